//! Attention, norm, gate and rotary embedding against references in f64, over random shapes, formats and instruction sets.

mod support;

use nics_kernels::attention::{Heads, Kept, PIECE, attend_with};
use nics_kernels::gate::silu_mul;
use nics_kernels::norm::rms_norm;
use nics_kernels::rotary::rotate;
use nics_kernels::{Isa, Kind, Pool, Values, ValuesMut};
use proptest::prelude::*;
use support::{KINDS, Owned, epsilon, random};

/// Softmax attention of one row in f64.
fn reference(
    heads: Heads,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    capacity: usize,
    from: usize,
    to: usize,
) -> Vec<f64> {
    let Heads { queries, keys, dim } = heads;
    let mut out = Vec::new();
    for h in 0..queries {
        let kv = h / (queries / keys);
        let row = |j: usize| (kv * capacity + j) * dim;
        let scores: Vec<f64> = (from..to)
            .map(|j| (0..dim).map(|c| f64::from(q[h * dim + c]) * f64::from(k[row(j) + c])).sum())
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let e: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = e.iter().sum();
        out.extend(
            (0..dim).map(|c| {
                e.iter().zip(from..to).map(|(e, j)| e * f64::from(v[row(j) + c])).sum::<f64>() / sum
            }),
        );
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn attention_equals_the_reference(
        keys in 1usize..4, group in 1usize..8, dim in prop::sample::select(vec![2usize, 6, 8, 16, 32, 48, 64, 80, 128]),
        lengths in prop::collection::vec((1usize..40, 0usize..9, any::<bool>()), 1..5),
        kind in 0usize..3, act in 0usize..3, sharp in 0.1f32..4.0, seed in any::<u64>(), threads in 1usize..4,
    ) {
        let heads = Heads { queries: keys * group, keys, dim };
        let (kind, act) = (KINDS[kind], KINDS[act]);
        let row = heads.queries * dim;
        let q: Vec<f32> = random(lengths.len() * row, seed).into_iter().map(|x| x * sharp).collect();
        // Some sequences span several pieces; some see a part of what is kept; each has room to spare.
        let spans: Vec<(usize, usize, usize)> = lengths.iter()
            .map(|&(n, from, long)| { let to = n + from + if long { PIECE * 2 } else { 0 }; (from, to, to + 5) }).collect();
        let stored: Vec<(Owned, Owned)> = spans.iter().enumerate().map(|(i, (.., capacity))| {
            let n = keys * capacity * dim;
            (Owned::new(kind, &random(n, seed ^ (i as u64 * 2 + 1))), Owned::new(kind, &random(n, seed ^ (i as u64 * 2 + 2))))
        }).collect();
        let kept: Vec<Kept> = stored.iter().zip(&spans)
            .map(|((k, v), &(from, to, capacity))| Kept { keys: k.values(), values: v.values(), capacity, from, to }).collect();
        for isa in Isa::available() {
            let mut out = Owned::new(act, &vec![f32::NAN; q.len()]);
            attend_with(isa, &Pool::new(threads).unwrap(), heads, &q, &kept, out.values_mut());
            let got = out.widened();
            for (s, ((k, v), &(from, to, capacity))) in stored.iter().zip(&spans).enumerate() {
                let expected = reference(heads, &q[s * row..][..row], &k.widened(), &v.widened(), capacity, from, to);
                for (i, (got, expected)) in got[s * row..].iter().zip(&expected).enumerate() {
                    let tolerance = 4e-6 + epsilon(act) * expected.abs();
                    prop_assert!((f64::from(*got) - expected).abs() <= tolerance, "{isa} sequence {s}, {i}: {got}, expected {expected}");
                }
                // Alone and with one thread: the same bits.
                let mut alone = vec![0f32; row];
                let mut together = vec![0f32; q.len()];
                attend_with(isa, &Pool::new(1).unwrap(), heads, &q[s * row..][..row], &kept[s..=s], ValuesMut::F32(&mut alone));
                attend_with(isa, &Pool::new(threads).unwrap(), heads, &q, &kept, ValuesMut::F32(&mut together));
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                prop_assert_eq!(bits(&alone), bits(&together[s * row..][..row]));
            }
        }
    }

    #[test]
    fn norm_equals_the_reference(rows in 1usize..5, n in 1usize..200, kind in 0usize..3, seed in any::<u64>()) {
        let kind = KINDS[kind];
        let (x, w) = (Owned::new(kind, &random(rows * n, seed)), Owned::new(kind, &random(n, seed ^ 1)));
        let mut y = Owned::new(kind, &vec![f32::NAN; rows * n]);
        rms_norm(x.values(), w.values(), 1e-5, y.values_mut());
        let (x, w, y) = (x.widened(), w.widened(), y.widened());
        for (x, y) in x.chunks(n).zip(y.chunks(n)) {
            let square = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n as f64;
            for i in 0..n {
                let expected = f64::from(x[i]) / (square + 1e-5).sqrt() * f64::from(w[i]);
                // Two roundings.
                let tolerance = (2.5 * epsilon(kind) + 1e-6) * expected.abs() + 1e-6;
                prop_assert!((f64::from(y[i]) - expected).abs() <= tolerance);
            }
        }
    }

    #[test]
    fn gates_equal_the_reference(n in 1usize..20_000, kind in 0usize..3, seed in any::<u64>(), threads in 1usize..3) {
        let kind = KINDS[kind];
        let spread: Vec<f32> = random(n, seed).into_iter().map(|x| x * 30.0).collect();
        let (gate, up) = (Owned::new(kind, &spread), Owned::new(kind, &random(n, seed ^ 1)));
        let mut y = Owned::new(kind, &vec![f32::NAN; n]);
        silu_mul(&Pool::new(threads).unwrap(), gate.values(), up.values(), y.values_mut());
        let smallest = if kind == Kind::F16 { 6e-8 } else { 1e-30 };
        for ((y, g), u) in y.widened().iter().zip(gate.widened()).zip(up.widened()) {
            let (g, u) = (f64::from(g), f64::from(u));
            let expected = g / (1.0 + (-g).exp()) * u;
            let tolerance = (2.0 * epsilon(kind) + 1e-6) * expected.abs() + smallest;
            prop_assert!((f64::from(*y) - expected).abs() <= tolerance, "{g} {u}: {y}, expected {expected}");
        }
    }

    #[test]
    fn rotation_equals_the_reference(heads in 1usize..4, half in 1usize..40, seed in any::<u64>(), scale in 0.1f32..2.0) {
        let d = 2 * half;
        let x = random(heads * d, seed);
        let angles = random(half, seed ^ 9);
        let cos: Vec<f32> = angles.iter().chain(&angles).map(|a| (a * 7.0).cos()).collect();
        let sin: Vec<f32> = angles.iter().chain(&angles).map(|a| (a * 7.0).sin()).collect();
        let mut y = vec![f32::NAN; heads * d];
        rotate(&x, &cos, &sin, scale, &mut y);
        for h in 0..heads {
            for i in 0..d {
                let other = if i < half { -x[h * d + i + half] } else { x[h * d + i - half] };
                let expected = (x[h * d + i] * cos[i] + other * sin[i]) * scale;
                prop_assert!((y[h * d + i] - expected).abs() < 1e-6);
            }
        }
    }
}

#[test]
#[should_panic(expected = "is seen")]
fn a_sequence_without_a_row_is_refused() {
    let heads = Heads { queries: 1, keys: 1, dim: 2 };
    let kept =
        Kept { keys: Values::F32(&[0.0; 4]), values: Values::F32(&[0.0; 4]), capacity: 2, from: 1, to: 1 };
    attend_with(
        Isa::Scalar,
        &Pool::new(1).unwrap(),
        heads,
        &[0.0; 2],
        &[kept],
        ValuesMut::F32(&mut [0.0; 2]),
    );
}

#[test]
fn formats_have_their_sizes() {
    assert_eq!(KINDS.map(Kind::size), [4, 2, 2]);
}

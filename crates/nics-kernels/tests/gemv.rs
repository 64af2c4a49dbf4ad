//! The products against a scalar reference in f64, over random shapes, formats, rows and instruction sets.

mod support;

use nics_kernels::gemv::{MAX_ROWS, Product, gemv_with};
use nics_kernels::{Isa, Kind, Pool, Values, ValuesMut};
use proptest::prelude::*;
use support::{KINDS, Owned, epsilon, random};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 200 }))]

    #[test]
    fn products_equal_the_reference(
        rows in 1..=MAX_ROWS, input in 1usize..300, outs in prop::collection::vec(1usize..70, 1..4),
        wide in any::<bool>(), weight in 0usize..3, other in 0usize..3, act in 0usize..3, bias in any::<bool>(), seed in any::<u64>(),
        threads in 1usize..4,
    ) {
        // Now and then one that takes several tasks.
        let input = if wide { input * 9 } else { input };
        let pool = Pool::new(threads).unwrap();
        let act = KINDS[act];
        let x = Owned::new(act, &random(rows * input, seed));
        let kinds: Vec<Kind> = (0..outs.len()).map(|i| KINDS[if i == 0 { weight } else { other }]).collect();
        let weights: Vec<Owned> = outs.iter().zip(&kinds).enumerate()
            .map(|(i, (out, kind))| Owned::new(*kind, &random(out * input, seed ^ (i as u64 + 1)))).collect();
        let biases: Vec<Owned> = outs.iter().map(|out| Owned::new(act, &random(*out, seed ^ 0x77))).collect();
        for isa in Isa::available() {
            let mut ys: Vec<Owned> = outs.iter().map(|out| Owned::new(act, &vec![f32::NAN; rows * out])).collect();
            let mut products: Vec<Product> = weights.iter().zip(&biases).zip(&mut ys)
                .map(|((w, b), y)| Product { weight: w.values(), bias: bias.then(|| b.values()), y: y.values_mut() }).collect();
            gemv_with(isa, &pool, x.values(), rows, &mut products);
            let xs = x.widened();
            for (((w, b), y), out) in weights.iter().zip(&biases).zip(&ys).zip(&outs) {
                let (w, b, y) = (w.widened(), b.widened(), y.widened());
                for r in 0..rows {
                    for o in 0..*out {
                        let terms = (0..input).map(|i| f64::from(xs[r * input + i]) * f64::from(w[o * input + i]));
                        let (sum, size) = terms.fold((0.0, 0.0), |(s, a), t| (s + t, a + t.abs()));
                        let expected = sum + if bias { f64::from(b[o]) } else { 0.0 };
                        let got = f64::from(y[r * out + o]);
                        let tolerance = 1e-6 * (size + 1.0) + epsilon(act) * expected.abs();
                        prop_assert!((got - expected).abs() <= tolerance, "{isa} row {r} output {o}: {got}, expected {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_is_the_same_in_every_batch_and_at_every_thread_count(
        rows in 2..=MAX_ROWS, input in 1usize..700, out in 1usize..200, kind in 0usize..3, seed in any::<u64>(),
    ) {
        let kind = KINDS[kind];
        let (x, w) = (Owned::new(kind, &random(rows * input, seed)), Owned::new(kind, &random(out * input, seed ^ 5)));
        for isa in Isa::available() {
            let run = |x: Values, rows: usize, threads: usize| {
                let mut y = vec![0f32; rows * out];
                let product = Product { weight: w.values(), bias: None, y: ValuesMut::F32(&mut y) };
                gemv_with(isa, &Pool::new(threads).unwrap(), x, rows, &mut [product]);
                y.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let all = run(x.values(), rows, 3);
            for r in 0..rows {
                let one = match &x {
                    Owned::F32(x) => run(Values::F32(&x[r * input..(r + 1) * input]), 1, 1),
                    Owned::Bf16(x) => run(Values::Bf16(&x[r * input..(r + 1) * input]), 1, 1),
                    Owned::F16(x) => run(Values::F16(&x[r * input..(r + 1) * input]), 1, 1),
                };
                prop_assert_eq!(&all[r * out..(r + 1) * out], &one[..]);
            }
        }
    }
}

#[test]
#[should_panic(expected = "the weight is not [3, 4]")]
fn a_wrong_shape_is_refused() {
    let mut y = [0f32; 3];
    let weight = Values::F32(&[0.0; 11]);
    let product = Product { weight, bias: None, y: ValuesMut::F32(&mut y) };
    gemv_with(Isa::Scalar, &Pool::new(1).unwrap(), Values::F32(&[0.0; 4]), 1, &mut [product]);
}

//! Products with packed weights: integers exactly, everything else to the bit among instruction sets, batches and threads,
//! and near a reference in double precision.

mod support;

use nics_kernels::packed::{Packed, PackedProduct, Rounding, TILE, packed_with};
use nics_kernels::{Isa, Kind, Pool, ValuesMut};
use proptest::prelude::*;
use support::{KINDS, Owned, random};

const ROUNDINGS: [Rounding; 3] = [Rounding::A8, Rounding::A16, Rounding::A8Row];

/// A matrix by a seed, with its codes, scales and zeros.
struct Matrix {
    packed: Packed,
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<u8>,
}

impl Matrix {
    fn new(bits: u32, out: usize, input: usize, group: usize, small: bool, seed: u64) -> Self {
        let most = ((1u32 << bits) - 1) as f32;
        let code = |x: &f32| ((x + 1.0) / 2.0 * most).round() as u8;
        let codes: Vec<u8> = random(out * input, seed).iter().map(code).collect();
        let n = out * input / group;
        // Numbers that half precision holds exactly, or that are too small for it.
        let base = if small { 2f32.powi(-20) } else { 2f32.powi(-9) };
        let scales: Vec<f32> = (0..n).map(|i| base * (1.0 + (i % 7) as f32 / 8.0)).collect();
        let zeros: Vec<u8> = random(n, seed ^ 0x55).iter().map(code).collect();
        let packed = Packed::new(bits, [out, input], group, &codes, &scales, &zeros).unwrap();
        Self { packed, codes, scales, zeros }
    }

    fn value(&self, o: usize, k: usize) -> f64 {
        let group = self.packed.group();
        let at = o * (self.packed.input() / group) + k / group;
        let q = f64::from(self.codes[o * self.packed.input() + k]);
        (q - f64::from(self.zeros[at])) * f64::from(self.scales[at])
    }
}

/// Shapes with odd rows and groups: bits, out, groups, group.
fn shape() -> impl Strategy<Value = (u32, usize, usize, usize)> {
    let bits = prop::sample::select(vec![2u32, 3, 4, 8]);
    let odd = (1usize..300).prop_map(|input| (1, input));
    let even = (1usize..5, prop::sample::select(vec![32usize, 64, 96, 128, 256]));
    (bits, 1usize..150, prop_oneof![odd, even])
        .prop_map(|(bits, out, (groups, group))| (bits, out, groups, group))
}

fn run(
    isa: Isa,
    threads: usize,
    m: &Matrix,
    x: &Owned,
    bias: Option<&Owned>,
    rounding: Rounding,
) -> Vec<f32> {
    let rows = x.values().len() / m.packed.input();
    let mut y = vec![f32::NAN; rows * m.packed.out()];
    let product =
        PackedProduct { weight: &m.packed, bias: bias.map(Owned::values), y: ValuesMut::F32(&mut y) };
    packed_with(isa, &Pool::new(threads).unwrap(), x.values(), rows, rounding, &mut [product]);
    y
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 150 }))]

    #[test]
    fn what_is_packed_comes_out_again((bits, out, groups, group) in shape(), small in any::<bool>(), seed in any::<u64>()) {
        let m = Matrix::new(bits, out, groups * group, group, small, seed);
        prop_assert_eq!(m.packed.codes(), m.codes.clone());
        prop_assert_eq!(m.packed.parameters(), (m.scales.clone(), m.zeros.clone()));
        let mut whole = vec![0f32; out * groups * group];
        m.packed.dequantize(0, &mut whole);
        for (i, found) in whole.iter().enumerate() {
            let expected = m.value(i / (groups * group), i % (groups * group));
            prop_assert_eq!(f64::from(*found).to_bits(), (expected + 0.0).to_bits());
        }
        let mut last = vec![0f32; groups * group];
        m.packed.dequantize(out - 1, &mut last);
        prop_assert_eq!(&last[..], &whole[(out - 1) * groups * group..]);
    }

    #[test]
    fn a_panel_is_what_weights_mean_rounded_once(
        (bits, out, groups, group) in shape(), small in any::<bool>(), threads in 1usize..4, seed in any::<u64>(),
    ) {
        let m = Matrix::new(bits, out, groups * group, group, small, seed);
        let (input, pool) = (groups * group, Pool::new(threads).unwrap());
        let from = out / 2 / TILE * TILE;
        let outputs = (out - from).div_ceil(2);
        let mut exact = vec![0f32; outputs * input];
        m.packed.dequantize(from, &mut exact);
        for isa in Isa::available() {
            for kind in KINDS {
                let mut panel = Owned::new(kind, &vec![0.5; exact.len()]);
                m.packed.dequantize_panel_with(isa, &pool, from, panel.values_mut());
                prop_assert_eq!(panel.widened(), Owned::new(kind, &exact).widened(), "{}", isa);
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits(
        (bits, out, groups, group) in shape(), rows in prop_oneof![1usize..30, Just(257)], which in 0usize..3,
        kind in 0usize..3, small in any::<bool>(), seed in any::<u64>(), threads in 1usize..4,
    ) {
        let input = groups * group;
        let (out, rows) = if rows == 257 { (out.min(20), rows) } else { (out, rows) };
        let m = Matrix::new(bits, out, input, group, small, seed);
        let x = Owned::new(KINDS[kind], &random(rows * input, seed ^ 3));
        let bias = Owned::new(KINDS[kind], &random(out, seed ^ 9));
        let expected = run(Isa::Scalar, 1, &m, &x, Some(&bias), ROUNDINGS[which]);
        for isa in Isa::available() {
            let found = run(isa, threads, &m, &x, Some(&bias), ROUNDINGS[which]);
            prop_assert!(found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa}");
            // A row alone, for any place in a batch.
            let row = seed as usize % rows;
            let alone = Owned::new(KINDS[kind], &x.widened()[row * input..][..input]);
            let alone = run(isa, 1, &m, &alone, Some(&bias), ROUNDINGS[which]);
            let same = alone.iter().zip(&expected[row * out..]).all(|(a, b)| a.to_bits() == b.to_bits());
            prop_assert!(same, "{isa}, row {row} of {rows} alone");
        }
    }

    #[test]
    fn products_are_near_those_in_double_precision(
        (bits, out, groups, group) in shape(), rows in 1usize..6, which in 0usize..3, seed in any::<u64>(),
    ) {
        let input = groups * group;
        let m = Matrix::new(bits, out, input, group, false, seed);
        let x = Owned::new(Kind::F32, &random(rows * input, seed ^ 3));
        let (y, xs) = (run(Isa::detect(), 2, &m, &x, None, ROUNDINGS[which]), x.widened());
        // Half a step of x in every term.
        let step = if ROUNDINGS[which] == Rounding::A16 { 0.5 / 32639.0 } else { 0.5 / 127.0 };
        for t in 0..rows {
            for o in 0..out {
                let x = &xs[t * input..][..input];
                let sum: f64 = x.iter().enumerate().map(|(k, x)| f64::from(*x) * m.value(o, k)).sum();
                let size: f64 = (0..input).map(|k| m.value(o, k).abs()).sum();
                let terms: f64 = x.iter().enumerate().map(|(k, x)| (f64::from(*x) * m.value(o, k)).abs()).sum();
                let allowed = 1.01 * step * size + 1e-5 * terms + 1e-6;
                let found = f64::from(y[t * out + o]);
                prop_assert!((found - sum).abs() <= allowed, "row {t} output {o}: {found}, expected {sum} within {allowed}");
            }
        }
    }

    #[test]
    fn results_have_the_format_that_is_asked_for(kind in 0usize..3, rows in 1usize..8, seed in any::<u64>()) {
        let m = [(3, 33, 128), (4, 20, 32), (8, 47, 384)].map(|(bits, out, group)| Matrix::new(bits, out, 384, group, false, seed));
        let x = Owned::new(KINDS[kind], &random(rows * 384, seed));
        let mut ys = m.each_ref().map(|m| Owned::new(KINDS[kind], &vec![f32::NAN; rows * m.packed.out()]));
        let mut products: Vec<PackedProduct> = m.iter().zip(&mut ys)
            .map(|(m, y)| PackedProduct { weight: &m.packed, bias: None, y: y.values_mut() }).collect();
        packed_with(Isa::detect(), &Pool::new(2).unwrap(), x.values(), rows, Rounding::A8, &mut products);
        for (m, y) in m.iter().zip(&ys) {
            let expected = run(Isa::Scalar, 1, m, &x, None, Rounding::A8);
            prop_assert_eq!(y.widened(), Owned::new(KINDS[kind], &expected).widened());
        }
    }
}

#[test]
fn what_is_no_number_shows_in_its_row_alone() {
    let m = Matrix::new(4, 40, 256, 128, false, 1);
    for (bad, rounding) in
        [(f32::NAN, Rounding::A8), (f32::INFINITY, Rounding::A16), (f32::NAN, Rounding::A8Row)]
    {
        let mut x = random(3 * 256, 2);
        x[256 + 7] = bad;
        for isa in Isa::available() {
            let y = run(isa, 1, &m, &Owned::F32(x.clone()), None, rounding);
            assert!(y[40..80].iter().all(|y| y.is_nan()), "{isa}");
            assert!(y[..40].iter().chain(&y[80..]).all(|y| y.is_finite()), "{isa}");
        }
    }
    // Zeros give the bias.
    let bias = Owned::F32(random(40, 3));
    let y = run(Isa::detect(), 1, &m, &Owned::F32(vec![0.0; 256]), Some(&bias), Rounding::A8);
    assert_eq!(y, bias.widened());
}

#[test]
fn what_cannot_be_packed_is_refused() {
    let new = |bits, shape, group, codes: &[u8], scales: &[f32], zeros: &[u8]| {
        Packed::new(bits, shape, group, codes, scales, zeros).unwrap_err().to_string()
    };
    let (codes, scales, zeros) = (vec![1u8; 64 * 2], vec![0.5f32; 4], vec![1u8; 4]);
    for (found, says) in [
        (new(5, [2, 64], 32, &codes, &scales, &zeros), "5 bits"),
        (new(3, [2, 63], 63, &codes, &scales[..2], &zeros[..2]), "128 codes"),
        (new(3, [2, 64], 16, &codes, &scales, &zeros), "groups of 16"),
        (new(3, [2, 64], 48, &codes, &scales, &zeros), "groups of 48"),
        (new(3, [2, 64], 32, &codes, &scales[..3], &zeros), "[3, 4] scales"),
        (new(3, [2, 64], 32, &[8; 128], &scales, &zeros), "code 8 of output 0 is above 7"),
        (new(3, [2, 64], 32, &codes, &scales, &[1, 1, 9, 1]), "zero 9 of output 1"),
        (new(3, [2, 64], 32, &codes, &[0.5, f32::NAN, 0.5, 0.5], &zeros), "scale NaN of output 0"),
        (new(3, [2, 64], 32, &codes, &[0.5, 0.5, 0.5, -0.5], &zeros), "scale -0.5 of output 1"),
    ] {
        assert!(found.contains(says), "{found:?} does not say {says:?}");
    }
}

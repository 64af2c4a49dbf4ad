//! Tiles of packed weights: codes laid out and read back; and the kernels over them, their source as C++ with every thread
//! run, against products of the same numbers in double precision.

use half::{bf16, f16};
use nics_cuda::packed::{
    Addresses, Kind, Launch, Layout, ROWS, SOURCE, Scales, Tiles, dequantize, names, product,
};
use nics_cuda::{Arch, Emulated, LOCATION, Nvrtc, Source};
use proptest::prelude::*;

/// Numbers of a seed, from 0 to 1.
fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 24) as f32
        })
        .collect()
}

/// Codes, scales and zeros. Scales of `fine` have more bits than half precision.
fn made(layout: &Layout, fine: bool, seed: u64) -> (Vec<u8>, Vec<f32>, Vec<u8>) {
    let levels = (1u32 << layout.bits) as f32;
    let parameters = layout.out * layout.groups();
    let whole =
        |n: usize, seed: u64| -> Vec<u8> { random(n, seed).iter().map(|x| (x * levels) as u8).collect() };
    let scale = |x: &f32| if fine { 0.01 + 0.02 * x } else { f16::from_f32(0.01 + 0.02 * x).to_f32() };
    let scales = random(parameters, seed ^ 3).iter().map(scale).collect();
    (whole(layout.out * layout.input, seed), scales, whole(parameters, seed ^ 5))
}

fn layouts() -> impl Strategy<Value = Layout> {
    let group = prop::sample::select(vec![0usize, 32, 64, 96, 128, 256]);
    (prop::sample::select(vec![2u32, 3, 4, 8]), 1usize..80, group, 1usize..60, 1usize..4).prop_map(
        |(bits, out, group, eighths, groups)| match group {
            0 => Layout { bits, out, input: eighths * 8, group: eighths * 8 },
            _ => Layout { bits, out, input: group * groups, group },
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn tiles_are_read_back(layout in layouts(), fine in any::<bool>(), seed in any::<u64>()) {
        let (codes, scales, zeros) = made(&layout, fine, seed);
        let tiles = Tiles::pack(layout, &codes, &scales, &zeros).unwrap();
        prop_assert!(tiles.codes() == codes);
        prop_assert_eq!(tiles.parameters(), (scales, zeros));
        prop_assert_eq!(matches!(tiles.scales(), Scales::F32(_)), fine);
        // Nothing but what fills up tiles and blocks is added.
        let filled = layout.out.div_ceil(32) * 32 * layout.input.div_ceil(128) * 128;
        prop_assert_eq!(tiles.words().len() * 32, filled * layout.bits as usize);
    }
}

#[test]
fn a_lane_of_a_block_has_vectors_of_16_bytes() {
    // Output 0, channels 0 and 1 are the first pair of lane 0; output 8 has the second pair, channels 8 are lane 1's.
    let layout = Layout { bits: 4, out: 32, input: 128, group: 128 };
    let mut codes = vec![0u8; 32 * 128];
    (codes[0], codes[1], codes[8 * 128], codes[8], codes[32]) = (1, 2, 3, 4, 5);
    let tiles = Tiles::pack(layout, &codes, &[1.0; 32], &[0; 32]).unwrap();
    let words = tiles.words();
    assert_eq!(words[0], 0x0002_0031);
    assert_eq!(words[4], 4); // lane 1, column 0
    assert_eq!(words[1], 5); // lane 0, column 1
    assert_eq!(words.iter().filter(|w| **w != 0).count(), 3);
}

#[test]
fn matrices_that_kernels_do_not_take_are_told() {
    let good = Layout { bits: 4, out: 3, input: 256, group: 128 };
    good.check().unwrap();
    for (layout, says) in [
        (Layout { bits: 5, ..good }, "5 bits, expected 2, 3, 4 or 8"),
        (Layout { out: 0, ..good }, "[0, 256] is empty"),
        (Layout { input: 100, group: 100, ..good }, "100 channels, expected a multiple of 8"),
        (Layout { group: 16, ..good }, "groups of 16 of 256 channels"),
        (Layout { group: 96, ..good }, "groups of 96 of 256 channels"),
        (Layout { group: 0, ..good }, "groups of 0 of 256 channels"),
    ] {
        let e = layout.check().unwrap_err().to_string();
        assert!(e.starts_with("no kernel takes this matrix: ") && e.contains(says), "{e}");
    }
    let codes = vec![3u8; 3 * 256];
    let e = Tiles::pack(good, &codes, &[1.0; 6], &[0; 5]).unwrap_err().to_string();
    assert!(e.contains("6 scales and 5 zeros, expected 768, 6 and 6"), "{e}");
    let e = Tiles::pack(Layout { bits: 2, ..good }, &codes, &[1.0; 6], &[4; 6]).unwrap_err().to_string();
    assert!(e.contains("a code or zero of 4, expected at most 3"), "{e}");
}

/// A matrix in memory where launches find it, with what it means.
struct Made {
    tiles: Tiles,
    /// `[out, input]`.
    meant: Vec<f64>,
}

impl Made {
    fn new(layout: Layout, fine: bool, seed: u64) -> Self {
        let (codes, scales, zeros) = made(&layout, fine, seed);
        let tiles = Tiles::pack(layout, &codes, &scales, &zeros).unwrap();
        let group = |i: usize| i / layout.input * layout.groups() + i % layout.input / layout.group;
        let meant =
            |(i, q): (usize, &u8)| (f64::from(*q) - f64::from(zeros[group(i)])) * f64::from(scales[group(i)]);
        Self { tiles, meant: codes.iter().enumerate().map(meant).collect() }
    }

    fn kind(&self, half: bool) -> Kind {
        let bits = if matches!(self.tiles.scales(), Scales::F16(_)) { 16 } else { 32 };
        Kind::of(&self.tiles.layout(), bits, half)
    }
}

/// A copy whose words lie at multiples of 16 bytes, as on a device.
fn aligned(bytes: &[u8]) -> Vec<u128> {
    let whole = |x: &[u8]| {
        let mut word = [0u8; 16];
        word[..x.len()].copy_from_slice(x);
        u128::from_le_bytes(word)
    };
    bytes.chunks(16).map(whole).collect()
}

fn bytes_of<T: Copy, const N: usize>(x: &[T], to: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    x.iter().flat_map(|x| to(*x)).collect()
}

/// Runs a launch over a matrix whose copy lives as long as it takes.
fn run(kernels: &Emulated, made: &Made, launch: impl FnOnce(Addresses) -> Launch) {
    let codes = aligned(&bytes_of(made.tiles.words(), u32::to_le_bytes));
    let scales = match made.tiles.scales() {
        Scales::F16(s) => aligned(&bytes_of(s, f16::to_le_bytes)),
        Scales::F32(s) => aligned(&bytes_of(s, f32::to_le_bytes)),
    };
    let zeros = aligned(made.tiles.zeros());
    let address = |x: &[u128]| x.as_ptr() as u64;
    let launch =
        launch(Addresses { codes: address(&codes), scales: address(&scales), zeros: address(&zeros) });
    // SAFETY: everything has the size of the layout, and lives until the kernel has run.
    unsafe { kernels.launch(launch.kernel, launch.grid, &launch.arguments) };
}

fn narrow(x: f32, half: bool) -> u16 {
    if half { f16::from_f32(x).to_bits() } else { bf16::from_f32(x).to_bits() }
}

fn wide(x: u16, half: bool) -> f32 {
    if half { f16::from_bits(x).to_f32() } else { bf16::from_bits(x).to_f32() }
}

/// The kernels of a kind, over matrices of it and numbers of rows.
fn hold(half: bool, matrices: &[(Layout, bool)], rows: &[usize]) {
    let all: Vec<Made> =
        matrices.iter().zip(1..).map(|((layout, fine), seed)| Made::new(*layout, *fine, seed)).collect();
    let kind = all[0].kind(half);
    let kernels =
        Emulated::compile(&Source { name: "packed", text: SOURCE, defines: &kind.defines() }, &names());
    for made in &all {
        let layout = made.tiles.layout();
        assert_eq!(made.kind(half), kind, "{layout:?} is of another kind");
        for &rows in rows {
            // From -1 to 1, and one large value, which half precision could not sum many times.
            let mut x: Vec<u16> =
                random(rows * layout.input, 7).iter().map(|x| narrow(2.0 * x - 1.0, half)).collect();
            x[layout.input / 2] = narrow(if half { 6e4 } else { 1e6 }, half);
            let bias: Vec<u16> = random(layout.out, 11).iter().map(|x| narrow(*x, half)).collect();
            let nothing = narrow(f32::NAN, half);
            let (own_x, mut y) =
                (aligned(&bytes_of(&x, u16::to_le_bytes)), vec![nothing; rows * layout.out + 1]);
            let with_bias = rows % 2 == 1;
            let b = if with_bias { bias.as_ptr() as u64 } else { 0 };
            run(&kernels, made, |w| {
                product(&layout, w, [y.as_mut_ptr() as u64, own_x.as_ptr() as u64, b], rows)
            });
            assert_eq!(y.pop(), Some(nothing), "something was written behind the results");
            for (i, &got) in y.iter().enumerate() {
                let (row, output) = (i / layout.out, i % layout.out);
                let x = &x[row * layout.input..][..layout.input];
                let w = &made.meant[output * layout.input..][..layout.input];
                let (mut sum, mut size) = (0f64, 0f64);
                for (x, w) in x.iter().zip(w) {
                    let term = f64::from(wide(*x, half)) * w;
                    (sum, size) = (sum + term, size + term.abs());
                }
                let sum = sum + if with_bias { f64::from(wide(bias[output], half)) } else { 0.0 };
                let got = f64::from(wide(got, half));
                // One rounding of 11 or 8 bits, and sums in float32.
                let step = if half { 0.5f64.powi(11) } else { 0.5f64.powi(8) };
                let within = sum.abs() * step + size * 1e-6 + 1e-7;
                let infinite = half && sum.abs() >= 65504.0;
                assert!(
                    infinite || (got - sum).abs() <= within,
                    "{layout:?}, output {output}, row {row} of {rows}: {got}, not {sum}, size {size}"
                );
            }
        }
        let mut to = aligned(&vec![0xff; layout.out * layout.input * 2]);
        run(&kernels, made, |w| dequantize(&layout, w, to.as_mut_ptr() as u64));
        let got = to.iter().flat_map(|x| x.to_le_bytes().as_chunks::<2>().0.to_vec());
        for (i, (got, meant)) in got.map(u16::from_le_bytes).zip(&made.meant).enumerate() {
            // Exact in float32, but for scales that have all its bits.
            assert_eq!(got, narrow(*meant as f32, half), "{layout:?}: weight {i}");
        }
    }
}

/// Every number of rows that a launch of eight serves, and some of each other one and of several.
const FEW: [usize; 8] = [1, 2, 3, 4, 5, 6, 7, 8];
const MORE: [usize; 5] = [9, 16, 31, 50, ROWS + 3];

fn layout(bits: u32, out: usize, input: usize, group: usize) -> Layout {
    Layout { bits, out, input, group }
}

#[test]
fn three_bits_in_groups_of_128() {
    let matrices = [layout(3, 45, 640, 128), layout(3, 32, 256, 128), layout(3, 1, 256, 128)];
    hold(false, &matrices.map(|l| (l, false)), &FEW);
    hold(true, &matrices.map(|l| (l, false)), &FEW);
}

#[test]
fn four_bits_in_groups_of_128() {
    let matrices = [layout(4, 45, 640, 128), layout(4, 64, 256, 128), layout(4, 33, 4352, 128)];
    hold(false, &matrices.map(|l| (l, false)), &FEW);
    hold(true, &matrices.map(|l| (l, false)), &FEW);
}

#[test]
fn more_rows_in_one_launch() {
    hold(false, &[(layout(4, 41, 384, 128), false)], &MORE);
    hold(true, &[(layout(3, 41, 384, 128), false)], &MORE);
}

#[test]
fn other_widths_groups_and_scales() {
    hold(false, &[(layout(2, 40, 192, 64), false), (layout(2, 7, 128, 64), false)], &[1, 8]);
    hold(true, &[(layout(2, 40, 288, 96), false)], &[1, 8]);
    hold(true, &[(layout(8, 35, 160, 32), false)], &[1, 8]);
    hold(false, &[(layout(8, 35, 512, 256), true)], &[1, 8]);
    // One scale an output: blocks end within the row.
    hold(false, &[(layout(3, 35, 200, 200), false), (layout(3, 35, 8, 8), false)], &[1, 3]);
    hold(true, &[(layout(4, 35, 160, 32), true)], &[2, 5]);
}

#[test]
fn the_kernels_compile_with_nvrtc() {
    let nvrtc = match Nvrtc::open() {
        Ok(found) => found,
        Err(e) if std::env::var_os(LOCATION).is_none() => {
            eprintln!("not tested, but by `cargo xtask check`: {e}");
            return;
        }
        Err(e) => panic!("{LOCATION} is set, but {e}"),
    };
    for (bits, group, scales, half, major) in [
        (3, 128, 16, false, 8),
        (3, 128, 16, true, 9),
        (4, 128, 16, false, 9),
        (4, 64, 32, true, 8),
        (2, 0, 16, false, 9),
        (8, 32, 16, false, 8),
        (8, 128, 32, true, 10),
    ] {
        let kind = Kind { bits, group, scales, half };
        let source = Source { name: "packed", text: SOURCE, defines: &kind.defines() };
        let code = nvrtc.compile(&source, Arch { major, minor: 0 }).unwrap();
        assert!(code.starts_with(b"\x7fELF"));
    }
}

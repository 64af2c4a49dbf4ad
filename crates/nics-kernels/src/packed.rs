//! `y = x Wᵀ + b` where `W` is kept in 2, 3, 4 or 8 bits and `x` is rounded to integers.
//!
//! A [`Packed`] matrix lies in memory in the order in which it is read, 16 outputs side by side, so that products need no
//! sum across a vector: each 32-bit lane is an output. `x` is rounded once for all matrices of a call ([`Rounding`]). With
//! a few rows the limit is the bandwidth of memory: 3.19 bits a weight at 3 bits in groups of 128.
//!
//! Products of up to 128 channels are summed as integers, which no instruction set does differently; the sums of those are
//! added in float32 in the order of the channels. So a result is the same to the bit with every instruction set, in every
//! batch and on every number of threads.

/// Runs `$body` for each quad of a unit, with its number as a constant.
#[cfg(target_arch = "x86_64")]
macro_rules! each_quad {
    ($j:ident => $body:block) => {
        each_quad!(@ $j $body 0 1 2 3 4 5 6 7);
    };
    (@ $j:ident $body:block $($n:literal)*) => {
        $({
            const $j: usize = $n;
            $body
        })*
    };
}

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod dequantize;
mod matrix;
mod scalar;

pub use activations::Rounding;
pub use matrix::{CHUNK, PackError, Packed, TILE, UNIT};

use std::sync::OnceLock;

use half::{bf16, f16};

use crate::element::{Element, Values, ValuesMut};
use crate::isa::Isa;
use crate::pool::Pool;
use activations::Activations;

/// Tiles of a task.
const TILES: usize = 8;
/// Rows whose sums are kept at a time, of whatever blocks: 15 KiB a tile.
const ROWS: usize = 240;

/// One matrix of a call.
#[derive(Debug)]
pub struct PackedProduct<'a> {
    /// `[out, in]`.
    pub weight: &'a Packed,
    /// `[out]`.
    pub bias: Option<Values<'a>>,
    /// `[rows, out]`.
    pub y: ValuesMut<'a>,
}

#[derive(Clone, Copy)]
enum Pointer {
    F32(*mut f32),
    Bf16(*mut bf16),
    F16(*mut f16),
}

struct Target<'a> {
    weight: &'a Packed,
    bias: Option<Values<'a>>,
    y: Pointer,
}

// SAFETY: tasks write disjoint outputs, and the slices behind the pointers are borrowed for the whole call.
unsafe impl Sync for Target<'_> {}

/// Several products of the same `x` (`[rows, in]`) in one go, with the best instructions there are. Matrices whose chunks
/// differ (groups below 128 beside others) round `x` once for each kind.
///
/// # Panics
/// When a length does not fit, or there are no rows.
pub fn packed(pool: &Pool, x: Values, rows: usize, rounding: Rounding, products: &mut [PackedProduct]) {
    packed_with(Isa::detect(), pool, x, rows, rounding, products);
}

/// Whether there are the integer products of AVX-512; without them its processors take the AVX2 kernels.
fn has_vnni() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        static FOUND: OnceLock<bool> = OnceLock::new();
        *FOUND.get_or_init(|| is_x86_feature_detected!("avx512vnni"))
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// [`packed`] with chosen instructions.
///
/// # Panics
/// As [`packed`], and when the processor lacks the instructions.
pub fn packed_with(
    isa: Isa,
    pool: &Pool,
    x: Values,
    rows: usize,
    rounding: Rounding,
    products: &mut [PackedProduct],
) {
    isa.assert_available();
    let isa = if isa == Isa::Avx512 && !has_vnni() { Isa::Avx2 } else { isa };
    assert!(rows > 0 && x.len().is_multiple_of(rows), "{} values are not {rows} rows", x.len());
    let input = x.len() / rows;
    let targets: Vec<Target> = products
        .iter_mut()
        .map(|p| {
            let (out, own) = (p.weight.out(), p.weight.input());
            assert_eq!(own, input, "the matrix takes {own} channels, x has {input}");
            assert_eq!(p.y.len(), rows * out, "results are not [{rows}, {out}]");
            assert!(p.bias.is_none_or(|b| b.len() == out), "the bias is not [{out}]");
            let y = match &mut p.y {
                ValuesMut::F32(y) => Pointer::F32(y.as_mut_ptr()),
                ValuesMut::Bf16(y) => Pointer::Bf16(y.as_mut_ptr()),
                ValuesMut::F16(y) => Pointer::F16(y.as_mut_ptr()),
            };
            Target { weight: p.weight, bias: p.bias, y }
        })
        .collect();
    let mut chunks: Vec<usize> = targets.iter().map(|t| t.weight.chunk()).collect();
    chunks.sort_unstable();
    chunks.dedup();
    for chunk in chunks {
        let tasks: Vec<(&Target, usize)> = targets
            .iter()
            .filter(|t| t.weight.chunk() == chunk)
            .flat_map(|t| (0..t.weight.tiles()).step_by(TILES).map(move |first| (t, first)))
            .collect();
        activations::with(isa, x, rows, chunk, rounding, |x| {
            pool.run(tasks.len(), &|task| {
                let (target, first) = tasks[task];
                let end = (first + TILES).min(target.weight.tiles());
                let most = ROWS / x.block() * x.block();
                let mut sums = vec![[0f32; TILE]; most.min(rows)];
                for row in (0..rows).step_by(most) {
                    let n = most.min(rows - row);
                    for tile in first..end {
                        one(isa, rounding.is_wide(), target, tile, x, row, &mut sums[..n]);
                    }
                }
            });
        });
    }
}

/// A tile's outputs of rows `first ..`, as many as there is room for in `sums`.
fn one(
    isa: Isa,
    wide: bool,
    target: &Target,
    tile: usize,
    x: &Activations,
    first: usize,
    sums: &mut [[f32; TILE]],
) {
    let weights = target.weight.tile(tile);
    macro_rules! with_bits {
        ($($bits:literal),*) => {
            match (isa, target.weight.bits()) {
                $(
                    (Isa::Scalar, $bits) => scalar::tile::<$bits>(weights, x, first, sums),
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: the processor has the instructions, as was asserted.
                    (Isa::Avx2, $bits) => unsafe {
                        if wide {
                            avx2::tile::<$bits, true>(weights, x, first, sums);
                        } else {
                            avx2::tile::<$bits, false>(weights, x, first, sums);
                        }
                    },
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: as above, with VNNI.
                    (Isa::Avx512, $bits) => unsafe {
                        if wide {
                            avx512::tile::<$bits, true>(weights, x, first, sums);
                        } else {
                            avx512::tile::<$bits, false>(weights, x, first, sums);
                        }
                    },
                )*
                _ => unreachable!("a matrix has 2, 3, 4 or 8 bits, and the instructions were asserted"),
            }
        };
    }
    with_bits!(2, 3, 4, 8);
    store(target, tile, first, sums);
}

/// Adds the bias and writes results in their format.
fn store(target: &Target, tile: usize, first: usize, sums: &mut [[f32; TILE]]) {
    let out = target.weight.out();
    let from = tile * TILE;
    let n = TILE.min(out - from);
    if let Some(bias) = target.bias {
        let mut own = [0f32; TILE];
        match bias {
            Values::F32(b) => Values::F32(&b[from..from + n]).widen(&mut own),
            Values::Bf16(b) => Values::Bf16(&b[from..from + n]).widen(&mut own),
            Values::F16(b) => Values::F16(&b[from..from + n]).widen(&mut own),
        }
        for sums in &mut *sums {
            sums.iter_mut().zip(&own).for_each(|(y, b)| *y += b);
        }
    }
    for (t, sums) in sums.iter().enumerate() {
        let at = (first + t) * out + from;
        let sums = &sums[..n];
        // SAFETY: the results are [rows, out], and this task alone writes the outputs of its tiles.
        unsafe {
            match target.y {
                Pointer::F32(y) => write(y.add(at), sums),
                Pointer::Bf16(y) => write(y.add(at), sums),
                Pointer::F16(y) => write(y.add(at), sums),
            }
        }
    }
}

/// Writes values in their format.
///
/// # Safety
/// There is room for them, and nobody else writes there.
unsafe fn write<T: Element>(to: *mut T, values: &[f32]) {
    for (i, y) in values.iter().enumerate() {
        // SAFETY: the caller's.
        unsafe { to.add(i).write(T::from_f32(*y)) };
    }
}

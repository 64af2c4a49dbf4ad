//! Activations as integers: once a call, for all matrices that they are multiplied with.

use std::cell::RefCell;

use super::matrix::UNIT;
use crate::each_kind;
use crate::element::{Element, Values};
use crate::isa::Isa;

/// How activations are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// 8 bits, a scale for every chunk of channels that share a weight scale (up to 128): `max |x| / 127`.
    A8,
    /// 16 bits, likewise: `max |x| / 32639`, so that both bytes are signed ones. Relative errors of 1e-5: for weights alone to be quantized.
    A16,
    /// 8 bits, a scale for every row: `max(max |x|, 1e-5) / 127`, as methods that quantize activations have it.
    A8Row,
}

impl Rounding {
    /// Whether a value takes two bytes.
    pub(super) fn is_wide(self) -> bool {
        self == Self::A16
    }
}

/// A line of the cache.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Rows of integers in blocks of a few, `[block, quad, row of the block, channel of the quad]`, so that a kernel finds the
/// rows of a block beside each other; the last block is filled up with rows of 0.
#[derive(Debug, Default)]
pub(super) struct Activations {
    values: Vec<Line>,
    /// Of each chunk of each row.
    scales: Vec<f32>,
    /// The sum of a chunk's integers.
    sums: Vec<i32>,
    /// Rows of a block.
    block: usize,
    /// Bytes of a block.
    size: usize,
    chunks: usize,
    order: Order,
    /// A row on its way.
    floats: Vec<f32>,
    bytes: Vec<u8>,
}

/// How the integers of a quad lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Order {
    /// A byte each.
    #[default]
    Bytes,
    /// Two bytes each in the order 0, 2, 1, 3: the products of even and odd bytes of weights are summed apart.
    Words,
    /// The low bytes of all, then their high bytes, both signed: the value is `256 high + low`.
    Halves,
}

impl Order {
    /// As the kernels of an instruction set take it.
    fn of(isa: Isa, rounding: Rounding) -> Self {
        match (rounding.is_wide(), isa) {
            (false, _) => Self::Bytes,
            (true, Isa::Avx512) => Self::Halves,
            (true, _) => Self::Words,
        }
    }
}

/// The largest integer of 16 bits whose halves are signed bytes.
const WIDEST: f32 = 32639.0;

/// The most rows of a block.
pub(super) const MOST: usize = 12;

/// Rows of a block: as few blocks as can be, as even as can be, and of a number that there are kernels for.
fn block(rows: usize) -> usize {
    match rows.div_ceil(rows.div_ceil(MOST)) {
        few @ ..=4 => few,
        more => more.next_multiple_of(2),
    }
}

thread_local! {
    static OWN: RefCell<Activations> = RefCell::default();
}

/// Runs `work` with the activations `[rows, input]` in chunks of `chunk` units, in memory that the thread keeps.
pub(super) fn with<R>(
    isa: Isa,
    x: Values,
    rows: usize,
    chunk: usize,
    rounding: Rounding,
    work: impl FnOnce(&Activations) -> R,
) -> R {
    OWN.with(|own| {
        // A call inside a task of another has its own.
        let mut taken = own.take();
        taken.order = Order::of(isa, rounding);
        each_kind!(x, Values, x => match isa {
            Isa::Scalar => taken.fill(x, rows, chunk, rounding),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: whoever has AVX-512 has AVX2, and the caller has asserted that the processor has it.
            _ => unsafe { fill_avx2(&mut taken, x, rows, chunk, rounding) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("asserted by the caller"),
        });
        let result = work(&taken);
        own.replace(taken);
        result
    })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
unsafe fn fill_avx2<T: Element>(
    to: &mut Activations,
    x: &[T],
    rows: usize,
    chunk: usize,
    rounding: Rounding,
) {
    to.fill(x, rows, chunk, rounding);
}

impl Activations {
    #[inline(always)]
    fn fill<T: Element>(&mut self, x: &[T], rows: usize, chunk: usize, rounding: Rounding) {
        let input = x.len() / rows;
        let units = input.div_ceil(UNIT);
        self.chunks = units.div_ceil(chunk);
        self.block = block(rows);
        let quad = if rounding.is_wide() { 8 } else { 4 };
        let row = units * UNIT / 4 * quad;
        self.size = (row * self.block).next_multiple_of(64);
        self.values.clear();
        self.values.resize(rows.div_ceil(self.block) * self.size / 64, Line([0; 64]));
        self.scales.clear();
        self.sums.clear();
        self.floats.resize(input, 0.0);
        self.bytes.clear();
        self.bytes.resize(row, 0);
        // SAFETY: a line is its bytes and nothing else.
        let values = unsafe {
            std::slice::from_raw_parts_mut(self.values.as_mut_ptr().cast::<u8>(), self.values.len() * 64)
        };
        for (r, x) in x.chunks_exact(input).enumerate() {
            self.floats.iter_mut().zip(x).for_each(|(to, x)| *to = x.to_f32());
            let whole = (rounding == Rounding::A8Row).then(|| largest(&self.floats).max(1e-5) / 127.0);
            let step = chunk * UNIT / 4 * quad;
            for (x, to) in self.floats.chunks(chunk * UNIT).zip(self.bytes.chunks_mut(step)) {
                let (scale, sum) = match self.order {
                    Order::Bytes => to_i8(x, to, whole.unwrap_or_else(|| largest(x) / 127.0)),
                    Order::Words => to_i16::<false>(x, to),
                    Order::Halves => to_i16::<true>(x, to),
                };
                self.scales.push(scale);
                self.sums.push(sum);
            }
            let own = &mut values[r / self.block * self.size..][..row * self.block];
            match (self.block, quad) {
                (1, _) => own.copy_from_slice(&self.bytes),
                (block, 4) => spread::<4>(&self.bytes, own, r % block, block),
                (block, _) => spread::<8>(&self.bytes, own, r % block, block),
            }
        }
    }

    /// Rows of a block.
    pub(super) fn block(&self) -> usize {
        self.block
    }

    /// Blocks.
    pub(super) fn blocks(&self) -> usize {
        self.values.len() * 64 / self.size
    }

    /// The integers of block `block`.
    #[inline(always)]
    pub(super) fn of_block(&self, block: usize) -> *const u8 {
        self.values.as_ptr().cast::<u8>().wrapping_add(block * self.size)
    }

    /// Scale and sum of a chunk of a row; 0 of rows that fill up a block.
    #[inline(always)]
    pub(super) fn of(&self, row: usize, chunk: usize) -> (f32, i32) {
        let at = row * self.chunks + chunk;
        (self.scales.get(at).copied().unwrap_or(0.0), self.sums.get(at).copied().unwrap_or(0))
    }

    /// The integer of channel `k` of a row.
    #[inline(always)]
    pub(super) fn get(&self, row: usize, k: usize) -> i32 {
        let quad = k / 4 * self.block + row % self.block;
        let from = row / self.block * self.size;
        let byte = |at: usize| self.values[(from + at) / 64].0[(from + at) % 64];
        match self.order {
            Order::Bytes => i32::from(byte(4 * quad + k % 4).cast_signed()),
            Order::Words => {
                let at = 8 * quad + 2 * [0, 2, 1, 3][k % 4];
                i32::from(i16::from_le_bytes([byte(at), byte(at + 1)]))
            }
            Order::Halves => {
                let [low, high] = [0, 4].map(|half| i32::from(byte(8 * quad + half + k % 4).cast_signed()));
                256 * high + low
            }
        }
    }
}

/// Copies quads of `N` bytes to every `step`th place, from place `first` on.
#[inline(always)]
fn spread<const N: usize>(quads: &[u8], to: &mut [u8], first: usize, step: usize) {
    let (quads, to) = (quads.as_chunks::<N>().0, to.as_chunks_mut::<N>().0);
    for (to, quad) in to.iter_mut().skip(first).step_by(step).zip(quads) {
        *to = *quad;
    }
}

/// Word `i` of what lies at `x`.
///
/// # Safety
/// There are 4 bytes.
#[inline(always)]
pub(super) unsafe fn word(x: *const u8, i: usize) -> i32 {
    // SAFETY: the caller's.
    i32::from_le_bytes(unsafe { x.add(4 * i).cast::<[u8; 4]>().read() })
}

/// The largest absolute value; what is no number counts as infinite, so that it shows in the results.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    // Sixteen maxima side by side become vector code.
    let mut most = [0f32; 16];
    let mut broken = false;
    for part in x.chunks(16) {
        for (most, x) in most.iter_mut().zip(part) {
            *most = most.max(x.abs());
            broken |= x.is_nan();
        }
    }
    if broken { f32::INFINITY } else { most.into_iter().fold(0.0, f32::max) }
}

/// Adding it leaves the nearest integer, ties to even, in the low bits of a float32 of at most 22 bits.
const MAGIC: f32 = 12_582_912.0;

/// The nearest integer of a value of at most 22 bits, as vector code has it.
#[inline(always)]
fn round(x: f32) -> i32 {
    (x + MAGIC).to_bits().cast_signed().wrapping_sub(MAGIC.to_bits().cast_signed())
}

/// Scale and sum of what cannot be rounded: nothing but zeros, or no numbers, which every product then is none either.
#[inline(always)]
fn without_values(scale: f32) -> Option<(f32, i32)> {
    (scale == 0.0 || !scale.is_finite()).then_some((if scale == 0.0 { 0.0 } else { f32::NAN }, 0))
}

#[inline(always)]
fn to_i8(x: &[f32], to: &mut [u8], scale: f32) -> (f32, i32) {
    if let Some(nothing) = without_values(scale) {
        to.fill(0);
        return nothing;
    }
    let mut sum = 0;
    for (x, to) in x.iter().zip(to) {
        let q = round((x / scale).clamp(-128.0, 127.0));
        sum += q;
        *to = (q as i8).cast_unsigned();
    }
    (scale, sum)
}

#[inline(always)]
fn to_i16<const HALVES: bool>(x: &[f32], to: &mut [u8]) -> (f32, i32) {
    let scale = largest(x) / WIDEST;
    if let Some(nothing) = without_values(scale) {
        to.fill(0);
        return nothing;
    }
    let mut sum = 0;
    for (x, to) in x.chunks(4).zip(to.chunks_exact_mut(8)) {
        let mut quad = [0i32; 4];
        for (x, q) in x.iter().zip(&mut quad) {
            *q = round((x / scale).clamp(-WIDEST, WIDEST));
            sum += *q;
        }
        if HALVES {
            for (i, q) in quad.into_iter().enumerate() {
                let low = q as i8;
                to[i] = low.cast_unsigned();
                to[4 + i] = ((q - i32::from(low)) >> 8) as u8;
            }
        } else {
            for (q, to) in [quad[0], quad[2], quad[1], quad[3]].into_iter().zip(to.chunks_exact_mut(2)) {
                to.copy_from_slice(&(q as i16).to_le_bytes());
            }
        }
    }
    (scale, sum)
}

//! AVX2: a vector of the stream is two halves of 8 outputs.

#[allow(clippy::wildcard_imports)] // Intrinsics carry their family in their names.
use std::arch::x86_64::*;

use super::activations::{Activations, word};
use super::matrix::{CHUNK, QUADS, TILE, Tile, TileScales, UNIT, Vector};

/// Rows up to which weights are decoded anew for every two.
const FEW: usize = 2;
/// Rows that share a decoded weight's register.
const BLOCK: usize = 4;
/// Bytes by which the stream is prefetched.
const AHEAD: usize = 4 << 10;

/// The codes of quad `j` of a unit, a byte each, for outputs `8 half ..`.
#[inline(always)]
unsafe fn quad<const BITS: u32>(unit: *const Vector, half: usize, j: usize) -> __m256i {
    // SAFETY: the caller's function has AVX2, and the unit `BITS` vectors.
    unsafe {
        let vector = |i: usize| _mm256_load_si256(unit.add(i).cast::<__m256i>().add(half));
        match BITS {
            2 | 3 => {
                let low = vector(j / 4);
                let low = match j % 4 {
                    0 => low,
                    1 => _mm256_srli_epi16::<2>(low),
                    2 => _mm256_srli_epi16::<4>(low),
                    _ => _mm256_srli_epi16::<6>(low),
                };
                let low = _mm256_and_si256(low, _mm256_set1_epi8(3));
                if BITS == 2 {
                    return low;
                }
                let high = vector(2);
                let high = match j {
                    0 => _mm256_slli_epi16::<2>(high),
                    1 => _mm256_slli_epi16::<1>(high),
                    2 => high,
                    3 => _mm256_srli_epi16::<1>(high),
                    4 => _mm256_srli_epi16::<2>(high),
                    5 => _mm256_srli_epi16::<3>(high),
                    6 => _mm256_srli_epi16::<4>(high),
                    _ => _mm256_srli_epi16::<5>(high),
                };
                _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(4)))
            }
            4 => {
                let both = vector(j / 2);
                let nibble = if j.is_multiple_of(2) { both } else { _mm256_srli_epi16::<4>(both) };
                _mm256_and_si256(nibble, _mm256_set1_epi8(15))
            }
            _ => vector(j),
        }
    }
}

/// Sums of a unit's products: 32 bits, and 16 bits that up to a unit's quads fit in.
struct Sums {
    whole: __m256i,
    short: __m256i,
}

impl Sums {
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller's function has AVX2.
        unsafe { Self { whole: _mm256_setzero_si256(), short: _mm256_setzero_si256() } }
    }

    /// Adds the products of a quad.
    #[inline(always)]
    unsafe fn add<const BITS: u32, const WIDE: bool>(&mut self, weights: __m256i, x: *const u8) {
        // SAFETY: the caller's function has AVX2; a quad of x is 4 or 8 bytes.
        unsafe {
            let pair = |i: usize| _mm256_set1_epi32(word(x, i));
            if WIDE {
                let even = _mm256_and_si256(weights, _mm256_set1_epi16(0xff));
                let odd = _mm256_srli_epi16::<8>(weights);
                let both =
                    _mm256_add_epi32(_mm256_madd_epi16(even, pair(0)), _mm256_madd_epi16(odd, pair(1)));
                self.whole = _mm256_add_epi32(self.whole, both);
            } else if BITS == 8 {
                // Sums of two products of 8 bits do not fit 16: the lowest bit goes apart.
                let ones = _mm256_set1_epi16(1);
                let upper = _mm256_and_si256(_mm256_srli_epi16::<1>(weights), _mm256_set1_epi8(0x7f));
                let lowest = _mm256_and_si256(weights, _mm256_set1_epi8(1));
                let upper = _mm256_madd_epi16(_mm256_maddubs_epi16(upper, pair(0)), ones);
                let lowest = _mm256_madd_epi16(_mm256_maddubs_epi16(lowest, pair(0)), ones);
                let both = _mm256_add_epi32(_mm256_add_epi32(upper, upper), lowest);
                self.whole = _mm256_add_epi32(self.whole, both);
            } else {
                // Eight times 2 · 15 · 127, or 2 · 15 · 128 once in a row, fit 16 bits.
                self.short = _mm256_add_epi16(self.short, _mm256_maddubs_epi16(weights, pair(0)));
            }
        }
    }

    /// Ends a unit.
    #[inline(always)]
    unsafe fn widen<const BITS: u32, const WIDE: bool>(&mut self) {
        if WIDE || BITS == 8 {
            return;
        }
        // SAFETY: the caller's function has AVX2.
        unsafe {
            let wide = _mm256_madd_epi16(self.short, _mm256_set1_epi16(1));
            self.whole = _mm256_add_epi32(self.whole, wide);
            self.short = _mm256_setzero_si256();
        }
    }
}

/// Scales and zeros of a chunk for outputs `8 half ..`.
#[inline(always)]
unsafe fn parameters(tile: &Tile, half: usize, chunk: usize) -> (__m256, __m256i) {
    let at = tile.parameters_of(chunk) + 8 * half;
    // SAFETY: the caller's function has AVX2 and F16C; a chunk has 16 scales and zeros.
    unsafe {
        let scales = match tile.scales {
            TileScales::F16(s) => _mm256_cvtph_ps(_mm_loadu_si128(s[at..at + 8].as_ptr().cast())),
            TileScales::F32(s) => _mm256_loadu_ps(s[at..at + 8].as_ptr()),
        };
        let zeros = _mm_loadl_epi64(tile.zeros[at..at + 8].as_ptr().cast());
        (scales, _mm256_cvtepu8_epi32(zeros))
    }
}

/// Adds a chunk's integers to a row's sums.
#[inline(always)]
unsafe fn settle(
    y: __m256,
    acc: __m256i,
    (scales, zeros): (__m256, __m256i),
    (scale, sum): (f32, i32),
) -> __m256 {
    // SAFETY: the caller's function has AVX2.
    unsafe {
        let whole = _mm256_sub_epi32(acc, _mm256_mullo_epi32(zeros, _mm256_set1_epi32(sum)));
        let by = _mm256_mul_ps(scales, _mm256_set1_ps(scale));
        _mm256_add_ps(y, _mm256_mul_ps(_mm256_cvtepi32_ps(whole), by))
    }
}

#[inline(always)]
unsafe fn few<const BITS: u32, const WIDE: bool, const ROWS: usize>(
    tile: &Tile,
    x: &Activations,
    first: usize,
    y: &mut [[f32; TILE]],
) {
    let rows: [*const u8; ROWS] = std::array::from_fn(|t| x.row(first + t));
    let size = if WIDE { 2 } else { 1 };
    // SAFETY: the caller's function has AVX2; units and rows are as long as the tile says, and a prefetch may be of any
    // address.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
        let mut unit = tile.stream.as_ptr();
        let mut k = 0;
        for chunk in 0..tile.chunks() {
            let mut acc: [[Sums; 2]; ROWS] = std::array::from_fn(|_| std::array::from_fn(|_| Sums::zero()));
            for _ in 0..tile.units_of(chunk) {
                for i in 0..BITS as usize {
                    _mm_prefetch::<_MM_HINT_T0>(unit.cast::<i8>().wrapping_add(AHEAD + 64 * i));
                }
                for half in 0..2 {
                    for j in 0..QUADS {
                        let weights = quad::<BITS>(unit, half, j);
                        for t in 0..ROWS {
                            acc[t][half].add::<BITS, WIDE>(weights, rows[t].add((k + 4 * j) * size));
                        }
                    }
                    for acc in &mut acc {
                        acc[half].widen::<BITS, WIDE>();
                    }
                }
                unit = unit.add(BITS as usize);
                k += UNIT;
            }
            for half in 0..2 {
                let own = parameters(tile, half, chunk);
                for t in 0..ROWS {
                    sums[t][half] = settle(sums[t][half], acc[t][half].whole, own, x.of(first + t, chunk));
                }
            }
        }
        for t in 0..ROWS {
            for half in 0..2 {
                _mm256_storeu_ps(y[t][8 * half..].as_mut_ptr(), sums[t][half]);
            }
        }
    }
}

/// Rows that share a decoded chunk.
#[inline(always)]
unsafe fn block<const BITS: u32, const WIDE: bool, const ROWS: usize>(
    decoded: &[__m256i],
    x: &Activations,
    first: usize,
    k: usize,
) -> [__m256i; ROWS] {
    let size = if WIDE { 2 } else { 1 };
    let rows: [*const u8; ROWS] = std::array::from_fn(|t| x.row(first + t).wrapping_add(k * size));
    // SAFETY: the caller's function has AVX2; rows are as long as the matrix is wide.
    unsafe {
        let mut acc: [Sums; ROWS] = std::array::from_fn(|_| Sums::zero());
        for (i, unit) in decoded.chunks_exact(QUADS).enumerate() {
            for (j, weights) in unit.iter().enumerate() {
                for t in 0..ROWS {
                    acc[t].add::<BITS, WIDE>(*weights, rows[t].add((UNIT * i + 4 * j) * size));
                }
            }
            for acc in &mut acc {
                acc.widen::<BITS, WIDE>();
            }
        }
        acc.map(|acc| acc.whole)
    }
}

#[inline(always)]
unsafe fn many<const BITS: u32, const WIDE: bool>(
    tile: &Tile,
    x: &Activations,
    first: usize,
    y: &mut [[f32; TILE]],
) {
    y.fill([0.0; TILE]);
    // SAFETY: the caller's function has AVX2; units are as many as the tile says.
    unsafe {
        let mut decoded = [_mm256_setzero_si256(); CHUNK / 4];
        for chunk in 0..tile.chunks() {
            let (units, k) = (tile.units_of(chunk), chunk * tile.chunk * UNIT);
            for half in 0..2 {
                let mut unit = tile.stream.as_ptr().add(chunk * tile.chunk * BITS as usize);
                for quads in decoded[..units * QUADS].chunks_exact_mut(QUADS) {
                    for (j, to) in quads.iter_mut().enumerate() {
                        *to = quad::<BITS>(unit, half, j);
                    }
                    unit = unit.add(BITS as usize);
                }
                let decoded = &decoded[..units * QUADS];
                let own = parameters(tile, half, chunk);
                let n = y.len();
                let mut settle_all = |row: usize, acc: &[__m256i]| {
                    for (t, acc) in acc.iter().enumerate() {
                        let to = y[row + t][8 * half..].as_mut_ptr();
                        let sum = settle(_mm256_loadu_ps(to), *acc, own, x.of(first + row + t, chunk));
                        _mm256_storeu_ps(to, sum);
                    }
                };
                let mut row = 0;
                while row + BLOCK <= n {
                    settle_all(row, &block::<BITS, WIDE, BLOCK>(decoded, x, first + row, k));
                    row += BLOCK;
                }
                while row < n {
                    settle_all(row, &block::<BITS, WIDE, 1>(decoded, x, first + row, k));
                    row += 1;
                }
            }
        }
    }
}

/// Sums of a tile's products with rows `first ..` of the activations, `[rows, 16]`.
///
/// # Safety
/// The processor has AVX2 and F16C.
#[target_feature(enable = "avx2,f16c")]
pub(super) unsafe fn tile<const BITS: u32, const WIDE: bool>(
    tile: Tile,
    x: &Activations,
    first: usize,
    y: &mut [[f32; TILE]],
) {
    // SAFETY: this function has the instructions.
    unsafe {
        match y.len() {
            0 => {}
            1 => few::<BITS, WIDE, 1>(&tile, x, first, y),
            FEW => few::<BITS, WIDE, FEW>(&tile, x, first, y),
            _ => many::<BITS, WIDE>(&tile, x, first, y),
        }
    }
}

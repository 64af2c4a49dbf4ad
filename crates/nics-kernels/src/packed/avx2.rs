//! AVX2: a vector of the stream is two halves of 8 outputs.

#[allow(clippy::wildcard_imports)] // Intrinsics carry their family in their names.
use std::arch::x86_64::*;

use super::activations::{Activations, word};
use super::matrix::{CHUNK, QUADS, TILE, Tile, TileScales, Vector};

/// Bytes by which the stream is prefetched.
const AHEAD: usize = 4 << 10;

/// The codes of quad `J` of a unit, a byte each, for outputs `8 half ..`.
#[inline(always)]
unsafe fn quad<const BITS: u32, const J: usize>(unit: *const Vector, half: usize) -> __m256i {
    // SAFETY: the caller's function has AVX2, and the unit `BITS` vectors.
    unsafe {
        let vector = |i: usize| _mm256_load_si256(unit.add(i).cast::<__m256i>().add(half));
        match BITS {
            2 => {
                let four = vector(J / 4);
                let own = match J % 4 {
                    0 => four,
                    1 => _mm256_srli_epi16::<2>(four),
                    2 => _mm256_srli_epi16::<4>(four),
                    _ => _mm256_srli_epi16::<6>(four),
                };
                _mm256_and_si256(own, _mm256_set1_epi8(3))
            }
            3 if J < 6 => {
                let two = vector(J / 2);
                let own = if J.is_multiple_of(2) { two } else { _mm256_srli_epi16::<3>(two) };
                _mm256_and_si256(own, _mm256_set1_epi8(7))
            }
            3 => {
                let low = _mm256_and_si256(_mm256_srli_epi16::<6>(vector(J % 2)), _mm256_set1_epi8(3));
                let high = vector(2);
                let high = if J == 6 { _mm256_srli_epi16::<4>(high) } else { _mm256_srli_epi16::<5>(high) };
                _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(4)))
            }
            4 => {
                let both = vector(J / 2);
                let nibble = if J.is_multiple_of(2) { both } else { _mm256_srli_epi16::<4>(both) };
                _mm256_and_si256(nibble, _mm256_set1_epi8(15))
            }
            _ => vector(J),
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

/// Blocks of `ROWS` rows: a chunk of weights is decoded once for all of them, half a tile at a time.
#[inline(always)]
unsafe fn blocks<const BITS: u32, const WIDE: bool, const ROWS: usize>(
    tile: &Tile,
    x: &Activations,
    first: usize,
    y: &mut [[f32; TILE]],
) {
    let quad_of_x = if WIDE { 8 } else { 4 };
    y.fill([0.0; TILE]);
    // SAFETY: the caller's function has AVX2; units and rows are as long as the tile says, and a prefetch may be of any
    // address.
    unsafe {
        let mut decoded = [_mm256_setzero_si256(); CHUNK / 4];
        for chunk in 0..tile.chunks() {
            let quads = tile.units_of(chunk) * QUADS;
            let units = tile.stream.as_ptr().add(chunk * tile.chunk * BITS as usize);
            for i in 0..tile.units_of(chunk) * BITS as usize {
                _mm_prefetch::<_MM_HINT_T0>(units.cast::<i8>().wrapping_add(AHEAD + 64 * i));
            }
            for half in 0..2 {
                let mut unit = units;
                for to in decoded[..quads].chunks_exact_mut(QUADS) {
                    each_quad!(J => { to[J] = quad::<BITS, J>(unit, half); });
                    unit = unit.add(BITS as usize);
                }
                let own = parameters(tile, half, chunk);
                for (block, y) in y.chunks_mut(ROWS).enumerate() {
                    let row = first + block * ROWS;
                    let at = x.of_block(row / ROWS).add(chunk * tile.chunk * QUADS * ROWS * quad_of_x);
                    // Four rows at a time: as many sums as there are registers for.
                    for from in (0..ROWS.min(y.len())).step_by(4) {
                        let n = 4.min(ROWS - from);
                        let mut acc: [Sums; 4] = std::array::from_fn(|_| Sums::zero());
                        for (i, unit) in decoded[..quads].chunks_exact(QUADS).enumerate() {
                            for (j, weights) in unit.iter().enumerate() {
                                let at = at.add(((i * QUADS + j) * ROWS + from) * quad_of_x);
                                for t in 0..n {
                                    acc[t].add::<BITS, WIDE>(*weights, at.add(t * quad_of_x));
                                }
                            }
                            for acc in &mut acc[..n] {
                                acc.widen::<BITS, WIDE>();
                            }
                        }
                        for t in 0..n.min(y.len() - from) {
                            let to = y[from + t][8 * half..].as_mut_ptr();
                            let of = x.of(row + from + t, chunk);
                            _mm256_storeu_ps(to, settle(_mm256_loadu_ps(to), acc[t].whole, own, of));
                        }
                    }
                }
            }
        }
    }
}

/// Sums of a tile's products with rows `first ..` of the activations, `[rows, 16]`; `first` begins a block.
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
    macro_rules! with_rows {
        ($($rows:literal),*) => {
            match x.block() {
                // SAFETY: this function has the instructions.
                $($rows => unsafe { blocks::<BITS, WIDE, $rows>(&tile, x, first, y) },)*
                other => unreachable!("blocks of {other} rows"),
            }
        };
    }
    with_rows!(1, 2, 3, 4, 6, 8, 10, 12);
}

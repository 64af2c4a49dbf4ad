//! AVX-512 with VNNI.

#[allow(clippy::wildcard_imports)] // Intrinsics carry their family in their names.
use std::arch::x86_64::*;

use super::activations::{Activations, word};
use super::matrix::{QUADS, TILE, Tile, TileScales, UNIT, Vector};

/// Rows up to which weights are decoded anew for every four.
const FEW: usize = 4;
/// Rows that share a decoded weight's register.
const BLOCK: usize = 12;
/// Bytes by which the stream is prefetched.
const AHEAD: usize = 8 << 10;

/// The codes of quad `j` of a unit, a byte each.
#[inline(always)]
unsafe fn quad<const BITS: u32>(unit: *const Vector, j: usize) -> __m512i {
    // SAFETY: the caller's function has AVX-512, and the unit `BITS` vectors.
    unsafe {
        let vector = |i: usize| _mm512_load_si512(unit.add(i).cast());
        match BITS {
            2 | 3 => {
                let low = vector(j / 4);
                let low = match j % 4 {
                    0 => low,
                    1 => _mm512_srli_epi16::<2>(low),
                    2 => _mm512_srli_epi16::<4>(low),
                    _ => _mm512_srli_epi16::<6>(low),
                };
                let three = _mm512_set1_epi8(3);
                if BITS == 2 {
                    return _mm512_and_si512(low, three);
                }
                let high = vector(2);
                let high = match j {
                    0 => _mm512_slli_epi16::<2>(high),
                    1 => _mm512_slli_epi16::<1>(high),
                    2 => high,
                    3 => _mm512_srli_epi16::<1>(high),
                    4 => _mm512_srli_epi16::<2>(high),
                    5 => _mm512_srli_epi16::<3>(high),
                    6 => _mm512_srli_epi16::<4>(high),
                    _ => _mm512_srli_epi16::<5>(high),
                };
                // (low & 3) | (high & 4) is the bit of `high` where the mask is 0.
                let both = _mm512_ternarylogic_epi32::<0xca>(three, low, high);
                _mm512_and_si512(both, _mm512_set1_epi8(7))
            }
            4 => {
                let both = vector(j / 2);
                let nibble = if j.is_multiple_of(2) { both } else { _mm512_srli_epi16::<4>(both) };
                _mm512_and_si512(nibble, _mm512_set1_epi8(15))
            }
            _ => vector(j),
        }
    }
}

/// Adds the products of a quad.
#[inline(always)]
unsafe fn dot<const WIDE: bool>(acc: __m512i, weights: __m512i, x: *const u8) -> __m512i {
    // SAFETY: the caller's function has AVX-512 with VNNI; a quad of x is 4 or 8 bytes.
    unsafe {
        if WIDE {
            let even = _mm512_and_si512(weights, _mm512_set1_epi16(0xff));
            let odd = _mm512_srli_epi16::<8>(weights);
            let pair = |i: usize| _mm512_set1_epi32(word(x, i));
            _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(acc, even, pair(0)), odd, pair(1))
        } else {
            _mm512_dpbusd_epi32(acc, weights, _mm512_set1_epi32(word(x, 0)))
        }
    }
}

/// Scales and zeros of a chunk.
#[inline(always)]
unsafe fn parameters(tile: &Tile, chunk: usize) -> (__m512, __m512i) {
    let at = tile.parameters_of(chunk);
    // SAFETY: the caller's function has AVX-512; a chunk has 16 scales and zeros.
    unsafe {
        let scales = match tile.scales {
            TileScales::F16(s) => _mm512_cvtph_ps(_mm256_loadu_si256(s[at..at + TILE].as_ptr().cast())),
            TileScales::F32(s) => _mm512_loadu_ps(s[at..at + TILE].as_ptr()),
        };
        let zeros = _mm_loadu_si128(tile.zeros[at..at + TILE].as_ptr().cast());
        (scales, _mm512_cvtepu8_epi32(zeros))
    }
}

/// Adds a chunk's integers to a row's sums.
#[inline(always)]
unsafe fn settle(
    y: __m512,
    acc: __m512i,
    (scales, zeros): (__m512, __m512i),
    (scale, sum): (f32, i32),
) -> __m512 {
    // SAFETY: the caller's function has AVX-512.
    unsafe {
        let whole = _mm512_sub_epi32(acc, _mm512_mullo_epi32(zeros, _mm512_set1_epi32(sum)));
        let by = _mm512_mul_ps(scales, _mm512_set1_ps(scale));
        _mm512_add_ps(y, _mm512_mul_ps(_mm512_cvtepi32_ps(whole), by))
    }
}

/// `ROWS` rows, `CHAINS` independent sums each.
#[inline(always)]
unsafe fn few<const BITS: u32, const WIDE: bool, const ROWS: usize, const CHAINS: usize>(
    tile: &Tile,
    x: &Activations,
    first: usize,
    y: &mut [[f32; TILE]],
) {
    let rows: [*const u8; ROWS] = std::array::from_fn(|t| x.row(first + t));
    let size = if WIDE { 2 } else { 1 };
    // SAFETY: the caller's function has AVX-512 with VNNI; units and rows are as long as the tile says, and a prefetch may
    // be of any address.
    unsafe {
        let mut sums = [_mm512_setzero_ps(); ROWS];
        let mut unit = tile.stream.as_ptr();
        let mut k = 0;
        for chunk in 0..tile.chunks() {
            let mut acc = [[_mm512_setzero_si512(); CHAINS]; ROWS];
            for _ in 0..tile.units_of(chunk) {
                for i in 0..BITS as usize {
                    _mm_prefetch::<_MM_HINT_T0>(unit.cast::<i8>().wrapping_add(AHEAD + 64 * i));
                }
                for j in 0..QUADS {
                    let weights = quad::<BITS>(unit, j);
                    for t in 0..ROWS {
                        let at = rows[t].add((k + 4 * j) * size);
                        acc[t][j % CHAINS] = dot::<WIDE>(acc[t][j % CHAINS], weights, at);
                    }
                }
                unit = unit.add(BITS as usize);
                k += UNIT;
            }
            let own = parameters(tile, chunk);
            for t in 0..ROWS {
                let mut all = acc[t][0];
                for chain in 1..CHAINS {
                    all = _mm512_add_epi32(all, acc[t][chain]);
                }
                sums[t] = settle(sums[t], all, own, x.of(first + t, chunk));
            }
        }
        for t in 0..ROWS {
            _mm512_storeu_ps(y[t].as_mut_ptr(), sums[t]);
        }
    }
}

/// Rows that share a decoded chunk.
#[inline(always)]
unsafe fn block<const WIDE: bool, const ROWS: usize>(
    decoded: &[__m512i],
    x: &Activations,
    first: usize,
    k: usize,
) -> [__m512i; ROWS] {
    let size = if WIDE { 2 } else { 1 };
    let rows: [*const u8; ROWS] = std::array::from_fn(|t| x.row(first + t).wrapping_add(k * size));
    // SAFETY: the caller's function has AVX-512 with VNNI; rows are as long as the matrix is wide.
    unsafe {
        let mut acc = [_mm512_setzero_si512(); ROWS];
        for (j, weights) in decoded.iter().enumerate() {
            for t in 0..ROWS {
                acc[t] = dot::<WIDE>(acc[t], *weights, rows[t].add(4 * j * size));
            }
        }
        acc
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
    // SAFETY: the caller's function has AVX-512 with VNNI; units are as many as the tile says.
    unsafe {
        let mut decoded = [_mm512_setzero_si512(); super::matrix::CHUNK / 4];
        let mut unit = tile.stream.as_ptr();
        for chunk in 0..tile.chunks() {
            let units = tile.units_of(chunk);
            for quads in decoded[..units * QUADS].chunks_exact_mut(QUADS) {
                for (j, to) in quads.iter_mut().enumerate() {
                    *to = quad::<BITS>(unit, j);
                }
                unit = unit.add(BITS as usize);
            }
            let decoded = &decoded[..units * QUADS];
            let (own, k) = (parameters(tile, chunk), chunk * tile.chunk * UNIT);
            let n = y.len();
            let mut settle_all = |row: usize, acc: &[__m512i]| {
                for (t, acc) in acc.iter().enumerate() {
                    let to = y[row + t].as_mut_ptr();
                    let sum = settle(_mm512_loadu_ps(to), *acc, own, x.of(first + row + t, chunk));
                    _mm512_storeu_ps(to, sum);
                }
            };
            let mut row = 0;
            while row + BLOCK <= n {
                settle_all(row, &block::<WIDE, BLOCK>(decoded, x, first + row, k));
                row += BLOCK;
            }
            while row + FEW <= n {
                settle_all(row, &block::<WIDE, FEW>(decoded, x, first + row, k));
                row += FEW;
            }
            while row < n {
                settle_all(row, &block::<WIDE, 1>(decoded, x, first + row, k));
                row += 1;
            }
        }
    }
}

/// Sums of a tile's products with rows `first ..` of the activations, `[rows, 16]`.
///
/// # Safety
/// The processor has AVX-512 F, BW, VL, DQ and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
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
            1 => few::<BITS, WIDE, 1, 4>(&tile, x, first, y),
            2 => few::<BITS, WIDE, 2, 2>(&tile, x, first, y),
            3 => few::<BITS, WIDE, 3, 2>(&tile, x, first, y),
            FEW => few::<BITS, WIDE, FEW, 1>(&tile, x, first, y),
            _ => many::<BITS, WIDE>(&tile, x, first, y),
        }
    }
}

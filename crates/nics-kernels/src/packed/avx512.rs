//! AVX-512 with VNNI.

#[allow(clippy::wildcard_imports)] // Intrinsics carry their family in their names.
use std::arch::x86_64::*;

use super::activations::{Activations, word};
use super::matrix::{CHUNK, QUADS, TILE, Tile, TileScales, Vector};
use crate::isa::prefetches_alone;

/// Bytes by which the stream is prefetched into the first cache, and into the second.
const AHEAD: usize = 1 << 10;
const FAR_AHEAD: usize = 4 << 10;

/// The codes of quad `J` of a unit, a byte each.
#[inline(always)]
unsafe fn quad<const BITS: u32, const J: usize>(unit: *const Vector) -> __m512i {
    // SAFETY: the caller's function has AVX-512, and the unit `BITS` vectors.
    unsafe {
        let vector = |i: usize| _mm512_load_si512(unit.add(i).cast());
        match BITS {
            2 => {
                let four = vector(J / 4);
                let own = match J % 4 {
                    0 => four,
                    1 => _mm512_srli_epi16::<2>(four),
                    2 => _mm512_srli_epi16::<4>(four),
                    _ => _mm512_srli_epi16::<6>(four),
                };
                _mm512_and_si512(own, _mm512_set1_epi8(3))
            }
            3 if J < 6 => {
                let two = vector(J / 2);
                let own = if J.is_multiple_of(2) { two } else { _mm512_srli_epi16::<3>(two) };
                _mm512_and_si512(own, _mm512_set1_epi8(7))
            }
            3 => {
                let low = _mm512_srli_epi16::<6>(vector(J % 2));
                let high = vector(2);
                let high = if J == 6 { _mm512_srli_epi16::<4>(high) } else { _mm512_srli_epi16::<5>(high) };
                let both = _mm512_ternarylogic_epi32::<CHOOSE>(_mm512_set1_epi8(3), low, high);
                _mm512_and_si512(both, _mm512_set1_epi8(7))
            }
            4 => {
                let both = vector(J / 2);
                let nibble = if J.is_multiple_of(2) { both } else { _mm512_srli_epi16::<4>(both) };
                _mm512_and_si512(nibble, _mm512_set1_epi8(15))
            }
            _ => vector(J),
        }
    }
}

/// Asks for what comes after a unit: for the second cache, and, with `near`, what comes soon for the first one too.
#[inline(always)]
unsafe fn prefetch<const BITS: u32>(unit: *const Vector, near: bool) {
    for i in 0..BITS as usize {
        let ahead = |by: usize| unit.wrapping_add(i).wrapping_byte_add(by).cast();
        // SAFETY: a prefetch may be of any address.
        unsafe {
            if near {
                _mm_prefetch::<_MM_HINT_T0>(ahead(AHEAD));
            }
            _mm_prefetch::<_MM_HINT_T1>(ahead(FAR_AHEAD));
        }
    }
}

/// `b` where `a` has ones, `c` elsewhere.
const CHOOSE: i32 = 0xca;

/// Sums that a row has where codes are multiplied as they lie, one for each power of two that a mask leaves them at.
const CHAINS: usize = 4;

/// Which of them takes quad `quad`.
const fn chain(bits: u32, quad: usize) -> usize {
    match bits {
        3 => [0, 1, 0, 1, 0, 1, 2, 3][quad],
        4 => [0, 2, 1, 3, 0, 2, 1, 3][quad],
        _ => quad % CHAINS,
    }
}

/// By how many bits what each takes is too high.
const fn raised(bits: u32) -> [i32; CHAINS] {
    match bits {
        2 => [0, 2, 4, 6],
        3 => [0, 3, 4, 5],
        4 => [0, 0, 4, 4],
        _ => [0; CHAINS],
    }
}

/// The codes of quad `J` where they lie: times 2 to the power of what [`raised`] says of its chain.
#[inline(always)]
unsafe fn quad_in_place<const BITS: u32, const J: usize>(unit: *const Vector) -> __m512i {
    // SAFETY: the caller's function has AVX-512, and the unit `BITS` vectors.
    unsafe {
        let vector = |i: usize| _mm512_load_si512(unit.add(i).cast());
        let mask = |bits: u8| _mm512_set1_epi8(bits.cast_signed());
        match BITS {
            2 => _mm512_and_si512(vector(J / 4), mask(3 << (2 * (J % 4)))),
            3 if J < 6 => _mm512_and_si512(vector(J / 2), mask(7 << (3 * (J % 2)))),
            3 if J == 6 => {
                let low = _mm512_srli_epi16::<2>(vector(0));
                let both = _mm512_ternarylogic_epi32::<CHOOSE>(mask(0x30), low, vector(2));
                _mm512_and_si512(both, mask(0x70))
            }
            3 => {
                let low = _mm512_srli_epi16::<1>(vector(1));
                let both = _mm512_ternarylogic_epi32::<CHOOSE>(mask(0x60), low, vector(2));
                _mm512_and_si512(both, mask(0xe0))
            }
            4 => _mm512_and_si512(vector(J / 2), mask(15 << (4 * (J % 2)))),
            _ => vector(J),
        }
    }
}

/// Sums of products: of whole activations of 8 bits, or of the low and the high bytes of those of 16.
type Sums = [__m512i; 2];

/// Adds the products of a quad.
#[inline(always)]
unsafe fn dot<const WIDE: bool>([low, high]: Sums, weights: __m512i, x: *const u8) -> Sums {
    // SAFETY: the caller's function has AVX-512 with VNNI; a quad of x is 4 or 8 bytes.
    unsafe {
        let bytes = |i: usize| _mm512_set1_epi32(word(x, i));
        let low = _mm512_dpbusd_epi32(low, weights, bytes(0));
        [low, if WIDE { _mm512_dpbusd_epi32(high, weights, bytes(1)) } else { high }]
    }
}

/// The sum of products with whole activations.
#[inline(always)]
unsafe fn whole<const WIDE: bool>([low, high]: Sums) -> __m512i {
    // SAFETY: the caller's function has AVX-512.
    unsafe { if WIDE { _mm512_add_epi32(low, _mm512_slli_epi32::<8>(high)) } else { low } }
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

/// One block of `ROWS` rows, `SUMS` independent sums each: with [`CHAINS`] of them codes are multiplied where they lie, with
/// fewer they are decoded on the way.
#[inline(always)]
unsafe fn one<const BITS: u32, const WIDE: bool, const ROWS: usize, const SUMS: usize>(
    tile: &Tile,
    x: &Activations,
    y: &mut [[f32; TILE]],
) {
    let quad_of_x = if WIDE { 8 } else { 4 };
    // SAFETY: the caller's function has AVX-512 with VNNI; units and rows are as long as the tile says, and a prefetch may
    // be of any address.
    unsafe {
        let near = !prefetches_alone();
        // Little arithmetic leaves room for many loads at a time.
        let hints = near || ROWS * if WIDE { 2 } else { 1 } * QUADS > 4 * BITS as usize;
        let mut sums = [_mm512_setzero_ps(); ROWS];
        let mut unit = tile.stream.as_ptr();
        let mut at = x.of_block(0);
        for chunk in 0..tile.chunks() {
            let mut acc = [[[_mm512_setzero_si512(); 2]; SUMS]; ROWS];
            for _ in 0..tile.units_of(chunk) {
                if hints {
                    prefetch::<BITS>(unit, near);
                }
                each_quad!(J => {
                    let (weights, to) = if SUMS == CHAINS {
                        (quad_in_place::<BITS, J>(unit), const { chain(BITS, J) })
                    } else {
                        (quad::<BITS, J>(unit), J % SUMS)
                    };
                    for t in 0..ROWS {
                        let x = at.add((J * ROWS + t) * quad_of_x);
                        acc[t][to] = dot::<WIDE>(acc[t][to], weights, x);
                    }
                });
                unit = unit.add(BITS as usize);
                at = at.add(QUADS * ROWS * quad_of_x);
            }
            let own = parameters(tile, chunk);
            // Apart from `settle`, so that `acc` stays in registers.
            let mut ended = [_mm512_setzero_si512(); ROWS];
            for t in 0..ROWS {
                let mut all = [_mm512_setzero_si512(); 2];
                for (chain, by) in acc[t].into_iter().zip(raised(BITS)) {
                    let by = _mm_cvtsi32_si128(if SUMS == CHAINS { by } else { 0 });
                    for (all, chain) in all.iter_mut().zip(chain) {
                        *all = _mm512_add_epi32(*all, _mm512_sra_epi32(chain, by));
                    }
                }
                ended[t] = whole::<WIDE>(all);
            }
            for t in 0..ROWS {
                sums[t] = settle(sums[t], ended[t], own, x.of(t, chunk));
            }
        }
        for (y, sum) in y.iter_mut().zip(sums) {
            _mm512_storeu_ps(y.as_mut_ptr(), sum);
        }
    }
}

/// Several blocks of `ROWS` rows: a chunk of weights is decoded once for all.
#[inline(always)]
unsafe fn several<const BITS: u32, const WIDE: bool, const ROWS: usize>(
    tile: &Tile,
    x: &Activations,
    first: usize,
    y: &mut [[f32; TILE]],
) {
    let quad_of_x = if WIDE { 8 } else { 4 };
    y.fill([0.0; TILE]);
    // SAFETY: the caller's function has AVX-512 with VNNI; units and rows are as long as the tile says.
    unsafe {
        let near = !prefetches_alone();
        let mut decoded = [_mm512_setzero_si512(); CHUNK / 4];
        let mut unit = tile.stream.as_ptr();
        for chunk in 0..tile.chunks() {
            let quads = tile.units_of(chunk) * QUADS;
            for to in decoded[..quads].chunks_exact_mut(QUADS) {
                prefetch::<BITS>(unit, near);
                each_quad!(J => { to[J] = quad::<BITS, J>(unit); });
                unit = unit.add(BITS as usize);
            }
            let own = parameters(tile, chunk);
            for (block, y) in y.chunks_mut(ROWS).enumerate() {
                let row = first + block * ROWS;
                let mut at = x.of_block(row / ROWS).add(chunk * tile.chunk * QUADS * ROWS * quad_of_x);
                let mut acc = [[_mm512_setzero_si512(); 2]; ROWS];
                for weights in &decoded[..quads] {
                    for t in 0..ROWS {
                        acc[t] = dot::<WIDE>(acc[t], *weights, at.add(t * quad_of_x));
                    }
                    at = at.add(ROWS * quad_of_x);
                }
                // At once, so that `acc` stays in registers: a loop that is not unrolled would keep it in memory.
                let mut ended = [_mm512_setzero_si512(); ROWS];
                for (ended, acc) in ended.iter_mut().zip(acc) {
                    *ended = whole::<WIDE>(acc);
                }
                for (t, (y, sum)) in y.iter_mut().zip(ended).enumerate() {
                    let to = y.as_mut_ptr();
                    _mm512_storeu_ps(to, settle(_mm512_loadu_ps(to), sum, own, x.of(row + t, chunk)));
                }
            }
        }
    }
}

/// Sums of a tile's products with rows `first ..` of the activations, `[rows, 16]`; `first` begins a block.
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
    macro_rules! with_rows {
        ($($rows:literal $chains:literal),*) => {
            // SAFETY: this function has the instructions.
            match x.block() {
                $(
                    $rows if x.blocks() == 1 => unsafe { one::<BITS, WIDE, $rows, $chains>(&tile, x, y) },
                    $rows => unsafe { several::<BITS, WIDE, $rows>(&tile, x, first, y) },
                )*
                other => unreachable!("blocks of {other} rows"),
            }
        };
    }
    with_rows!(1 4, 2 4, 3 2, 4 1, 6 1, 8 1, 10 1, 12 1);
}

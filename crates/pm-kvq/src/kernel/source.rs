//! How stored rows become vectors of f32.
//!
//! A row is a sequence of *blocks* that become two or four vectors each. Their channels come out in the order that makes
//! unpacking cheap, not in their natural one: queries are put into the same order before, sums back afterwards.

#[allow(clippy::wildcard_imports)] // Intrinsics carry their prefix.
use std::arch::x86_64::*;

use nics_kernels::lanes::{Avx2, Avx512, Lanes, Weight};

use crate::{Bits, pack};

/// What unpacking takes beyond [`Lanes`].
///
/// # Safety
/// As for [`Lanes`].
pub unsafe trait Unpack: Lanes {
    /// `N` integers of 32 bits.
    type I: Copy;
    /// `N` bytes, each in 32 bits.
    unsafe fn bytes(at: *const u8) -> Self::I;
    /// Codes of 8 bits.
    unsafe fn code8(bytes: Self::I) -> Self::V;
    /// Codes of 4 bits at bits `4 n`.
    unsafe fn code4(bytes: Self::I, n: usize) -> Self::V;
    /// Codes of 2 bits at bits `2 n`.
    unsafe fn code2(bytes: Self::I, n: usize) -> Self::V;
    /// The sum of each of four vectors.
    unsafe fn sums4(v: [Self::V; 4]) -> [f32; 4];
    /// `N` signed bytes.
    unsafe fn signed(at: *const u8) -> Self::V;
    /// `(code − 8) d` of codes of 4 bits at bits `4 n`.
    unsafe fn centred(bytes: Self::I, n: usize, d: Self::V) -> Self::V;
    /// The same number of half precision in all lanes.
    unsafe fn scale(at: *const u8) -> Self::V;
    /// Product.
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
}

// SAFETY (in the functions): instructions and pointers are the caller's promise.
unsafe impl Unpack for Avx512 {
    type I = __m512i;
    #[inline(always)]
    unsafe fn bytes(at: *const u8) -> Self::I {
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(at.cast())) }
    }
    #[inline(always)]
    unsafe fn code8(bytes: Self::I) -> Self::V {
        unsafe { _mm512_cvtepi32_ps(bytes) }
    }
    #[inline(always)]
    unsafe fn code4(bytes: Self::I, n: usize) -> Self::V {
        unsafe {
            // A lookup sees only the low four bits: neither mask nor conversion.
            let table = _mm512_setr_ps(
                0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
            );
            let at = if n == 0 { bytes } else { _mm512_srli_epi32::<4>(bytes) };
            _mm512_permutexvar_ps(at, table)
        }
    }
    #[inline(always)]
    unsafe fn code2(bytes: Self::I, n: usize) -> Self::V {
        unsafe {
            let table = _mm512_setr_ps(
                0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0,
            );
            let at = match n {
                0 => bytes,
                1 => _mm512_srli_epi32::<2>(bytes),
                2 => _mm512_srli_epi32::<4>(bytes),
                _ => _mm512_srli_epi32::<6>(bytes),
            };
            _mm512_permutexvar_ps(at, table)
        }
    }
    #[inline(always)]
    unsafe fn sums4(v: [Self::V; 4]) -> [f32; 4] {
        unsafe {
            let [a, b, c, d] = v;
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
            let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
            let high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
            // Each quarter now holds parts of the four sums.
            let quarters = _mm512_add_ps(low, high);
            let halves =
                _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps::<1>(quarters));
            let sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
            let mut all = [0f32; 4];
            _mm_storeu_ps(all.as_mut_ptr(), sums);
            all
        }
    }
    #[inline(always)]
    unsafe fn signed(at: *const u8) -> Self::V {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast()))) }
    }
    #[inline(always)]
    unsafe fn centred(bytes: Self::I, n: usize, d: Self::V) -> Self::V {
        unsafe { _mm512_mul_ps(_mm512_sub_ps(Self::code4(bytes, n), _mm512_set1_ps(8.0)), d) }
    }
    #[inline(always)]
    unsafe fn scale(at: *const u8) -> Self::V {
        unsafe {
            let bits = u16::from_le_bytes([*at, *at.add(1)]);
            _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
        }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_mul_ps(a, b) }
    }
}

// SAFETY (in the functions): instructions and pointers are the caller's promise.
unsafe impl Unpack for Avx2 {
    type I = __m256i;
    #[inline(always)]
    unsafe fn bytes(at: *const u8) -> Self::I {
        unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(at.cast())) }
    }
    #[inline(always)]
    unsafe fn code8(bytes: Self::I) -> Self::V {
        unsafe { _mm256_cvtepi32_ps(bytes) }
    }
    #[inline(always)]
    unsafe fn code4(bytes: Self::I, n: usize) -> Self::V {
        unsafe {
            // Nothing stands above the second code.
            _mm256_cvtepi32_ps(match n {
                0 => _mm256_and_si256(bytes, _mm256_set1_epi32(15)),
                _ => _mm256_srli_epi32::<4>(bytes),
            })
        }
    }
    #[inline(always)]
    unsafe fn code2(bytes: Self::I, n: usize) -> Self::V {
        unsafe {
            // A lookup sees three bits: the third is one of the next code.
            let table = _mm256_setr_ps(0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0);
            let at = match n {
                0 => bytes,
                1 => _mm256_srli_epi32::<2>(bytes),
                2 => _mm256_srli_epi32::<4>(bytes),
                _ => _mm256_srli_epi32::<6>(bytes),
            };
            _mm256_permutevar8x32_ps(table, at)
        }
    }
    #[inline(always)]
    unsafe fn sums4(v: [Self::V; 4]) -> [f32; 4] {
        unsafe {
            let halves = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
            let sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
            let mut all = [0f32; 4];
            _mm_storeu_ps(all.as_mut_ptr(), sums);
            all
        }
    }
    #[inline(always)]
    unsafe fn signed(at: *const u8) -> Self::V {
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast()))) }
    }
    #[inline(always)]
    unsafe fn centred(bytes: Self::I, n: usize, d: Self::V) -> Self::V {
        unsafe { _mm256_mul_ps(_mm256_sub_ps(Self::code4(bytes, n), _mm256_set1_ps(8.0)), d) }
    }
    #[inline(always)]
    unsafe fn scale(at: *const u8) -> Self::V {
        unsafe {
            let bits = u16::from_le_bytes([*at, *at.add(1)]);
            _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
        }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm256_mul_ps(a, b) }
    }
}

/// A format of stored rows.
///
/// # Safety
/// As for [`Lanes`]; `BYTES` are what [`Source::load`] reads.
pub unsafe trait Source<L: Unpack> {
    /// Vectors of a block: 2 or 4.
    const PARTS: usize;
    /// Bytes of a block.
    const BYTES: usize;
    /// A block.
    type Raw: Copy;
    /// Reads a block.
    unsafe fn load(at: *const u8) -> Self::Raw;
    /// Its vector `n`.
    unsafe fn part(raw: Self::Raw, n: usize) -> L::V;
    /// The channel at `lane` of vector `n` of `block`.
    fn channel(dim: usize, block: usize, n: usize, lane: usize) -> usize;
}

/// The channel of code `n` of byte `byte` of a row.
fn channel_of_code(bits: Bits, dim: usize, byte: usize, n: usize) -> usize {
    let run = pack::run(bits, dim);
    let stride = run * bits.get() as usize / 8;
    byte / stride * run + byte % stride + n * stride
}

/// Codes of 8 bits.
pub struct Codes8;
/// Codes of 4 bits.
pub struct Codes4;
/// Codes of 2 bits.
pub struct Codes2;
/// Numbers.
pub struct Numbers<T>(std::marker::PhantomData<T>);

// SAFETY (in the functions): instructions and pointers are the caller's promise.
unsafe impl<L: Unpack> Source<L> for Codes8 {
    const PARTS: usize = 2;
    const BYTES: usize = 2 * L::N;
    type Raw = [L::I; 2];
    #[inline(always)]
    unsafe fn load(at: *const u8) -> Self::Raw {
        unsafe { [L::bytes(at), L::bytes(at.add(L::N))] }
    }
    #[inline(always)]
    unsafe fn part(raw: Self::Raw, n: usize) -> L::V {
        unsafe { L::code8(raw[n]) }
    }
    fn channel(_: usize, block: usize, n: usize, lane: usize) -> usize {
        (2 * block + n) * L::N + lane
    }
}

// SAFETY (in the functions): instructions and pointers are the caller's promise.
unsafe impl<L: Unpack> Source<L> for Codes4 {
    const PARTS: usize = 2;
    const BYTES: usize = L::N;
    type Raw = L::I;
    #[inline(always)]
    unsafe fn load(at: *const u8) -> Self::Raw {
        unsafe { L::bytes(at) }
    }
    #[inline(always)]
    unsafe fn part(raw: Self::Raw, n: usize) -> L::V {
        unsafe { L::code4(raw, n) }
    }
    fn channel(dim: usize, block: usize, n: usize, lane: usize) -> usize {
        channel_of_code(Bits::B4, dim, block * L::N + lane, n)
    }
}

// SAFETY (in the functions): instructions and pointers are the caller's promise.
unsafe impl<L: Unpack> Source<L> for Codes2 {
    const PARTS: usize = 4;
    const BYTES: usize = L::N;
    type Raw = L::I;
    #[inline(always)]
    unsafe fn load(at: *const u8) -> Self::Raw {
        unsafe { L::bytes(at) }
    }
    #[inline(always)]
    unsafe fn part(raw: Self::Raw, n: usize) -> L::V {
        unsafe { L::code2(raw, n) }
    }
    fn channel(dim: usize, block: usize, n: usize, lane: usize) -> usize {
        channel_of_code(Bits::B2, dim, block * L::N + lane, n)
    }
}

// SAFETY (in the functions): instructions and pointers are the caller's promise.
unsafe impl<L: Unpack, T: Weight> Source<L> for Numbers<T> {
    const PARTS: usize = 2;
    const BYTES: usize = 2 * L::N * size_of::<T>();
    type Raw = *const T;
    #[inline(always)]
    unsafe fn load(at: *const u8) -> Self::Raw {
        at.cast()
    }
    #[inline(always)]
    unsafe fn part(raw: Self::Raw, n: usize) -> L::V {
        unsafe { T::half::<L>(raw, n == 1) }
    }
    fn channel(_: usize, block: usize, n: usize, lane: usize) -> usize {
        2 * L::N * block + if T::PAIRED { 2 * lane + n } else { n * L::N + lane }
    }
}

/// Blocks of 32 signed codes of 8 bits behind their scale.
pub struct Blocks8;
/// Blocks of 32 codes of 4 bits behind their scale.
pub struct Blocks4;

// SAFETY (in the functions): instructions and pointers are the caller's promise.
unsafe impl<L: Unpack> Source<L> for Blocks8 {
    const PARTS: usize = 32 / L::N;
    const BYTES: usize = 34;
    type Raw = (*const u8, L::V);
    #[inline(always)]
    unsafe fn load(at: *const u8) -> Self::Raw {
        unsafe { (at.add(2), L::scale(at)) }
    }
    #[inline(always)]
    unsafe fn part((at, d): Self::Raw, n: usize) -> L::V {
        unsafe { L::mul(L::signed(at.add(n * L::N)), d) }
    }
    fn channel(_: usize, block: usize, n: usize, lane: usize) -> usize {
        32 * block + n * L::N + lane
    }
}

// SAFETY (in the functions): instructions and pointers are the caller's promise.
unsafe impl<L: Unpack> Source<L> for Blocks4 {
    const PARTS: usize = 32 / L::N;
    const BYTES: usize = 18;
    type Raw = (*const u8, L::V);
    #[inline(always)]
    unsafe fn load(at: *const u8) -> Self::Raw {
        unsafe { (at.add(2), L::scale(at)) }
    }
    #[inline(always)]
    unsafe fn part((at, d): Self::Raw, n: usize) -> L::V {
        // The low halves of all bytes, then the high ones.
        let vectors = 16 / L::N;
        unsafe { L::centred(L::bytes(at.add(n % vectors * L::N)), n / vectors, d) }
    }
    fn channel(_: usize, block: usize, n: usize, lane: usize) -> usize {
        32 * block + n * L::N + lane
    }
}

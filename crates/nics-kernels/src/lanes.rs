//! Vectors of f32, and how weights become them: what a kernel is written in once for every set of instructions.
//!
//! A kernel is a generic function over [`Lanes`], inlined into one function for each set of instructions that is marked
//! with `#[target_feature]`; outside such a function the vector types are slow, or not there at all.

#[cfg(target_arch = "x86_64")]
#[allow(clippy::wildcard_imports)] // Intrinsics carry their prefix.
use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::element::Element;

/// The channels of the longest step: `2 * Lanes::N` at most.
pub const BLOCK: usize = 32;

/// A vector of `N` f32.
///
/// # Safety
/// The processor must have the instructions, and pointers must be readable for what is loaded.
pub unsafe trait Lanes: Copy {
    /// The vector.
    type V: Copy;
    /// Its length.
    const N: usize;
    /// Zeros.
    ///
    /// # Safety
    /// As for the trait.
    unsafe fn zero() -> Self::V;
    /// `N` values; no alignment is asked for.
    ///
    /// # Safety
    /// As for the trait.
    unsafe fn load(from: *const f32) -> Self::V;
    /// Writes `N` values; no alignment is asked for.
    ///
    /// # Safety
    /// As for the trait.
    unsafe fn store(v: Self::V, to: *mut f32);
    /// `N` times `x`.
    ///
    /// # Safety
    /// As for the trait.
    unsafe fn splat(x: f32) -> Self::V;
    /// `a * b + sum`.
    ///
    /// # Safety
    /// As for the trait.
    unsafe fn fma(a: Self::V, b: Self::V, sum: Self::V) -> Self::V;
    /// The sum of each of eight vectors.
    ///
    /// # Safety
    /// As for the trait.
    unsafe fn sums(v: [Self::V; 8]) -> [f32; 8];
    /// Asks for a line of memory that will soon be read; any address.
    ///
    /// # Safety
    /// As for the trait.
    unsafe fn prefetch(at: *const u8);
    /// Of `2 N` values those at even places.
    ///
    /// # Safety
    /// As for the trait.
    unsafe fn load_even(from: *const bf16) -> Self::V;
    /// Of `2 N` values those at odd places.
    ///
    /// # Safety
    /// As for the trait.
    unsafe fn load_odd(from: *const bf16) -> Self::V;
    /// `N` values, widened.
    ///
    /// # Safety
    /// As for the trait.
    unsafe fn load_f16(from: *const f16) -> Self::V;
}

/// A format that weights may have.
pub trait Weight: Element {
    /// Whether the two halves of a step are the even and the odd channels.
    const PAIRED: bool;
    /// One half of the `2 N` weights of a step.
    ///
    /// # Safety
    /// As for [`Lanes`]; all `2 N` weights must be readable.
    unsafe fn half<L: Lanes>(step: *const Self, second: bool) -> L::V;
}

impl Weight for f32 {
    const PAIRED: bool = false;
    #[inline(always)]
    unsafe fn half<L: Lanes>(step: *const Self, second: bool) -> L::V {
        // SAFETY: the caller's promise.
        unsafe { L::load(step.add(if second { L::N } else { 0 })) }
    }
}

impl Weight for bf16 {
    const PAIRED: bool = true;
    #[inline(always)]
    unsafe fn half<L: Lanes>(step: *const Self, second: bool) -> L::V {
        // SAFETY: the caller's promise.
        unsafe { if second { L::load_odd(step) } else { L::load_even(step) } }
    }
}

impl Weight for f16 {
    const PAIRED: bool = false;
    #[inline(always)]
    unsafe fn half<L: Lanes>(step: *const Self, second: bool) -> L::V {
        // SAFETY: the caller's promise.
        unsafe { L::load_f16(step.add(if second { L::N } else { 0 })) }
    }
}

/// Plain Rust.
#[derive(Clone, Copy)]
pub struct Plain;

// SAFETY: needs no instructions of its own.
unsafe impl Lanes for Plain {
    type V = [f32; 8];
    const N: usize = 8;
    #[inline(always)]
    unsafe fn zero() -> Self::V {
        [0.0; 8]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(v: Self::V, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, sum: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i] + sum[i])
    }
    #[inline(always)]
    unsafe fn sums(v: [Self::V; 8]) -> [f32; 8] {
        v.map(|v| ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])))
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
    #[inline(always)]
    unsafe fn load_even(from: *const bf16) -> Self::V {
        // SAFETY: the caller's promise.
        let all = unsafe { from.cast::<[bf16; 16]>().read_unaligned() };
        std::array::from_fn(|i| all[2 * i].to_f32())
    }
    #[inline(always)]
    unsafe fn load_odd(from: *const bf16) -> Self::V {
        // SAFETY: the caller's promise.
        let all = unsafe { from.cast::<[bf16; 16]>().read_unaligned() };
        std::array::from_fn(|i| all[2 * i + 1].to_f32())
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::V {
        // SAFETY: the caller's promise.
        let all = unsafe { from.cast::<[f16; 8]>().read_unaligned() };
        all.map(Element::to_f32)
    }
}

/// AVX2 with FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub struct Avx2;

#[cfg(target_arch = "x86_64")]
// SAFETY (in the functions): instructions and pointers are the caller's promise.
unsafe impl Lanes for Avx2 {
    type V = __m256;
    const N: usize = 8;
    #[inline(always)]
    unsafe fn zero() -> Self::V {
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(v: Self::V, to: *mut f32) {
        unsafe { _mm256_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, sum: Self::V) -> Self::V {
        unsafe { _mm256_fmadd_ps(a, b, sum) }
    }
    #[inline(always)]
    unsafe fn sums(v: [Self::V; 8]) -> [f32; 8] {
        unsafe { sums_of_eight(v) }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn load_even(from: *const bf16) -> Self::V {
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_odd(from: *const bf16) -> Self::V {
        unsafe {
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(from.cast()), high))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::V {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
}

/// AVX-512.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub struct Avx512;

#[cfg(target_arch = "x86_64")]
// SAFETY (in the functions): instructions and pointers are the caller's promise.
unsafe impl Lanes for Avx512 {
    type V = __m512;
    const N: usize = 16;
    #[inline(always)]
    unsafe fn zero() -> Self::V {
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(v: Self::V, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, sum: Self::V) -> Self::V {
        unsafe { _mm512_fmadd_ps(a, b, sum) }
    }
    #[inline(always)]
    unsafe fn sums(v: [Self::V; 8]) -> [f32; 8] {
        unsafe {
            // A loop: a closure would not be compiled with these instructions.
            let mut halved = [_mm256_setzero_ps(); 8];
            for (half, v) in halved.iter_mut().zip(v) {
                *half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            }
            sums_of_eight(halved)
        }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn load_even(from: *const bf16) -> Self::V {
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_odd(from: *const bf16) -> Self::V {
        unsafe {
            let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(from.cast()), high))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::V {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
}

/// The sum of each of eight vectors of eight, by pairwise additions across them.
///
/// # Safety
/// The processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn sums_of_eight(v: [__m256; 8]) -> [f32; 8] {
    // SAFETY: the caller's promise; `all` is as large as what is stored.
    unsafe {
        let low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
        let high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
        // Each half of `low` holds parts of the sums 0 to 3, of `high` of 4 to 7.
        let first = _mm256_permute2f128_ps::<0x20>(low, high);
        let second = _mm256_permute2f128_ps::<0x31>(low, high);
        let mut all = [0f32; 8];
        _mm256_storeu_ps(all.as_mut_ptr(), _mm256_add_ps(first, second));
        all
    }
}

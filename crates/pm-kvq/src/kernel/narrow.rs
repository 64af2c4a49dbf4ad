//! Narrower rows in the place of wider ones: halving of codes, and the first step from numbers to codes of 8 bits.
//!
//! Both stream through a page: what is written never passes what is still to be read. The page's second half is free
//! afterwards.

use half::{bf16, f16};
use nics_kernels::{Element, Isa, Kind};

use crate::shrink::{Shift, shrink_codes};
use crate::{Bits, pack};

/// Halves the width of codes in the native layout by the equivalent right shift ([`crate::shrink`]):
/// `q' = ⌊(q + 2^(h−1)) / (2^h + 1)⌋`, `s' = (2^h + 1) s`. Zeros stay as they are. `from`: 8 or 4 bits; rows have `head_dim`
/// codes.
///
/// # Panics
/// Another width, or `packed` is not whole rows.
pub fn halve(from: Bits, head_dim: usize, packed: &mut [u8], scales: &mut [f32]) {
    halve_with(Isa::detect(), from, head_dim, packed, scales);
}

/// [`halve`] with chosen instructions.
///
/// # Panics
/// As [`halve`], and when the processor lacks the instructions.
pub fn halve_with(isa: Isa, from: Bits, head_dim: usize, packed: &mut [u8], scales: &mut [f32]) {
    isa.assert_available();
    let row = from.bytes(head_dim);
    assert!(row > 0 && packed.len().is_multiple_of(row), "{} bytes are no rows of {row}", packed.len());
    let factor = match from {
        Bits::B8 => 17.0,
        Bits::B4 => 5.0,
        Bits::B2 | Bits::B16 => panic!("codes of {} bits are not halved in place", from.get()),
    };
    for scale in scales {
        *scale *= factor;
    }
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx2 {
        // SAFETY: the processor has AVX2, as asserted above. Runs fill rows, and `packed` is whole rows.
        match (from, pack::run(Bits::B4, head_dim), pack::run(Bits::B2, head_dim)) {
            (Bits::B8, 32, _) => return unsafe { x86::eight_to_four(packed) },
            (Bits::B4, 32, 128) => return unsafe { x86::four_to_two_of_128(packed) },
            (Bits::B4, 32, 64) => return unsafe { x86::four_to_two_of_64(packed) },
            (Bits::B4, 32, 32) => return unsafe { x86::four_to_two_of_32(packed) },
            _ => {}
        }
    }
    shrink_codes(Shift::Equivalent, from, head_dim, packed);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    #[allow(clippy::wildcard_imports)] // Intrinsics carry their prefix.
    use std::arch::x86_64::*;

    /// Runs of 32 bytes become 16 bytes: codes `j` and `j + 16`.
    ///
    /// # Safety
    /// `packed` is whole runs.
    #[target_feature(enable = "avx2")]
    pub unsafe fn eight_to_four(packed: &mut [u8]) {
        // (q + 8) / 17 = 241 (q + 8) / 4096 for every q; it fits 16 bits.
        let narrow = |sixteen: __m128i| {
            let q = _mm256_add_epi16(_mm256_cvtepu8_epi16(sixteen), _mm256_set1_epi16(8));
            _mm256_srli_epi16::<12>(_mm256_mullo_epi16(q, _mm256_set1_epi16(241)))
        };
        let (runs, at) = (packed.len() / 32, packed.as_mut_ptr());
        for run in 0..runs {
            // SAFETY: the run is inside; the write ends where the next read begins, or before.
            unsafe {
                let from = at.add(run * 32);
                let low = narrow(_mm_loadu_si128(from.cast()));
                let high = narrow(_mm_loadu_si128(from.add(16).cast()));
                let both = _mm256_or_si256(low, _mm256_slli_epi16::<4>(high));
                // Packing works in halves: the two quarters that matter are the first and the third.
                let bytes = _mm256_permute4x64_epi64::<0b00_00_10_00>(_mm256_packus_epi16(both, both));
                _mm_storeu_si128(at.add(run * 16).cast(), _mm256_castsi256_si128(bytes));
            }
        }
    }

    /// Codes of 2 bits for codes of 4 bits, times `1 << shift`.
    #[target_feature(enable = "avx2")]
    fn table(shift: u32) -> __m128i {
        let mut table = [0u8; 16];
        for (q, to) in table.iter_mut().enumerate() {
            *to = ((q as u8 + 2) / 5) << shift;
        }
        // SAFETY: sixteen bytes.
        unsafe { _mm_loadu_si128(table.as_ptr().cast()) }
    }

    /// Four runs of 16 bytes become 32 bytes: codes `j`, `j + 32`, `j + 64`, `j + 96`.
    ///
    /// # Safety
    /// `packed` is whole sets of four runs.
    #[target_feature(enable = "avx2")]
    pub unsafe fn four_to_two_of_128(packed: &mut [u8]) {
        let first = _mm256_set_m128i(table(2), table(0));
        let second = _mm256_set_m128i(table(6), table(4));
        let nibble = _mm256_set1_epi8(15);
        let (sets, at) = (packed.len() / 64, packed.as_mut_ptr());
        for set in 0..sets {
            // SAFETY: the set is inside; the writes end where the next read begins, or before.
            unsafe {
                let a = _mm256_loadu_si256(at.add(set * 64).cast());
                let b = _mm256_loadu_si256(at.add(set * 64 + 32).cast());
                let low = _mm256_or_si256(
                    _mm256_shuffle_epi8(first, _mm256_and_si256(a, nibble)),
                    _mm256_shuffle_epi8(second, _mm256_and_si256(b, nibble)),
                );
                let high = _mm256_or_si256(
                    _mm256_shuffle_epi8(first, _mm256_and_si256(_mm256_srli_epi16::<4>(a), nibble)),
                    _mm256_shuffle_epi8(second, _mm256_and_si256(_mm256_srli_epi16::<4>(b), nibble)),
                );
                let bytes = _mm256_or_si256(
                    _mm256_permute2x128_si256::<0x20>(low, high),
                    _mm256_permute2x128_si256::<0x31>(low, high),
                );
                _mm256_storeu_si256(at.add(set * 32).cast(), bytes);
            }
        }
    }

    /// Two runs of 16 bytes become 16 bytes: codes `j`, `j + 16`, `j + 32`, `j + 48`.
    ///
    /// # Safety
    /// `packed` is whole sets of two runs.
    #[target_feature(enable = "avx2")]
    pub unsafe fn four_to_two_of_64(packed: &mut [u8]) {
        let [t0, t2, t4, t6] = [table(0), table(2), table(4), table(6)];
        let nibble = _mm_set1_epi8(15);
        let (sets, at) = (packed.len() / 32, packed.as_mut_ptr());
        for set in 0..sets {
            // SAFETY: as above.
            unsafe {
                let a = _mm_loadu_si128(at.add(set * 32).cast());
                let b = _mm_loadu_si128(at.add(set * 32 + 16).cast());
                let a = _mm_or_si128(
                    _mm_shuffle_epi8(t0, _mm_and_si128(a, nibble)),
                    _mm_shuffle_epi8(t2, _mm_and_si128(_mm_srli_epi16::<4>(a), nibble)),
                );
                let b = _mm_or_si128(
                    _mm_shuffle_epi8(t4, _mm_and_si128(b, nibble)),
                    _mm_shuffle_epi8(t6, _mm_and_si128(_mm_srli_epi16::<4>(b), nibble)),
                );
                _mm_storeu_si128(at.add(set * 16).cast(), _mm_or_si128(a, b));
            }
        }
    }

    /// A run of 16 bytes becomes 8 bytes: codes `j`, `j + 8`, `j + 16`, `j + 24`.
    ///
    /// # Safety
    /// `packed` is whole runs.
    #[target_feature(enable = "avx2")]
    pub unsafe fn four_to_two_of_32(packed: &mut [u8]) {
        // The low nibbles become bits 0 and 2 of a byte's pair, the high ones bits 4 and 6.
        let (t0, t4) = (table(0), table(4));
        let nibble = _mm_set1_epi8(15);
        let (runs, at) = (packed.len() / 16, packed.as_mut_ptr());
        for run in 0..runs {
            // SAFETY: as above.
            unsafe {
                let x = _mm_loadu_si128(at.add(run * 16).cast());
                let pairs = _mm_or_si128(
                    _mm_shuffle_epi8(t0, _mm_and_si128(x, nibble)),
                    _mm_shuffle_epi8(t4, _mm_and_si128(_mm_srli_epi16::<4>(x), nibble)),
                );
                // Bytes `j + 8` two bits further up; nothing reaches the neighbouring byte.
                let upper = _mm_slli_epi16::<2>(_mm_srli_si128::<8>(pairs));
                _mm_storel_epi64(at.add(run * 8).cast(), _mm_or_si128(pairs, upper));
            }
        }
    }
}

/// Turns rows of numbers of half precision into codes of 8 bits in their place, group by group: `s = clamp((max − min) / 255,
/// 1e-5, 1e5)`, `z = −min`, `q = clamp(round((x + z) / s), 0, 255)` with ties to even, all in float32. `page` holds
/// `[tokens, head_dim]` numbers of `kind`; its first half holds the codes afterwards.
///
/// # Panics
/// When lengths do not fit, `kind` is f32, or `group` does not divide `head_dim`.
pub fn quantize(
    kind: Kind,
    head_dim: usize,
    group: usize,
    page: &mut [u8],
    scales: &mut [f32],
    zeros: &mut [f32],
) {
    quantize_with(Isa::detect(), kind, head_dim, group, page, scales, zeros);
}

/// [`quantize`] with chosen instructions.
///
/// # Panics
/// As [`quantize`], and when the processor lacks the instructions.
pub fn quantize_with(
    isa: Isa,
    kind: Kind,
    head_dim: usize,
    group: usize,
    page: &mut [u8],
    scales: &mut [f32],
    zeros: &mut [f32],
) {
    isa.assert_available();
    assert!(group > 0 && head_dim.is_multiple_of(group), "groups of {group} do not divide {head_dim}");
    assert!(page.len().is_multiple_of(2 * head_dim), "{} bytes are no rows of {head_dim}", page.len());
    let groups = page.len() / 2 / group;
    assert!(scales.len() == groups && zeros.len() == groups, "not {groups} scales and zeros");
    match kind {
        Kind::Bf16 => each::<bf16>(isa, group, page, scales, zeros),
        Kind::F16 => each::<f16>(isa, group, page, scales, zeros),
        Kind::F32 => panic!("rows of f32 do not become codes of 8 bits in their place"),
    }
}

/// A number in two bytes.
trait Two: Element {
    fn of(bytes: [u8; 2]) -> Self;
}

impl Two for bf16 {
    #[inline(always)]
    fn of(bytes: [u8; 2]) -> Self {
        Self::from_le_bytes(bytes)
    }
}

impl Two for f16 {
    #[inline(always)]
    fn of(bytes: [u8; 2]) -> Self {
        Self::from_le_bytes(bytes)
    }
}

fn each<T: Two>(isa: Isa, group: usize, page: &mut [u8], scales: &mut [f32], zeros: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
        fn avx512<T: Two>(group: usize, page: &mut [u8], scales: &mut [f32], zeros: &mut [f32]) {
            groups::<T>(group, page, scales, zeros);
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<T: Two>(group: usize, page: &mut [u8], scales: &mut [f32], zeros: &mut [f32]) {
            groups::<T>(group, page, scales, zeros);
        }
        match isa {
            // SAFETY: the processor has the instructions, as asserted at the entry.
            Isa::Avx512 => return unsafe { avx512::<T>(group, page, scales, zeros) },
            // SAFETY: as above.
            Isa::Avx2 => return unsafe { avx2::<T>(group, page, scales, zeros) },
            Isa::Scalar => {}
        }
    }
    let _ = isa;
    groups::<T>(group, page, scales, zeros);
}

#[inline(always)]
fn groups<T: Two>(group: usize, page: &mut [u8], scales: &mut [f32], zeros: &mut [f32]) {
    const LANES: usize = 16;
    /// Adding it rounds to a whole number, which then stands in the low bits.
    const ROUND: f32 = 8_388_608.0; // 2^23
    let mut x = vec![0f32; group];
    for (i, (scale, zero)) in scales.iter_mut().zip(zeros).enumerate() {
        for (x, bytes) in x.iter_mut().zip(page[i * 2 * group..].chunks_exact(2)) {
            *x = T::of([bytes[0], bytes[1]]).to_f32();
        }
        let (mut min, mut max) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
        for part in x.chunks(LANES) {
            for ((min, max), x) in min.iter_mut().zip(&mut max).zip(part) {
                *min = if *x < *min { *x } else { *min };
                *max = if *x > *max { *x } else { *max };
            }
        }
        let min = min.into_iter().fold(f32::INFINITY, f32::min);
        let max = max.into_iter().fold(f32::NEG_INFINITY, f32::max);
        (*scale, *zero) = (((max - min) / 255.0).clamp(1e-5, 1e5), -min);
        for (code, x) in page[i * group..][..group].iter_mut().zip(&x) {
            let q = ((x + *zero) / *scale).clamp(0.0, 255.0);
            *code = (q + ROUND).to_bits() as u8;
        }
    }
}

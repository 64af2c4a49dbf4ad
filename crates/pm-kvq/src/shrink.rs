//! Halving the width of codes: the equivalent right shift (arXiv 2505.18610) and the paper's two ablations.
//!
//! From width `2h` to `h`:
//!
//! ```text
//! q' = ((2^{2h} − 2^h + 1)·(q + 2^{h−1})) >> 3h,   s' = (2^h + 1)·s,   z' = z
//! ```
//!
//! Since `(2^h + 1)(2^{2h} − 2^h + 1) = 2^{3h} + 1`, that is `q / (2^h + 1)` rounded to the nearest for every code; the
//! divisor is odd, so there are no ties. The smallest and the largest code map to the smallest and the largest, so a group
//! keeps its range to the bit.

use serde::{Deserialize, Serialize};

use crate::Bits;
use crate::pack;

/// How codes of half the width are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shift {
    /// To the nearest level that keeps the range: the method's own.
    #[default]
    Equivalent,
    /// `q >> h` on levels that keep the range: values come out too small.
    Direct,
    /// `q >> h`, each new level in the middle of the `2^h` old ones that became it.
    Modified,
}

/// Code of half the width of `from` for a code of width `from`.
///
/// # Panics
/// From 2 bits, which have no half.
pub const fn code(shift: Shift, from: Bits, q: u32) -> u32 {
    let h = half_bits(from);
    match shift {
        // The largest product, of 16 bits, is 4,286,546,303: it fits u32, not i32.
        Shift::Equivalent => (((1 << (2 * h)) - (1 << h) + 1) * (q + (1 << (h - 1)))) >> (3 * h),
        Shift::Direct | Shift::Modified => q >> h,
    }
}

/// Scale and zero that go with the codes of half the width of `from`.
///
/// # Panics
/// From 2 bits, which have no half.
pub fn parameters(shift: Shift, from: Bits, scale: f32, zero: f32) -> (f32, f32) {
    let h = half_bits(from);
    let levels = (1u32 << h) as f32;
    match shift {
        Shift::Equivalent | Shift::Direct => (scale * (levels + 1.0), zero),
        Shift::Modified => (scale * levels, zero - scale * (levels - 1.0) / 2.0),
    }
}

const fn half_bits(from: Bits) -> u32 {
    match from {
        Bits::B2 => panic!("2 bits have no half"),
        other => other.get() / 2,
    }
}

/// Codes of 4 bits for all codes of 8 bits.
pub const fn table_8_to_4(shift: Shift) -> [u8; 256] {
    let mut table = [0; 256];
    let mut q = 0;
    while q < 256 {
        table[q] = code(shift, Bits::B8, q as u32) as u8;
        q += 1;
    }
    table
}

/// For a byte of two 4-bit codes, the two 2-bit codes in the low half of each nibble.
pub const fn table_4_to_2(shift: Shift) -> [u8; 256] {
    let mut table = [0; 256];
    let mut q = 0u32;
    while q < 256 {
        table[q as usize] = (code(shift, Bits::B4, q & 15) | code(shift, Bits::B4, q >> 4) << 4) as u8;
        q += 1;
    }
    table
}

/// Halves the width of codes in the native layout ([`crate::pack`]) in place: the first half of `packed` then holds them,
/// its second half is free. `from` is 8 or 4 bits; rows have `head_dim` codes.
///
/// # Panics
/// Another width, or `packed` is not whole rows.
pub fn shrink_codes(shift: Shift, from: Bits, head_dim: usize, packed: &mut [u8]) {
    let row = from.bytes(head_dim);
    assert!(row > 0 && packed.len().is_multiple_of(row), "{} bytes are no rows of {row}", packed.len());
    match from {
        Bits::B8 => {
            let table = table_8_to_4(shift);
            let run = pack::run(Bits::B4, head_dim);
            let stride = run / 2;
            for r in 0..packed.len() / run {
                // Byte `r·stride + j` is written after every read at or below it.
                for j in 0..stride {
                    let [low, high] = [j, j + stride].map(|j| table[packed[r * run + j] as usize]);
                    packed[r * stride + j] = low | high << 4;
                }
            }
        }
        Bits::B4 => {
            let table = table_4_to_2(shift);
            let (run4, run2) = (pack::run(Bits::B4, head_dim), pack::run(Bits::B2, head_dim));
            let (stride4, stride2) = (run4 / 2, run2 / 4);
            let mut old = [0; 64]; // a run of 128 codes of 4 bits
            let old = &mut old[..run2 / 2];
            for r in 0..packed.len() / (run2 / 2) {
                for (to, from) in old.iter_mut().zip(&packed[r * (run2 / 2)..]) {
                    *to = table[*from as usize];
                }
                for j in 0..stride2 {
                    let byte = (0..4).fold(0, |byte, p| {
                        let i = j + p * stride2; // code of the run
                        let (run, within) = (i / run4, i % run4);
                        let pair = old[run * stride4 + within % stride4];
                        let code = if within < stride4 { pair & 3 } else { pair >> 4 };
                        byte | code << (2 * p)
                    });
                    packed[r * stride2 + j] = byte;
                }
            }
        }
        Bits::B2 | Bits::B16 => panic!("codes of {} bits are not shrunk in place", from.get()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_shift_rounds_to_the_nearest_level() {
        for from in [Bits::B16, Bits::B8, Bits::B4] {
            let divisor = (1u32 << (from.get() / 2)) + 1;
            for q in 0..=from.levels() {
                assert_eq!(code(Shift::Equivalent, from, q), (q + divisor / 2) / divisor, "{from:?} {q}");
            }
        }
    }

    #[test]
    fn a_modified_level_is_the_mean_of_the_old_ones() {
        let (s, z) = (0.25f32, 1.5f32);
        let (s4, z4) = parameters(Shift::Modified, Bits::B8, s, z);
        for level in 0..16u32 {
            let old: f32 = (0..16).map(|i| (level * 16 + i) as f32 * s - z).sum::<f32>() / 16.0;
            assert!((level as f32 * s4 - z4 - old).abs() < 1e-4);
        }
    }

    proptest! {
        #[test]
        fn in_place_equals_code_by_code(
            d in prop::sample::select(vec![4usize, 12, 48, 64, 80, 96, 128, 256]),
            rows in 1usize..4,
            from in prop::sample::select(vec![Bits::B4, Bits::B8]),
            shift in prop::sample::select(vec![Shift::Equivalent, Shift::Direct, Shift::Modified]),
            seed: u8,
        ) {
            let to = from.half().unwrap();
            let codes: Vec<u8> = (0..rows * d)
                .map(|i| (i as u8).wrapping_mul(73).wrapping_add(seed) & from.levels() as u8)
                .collect();
            let mut packed = vec![0; from.bytes(codes.len())];
            pack::pack(from, d, &codes, &mut packed);
            shrink_codes(shift, from, d, &mut packed);
            let mut found = vec![0; codes.len()];
            pack::unpack(to, d, &packed[..to.bytes(codes.len())], &mut found);
            let expected: Vec<u8> = codes.iter().map(|q| code(shift, from, u32::from(*q)) as u8).collect();
            prop_assert_eq!(found, expected);
        }
    }
}

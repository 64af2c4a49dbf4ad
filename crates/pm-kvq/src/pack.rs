//! Codes in memory.
//!
//! Two layouts. The *official* one ([`words`], [`codes`]) is for exchange with the reference: int16 words, the first code in
//! the most significant bits. The *native* one ([`pack`], [`unpack`]) is what the cache stores and the kernels read, chosen
//! so that unpacking needs a mask and a shift alone: codes of a row (one token of one head) stand in runs, and byte `j` of
//! a run holds codes a fixed stride apart, the first in its lowest bits.
//!
//! | width | run | byte `j` holds |
//! |---|---|---|
//! | 8 bits | 1 code | code `j` |
//! | 4 bits | 32 codes in 16 bytes | codes `j`, `j + 16` |
//! | 2 bits | 128 codes in 32 bytes | codes `j`, `j + 32`, `j + 64`, `j + 96` |
//!
//! A head whose width has no such divisor takes the largest power of two that divides it as its run ([`run`]); the stride is
//! then a half or a quarter of that.

use tch::{Kind, Tensor};

use crate::{Bits, Error, Result};

/// Codes of a run in the native layout, for rows of `head_dim` codes.
pub const fn run(bits: Bits, head_dim: usize) -> usize {
    let largest = match bits {
        Bits::B8 | Bits::B16 => return 1,
        Bits::B4 => 32,
        Bits::B2 => 128,
    };
    // The largest power of two in `head_dim`.
    let divisor = head_dim & head_dim.wrapping_neg();
    if divisor < largest { divisor } else { largest }
}

/// Writes codes of 8, 4 or 2 bits in the native layout.
///
/// # Panics
/// When `codes` are not whole rows, `packed` has not [`Bits::bytes`] of them, or the width is 16 bits: those are stored as
/// half-precision numbers, not as codes.
pub fn pack(bits: Bits, head_dim: usize, codes: &[u8], packed: &mut [u8]) {
    check(bits, head_dim, codes.len(), packed.len());
    if bits == Bits::B8 {
        return packed.copy_from_slice(codes);
    }
    let (run, per_byte) = (run(bits, head_dim), 8 / bits.get() as usize);
    let stride = run / per_byte;
    for (codes, packed) in codes.chunks_exact(run).zip(packed.chunks_exact_mut(stride)) {
        for (j, byte) in packed.iter_mut().enumerate() {
            *byte = (0..per_byte).fold(0, |byte, p| byte | codes[j + p * stride] << (p as u32 * bits.get()));
        }
    }
}

/// Reads codes of 8, 4 or 2 bits from the native layout.
///
/// # Panics
/// As [`pack`].
pub fn unpack(bits: Bits, head_dim: usize, packed: &[u8], codes: &mut [u8]) {
    check(bits, head_dim, codes.len(), packed.len());
    if bits == Bits::B8 {
        return codes.copy_from_slice(packed);
    }
    let (run, per_byte) = (run(bits, head_dim), 8 / bits.get() as usize);
    let stride = run / per_byte;
    let mask = bits.levels() as u8;
    for (codes, packed) in codes.chunks_exact_mut(run).zip(packed.chunks_exact(stride)) {
        for (j, byte) in packed.iter().enumerate() {
            for p in 0..per_byte {
                codes[j + p * stride] = byte >> (p as u32 * bits.get()) & mask;
            }
        }
    }
}

fn check(bits: Bits, head_dim: usize, codes: usize, bytes: usize) {
    assert!(bits != Bits::B16, "16-bit values are not packed as codes");
    assert!(head_dim > 0 && head_dim.is_multiple_of(4), "rows of {head_dim} codes do not fill bytes");
    assert!(
        codes.is_multiple_of(head_dim) && bytes == bits.bytes(codes),
        "{codes} codes of {} bits in {bytes} bytes, rows of {head_dim}",
        bits.get()
    );
}

/// Codes in the official layout: `[.., d]` of any integer dtype to int16 `[.., d · bits / 16]`,
/// `word = Σ_i q_i << (16 − bits·(i + 1))`.
///
/// # Errors
/// A last axis that does not fill words.
pub fn words(codes: &Tensor, bits: Bits) -> Result<Tensor> {
    let per_word = 16 / i64::from(bits.get());
    let mut shape = codes.size();
    let last = shape.pop().unwrap_or(1);
    if last % per_word != 0 {
        return Err(Error::Input(format!(
            "{last} codes of {} bits do not fill words of {per_word} codes",
            bits.get()
        )));
    }
    shape.push(last / per_word);
    let shifts: Vec<i64> = (1..=per_word).map(|i| 1 << (16 - i64::from(bits.get()) * i)).collect();
    let shifts = Tensor::f_from_slice(&shifts)?.f_to_device(codes.device())?;
    let words = codes.f_to_kind(Kind::Int64)?.f_reshape([-1, per_word])?.f_mul(&shifts)?;
    let words = words.f_sum_dim_intlist([-1].as_slice(), false, Kind::Int64)?;
    // Words from 0x8000 on are the negative int16 numbers.
    let words = words.f_add_scalar(0x8000)?.f_remainder(0x1_0000)?.f_sub_scalar(0x8000)?;
    Ok(words.f_to_kind(Kind::Int16)?.f_reshape(&shape)?)
}

/// Codes, int32 `[.., d]`, from words of the official layout, int16 `[.., d · bits / 16]`.
pub fn codes(words: &Tensor, bits: Bits) -> Result<Tensor> {
    let per_word = 16 / i64::from(bits.get());
    let mut shape = words.size();
    if let Some(last) = shape.last_mut() {
        *last *= per_word;
    }
    let divisors: Vec<i64> = (1..=per_word).map(|i| 1 << (16 - i64::from(bits.get()) * i)).collect();
    let divisors = Tensor::f_from_slice(&divisors)?.f_to_device(words.device())?;
    let words = words.f_to_kind(Kind::Int64)?.f_remainder(0x1_0000)?.f_unsqueeze(-1)?;
    let codes = words.f_div_tensor_mode(&divisors, "floor")?.f_remainder(1i64 << bits.get())?;
    Ok(codes.f_to_kind(Kind::Int)?.f_reshape(&shape)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bytes_hold_the_codes_of_the_table() {
        let codes: Vec<u8> = (0..128).map(|i| i % 4).collect();
        let mut four = [0; 64];
        pack(Bits::B4, 128, &codes, &mut four);
        assert_eq!(four[16 + 5], codes[32 + 5] | codes[32 + 5 + 16] << 4);
        let codes: Vec<u8> = (0..128).map(|i| (i / 32) as u8).collect();
        let mut two = [0; 32];
        pack(Bits::B2, 128, &codes, &mut two);
        assert!(two.iter().all(|b| *b == 0b11_10_01_00));
    }

    proptest! {
        #[test]
        fn unpacking_undoes_packing(
            d in prop::sample::select(vec![4usize, 12, 48, 64, 80, 96, 128, 256]),
            rows in 1usize..4,
            bits in prop::sample::select(vec![Bits::B2, Bits::B4, Bits::B8]),
            seed: u8,
        ) {
            let codes: Vec<u8> = (0..rows * d)
                .map(|i| (i as u8).wrapping_mul(37).wrapping_add(seed) & bits.levels() as u8)
                .collect();
            let (mut packed, mut back) = (vec![0; bits.bytes(codes.len())], vec![0; codes.len()]);
            pack(bits, d, &codes, &mut packed);
            unpack(bits, d, &packed, &mut back);
            prop_assert_eq!(codes, back);
        }
    }
}

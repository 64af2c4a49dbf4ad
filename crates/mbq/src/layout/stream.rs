//! Integers of a few bits one behind the other in words, and matrices of them.

use tch::{Kind, Tensor};

use crate::{Error, Result};

/// Rows and columns of a block in which a matrix is transposed: 4 KiB, so that both sides stay in the cache.
const BLOCK: usize = 64;

/// Integers of a matrix by row.
pub(super) struct Matrix {
    pub rows: usize,
    pub columns: usize,
    pub values: Vec<u8>,
}

impl Matrix {
    pub fn of(t: &Tensor) -> Result<Self> {
        let (rows, columns) = t.size2()?;
        let flat = t.f_to_kind(Kind::Uint8)?.f_contiguous()?.f_view([-1])?;
        Ok(Self { rows: rows as usize, columns: columns as usize, values: Vec::try_from(flat)? })
    }

    pub fn tensor(&self) -> Result<Tensor> {
        Ok(Tensor::f_from_slice(&self.values)?.f_view([self.rows as i64, self.columns as i64])?)
    }

    pub fn transposed(&self) -> Self {
        let (rows, columns) = (self.rows, self.columns);
        let mut values = vec![0; self.values.len()];
        for r0 in (0..rows).step_by(BLOCK) {
            for c0 in (0..columns).step_by(BLOCK) {
                for r in r0..rows.min(r0 + BLOCK) {
                    let row = &self.values[r * columns..][..columns];
                    for c in c0..columns.min(c0 + BLOCK) {
                        values[c * rows + r] = row[c];
                    }
                }
            }
        }
        Self { rows: columns, columns: rows, values }
    }

    /// The rows, none of a matrix without columns.
    pub fn each_row(&self) -> impl Iterator<Item = &[u8]> {
        self.values.chunks(self.columns.max(1))
    }
}

/// Words as a tensor, the same bits with a sign.
pub(super) fn words(rows: usize, columns: usize, words: &[u32]) -> Result<Tensor> {
    let signed: Vec<i32> = words.iter().map(|w| w.cast_signed()).collect();
    Ok(Tensor::f_from_slice(&signed)?.f_view([rows as i64, columns as i64])?)
}

/// The bits of a tensor of words.
pub(super) fn unsigned(t: &Tensor) -> Result<Vec<u32>> {
    let signed = Vec::<i32>::try_from(t.f_to_kind(Kind::Int)?.f_contiguous()?.f_view([-1])?)?;
    Ok(signed.into_iter().map(i32::cast_unsigned).collect())
}

/// Values of `bits` bits, one behind the other from the lowest bit on, in 32-bit words; what is left of the last is zero.
pub fn stream(values: &[u8], bits: u8) -> Vec<u32> {
    let bits = usize::from(bits);
    let mut out = vec![0u32; (values.len() * bits).div_ceil(32)];
    for (i, v) in values.iter().enumerate() {
        let (word, shift) = (i * bits / 32, i * bits % 32);
        let wide = u64::from(*v) << shift;
        out[word] |= wide as u32;
        if shift + bits > 32 {
            out[word + 1] |= (wide >> 32) as u32;
        }
    }
    out
}

/// The first `n` values of a [`stream`].
pub fn unstream(words: &[u32], bits: u8, n: usize) -> Vec<u8> {
    let bits = usize::from(bits);
    let at = |word: usize| u64::from(words.get(word).copied().unwrap_or(0));
    (0..n)
        .map(|i| {
            let (word, shift) = (i * bits / 32, i * bits % 32);
            let wide = at(word) | at(word + 1) << 32;
            (wide >> shift) as u8 & (u8::MAX >> (8 - bits))
        })
        .collect()
}

/// Refuses numbers of rows or columns that do not fill words.
pub(super) fn filled(what: &str, n: usize, by: usize) -> Result<()> {
    if n.is_multiple_of(by) {
        return Ok(());
    }
    Err(Error::Input(format!("{n} {what} do not fill words of {by}; this layout cannot hold the layer")))
}

/// Streams along the rows of a matrix: `[rows, columns · bits / 32]`.
pub(super) fn streams(m: &Matrix, bits: u8, what: &str) -> Result<Tensor> {
    filled(what, m.columns, 32 / gcd(32, usize::from(bits)))?;
    let all: Vec<u32> = m.each_row().flat_map(|row| stream(row, bits)).collect();
    words(m.rows, m.columns * usize::from(bits) / 32, &all)
}

/// The matrix of `columns` columns that [`streams`] packed.
pub(super) fn from_streams(t: &Tensor, bits: u8, columns: usize) -> Result<Matrix> {
    let (rows, n) = t.size2()?;
    let all = unsigned(t)?;
    let values = all.chunks(n.max(1) as usize).flat_map(|row| unstream(row, bits, columns)).collect();
    Ok(Matrix { rows: rows as usize, columns, values })
}

/// Streams along the rows of a matrix in whole bytes: `[rows, columns · bits / 8]`, uint8.
pub(super) fn byte_streams(m: &Matrix, bits: u8) -> Result<Tensor> {
    let bytes = m.columns * usize::from(bits) / 8;
    if !(m.columns * usize::from(bits)).is_multiple_of(8) {
        return Err(Error::Input(format!(
            "{} inputs of {bits} bits do not fill bytes; this layout cannot hold the layer",
            m.columns
        )));
    }
    let mut all = Vec::with_capacity(m.rows * bytes);
    for row in m.each_row() {
        let words = stream(row, bits);
        let end = all.len() + bytes;
        all.extend(words.into_iter().flat_map(u32::to_le_bytes));
        all.truncate(end);
    }
    Ok(Tensor::f_from_slice(&all)?.f_view([m.rows as i64, bytes as i64])?)
}

/// The matrix that [`byte_streams`] packed.
pub(super) fn from_byte_streams(t: &Tensor, bits: u8) -> Result<Matrix> {
    let bytes = Matrix::of(t)?;
    let columns = bytes.columns * 8 / usize::from(bits);
    let mut values = Vec::with_capacity(bytes.rows * columns);
    for row in bytes.each_row() {
        let word = |four: &[u8]| {
            four.iter().enumerate().fold(0, |word, (i, byte)| word | u32::from(*byte) << (8 * i))
        };
        let words: Vec<u32> = row.chunks(4).map(word).collect();
        values.extend(unstream(&words, bits, columns));
    }
    Ok(Matrix { rows: bytes.rows, columns, values })
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_stream_comes_back(values in proptest::collection::vec(any::<u8>(), 0..100), bits in 2u8..=8) {
            let values: Vec<u8> = values.iter().map(|v| v & (u8::MAX >> (8 - bits))).collect();
            prop_assert_eq!(unstream(&stream(&values, bits), bits, values.len()), values);
        }
    }

    #[test]
    fn a_matrix_transposed_twice_is_itself() {
        for (rows, columns) in [(1, 1), (3, 130), (65, 64), (100, 7)] {
            let values: Vec<u8> = (0..rows * columns).map(|i| (i * 7 % 251) as u8).collect();
            let m = Matrix { rows, columns, values: values.clone() };
            let turned = m.transposed();
            assert_eq!(turned.values[rows * (columns - 1)], values[columns - 1]);
            assert_eq!(turned.transposed().values, values);
        }
    }
}

//! The layouts in which engines read quantized weights.
//!
//! | | AutoAWQ, 4 bits | GPTQ, 2, 3, 4 and 8 bits |
//! |---|---|---|
//! | `qweight` | `[in, out/8]`: nibble `i` of word `j` is output `8j + ORDER[i]` | `[in·b/32, out]`: a little-endian stream of `b` bits along `in` |
//! | `qzeros` | `[groups, out/8]`, likewise | `[groups, out·b/32]`: such a stream along `out` |
//! | `scales` | `[groups, out]`, float16 | the same |
//! | `g_idx` | | `[in]`: the group of each input |
//!
//! compressed-tensors, 4 and 8 bits: `weight_packed` `[out, in·b/32]`, a stream along `in`; `weight_zero_point`
//! `[out·b/32, groups]`, a stream along `out`; `weight_scale` `[out, groups]`; `weight_shape`, `[2]`.
//!
//! Words are int32. The first form of GPTQ stores zero points one too small; the second, which newer engines read, as they
//! are.

use tch::{Kind, Tensor};

use crate::quantize::QTensor;
use crate::{Error, Result};

/// Where AutoAWQ puts the eight outputs of a word.
pub const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// How a GPTQ file stores zero points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeros {
    /// Less one, within the width: checkpoint format `gptq`.
    LessOne,
    /// As they are: checkpoint format `gptq_v2`.
    Exact,
}

/// Packed tensors by their name below the linear layer's.
pub type Packed = Vec<(&'static str, Tensor)>;

/// Integers of a matrix by row.
struct Matrix {
    rows: usize,
    columns: usize,
    values: Vec<u8>,
}

impl Matrix {
    fn of(t: &Tensor) -> Result<Self> {
        let (rows, columns) = t.size2()?;
        let flat = t.f_to_kind(Kind::Uint8)?.f_contiguous()?.f_view([-1])?;
        Ok(Self { rows: rows as usize, columns: columns as usize, values: Vec::try_from(flat)? })
    }

    fn tensor(&self) -> Result<Tensor> {
        Ok(Tensor::f_from_slice(&self.values)?.f_view([self.rows as i64, self.columns as i64])?)
    }

    fn transposed(&self) -> Self {
        let mut values = vec![0; self.values.len()];
        for (r, row) in self.values.chunks(self.columns.max(1)).enumerate() {
            for (c, v) in row.iter().enumerate() {
                values[c * self.rows + r] = *v;
            }
        }
        Self { rows: self.columns, columns: self.rows, values }
    }
}

fn words(rows: usize, columns: usize, words: &[u32]) -> Result<Tensor> {
    // The same bits with a sign.
    let signed: Vec<i32> = words.iter().map(|w| w.cast_signed()).collect();
    Ok(Tensor::f_from_slice(&signed)?.f_view([rows as i64, columns as i64])?)
}

fn unsigned(t: &Tensor) -> Result<Vec<u32>> {
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
fn filled(what: &str, n: usize, by: usize) -> Result<()> {
    if n.is_multiple_of(by) {
        return Ok(());
    }
    Err(Error::Input(format!("{n} {what} do not fill words of {by}; this layout cannot hold the layer")))
}

/// AutoAWQ's words of a matrix `[rows, columns]`: `[rows, columns / 8]`.
fn nibbles(m: &Matrix) -> Result<Tensor> {
    filled("outputs", m.columns, 8)?;
    let word = |eight: &[u8]| {
        ORDER.iter().enumerate().fold(0u32, |word, (i, from)| word | u32::from(eight[*from] & 15) << (4 * i))
    };
    let all: Vec<u32> = m.values.chunks_exact(8).map(word).collect();
    words(m.rows, m.columns / 8, &all)
}

fn from_nibbles(t: &Tensor) -> Result<Matrix> {
    let (rows, words) = t.size2()?;
    let mut values = Vec::with_capacity((rows * words * 8) as usize);
    for word in unsigned(t)? {
        let mut eight = [0; 8];
        for (i, to) in ORDER.iter().enumerate() {
            eight[*to] = (word >> (4 * i)) as u8 & 15;
        }
        values.extend(eight);
    }
    Ok(Matrix { rows: rows as usize, columns: words as usize * 8, values })
}

fn scales(q: &QTensor) -> Result<Tensor> {
    let half = q.scale.f_to_kind(Kind::Half)?.f_transpose(0, 1)?.f_contiguous()?;
    if half.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
        return Err(Error::Input("a scale leaves the range of float16, which this layout stores".into()));
    }
    Ok(half)
}

/// A 4-bit weight as AutoAWQ's GEMM kernels read it.
///
/// # Errors
/// Outputs that do not fill words.
pub fn awq(q: &QTensor) -> Result<Packed> {
    Ok(vec![
        ("qweight", nibbles(&Matrix::of(&q.q)?.transposed())?),
        ("qzeros", nibbles(&Matrix::of(&q.zero)?.transposed())?),
        ("scales", scales(q)?),
    ])
}

/// The weight that [`awq`] packed, with the scales as they are stored.
pub fn from_awq(qweight: &Tensor, qzeros: &Tensor, scales: &Tensor) -> Result<QTensor> {
    Ok(QTensor {
        q: from_nibbles(qweight)?.transposed().tensor()?,
        zero: from_nibbles(qzeros)?.transposed().tensor()?,
        scale: scales.f_to_kind(Kind::Float)?.f_transpose(0, 1)?.f_contiguous()?,
    })
}

fn width(bits: u8) -> Result<()> {
    if matches!(bits, 2 | 3 | 4 | 8) {
        return Ok(());
    }
    Err(Error::Setting { field: "bits", found: bits.to_string(), expected: "2, 3, 4 or 8 in this layout" })
}

/// Streams along the rows of a matrix: `[rows, columns · bits / 32]`.
fn streams(m: &Matrix, bits: u8, what: &str) -> Result<Tensor> {
    filled(what, m.columns, 32 / gcd(32, usize::from(bits)))?;
    let all: Vec<u32> = m.values.chunks(m.columns.max(1)).flat_map(|row| stream(row, bits)).collect();
    words(m.rows, m.columns * usize::from(bits) / 32, &all)
}

fn from_streams(t: &Tensor, bits: u8) -> Result<Matrix> {
    let (rows, n) = t.size2()?;
    let columns = n as usize * 32 / usize::from(bits);
    let all = unsigned(t)?;
    let values = all.chunks(n.max(1) as usize).flat_map(|row| unstream(row, bits, columns)).collect();
    Ok(Matrix { rows: rows as usize, columns, values })
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A weight of `bits` bits as GPTQ's kernels read it.
///
/// # Errors
/// A width without such a layout; inputs or outputs that do not fill words.
pub fn gptq(q: &QTensor, bits: u8, zeros: Zeros) -> Result<Packed> {
    width(bits)?;
    let along = streams(&Matrix::of(&q.q)?, bits, "inputs")?; // [out, in·b/32]
    let mut zero = Matrix::of(&q.zero)?.transposed();
    if zeros == Zeros::LessOne {
        let mask = u8::MAX >> (8 - bits);
        zero.values.iter_mut().for_each(|z| *z = z.wrapping_sub(1) & mask);
    }
    let (input, groups) = (q.q.size2()?.1, q.scale.size2()?.1);
    let group = |i: i64| (i * groups / input.max(1)) as i32;
    Ok(vec![
        ("qweight", along.f_transpose(0, 1)?.f_contiguous()?),
        ("qzeros", streams(&zero, bits, "outputs")?),
        ("scales", scales(q)?),
        ("g_idx", Tensor::f_from_slice(&(0..input).map(group).collect::<Vec<_>>())?),
    ])
}

/// The weight that [`gptq`] packed, of which the groups lie one behind the other.
pub fn from_gptq(
    qweight: &Tensor,
    qzeros: &Tensor,
    scales: &Tensor,
    bits: u8,
    zeros: Zeros,
) -> Result<QTensor> {
    width(bits)?;
    let along = from_streams(&qweight.f_transpose(0, 1)?.f_contiguous()?, bits)?;
    let mut zero = from_streams(qzeros, bits)?;
    if zeros == Zeros::LessOne {
        let mask = u8::MAX >> (8 - bits);
        zero.values.iter_mut().for_each(|z| *z = z.wrapping_add(1) & mask);
    }
    Ok(QTensor {
        q: along.tensor()?,
        zero: zero.transposed().tensor()?,
        scale: scales.f_to_kind(Kind::Float)?.f_transpose(0, 1)?.f_contiguous()?,
    })
}

/// A weight of 4 or 8 bits as compressed-tensors' `pack-quantized` format has it, with scales of a dtype.
///
/// # Errors
/// Another width; inputs or outputs that do not fill words.
pub fn compressed(q: &QTensor, bits: u8, scales: Kind) -> Result<Packed> {
    if !matches!(bits, 4 | 8) {
        return Err(Error::Setting {
            field: "bits",
            found: bits.to_string(),
            expected: "4 or 8 in this layout",
        });
    }
    let (out, input) = q.q.size2()?;
    let zero = streams(&Matrix::of(&q.zero)?.transposed(), bits, "outputs")?;
    Ok(vec![
        ("weight_packed", streams(&Matrix::of(&q.q)?, bits, "inputs")?),
        ("weight_scale", q.scale.f_to_kind(scales)?),
        ("weight_zero_point", zero.f_transpose(0, 1)?.f_contiguous()?),
        ("weight_shape", Tensor::f_from_slice(&[out, input])?),
    ])
}

/// A weight by row, `[out, in·b/8]` bytes: the stream of each row. For 3 bits these are GPTQ's bytes.
///
/// # Errors
/// Rows that do not fill bytes.
pub fn rows(q: &QTensor, bits: u8) -> Result<Tensor> {
    let m = Matrix::of(&q.q)?;
    filled("bits of a row", m.columns * usize::from(bits), 8)?;
    let bytes = m.columns * usize::from(bits) / 8;
    let row = |row: &[u8]| -> Vec<u8> {
        let all: Vec<u8> = stream(row, bits).into_iter().flat_map(u32::to_le_bytes).collect();
        all[..bytes].to_vec()
    };
    let all: Vec<u8> = m.values.chunks(m.columns.max(1)).flat_map(row).collect();
    Ok(Tensor::f_from_slice(&all)?.f_view([m.rows as i64, bytes as i64])?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::QuantSpec;
    use crate::quantize::quantize_group;
    use proptest::prelude::*;
    use tch::Device;

    proptest! {
        #[test]
        fn a_stream_comes_back(values in proptest::collection::vec(any::<u8>(), 0..100), bits in 2u8..=8) {
            let values: Vec<u8> = values.iter().map(|v| v & (u8::MAX >> (8 - bits))).collect();
            prop_assert_eq!(unstream(&stream(&values, bits), bits, values.len()), values);
        }
    }

    #[test]
    fn what_is_packed_comes_back() {
        tch::manual_seed(7);
        let w = Tensor::randn([32, 64], (Kind::Float, Device::Cpu));
        for bits in [2, 3, 4, 8] {
            let q = quantize_group(&w, &QuantSpec::weights(bits, 32)).unwrap();
            for zeros in [Zeros::LessOne, Zeros::Exact] {
                let packed = gptq(&q, bits, zeros).unwrap();
                let back = from_gptq(&packed[0].1, &packed[1].1, &packed[2].1, bits, zeros).unwrap();
                assert!(back.q.equal(&q.q) && back.zero.equal(&q.zero));
            }
            if bits == 4 {
                let packed = awq(&q).unwrap();
                let back = from_awq(&packed[0].1, &packed[1].1, &packed[2].1).unwrap();
                assert!(back.q.equal(&q.q) && back.zero.equal(&q.zero));
            }
        }
        let narrow = quantize_group(&w.narrow(0, 0, 5), &QuantSpec::weights(4, 32)).unwrap();
        assert!(awq(&narrow).unwrap_err().to_string().contains("5 outputs"));
    }
}

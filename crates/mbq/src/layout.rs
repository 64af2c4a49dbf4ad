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
//! Our own, 2 to 8 bits ([`packed`], docs/mbq-format.md): `qweight` `[out, in·b/8]`, uint8, a stream along `in`; `scales`
//! `[out, groups]`, float16 or float32; `zeros` `[out, groups]`, uint8.
//!
//! Words are int32. The first form of GPTQ stores zero points one too small; the second, which newer engines read, as they
//! are.

mod stream;

use tch::{Kind, Tensor};

use crate::quantize::QTensor;
use crate::{Error, Result};
use stream::{Matrix, byte_streams, filled, from_byte_streams, from_streams, streams, unsigned, words};
pub use stream::{stream, unstream};

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

fn scales(q: &QTensor, kind: Kind) -> Result<Tensor> {
    let cast = q.scale.f_to_kind(kind)?.f_transpose(0, 1)?.f_contiguous()?;
    if cast.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
        return Err(Error::Input(format!("a scale leaves the range of {kind:?}, which this layout stores")));
    }
    Ok(cast)
}

/// A 4-bit weight as AutoAWQ's GEMM kernels read it, with scales of a dtype (float16, unless a file has others).
///
/// # Errors
/// Outputs that do not fill words, scales that leave the range of their dtype.
pub fn awq(q: &QTensor, scale: Kind) -> Result<Packed> {
    Ok(vec![
        ("qweight", nibbles(&Matrix::of(&q.q)?.transposed())?),
        ("qzeros", nibbles(&Matrix::of(&q.zero)?.transposed())?),
        ("scales", scales(q, scale)?),
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

/// A weight of `bits` bits as GPTQ's kernels read it, with scales of a dtype (float16, unless a file has others).
///
/// # Errors
/// A width without such a layout; inputs or outputs that do not fill words; scales that leave the range of their dtype.
pub fn gptq(q: &QTensor, bits: u8, zeros: Zeros, scale: Kind) -> Result<Packed> {
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
        ("scales", scales(q, scale)?),
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
    let (rows, out) = qweight.size2()?;
    let input = rows as usize * 32 / usize::from(bits);
    let along = from_streams(&qweight.f_transpose(0, 1)?.f_contiguous()?, bits, input)?;
    let mut zero = from_streams(qzeros, bits, out as usize)?;
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

/// How a compressed-tensors file stores zero points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroPoints {
    /// None: the middle of the range, of symmetric weights.
    Middle,
    /// A stream along the outputs, `[out·b/32, groups]`, int32.
    Packed,
    /// Of their own, less the middle of the range, `[out, groups]`, int8: releases before 0.13.
    Signed,
}

/// A weight of 4 or 8 bits as compressed-tensors' `pack-quantized` format has it, with scales of a dtype.
///
/// # Errors
/// Another width; inputs or outputs that do not fill words; zero points elsewhere than in the middle where none are stored.
pub fn compressed(q: &QTensor, bits: u8, zeros: ZeroPoints, scale: Kind) -> Result<Packed> {
    if !matches!(bits, 4 | 8) {
        return Err(Error::Setting {
            field: "bits",
            found: bits.to_string(),
            expected: "4 or 8 in this layout",
        });
    }
    let (out, input) = q.q.size2()?;
    let middle = 1i64 << (bits - 1);
    let mut parts = vec![
        ("weight_packed", streams(&Matrix::of(&q.q)?, bits, "inputs")?),
        ("weight_scale", q.scale.f_to_kind(scale)?),
    ];
    match zeros {
        ZeroPoints::Packed => {
            let zero = streams(&Matrix::of(&q.zero)?.transposed(), bits, "outputs")?;
            parts.push(("weight_zero_point", zero.f_transpose(0, 1)?.f_contiguous()?));
        }
        ZeroPoints::Signed => {
            let zero = q.zero.f_to_kind(Kind::Int)?.f_sub_scalar(middle)?.f_to_kind(Kind::Int8)?;
            parts.push(("weight_zero_point", zero));
        }
        ZeroPoints::Middle => {
            if q.zero.f_ne(middle)?.f_any()?.f_int64_value(&[])? != 0 {
                return Err(Error::Input(
                    "zero points are not in the middle, and symmetric weights have no others".into(),
                ));
            }
        }
    }
    parts.push(("weight_shape", Tensor::f_from_slice(&[out, input])?));
    Ok(parts)
}

/// The weight that [`compressed`] packed; `zero` is `weight_zero_point` where zero points are stored.
pub fn from_compressed(
    packed: &Tensor,
    scale: &Tensor,
    zero: Option<&Tensor>,
    bits: u8,
    zeros: ZeroPoints,
    input: usize,
) -> Result<QTensor> {
    let out = packed.size2()?.0;
    let middle = 1i64 << (bits - 1);
    let zero = match (zeros, zero) {
        (ZeroPoints::Packed, Some(zero)) => {
            from_streams(&zero.f_transpose(0, 1)?.f_contiguous()?, bits, out as usize)?
                .transposed()
                .tensor()?
        }
        (ZeroPoints::Signed, Some(zero)) => {
            zero.f_to_kind(Kind::Int)?.f_add_scalar(middle)?.f_to_kind(Kind::Uint8)?
        }
        _ => Tensor::f_full(scale.size(), middle, (Kind::Uint8, scale.device()))?,
    };
    Ok(QTensor {
        q: from_streams(packed, bits, input)?.tensor()?,
        zero,
        scale: scale.f_to_kind(Kind::Float)?.f_contiguous()?,
    })
}

/// A weight by row, `[out, in·b/8]` bytes: the stream of each row. For 3 bits these are GPTQ's bytes.
///
/// # Errors
/// Rows that do not fill bytes.
pub fn rows(q: &QTensor, bits: u8) -> Result<Tensor> {
    byte_streams(&Matrix::of(&q.q)?, bits)
}

/// The smallest number that float16 has with all its bits.
const SMALLEST: f64 = 6.103_515_625e-5;

/// A weight in our own layout. Scales that were computed here are rounded to float16 unless one is too small or too large for
/// it; with `exact`, for those of other files, they stay float32 where float16 does not have them to the bit.
///
/// # Errors
/// Rows that do not fill bytes.
pub fn packed(q: &QTensor, bits: u8, exact: bool) -> Result<Packed> {
    let half = q.scale.f_to_kind(Kind::Half)?;
    let fits = if exact {
        half.f_to_kind(Kind::Float)?.f_equal(&q.scale)?
    } else {
        q.scale.f_min()?.f_double_value(&[])? >= SMALLEST
            && half.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0
    };
    let scales = if fits { half } else { q.scale.shallow_clone() };
    Ok(vec![("qweight", rows(q, bits)?), ("scales", scales), ("zeros", q.zero.shallow_clone())])
}

/// The weight that [`packed`] wrote.
pub fn from_packed(qweight: &Tensor, scales: &Tensor, zeros: &Tensor, bits: u8) -> Result<QTensor> {
    Ok(QTensor {
        q: from_byte_streams(qweight, bits)?.tensor()?,
        scale: scales.f_to_kind(Kind::Float)?.f_contiguous()?,
        zero: zeros.f_contiguous()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::QuantSpec;
    use crate::quantize::quantize_group;
    use tch::Device;

    #[test]
    fn what_is_packed_comes_back() {
        tch::manual_seed(7);
        let w = Tensor::randn([32, 64], (Kind::Float, Device::Cpu));
        for bits in [2, 3, 4, 8] {
            let q = quantize_group(&w, &QuantSpec::weights(bits, 32)).unwrap();
            for zeros in [Zeros::LessOne, Zeros::Exact] {
                let packed = gptq(&q, bits, zeros, Kind::Half).unwrap();
                let back = from_gptq(&packed[0].1, &packed[1].1, &packed[2].1, bits, zeros).unwrap();
                assert!(back.q.equal(&q.q) && back.zero.equal(&q.zero));
            }
            let own = packed(&q, bits, false).unwrap();
            let back = from_packed(&own[0].1, &own[1].1, &own[2].1, bits).unwrap();
            assert!(back.q.equal(&q.q) && back.zero.equal(&q.zero));
            for zeros in
                [ZeroPoints::Packed, ZeroPoints::Signed].into_iter().filter(|_| matches!(bits, 4 | 8))
            {
                let packed = compressed(&q, bits, zeros, Kind::Float).unwrap();
                let [weight, scale, zero] = [0, 1, 2].map(|i| &packed[i].1);
                let back = from_compressed(weight, scale, Some(zero), bits, zeros, 64).unwrap();
                assert!(back.q.equal(&q.q) && back.zero.equal(&q.zero) && back.scale.equal(&q.scale));
            }
            if bits == 4 {
                let packed = awq(&q, Kind::Half).unwrap();
                let back = from_awq(&packed[0].1, &packed[1].1, &packed[2].1).unwrap();
                assert!(back.q.equal(&q.q) && back.zero.equal(&q.zero));
            }
        }
        let narrow = quantize_group(&w.narrow(0, 0, 5), &QuantSpec::weights(4, 32)).unwrap();
        assert!(awq(&narrow, Kind::Half).unwrap_err().to_string().contains("5 outputs"));
    }
    #[test]
    fn scales_beyond_float16_keep_their_bits() {
        let w = Tensor::randn([8, 32], (Kind::Float, Device::Cpu));
        let q = quantize_group(&w, &QuantSpec::weights(4, 32)).unwrap();
        let kind = |q: &QTensor, exact| packed(q, 4, exact).unwrap()[1].1.kind();
        assert_eq!((kind(&q, false), kind(&q, true)), (Kind::Half, Kind::Float));
        let half = q.scale.to_kind(Kind::Half).to_kind(Kind::Float);
        let [small, large] = [&half * 1e-6, &half * 1e6];
        for (scale, expected) in [(half, Kind::Half), (small, Kind::Float), (large, Kind::Float)] {
            let q = QTensor { q: q.q.shallow_clone(), zero: q.zero.shallow_clone(), scale };
            assert_eq!((kind(&q, false), kind(&q, true)), (expected, expected));
        }
    }
}

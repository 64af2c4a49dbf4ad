//! The number formats that engines offer for caches today: ggml's blocks, and 8-bit floating point.

use half::f16;
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// ggml's blocks of 32 values, as llama.cpp stores quantized caches. All numbers are little-endian; codes of 4 bits stand
/// two to a byte, value `j` in the low half of byte `j` and value `j + 16` in the high one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block {
    /// A step `max|x| / 127` in half precision, 32 signed bytes.
    Q8_0,
    /// A step `x_max / −8`, with `x_max` the value of largest magnitude, and codes of 4 bits about 8.
    Q4_0,
    /// A step `(max − min) / 15`, the minimum, and codes of 4 bits.
    Q4_1,
    /// A step `x_max / −16` and codes of 5 bits about 16; their fifth bits stand in 4 bytes of their own.
    Q5_0,
    /// A step `(max − min) / 31`, the minimum, and codes of 5 bits.
    Q5_1,
}

impl Block {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Q8_0, Self::Q4_0, Self::Q4_1, Self::Q5_0, Self::Q5_1];

    /// Values of a block.
    pub const VALUES: usize = 32;

    /// Its name in llama.cpp.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
        }
    }

    /// Bytes of a block.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
        }
    }

    const fn has_minimum(self) -> bool {
        matches!(self, Self::Q4_1 | Self::Q5_1)
    }

    const fn has_fifth_bits(self) -> bool {
        matches!(self, Self::Q5_0 | Self::Q5_1)
    }

    /// Blocks of `values`, one after the other.
    ///
    /// # Errors
    /// `values` are not whole blocks.
    pub fn quantize(self, values: &[f32]) -> Result<Vec<u8>> {
        let (blocks, rest) = values.as_chunks::<{ Self::VALUES }>();
        if !rest.is_empty() {
            return Err(partial("values", values.len(), Self::VALUES));
        }
        let mut bytes = Vec::with_capacity(blocks.len() * self.bytes());
        for block in blocks {
            match self {
                Self::Q8_0 => quantize_q8(block, &mut bytes),
                _ => self.quantize_low(block, &mut bytes),
            }
        }
        Ok(bytes)
    }

    /// Codes of 4 or 5 bits.
    fn quantize_low(self, block: &[f32; Self::VALUES], bytes: &mut Vec<u8>) {
        let most = if self.has_fifth_bits() { 31u8 } else { 15 };
        // The step, and what code 0 stands for.
        let (step, base) = if self.has_minimum() {
            let least = block.iter().copied().fold(f32::MAX, f32::min);
            let largest = block.iter().copied().fold(f32::MIN, f32::max);
            ((largest - least) / f32::from(most), Some(least))
        } else {
            let largest = block.iter().fold(0f32, |m, x| if x.abs() > m.abs() { *x } else { m });
            (largest / -f32::from(most / 2 + 1), None)
        };
        let inverse = if step == 0.0 { 0.0 } else { 1.0 / step };
        // Casts to integers cut off and saturate, as the reference does.
        let code = |x: f32| match base {
            Some(least) => (((x - least) * inverse + 0.5) as u8).min(most),
            None => ((x * inverse + f32::from(most / 2 + 1) + 0.5) as u8).min(most),
        };
        bytes.extend(f16::from_f32(step).to_le_bytes());
        if let Some(least) = base {
            bytes.extend(f16::from_f32(least).to_le_bytes());
        }
        let codes = block.map(code);
        if self.has_fifth_bits() {
            let fifth = codes.iter().enumerate().fold(0u32, |bits, (j, c)| bits | u32::from(c >> 4) << j);
            bytes.extend(fifth.to_le_bytes());
        }
        let (low, high) = codes.split_at(Self::VALUES / 2);
        bytes.extend(low.iter().zip(high).map(|(l, h)| l & 15 | (h & 15) << 4));
    }

    /// The values of some blocks.
    ///
    /// # Errors
    /// `bytes` are not whole blocks.
    pub fn dequantize(self, bytes: &[u8]) -> Result<Vec<f32>> {
        if !bytes.len().is_multiple_of(self.bytes()) {
            return Err(partial("bytes", bytes.len(), self.bytes()));
        }
        let mut values = Vec::with_capacity(bytes.len() / self.bytes() * Self::VALUES);
        for block in bytes.chunks_exact(self.bytes()) {
            let number = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
            let step = number(0);
            if self == Self::Q8_0 {
                values.extend(block[2..].iter().map(|b| f32::from(b.cast_signed()) * step));
                continue;
            }
            let mut at = 2;
            let minimum = self.has_minimum().then(|| number(2));
            at += if minimum.is_some() { 2 } else { 0 };
            let mut fifth = 0u32;
            if self.has_fifth_bits() {
                fifth = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
                at += 4;
            }
            let middle = if self.has_fifth_bits() { 16.0 } else { 8.0 };
            for j in 0..Self::VALUES {
                let byte = block[at + j % 16];
                let low = if j < 16 { byte & 15 } else { byte >> 4 };
                let code = f32::from(low | ((fifth >> j & 1) as u8) << 4);
                values.push(match minimum {
                    Some(minimum) => code * step + minimum,
                    None => (code - middle) * step,
                });
            }
        }
        Ok(values)
    }

    /// What a tensor is after it was stored in blocks along its last axis: same shape, dtype and device.
    ///
    /// # Errors
    /// A last axis that is not whole blocks.
    pub fn round_trip(self, x: &Tensor) -> Result<Tensor> {
        let shape = x.size();
        let last = shape.last().copied().unwrap_or(1);
        if last % Self::VALUES as i64 != 0 {
            return Err(Error::GroupMismatch { head_dim: last, group: Self::VALUES as i64 });
        }
        let values = Vec::<f32>::try_from(x.f_to_kind(Kind::Float)?.f_reshape([-1])?)?;
        let back = Tensor::f_from_slice(&self.dequantize(&self.quantize(&values)?)?)?;
        Ok(back.f_reshape(&shape)?.f_to_device(x.device())?.f_to_kind(x.kind())?)
    }
}

fn quantize_q8(block: &[f32; Block::VALUES], bytes: &mut Vec<u8>) {
    let step = block.iter().fold(0f32, |m, x| m.max(x.abs())) / 127.0;
    let inverse = if step == 0.0 { 0.0 } else { 1.0 / step };
    bytes.extend(f16::from_f32(step).to_le_bytes());
    bytes.extend(block.iter().map(|x| ((x * inverse).round() as i8).cast_unsigned()));
}

fn partial(what: &str, found: usize, block: usize) -> Error {
    Error::Input(format!("{found} {what} are not whole blocks of {block}"))
}

/// The largest magnitude of 8-bit floating point with 4 bits of exponent (e4m3).
pub const FP8_LARGEST: f64 = 448.0;

/// What a tensor is after it was stored as e4m3 of `x / scale`: same shape and dtype. `scale` broadcasts to `x`.
///
/// Magnitudes past the format's range become NaN, as the conversion that engines use has it: it does not saturate.
pub fn fp8(x: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let kind = x.kind();
    let codes = x.f_div(scale)?.f_to_kind(Kind::Float8e4m3fn)?;
    Ok(codes.f_to_kind(kind)?.f_mul(scale)?.f_to_kind(kind)?)
}

/// The scale of a whole tensor that puts its largest magnitude at the end of e4m3's range.
pub fn fp8_scale(x: &Tensor) -> Result<Tensor> {
    above_zero(&x.f_abs()?.f_max()?)
}

/// As [`fp8_scale`], one scale a head: `x` is `[.., heads, tokens, head_dim]`, the result `[heads, 1, 1]`.
pub fn fp8_head_scales(x: &Tensor) -> Result<Tensor> {
    let [.., tokens, d] = x.size()[..] else {
        return Err(Error::Input(format!("heads need [.., heads, tokens, head_dim], found {:?}", x.size())));
    };
    let heads = x.size().iter().rev().nth(2).copied().unwrap_or(1);
    let largest = x.f_abs()?.f_reshape([-1, heads, tokens * d])?.f_amax([0, 2].as_slice(), false)?;
    above_zero(&largest.f_reshape([heads, 1, 1])?)
}

/// A scale of largest magnitudes; zeros alone are stored with a scale that is no zero.
fn above_zero(largest: &Tensor) -> Result<Tensor> {
    Ok(largest.f_div_scalar(FP8_LARGEST)?.f_clamp_min(f64::from(f32::MIN_POSITIVE))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_one_value_and_of_parts() {
        for format in Block::ALL {
            for value in [0.0, 3.0, -2.5] {
                let bytes = format.quantize(&[value; 32]).unwrap();
                assert_eq!(bytes.len(), format.bytes());
                let back = format.dequantize(&bytes).unwrap();
                assert!(back.iter().all(|b| (b - value).abs() <= 0.02 * value.abs()), "{format:?} {back:?}");
            }
            assert!(format.quantize(&[0.0; 33]).unwrap_err().to_string().contains("blocks of 32"));
            assert!(format.dequantize(&[0; 5]).is_err());
            assert!(format.round_trip(&Tensor::zeros([2, 48], (Kind::Float, tch::Device::Cpu))).is_err());
        }
    }
}

//! The quantizer of tensors, in the numerics of the method's reference code.
//!
//! Groups of consecutive values on the last axis share a scale. All that the method itself does uses a zero that is a float:
//!
//! ```text
//! n = 2^b − 1;   s = clamp((max − min)/n, 1e-5, 1e5);   z = −min
//! q = clamp(round_half_even((x + z)/s), 0, n);          x̂ = q·s − z
//! ```
//!
//! [`Codes`] and [`fake_quant`] keep those numerics to the bit: scale and zero in the dtype of `x`; at 16 bits the codes are
//! computed in float32 and the result is bfloat16 whatever came in.

use tch::{Kind, Tensor};

use crate::{Bits, Error, Result};

/// How a group's codes are placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Asymmetric, the zero a float: the method's own.
    #[default]
    FloatZero,
    /// Asymmetric, the zero rounded to a code.
    RoundedZero,
    /// Symmetric about 0, signed codes.
    Symmetric,
}

/// Which values share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// So many consecutive values of the last axis; they divide it.
    Values(i64),
    /// The whole last axis.
    Token,
    /// The whole tensor.
    Tensor,
}

impl From<i64> for Group {
    fn from(values: i64) -> Self {
        Self::Values(values)
    }
}

impl Group {
    /// Values that share a scale in a tensor of this shape.
    fn size(self, shape: &[i64]) -> Result<i64> {
        let last = shape.last().copied().unwrap_or(1);
        match self {
            Self::Values(group) if group > 0 && last % group == 0 => Ok(group),
            Self::Values(group) => Err(Error::GroupMismatch { head_dim: last, group }),
            Self::Token => Ok(last),
            Self::Tensor => Ok(shape.iter().product()),
        }
    }
}

/// Whether all values are finite.
pub(crate) fn finite(t: &Tensor) -> Result<bool> {
    Ok(t.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0)
}

/// The largest divisor of `head_dim` up to 128: values that share a scale unless told otherwise.
pub fn default_group(head_dim: i64) -> i64 {
    largest_divisor(head_dim, 128)
}

/// The largest divisor of `n` up to `most`.
pub fn largest_divisor(n: i64, most: i64) -> i64 {
    (1..=n.min(most)).rev().find(|g| n % g == 0).unwrap_or(1)
}

/// Quantizes and dequantizes `x` at `bits` (1 to 16; 0 leaves it as it is).
///
/// # Shapes
/// `x`: any, its last axis whole groups; result: the same, in the dtype of `x`, but bfloat16 at 16 bits.
///
/// # Errors
/// More than 16 bits, symmetric codes of 1 bit (they have no positive level), or groups that do not divide the last axis.
pub fn fake_quant(x: &Tensor, bits: u32, group: impl Into<Group>, mode: Mode) -> Result<Tensor> {
    if bits == 0 {
        return Ok(x.shallow_clone());
    }
    if bits > 16 || (bits == 1 && mode == Mode::Symmetric) {
        return Err(Error::Width(bits));
    }
    let shape = x.size();
    let group = group.into().size(&shape)?;
    if x.numel() == 0 {
        return Ok(x.shallow_clone());
    }
    let grouped = x.f_reshape([-1, group])?;
    let back = match mode {
        Mode::FloatZero => {
            let (scale, zero) = range(&grouped, bits)?;
            let codes = float_codes(&grouped, &scale, &zero, bits)?;
            codes.f_mul(&scale)?.f_sub(&zero)?
        }
        Mode::RoundedZero => {
            let n = f64::from((1u32 << bits) - 1);
            let (scale, zero) = range(&grouped, bits)?;
            // `zero` is −min; the minimum over the scale, rounded, is the code that stands for 0.
            let zero = zero.f_neg()?.f_div(&scale)?.f_round()?.f_neg()?.f_clamp(0.0, n)?;
            let codes = wide(&grouped, bits)?.f_div(&scale)?.f_round()?.f_add(&zero)?.f_clamp(0.0, n)?;
            codes.f_sub(&zero)?.f_mul(&scale)?
        }
        Mode::Symmetric => {
            let largest = (1i64 << (bits - 1)) - 1;
            let scale = grouped.f_abs()?.f_amax([-1].as_slice(), true)?.f_div_scalar(largest)?;
            let scale = scale.f_clamp(1e-4, 1e4)?;
            let codes = wide(&grouped, bits)?.f_div(&scale)?.f_round()?;
            codes.f_clamp((-largest - 1) as f64, largest as f64)?.f_mul(&scale)?
        }
    };
    let back = if bits == 16 { back.f_to_kind(Kind::BFloat16)? } else { back.f_to_kind(x.kind())? };
    Ok(back.f_reshape(shape.as_slice())?)
}

/// Codes of a tensor with their scales and zeros.
#[derive(Debug)]
pub struct Codes {
    /// Codes, int32 of the tensor's shape `[.., d]`.
    pub codes: Tensor,
    /// Step of each group, `[.., d / group]` in the dtype of the tensor.
    pub scale: Tensor,
    /// Minus the minimum of each group, like `scale`.
    pub zero: Tensor,
}

impl Codes {
    /// Quantizes `x` (`[.., d]`, `d` whole groups of `group` values) at `bits` (1 to 16).
    ///
    /// # Errors
    /// A width out of range, or groups that do not divide the last axis.
    pub fn of(x: &Tensor, bits: u32, group: i64) -> Result<Self> {
        if !(1..=16).contains(&bits) {
            return Err(Error::Width(bits));
        }
        let mut shape = x.size();
        let group = Group::Values(group).size(&shape)?;
        let grouped = grouped(x, group)?;
        let (scale, zero) = range(&grouped, bits)?;
        let codes = float_codes(&grouped, &scale, &zero, bits)?.f_to_kind(Kind::Int)?.f_reshape(&shape)?;
        if let Some(last) = shape.last_mut() {
            *last /= group;
        }
        Ok(Self { codes, scale: scale.f_reshape(&shape)?, zero: zero.f_reshape(&shape)? })
    }

    /// The values, bfloat16 `[.., d]`; arithmetic in the dtype of the scales.
    pub fn values(&self) -> Result<Tensor> {
        let shape = self.codes.size();
        let groups = self.scale.size().last().copied().unwrap_or(1).max(1);
        let codes = grouped(&self.codes, shape.last().copied().unwrap_or(1) / groups)?;
        let codes = codes.f_to_kind(self.scale.kind())?;
        let values = codes.f_mul(&self.scale.f_unsqueeze(-1)?)?.f_sub(&self.zero.f_unsqueeze(-1)?)?;
        Ok(values.f_to_kind(Kind::BFloat16)?.f_reshape(&shape)?)
    }

    /// The same codes, sharing their memory.
    pub fn shallow_clone(&self) -> Self {
        let [codes, scale, zero] = [&self.codes, &self.scale, &self.zero].map(Tensor::shallow_clone);
        Self { codes, scale, zero }
    }

    /// `len` tokens from token `from` on, the last axis but one; `None` when that is none.
    pub fn narrow(&self, from: i64, len: i64) -> Result<Option<Self>> {
        if len == 0 {
            return Ok(None);
        }
        let part = |t: &Tensor| t.f_narrow(-2, from, len);
        Ok(Some(Self { codes: part(&self.codes)?, scale: part(&self.scale)?, zero: part(&self.zero)? }))
    }

    /// The tokens of `a`, then those of `b`.
    pub fn cat(a: &Self, b: &Self) -> Result<Self> {
        let both = |a: &Tensor, b: &Tensor| Tensor::f_cat(&[a, b], -2);
        Ok(Self {
            codes: both(&a.codes, &b.codes)?,
            scale: both(&a.scale, &b.scale)?,
            zero: both(&a.zero, &b.zero)?,
        })
    }

    /// These codes of width `from` at half the width, by the equivalent shift ([`crate::shrink`]); the scales stay in their
    /// dtype and are rounded to it.
    ///
    /// # Errors
    /// From 2 bits, which have no half.
    pub fn halved(&self, from: Bits) -> Result<Self> {
        let Some(to) = from.half() else { return Err(Error::Width(1)) };
        let h = to.get();
        let levels = 1i64 << h;
        // Codes of 16 bits times the factor need more than 32 signed bits.
        let codes = self.codes.f_to_kind(Kind::Int64)?.f_add_scalar(levels / 2)?;
        let codes =
            codes.f_mul_scalar(levels * levels - levels + 1)?.f_div_scalar_mode(1i64 << (3 * h), "floor")?;
        Ok(Self {
            codes: codes.f_to_kind(Kind::Int)?,
            scale: self.scale.f_mul_scalar(levels + 1)?,
            zero: self.zero.shallow_clone(),
        })
    }
}

/// `[.., d] -> [.., d / group, group]`
fn grouped(x: &Tensor, group: i64) -> Result<Tensor> {
    let mut shape = x.size();
    let last = shape.pop().unwrap_or(1);
    shape.extend([last / group.max(1), group]);
    Ok(x.f_reshape(&shape)?)
}

/// `x` in the dtype that its codes are computed in.
fn wide(x: &Tensor, bits: u32) -> Result<Tensor> {
    Ok(if bits == 16 { x.f_to_kind(Kind::Float)? } else { x.shallow_clone() })
}

/// Step and minus the minimum over the last axis, which stays with length 1; in the dtype of `x`.
fn range(x: &Tensor, bits: u32) -> Result<(Tensor, Tensor)> {
    let n = f64::from((1u32 << bits) - 1);
    let most = x.f_amax([-1].as_slice(), true)?;
    let least = x.f_amin([-1].as_slice(), true)?;
    let scale = most.f_sub(&least)?.f_div_scalar(n)?.f_clamp(1e-5, 1e5)?;
    Ok((scale, least.f_neg()?))
}

/// Codes as floats.
fn float_codes(x: &Tensor, scale: &Tensor, zero: &Tensor, bits: u32) -> Result<Tensor> {
    let n = f64::from((1u32 << bits) - 1);
    Ok(wide(x, bits)?.f_add(zero)?.f_div(scale)?.f_round()?.f_clamp(0.0, n)?)
}

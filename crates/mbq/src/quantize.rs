//! Quantizers: asymmetric groups for weights alone, symmetric rows and tokens for weights with activations.
//!
//! Rounding is half to even, division is true division, and everything happens in the dtype of the tensor. The functions
//! here simulate: they give back what the quantized values stand for. [`quantize_group`] gives the integers themselves.

use std::fmt;
use std::str::FromStr;

use nics_core::seam::Projection;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// The least range that a scale is made from.
const LEAST: f64 = 1e-5;

/// What the range of an asymmetric group is made to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ZeroRange {
    /// The group's smallest and largest weight, as published: a group whose weights are all of one sign cannot place its
    /// zero point within the integers and saturates.
    #[default]
    Keep,
    /// Zero too, so that no group saturates.
    Extend,
}

/// How a model is quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuantSpec {
    /// Bits of a weight, 2 to 8.
    pub bits: u8,
    /// Weights along a row that share a scale; −1 for the whole row. Without meaning when activations are quantized too.
    pub group: i64,
    /// Bits of an activation, 2 to 8; without them activations stay as they are.
    pub act_bits: Option<u8>,
    /// Range of the groups.
    #[serde(default)]
    pub zero_range: ZeroRange,
}

impl QuantSpec {
    /// Weights alone, in asymmetric groups: `bits` 3 and `group` 128 are the paper's W3.
    pub fn weights(bits: u8, group: i64) -> Self {
        Self { bits, group, act_bits: None, zero_range: ZeroRange::Keep }
    }

    /// Symmetric weights by row and activations by token.
    pub fn with_activations(bits: u8, act_bits: u8) -> Self {
        Self { bits, group: -1, act_bits: Some(act_bits), zero_range: ZeroRange::Keep }
    }

    /// # Errors
    /// The field that is out of range.
    pub fn check(&self) -> Result<()> {
        let width = |field, bits: u8| {
            if (2..=8).contains(&bits) {
                return Ok(());
            }
            Err(Error::Setting { field, found: bits.to_string(), expected: "a number of bits from 2 to 8" })
        };
        width("bits", self.bits)?;
        if let Some(bits) = self.act_bits {
            width("act_bits", bits)?;
        }
        if self.group == -1 || self.group > 0 {
            return Ok(());
        }
        Err(Error::Setting {
            field: "group",
            found: self.group.to_string(),
            expected: "a number of weights, or -1 for one group a row",
        })
    }

    /// Whether the groups fill a row of `input` weights of the layer `name`.
    ///
    /// # Errors
    /// [`Error::GroupDoesNotDivide`].
    pub fn fits(&self, name: &str, input: i64) -> Result<()> {
        if self.act_bits.is_some() || self.group == -1 || (self.group > 0 && input % self.group == 0) {
            return Ok(());
        }
        Err(Error::GroupDoesNotDivide { name: name.to_owned(), group: self.group, input })
    }

    /// The integers behind a weight `[out, in]` after rounding.
    pub fn codes(&self, w: &Tensor) -> Result<QTensor> {
        if self.act_bits.is_some() { quantize_rows(w, self.bits) } else { quantize_group(w, self) }
    }

    /// A weight `[out, in]` after rounding.
    pub fn weight(&self, w: &Tensor) -> Result<Tensor> {
        if self.act_bits.is_some() { fake_quant_rows(w, self.bits) } else { fake_quant_group(w, self) }
    }
}

/// `w3g128`, `w4a8`, with `+extend` for [`ZeroRange::Extend`].
impl fmt::Display for QuantSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.act_bits, self.group) {
            (Some(a), _) => write!(f, "w{}a{a}", self.bits)?,
            (None, -1) => write!(f, "w{}row", self.bits)?,
            (None, g) => write!(f, "w{}g{g}", self.bits)?,
        }
        if self.zero_range == ZeroRange::Extend { f.write_str("+extend") } else { Ok(()) }
    }
}

impl FromStr for QuantSpec {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let wrong = || Error::Setting {
            field: "quantization",
            found: s.to_owned(),
            expected: "w3g128, w4row or w4a8, with +extend for ranges that hold zero",
        };
        let (main, zero_range) = match s.strip_suffix("+extend") {
            Some(main) => (main, ZeroRange::Extend),
            None => (s, ZeroRange::Keep),
        };
        let rest = main.strip_prefix('w').ok_or_else(wrong)?;
        let (mut spec, bits) = if let Some(bits) = rest.strip_suffix("row") {
            (Self::weights(0, -1), bits)
        } else if let Some((bits, group)) = rest.split_once('g') {
            (Self::weights(0, group.parse().map_err(|_| wrong())?), bits)
        } else {
            let (bits, act) = rest.split_once('a').ok_or_else(wrong)?;
            (Self::with_activations(0, act.parse().map_err(|_| wrong())?), bits)
        };
        spec.bits = bits.parse().map_err(|_| wrong())?;
        spec.zero_range = zero_range;
        spec.check()?;
        Ok(spec)
    }
}

/// A quantized weight.
#[derive(Debug)]
pub struct QTensor {
    /// Integers, uint8 `[out, in]`.
    pub q: Tensor,
    /// Step of each group, `[out, groups]`.
    pub scale: Tensor,
    /// Integer that stands for zero, uint8 `[out, groups]`.
    pub zero: Tensor,
}

impl QTensor {
    /// What the integers stand for, `[out, in]` in the dtype of the scales.
    pub fn dequantize(&self) -> Result<Tensor> {
        let (out, input) = self.q.size2()?;
        let groups = self.scale.size2()?.1;
        let kind = self.scale.kind();
        let q = self.q.f_view([out, groups, input / groups])?.f_to_kind(kind)?;
        let zero = self.zero.f_to_kind(kind)?.f_unsqueeze(-1)?;
        Ok(q.f_sub(&zero)?.f_mul(&self.scale.f_unsqueeze(-1)?)?.f_view([out, input])?)
    }
}

/// A weight cut into its groups, `[out, groups, group]`.
fn grouped(w: &Tensor, spec: &QuantSpec) -> Result<Tensor> {
    let (out, input) = w.size2()?;
    spec.fits("a weight", input)?;
    let group = if spec.group == -1 { input } else { spec.group };
    Ok(w.f_reshape([out, input / group, group])?)
}

/// Integers, scale and zero point of each group, all in the dtype of the weight: `[out, groups, group]`, twice
/// `[out, groups, 1]`.
fn integers(w: &Tensor, spec: &QuantSpec) -> Result<[Tensor; 3]> {
    let w = grouped(w, spec)?;
    let most = f64::from((1u32 << spec.bits) - 1);
    let (mut low, mut high) = (w.f_amin(-1i64, true)?, w.f_amax(-1i64, true)?);
    if spec.zero_range == ZeroRange::Extend {
        (low, high) = (low.f_clamp_max(0.0)?, high.f_clamp_min(0.0)?);
    }
    let scale = high.f_sub(&low)?.f_clamp_min(LEAST)?.f_div_scalar(most)?;
    let zero = low.f_div(&scale)?.f_round()?.f_neg()?.f_clamp(0.0, most)?;
    let q = w.f_div(&scale)?.f_round()?.f_add(&zero)?.f_clamp(0.0, most)?;
    Ok([q, scale, zero])
}

/// A weight `[out, in]` rounded in asymmetric groups:
/// `s = max(max w − min w, 1e-5) / (2^b − 1)`, `z = clamp(−round(min w / s))`, `ŵ = (clamp(round(w / s) + z) − z)·s`.
pub fn fake_quant_group(w: &Tensor, spec: &QuantSpec) -> Result<Tensor> {
    let [q, scale, zero] = integers(w, spec)?;
    Ok(q.f_sub(&zero)?.f_mul(&scale)?.f_reshape(w.size())?)
}

/// The integers behind [`fake_quant_group`], with float32 scales.
pub fn quantize_group(w: &Tensor, spec: &QuantSpec) -> Result<QTensor> {
    let [q, scale, zero] = integers(&w.f_to_kind(Kind::Float)?, spec)?;
    let byte = |t: Tensor| t.f_to_kind(Kind::Uint8);
    Ok(QTensor {
        q: byte(q.f_reshape(w.size())?)?,
        scale: scale.f_squeeze_dim(-1)?,
        zero: byte(zero.f_squeeze_dim(-1)?)?,
    })
}

/// `s = max(absmax, 1e-5) / (2^(b−1) − 1)`, `x̂ = clamp(round(x / s))·s` with a given absolute maximum that broadcasts.
fn symmetric(x: &Tensor, absmax: &Tensor, bits: u8) -> Result<Tensor> {
    let most = f64::from((1i32 << (bits - 1)) - 1);
    let scale = absmax.f_clamp_min(LEAST)?.f_div_scalar(most)?;
    Ok(x.f_div(&scale)?.f_round()?.f_clamp(-most - 1.0, most)?.f_mul(&scale)?)
}

/// The integers behind [`fake_quant_rows`] of a weight, with float32 scales: those from `−2^(b−1)` on are kept from 0 on, so
/// that every zero point is `2^(b−1)`.
pub fn quantize_rows(w: &Tensor, bits: u8) -> Result<QTensor> {
    let w = w.f_to_kind(Kind::Float)?;
    let most = f64::from((1i32 << (bits - 1)) - 1);
    let scale = w.f_abs()?.f_amax(-1i64, true)?.f_clamp_min(LEAST)?.f_div_scalar(most)?;
    let q = w.f_div(&scale)?.f_round()?.f_clamp(-most - 1.0, most)?.f_add_scalar(most + 1.0)?;
    let zero = Tensor::f_full(scale.size(), 1i64 << (bits - 1), (Kind::Uint8, w.device()))?;
    Ok(QTensor { q: q.f_to_kind(Kind::Uint8)?, scale, zero })
}

/// Rounded symmetrically with one scale for each slice along the last axis: a weight by row, an activation by token.
pub fn fake_quant_rows(x: &Tensor, bits: u8) -> Result<Tensor> {
    symmetric(x, &x.f_abs()?.f_amax(-1i64, true)?, bits)
}

/// Rounded symmetrically with one scale for all values.
pub fn fake_quant_tensor(x: &Tensor, bits: u8) -> Result<Tensor> {
    symmetric(x, &x.f_abs()?.f_max()?, bits)
}

/// A linear layer that rounds its input by token; its weight has been rounded already.
#[derive(Debug)]
pub struct RoundedLinear {
    weight: Tensor,
    bias: Option<Tensor>,
    act_bits: u8,
}

impl RoundedLinear {
    /// `weight` `[out, in]` as it is to be multiplied, `bias` `[out]`, and the bits of the input.
    pub fn new(weight: Tensor, bias: Option<Tensor>, act_bits: u8) -> Self {
        Self { weight, bias, act_bits }
    }
}

impl Projection for RoundedLinear {
    fn forward(&self, x: &Tensor) -> nics_core::Result<Tensor> {
        let x = fake_quant_rows(x, self.act_bits)?;
        Ok(x.f_linear(&self.weight, self.bias.as_ref())?)
    }

    fn dense(&self) -> nics_core::Result<Tensor> {
        Ok(self.weight.shallow_clone())
    }

    fn bias(&self) -> Option<Tensor> {
        self.bias.as_ref().map(Tensor::shallow_clone)
    }

    fn parameters(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        let mut all = vec![("weight", &mut self.weight)];
        all.extend(self.bias.as_mut().map(|b| ("bias", b)));
        all
    }
}

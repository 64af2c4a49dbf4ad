//! AWQ's clipping: the range of each group is shrunk as long as the group's part of the output comes out better.
//!
//! By row and group `w`, with the group's inputs `x` on every ⌊T/512⌋-th of `T` tokens: the largest magnitude is taken
//! `1 − i/20` times, `i = 0 … 9`, and the one kept whose rounded, clamped weights have the least mean of
//! `(x·Q(clamp(w)) − x·w)²`; the first of equals. Queries and keys are left alone, since attention multiplies their errors.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::Result;
use crate::quantize::{QuantSpec, fake_quant_group};

/// How far and how finely ranges are shrunk.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ClipConfig {
    /// Steps to nothing.
    pub grid: usize,
    /// The most that is taken away, as a share.
    pub most: f64,
    /// Tokens that outputs are compared on.
    pub tokens: i64,
}

impl Default for ClipConfig {
    fn default() -> Self {
        Self { grid: 20, most: 0.5, tokens: 512 }
    }
}

/// The largest magnitude that each group keeps, `[out, groups, 1]`, for a weight `[out, in]` with inputs `x`, `[tokens, in]`.
pub fn clip_range(w: &Tensor, x: &Tensor, spec: &QuantSpec, config: &ClipConfig) -> Result<Tensor> {
    let (out, input) = w.size2()?;
    spec.fits("a weight", input)?;
    let group = if spec.group == -1 { input } else { spec.group };
    let groups = input / group;
    let stride = (x.size()[0] / config.tokens).max(1);
    let x = x.f_slice(0, None, None, stride)?.f_to_kind(Kind::Float)?;
    let tokens = x.size()[0];
    let x = x.f_view([tokens, groups, group])?.f_transpose(0, 1)?; // [groups, tokens, group]
    let w = w.f_to_kind(Kind::Float)?;
    let grouped = w.f_view([out, groups, group])?;
    let whole = grouped.f_abs()?.f_amax(-1i64, true)?; // [out, groups, 1]
    let mut best = whole.shallow_clone();
    let mut least = whole.f_full_like(f64::from(f32::MAX))?;
    for i in 0..(config.most * config.grid as f64) as usize {
        let range = whole.f_mul_scalar(1.0 - i as f64 / config.grid as f64)?;
        let clamped = clamp(&grouped, &range)?.f_view([out, input])?;
        let error = fake_quant_group(&clamped, spec)?.f_sub(&w)?.f_view([out, groups, group])?;
        let output = x.f_bmm(&error.f_permute([1, 2, 0])?)?; // [groups, tokens, out]
        let error = output.f_square()?.f_mean_dim(1i64, false, Kind::Float)?;
        let error = error.f_transpose(0, 1)?.f_unsqueeze(-1)?;
        let better = error.f_lt_tensor(&least)?;
        least = error.f_where_self(&better, &least)?;
        best = range.f_where_self(&better, &best)?;
    }
    Ok(best)
}

fn clamp(w: &Tensor, range: &Tensor) -> Result<Tensor> {
    Ok(w.f_clamp_tensor(Some(&range.f_neg()?), Some(range))?)
}

/// A weight `[out, in]` within the ranges of [`clip_range`].
pub fn clipped(w: &Tensor, range: &Tensor) -> Result<Tensor> {
    let (out, input) = w.size2()?;
    let groups = range.size3()?.1;
    let within = clamp(&w.f_view([out, groups, input / groups])?, &range.f_to_kind(w.kind())?)?;
    Ok(within.f_view([out, input])?)
}

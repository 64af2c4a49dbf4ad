//! Scales to choose from: powers of how loud the input channels are.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// Exponents that are tried, as published.
pub const GRID: usize = 20;
/// The least scale before it is centred.
const LEAST: f64 = 1e-4;

/// What a candidate is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Statistic {
    /// The mean magnitude `a` of each input channel: `s = a^r`.
    #[default]
    Activation,
    /// AutoAWQ's duo scaling: `s = a^r / (w̄^(1−r) + 1e-4)`, with the mean magnitude `w̄` of each column, its weights taken
    /// relative to the largest of their group.
    Duo,
}

/// Which positions the mean magnitude of a channel is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Over {
    /// All of them, padding and prompts included, as published.
    #[default]
    All,
    /// Those that errors are compared on, each by what an error on it weighs: answers and, `r` times, the other modalities.
    Balanced,
    /// Candidates of both kinds, those over all positions first.
    Union,
}

impl Over {
    /// The statistics that it takes, for one operator.
    pub fn each(self) -> &'static [Self] {
        match self {
            Self::All => &[Self::All],
            Self::Balanced => &[Self::Balanced],
            Self::Union => &[Self::All, Self::Balanced],
        }
    }
}

/// The `k`-th exponent of a grid of `n`: `k / n`. 0, plain rounding, is among them; 1 is not.
pub fn exponent(k: usize, n: usize) -> f64 {
    k as f64 / n as f64
}

/// The mean magnitude of each channel over all rows, `[.., channels]` to float32 `[channels]`.
pub fn magnitude(x: &Tensor) -> Result<Tensor> {
    let channels = last(x)?;
    Ok(x.f_abs()?.f_reshape([-1, channels])?.f_mean_dim(0i64, false, Kind::Float)?)
}

/// The mean magnitude of each channel over rows of different weight, `[rows, channels]` with float32 `[rows]` to the sum of the
/// weighed magnitudes, float64 `[channels]`, and that of the weights.
pub fn weighed_magnitude(x: &Tensor, weights: &Tensor) -> Result<(Tensor, f64)> {
    let sum = weights.f_unsqueeze(0)?.f_matmul(&x.f_to_kind(Kind::Float)?.f_abs()?)?.f_squeeze_dim(0)?;
    Ok((sum.f_to_kind(Kind::Double)?, weights.f_sum(Kind::Double)?.f_double_value(&[])?))
}

fn last(x: &Tensor) -> Result<i64> {
    x.size().last().copied().ok_or_else(|| Error::Input("an activation without channels".into()))
}

/// The candidate with exponent `r`: at least 1e-4 and centred, `s / √(max s · min s)`. `a` is `[channels]`, and so is the
/// column magnitude `w̄` of [`Statistic::Duo`].
pub fn candidate(a: &Tensor, w: Option<&Tensor>, r: f64) -> Result<Tensor> {
    let mut s = a.f_pow_tensor_scalar(r)?;
    if let Some(w) = w {
        s = s.f_div(&w.f_pow_tensor_scalar(1.0 - r)?.f_add_scalar(1e-4)?)?;
    }
    let s = s.f_clamp_min(LEAST)?;
    Ok(s.f_div(&s.f_max()?.f_mul(&s.f_min()?)?.f_sqrt()?)?)
}

/// All candidates of a grid of `n` exponents.
pub fn candidates(a: &Tensor, w: Option<&Tensor>, n: usize) -> Result<Vec<Tensor>> {
    (0..n).map(|k| candidate(a, w, exponent(k, n))).collect()
}

/// `w̄` of [`Statistic::Duo`] over linear layers with one input: weights `[out, in]` to float32 `[in]`.
pub fn column_magnitude(weights: &[&Tensor], group: i64) -> Result<Tensor> {
    let w = Tensor::f_cat(weights, 0)?.f_to_kind(Kind::Float)?.f_abs()?;
    let (out, input) = w.size2()?;
    let group = if group == -1 { input } else { group };
    if group <= 0 || input % group != 0 {
        return Err(Error::GroupDoesNotDivide { name: "a weight".into(), group, input });
    }
    let w = w.f_view([out, input / group, group])?;
    let largest = w.f_amax(-1i64, true)?.f_add_scalar(1e-6)?;
    Ok(w.f_div(&largest)?.f_view([out, input])?.f_mean_dim(0i64, false, Kind::Float)?)
}

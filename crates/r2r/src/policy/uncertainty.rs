//! How unsure the small model is, from its logits alone.
//!
//! Beside the entropy there are two measures that take the K largest raw logits for the evidence of a Dirichlet
//! distribution (Ma et al., 2025): with `a_i` these logits and `S` their sum,
//!
//! ```text
//! aleatoric = -sum (a_i / S) (psi(a_i + 1) - psi(S + 1))        epistemic = K / (S + K)
//! ```
//!
//! They mean nothing for negative logits and are NaN where `S` is 0; they are here because policies of the literature use
//! them.

use tch::{Kind, Tensor};

use crate::Result;
use crate::router::largest_logits;

/// Logits that the evidence measures take.
pub const TOP: i64 = 10;

/// Measures of some rows, float32 `[rows]` each.
#[derive(Debug)]
pub struct Evidence {
    /// Doubt that lies in the matter.
    pub aleatoric: Tensor,
    /// Doubt for want of knowledge.
    pub epistemic: Tensor,
}

impl Evidence {
    /// Both measures over the `k` largest of `logits` (`[rows, vocab]`).
    pub fn of(logits: &Tensor, k: i64) -> Result<Self> {
        let a = largest_logits(logits, k)?;
        let sum = a.f_sum_dim_intlist(1i64, true, Kind::Float)?;
        let psi = |x: &Tensor| x.f_add_scalar(1.0).and_then(|x| x.f_digamma());
        let parts = a.f_div(&sum)?.f_mul(&psi(&a)?.f_sub(&psi(&sum)?)?)?;
        let aleatoric = parts.f_sum_dim_intlist(1i64, false, Kind::Float)?.f_neg()?;
        let sum = sum.f_squeeze_dim(1)?;
        let epistemic = sum.f_add_scalar(k as f64)?.f_reciprocal()?.f_mul_scalar(k as f64)?;
        Ok(Self { aleatoric, epistemic })
    }

    /// `1 / (aleatoric * epistemic)`.
    pub fn reliability(&self) -> Result<Tensor> {
        Ok(self.aleatoric.f_mul(&self.epistemic)?.f_reciprocal()?)
    }
}

/// Shannon entropy in nats of the distribution that `logits` (`[rows, vocab]`) stand for, float32 `[rows]`.
pub fn entropy(logits: &Tensor) -> Result<Tensor> {
    let log_p = logits.f_to_kind(Kind::Float)?.f_log_softmax(1, Kind::Float)?;
    // 0 log 0 is 0.
    let parts = log_p.f_exp()?.f_mul(&log_p)?.f_nan_to_num(0.0, 0.0, 0.0)?;
    Ok(parts.f_sum_dim_intlist(1i64, false, Kind::Float)?.f_neg()?)
}

/// A tensor `[rows]` as numbers.
pub(super) fn numbers(t: &Tensor) -> Result<Vec<f32>> {
    Ok(Vec::try_from(t)?)
}

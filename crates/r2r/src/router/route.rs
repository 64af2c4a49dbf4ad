//! From what the small model computed to a decision.

use nics_core::device::OneThread;
use nics_core::nn::memory::values;
use nics_kernels::each_kind;
use nics_kernels::gemv::MAX_ROWS;
use nics_kernels::largest::largest;
use tch::{Device, Kind, Tensor};

use super::{Features, Router};
use crate::{Error, Result};

/// A decision for each row.
#[derive(Debug, Clone, PartialEq)]
pub struct Routed {
    /// The router's probability.
    pub probability: Vec<f32>,
    /// Whether the large model is asked.
    pub large: Vec<bool>,
}

/// The `k` largest logits of each row, descending, in float32: `[rows, vocab]` to `[rows, k]`.
///
/// # Errors
/// [`Error::TopKTooLarge`]: a vocabulary smaller than `k` is never padded.
pub fn largest_logits(logits: &Tensor, k: i64) -> Result<Tensor> {
    let (rows, vocab) = logits.size2().map_err(|_| {
        Error::Input(format!("logits have shape {:?}, expected [rows, vocab]", logits.size()))
    })?;
    if k > vocab {
        return Err(Error::TopKTooLarge { k, vocab });
    }
    let contiguous = if logits.is_contiguous() { None } else { Some(logits.f_contiguous()?) };
    if let Some(all) = values(contiguous.as_ref().unwrap_or(logits)) {
        let mut found: Vec<f32> = Vec::with_capacity((rows * k) as usize);
        each_kind!(all, Values, all => for row in all.chunks_exact(vocab.max(1) as usize) {
            found.extend(largest(row.into(), k as usize));
        });
        return Ok(Tensor::f_from_slice(&found)?.f_reshape([rows, k])?);
    }
    Ok(logits.f_topk(k, 1, true, true)?.0.f_to_kind(Kind::Float)?)
}

/// Asks a router: the large model is wanted where its probability reaches `threshold`.
///
/// # Shapes
/// `logits`: raw logits of the last position, `[rows, vocab]`; `hidden`: `[rows, hidden]` after the final norm;
/// `token`: what the small model chose, int64 `[rows]`. Any floating dtype; the router computes in float32.
///
/// # Errors
/// [`Error::ThresholdOutOfRange`], [`Error::TopKTooLarge`], and those of [`Router::logits`].
pub fn route(
    router: &Router,
    logits: &Tensor,
    hidden: &Tensor,
    token: &Tensor,
    threshold: f64,
) -> Result<Routed> {
    if !(0.0..=1.0).contains(&threshold) {
        return Err(Error::ThresholdOutOfRange { found: threshold });
    }
    // What lies between the kernels is too small to share (see `OneThread`).
    let few = hidden.size().first().is_some_and(|&rows| rows <= MAX_ROWS as i64);
    let _between_kernels = OneThread::when(few && hidden.device() == Device::Cpu);
    let largest = router.config().top_k().map(|k| largest_logits(logits, k)).transpose()?;
    let features =
        Features { hidden: Some(hidden), token: Some(token), logits: largest.as_ref(), positions: None };
    let probability = Vec::<f32>::try_from(router.probability(&features)?)?;
    let large = probability.iter().map(|&p| f64::from(p) >= threshold).collect();
    Ok(Routed { probability, large })
}

//! The largest key of each head and rotary pair: what key scales are made from.
//!
//! `m[h, j] = max |K|` over samples, tokens and both channels `j` and `j + d/2` of a pair, which share a scale so that
//! scaling commutes with rotation.

use nics_core::models::Model;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::record::watch;
use super::samples::{Samples, stretch};
use crate::quantize::finite;
use crate::{Error, Result};

/// How the largest key of a pair is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaxMode {
    /// The larger of both channels at the samples' positions, which are stretched so that slow pairs turn.
    #[default]
    Rotated,
    /// The radius of the pair, which no position can exceed: it needs no long positions. At most √2 times the other.
    Hypot,
}

/// The largest keys of every layer.
#[derive(Debug)]
pub struct MaxKeys {
    /// Float32 `[kv_heads, head_dim / 2]` for each layer.
    pub layers: Vec<Tensor>,
    /// How they were taken.
    pub mode: MaxMode,
    /// Tokens of a sample.
    pub seq_len: usize,
    /// The length that positions were stretched to.
    pub effective_len: usize,
    /// Samples.
    pub samples: usize,
}

/// The largest of rotated keys `[tokens, kv_heads, head_dim]`, float32 `[kv_heads, head_dim / 2]`.
pub(super) fn largest(k: &Tensor, mode: MaxMode) -> Result<Tensor> {
    let (_, heads, d) = k.size3()?;
    let pairs = k.f_to_kind(tch::Kind::Float)?.f_reshape([-1, heads, 2, d / 2])?;
    Ok(match mode {
        MaxMode::Rotated => pairs.f_abs()?.f_amax([0, 2].as_slice(), false)?,
        MaxMode::Hypot => {
            let (a, b) = (pairs.f_select(2, 0)?, pairs.f_select(2, 1)?);
            a.f_hypot(&b)?.f_amax([0].as_slice(), false)?
        }
    })
}

/// Element-wise the larger, layer by layer.
pub(super) fn merge(into: &mut Vec<Tensor>, more: Vec<Tensor>) -> Result<()> {
    if into.is_empty() {
        *into = more;
        return Ok(());
    }
    for (m, n) in into.iter_mut().zip(more) {
        *m = m.f_maximum(&n)?;
    }
    Ok(())
}

/// The largest keys over some samples. `effective_len`: the length that positions are stretched to.
///
/// # Errors
/// Layers with a window, keys that are not finite, an effective length that is no multiple of the samples'.
pub fn max_keys(
    model: &dyn Model,
    samples: &Samples,
    effective_len: Option<usize>,
    mode: MaxMode,
) -> Result<MaxKeys> {
    let seq_len = samples.seq_len();
    let step = stretch(seq_len, effective_len)?;
    let mut layers = Vec::new();
    for ids in samples.ids() {
        let mut own = Vec::new();
        watch(model, ids, step, |handed| {
            if !finite(handed.k)? {
                return Err(Error::NonFiniteInput { layer: handed.site.layer });
            }
            own.push(largest(handed.k, mode)?);
            Ok(())
        })?;
        merge(&mut layers, own)?;
    }
    Ok(MaxKeys { layers, mode, seq_len, effective_len: seq_len * step, samples: samples.len() })
}

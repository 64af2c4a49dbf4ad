//! What every cache of this crate asks of a call.

use nics_core::cache::check_qkv;
use nics_core::models::ModelDims;
use nics_core::seam::{Mask, SeqId, Site};
use tch::Tensor;

use crate::{Error, Result, quantize};

/// Shape of the keys and values that a cache keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// Layers.
    pub layers: usize,
    /// Key/value heads.
    pub kv_heads: i64,
    /// Channels of a head.
    pub head_dim: i64,
}

impl Kept {
    /// That of a model.
    pub fn of(dims: &ModelDims) -> Self {
        Self { layers: dims.layers, kv_heads: dims.kv_heads, head_dim: dims.head_dim }
    }
}

/// Checks the shapes of a call.
///
/// # Errors
/// Those that do not fit each other, the site or the cache.
pub fn fits(at: &Site, q: &Tensor, k: &Tensor, v: &Tensor, kept: Kept) -> Result<()> {
    let (_, _, kv_heads, d) = check_qkv(at, q, k, v)?;
    if at.layer >= kept.layers || (kv_heads, d) != (kept.kv_heads, kept.head_dim) {
        return Err(Error::Input(format!(
            "layer {} of {kv_heads} heads of {d} channels in a cache for {} layers of {} heads of {}",
            at.layer, kept.layers, kept.kv_heads, kept.head_dim
        )));
    }
    Ok(())
}

/// Checks a call before anything of it is kept.
///
/// # Errors
/// Those of [`fits`], a sequence that stands twice, and masks that need keys by position.
pub fn check(at: &Site, q: &Tensor, k: &Tensor, v: &Tensor, kept: Kept) -> Result<()> {
    fits(at, q, k, v, kept)?;
    let mut seqs = at.rows.seqs().to_vec();
    seqs.sort_unstable();
    if let Some(twice) = seqs.windows(2).find(|s| s[0] == s[1]) {
        return Err(Error::Input(format!("sequence {} stands twice in a call", twice[0].0)));
    }
    match at.mask {
        Mask::Window(window) => Err(Error::SlidingWindowLayer { layer: at.layer, window }),
        Mask::Additive(_) => {
            Err(Error::Input("an additive mask goes with uncached calls only: use NoCache".into()))
        }
        Mask::Causal | Mask::Full => Ok(()),
    }
}

/// The error for a sequence that is not open.
pub fn unknown(s: SeqId) -> Error {
    Error::Input(format!("sequence {} is not open in this cache", s.0))
}

/// The error for a sequence that is longer than it was opened for.
pub fn overflow(need: usize, max: usize) -> Error {
    nics_core::Error::ContextOverflow { need, max, what: "the sequence's cache" }.into()
}

/// Checks that keys and values are numbers.
pub fn finite(layer: usize, rows: [&Tensor; 2]) -> Result<()> {
    for t in rows {
        if !quantize::finite(t)? {
            return Err(Error::NonFiniteInput { layer });
        }
    }
    Ok(())
}

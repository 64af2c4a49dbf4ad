//! What the small model computed at every position of a text that it reads.

use nics_core::cache::DenseCache;
use nics_core::models::{Batch, Input, Model};
use nics_core::seam::{KvCache, Ragged};
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// Rows that are read at once, and whose logits are in memory at once.
const CHUNK: usize = 256;

/// Features of each position, on the CPU.
#[derive(Debug)]
pub struct PrefillFeatures {
    /// The likeliest next token, int64 `[rows]`.
    pub argmax: Tensor,
    /// The largest logits, descending, float32 `[rows, K]`.
    pub top_logits: Tensor,
    /// Their tokens, int64 `[rows, K]`.
    pub top_indices: Tensor,
    /// Hidden states after the final norm, in the model's dtype, `[rows, hidden]`.
    pub hidden: Tensor,
}

/// Reads `ids` and keeps the `k` largest logits and the hidden state of every position.
///
/// # Errors
/// [`Error::TopKTooLarge`], [`Error::NonFiniteFeatures`], an empty text, ids outside the vocabulary.
pub fn prefill_features(model: &dyn Model, ids: &[i64], k: i64) -> Result<PrefillFeatures> {
    let _guard = tch::no_grad_guard();
    let vocab = model.dims().vocab;
    if k > vocab {
        return Err(Error::TopKTooLarge { k, vocab });
    }
    if ids.is_empty() {
        return Err(Error::EmptyPrompt { seq: 0 });
    }
    let mut cache = DenseCache::new();
    let sequence = cache.open(ids.len())?;
    let (mut argmax, mut top_logits, mut top_indices, mut hidden) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (chunk, part) in ids.chunks(CHUNK).enumerate() {
        let rows = Ragged::contiguous(&[(sequence, chunk * CHUNK, part.len())]);
        let input = Tensor::f_from_slice(part)?.f_to_device(model.dims().device)?;
        let out = model.forward(&Batch::new(rows, Input::Ids(&input)), &mut cache, None)?;
        let logits = model.logits(&out.hidden)?.f_to_kind(Kind::Float)?;
        let (values, indices) = logits.f_topk(k, 1, true, true)?;
        if !values.f_isfinite()?.f_all()?.f_int64_value(&[]).is_ok_and(|v| v != 0) {
            return Err(Error::NonFiniteFeatures { what: "the small model's logits" });
        }
        let cpu = |t: Tensor| t.f_to_device(tch::Device::Cpu);
        argmax.push(cpu(logits.f_argmax(1, false)?)?);
        top_logits.push(cpu(values)?);
        top_indices.push(cpu(indices)?);
        hidden.push(cpu(out.hidden)?);
    }
    let cat = |parts: &[Tensor]| Tensor::f_cat(parts, 0);
    Ok(PrefillFeatures {
        argmax: cat(&argmax)?,
        top_logits: cat(&top_logits)?,
        top_indices: cat(&top_indices)?,
        hidden: cat(&hidden)?,
    })
}

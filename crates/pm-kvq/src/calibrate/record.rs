//! Seeing what a model's layers hand to attention.

use nics_core::cache::{NoCache, attend_even, check_qkv};
use nics_core::models::{Batch, Input, Model};
use nics_core::seam::{Attended, Bytes, KvCache, Mask, Ragged, SeqId, Site, Snapshot};
use tch::Tensor;

use crate::{Error, Result};

/// Rotated queries `[tokens, heads, head_dim]` and keys `[tokens, kv_heads, head_dim]`, and values, of one layer; also the
/// keys before rotation.
#[derive(Debug)]
pub(crate) struct Handed<'a> {
    pub site: &'a Site<'a>,
    pub q: &'a Tensor,
    pub k: &'a Tensor,
    pub v: &'a Tensor,
    pub unrotated_k: &'a Tensor,
}

impl Handed<'_> {
    /// Causal attention over these with other queries, keys and values, of the same shapes: `[tokens, heads, head_dim]`.
    pub fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let one = |t: &Tensor| t.f_transpose(0, 1)?.f_unsqueeze(0); // [1, heads, tokens, d]
        let positions = self.site.rows.positions();
        let out = attend_even(&one(q)?, &one(k)?, &one(v)?, positions, self.site.mask, self.site.scale)?;
        Ok(out.f_squeeze_dim(0)?.f_transpose(0, 1)?)
    }
}

/// No cache, but `see` is shown what every layer hands over; the tensors are those that attention goes on with, so that
/// gradients can be asked for.
struct Recorder<F> {
    see: F,
    none: NoCache,
}

impl<F: FnMut(&Handed) -> Result<()> + Send> KvCache for Recorder<F> {
    fn attend(&mut self, at: &Site, q: &Tensor, k: &Tensor, v: &Tensor) -> nics_core::Result<Attended> {
        check_qkv(at, q, k, v)?;
        if let Mask::Window(window) = at.mask {
            return Err(Error::SlidingWindowLayer { layer: at.layer, window }.into());
        }
        let (q, rotated) = (at.rope.apply(q)?, at.rope.apply(k)?);
        let handed = Handed { site: at, q: &q, k: &rotated, v, unrotated_k: k };
        (self.see)(&handed)?;
        let out = handed.attend(&q, &rotated, v)?.f_contiguous()?;
        Ok(Attended { out, scores: None, exhausted: Vec::new() })
    }

    fn open(&mut self, max_tokens: usize) -> nics_core::Result<SeqId> {
        self.none.open(max_tokens)
    }

    fn close(&mut self, s: SeqId) {
        self.none.close(s);
    }

    fn kept(&self, s: SeqId, layer: usize) -> usize {
        self.none.kept(s, layer)
    }

    fn truncate(&mut self, s: SeqId, position: usize) -> nics_core::Result<()> {
        self.none.truncate(s, position)
    }

    fn bytes(&self) -> Bytes {
        self.none.bytes()
    }

    fn fork(&mut self, s: SeqId) -> nics_core::Result<SeqId> {
        self.none.fork(s)
    }

    fn snapshot(&self, s: SeqId) -> nics_core::Result<Snapshot> {
        self.none.snapshot(s)
    }

    fn restore(&mut self, snapshot: &Snapshot) -> nics_core::Result<SeqId> {
        self.none.restore(snapshot)
    }
}

/// Int64 `[tokens]` on the model's device.
pub(crate) fn tensor(model: &dyn Model, ids: &[u32]) -> Result<Tensor> {
    let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    Ok(Tensor::f_from_slice(&ids)?.f_to_device(model.dims().device)?)
}

/// Runs one sample whose positions are `step` apart through the model; `see` is shown every layer. `embeds`: `[tokens,
/// hidden]`. Hidden states after the final norm, `[tokens, hidden]`.
pub(crate) fn run(
    model: &dyn Model,
    embeds: &Tensor,
    step: usize,
    see: impl FnMut(&Handed) -> Result<()> + Send,
) -> Result<Tensor> {
    let tokens = embeds.size2()?.0;
    let positions = (0..tokens).map(|p| p * step as i64).collect();
    let rows = Ragged::new(vec![(SeqId(0), positions)]);
    let mut recorder = Recorder { see, none: NoCache::new() };
    Ok(model.forward(&Batch::new(rows, Input::Embeds(embeds)), &mut recorder, None)?.hidden)
}

/// As [`run`] on token ids, without gradients.
pub(crate) fn watch(
    model: &dyn Model,
    ids: &[u32],
    step: usize,
    see: impl FnMut(&Handed) -> Result<()> + Send,
) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let embeds = model.embed(&tensor(model, ids)?)?;
    run(model, &embeds, step, see).map(drop)
}

//! Ours: the core's decoder over its dense cache.

use std::time::Instant;

use anyhow::Result;
use nics_core::cache::DenseCache;
use nics_core::models::{Batch, Decoder, Input, Model};
use nics_core::seam::{KvCache, Ragged, SeqId, Snapshot};
use tch::Tensor;

use super::{Past, Peer};

/// A decoder with the sequences that it writes.
pub struct Ours {
    model: Decoder,
    cache: DenseCache,
    seqs: Vec<SeqId>,
    position: usize,
    logits: Tensor,
}

impl Ours {
    /// Without a sequence.
    pub fn new(model: Decoder) -> Self {
        Self { model, cache: DenseCache::new(), seqs: Vec::new(), position: 0, logits: Tensor::new() }
    }

    /// The decoder.
    pub fn model(&self) -> &Decoder {
        &self.model
    }

    /// The decoder, to exchange what it is made of.
    pub fn model_mut(&mut self) -> &mut Decoder {
        &mut self.model
    }
}

impl Peer for Ours {
    fn name(&self) -> &'static str {
        "ours"
    }

    fn begin(&mut self, batch: usize, past: &Past, room: usize) -> Result<()> {
        self.cache = DenseCache::new();
        self.position = past.ids.len();
        let max_tokens = self.position + room;
        let positions: Vec<i64> = (0..self.position as i64).collect();
        let mut tensors = Vec::new();
        for (l, (k, v)) in past.kept.iter().enumerate() {
            tensors.push((format!("{l}.k"), k.shallow_clone()));
            tensors.push((format!("{l}.v"), v.shallow_clone()));
            tensors.push((format!("{l}.positions"), Tensor::f_from_slice(&positions)?));
        }
        let snapshot = Snapshot { cache: "dense".into(), max_tokens, tensors };
        self.seqs = (0..batch).map(|_| self.cache.restore(&snapshot)).collect::<Result<_, _>>()?;
        Ok(())
    }

    fn call(&mut self, ids: &[i64]) -> Result<f64> {
        let n = ids.len() / self.seqs.len().max(1);
        let start = Instant::now();
        let rows: Vec<_> = self.seqs.iter().map(|s| (*s, self.position, n)).collect();
        let rows = Ragged::contiguous(&rows);
        let last = (n > 1).then(|| rows.last_rows());
        let ids = Tensor::f_from_slice(ids)?;
        let out = self.model.forward(&Batch::new(rows, Input::Ids(&ids)), &mut self.cache, None)?;
        let hidden = match last {
            None => out.hidden,
            Some(last) => out.hidden.f_index_select(0, &Tensor::f_from_slice(&last)?)?,
        };
        self.logits = self.model.logits(&hidden)?;
        let seconds = start.elapsed().as_secs_f64();
        self.position += n;
        Ok(seconds)
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        super::libtorch::floats(&self.logits)
    }
}

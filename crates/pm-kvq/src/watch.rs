//! What a cache did while somebody else had it: a generator that owns a cache tells nothing of widths and bytes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use nics_core::models::ModelDims;
use nics_core::seam::{Attended, Bytes, KvCache, SeqId, Site, Snapshot};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::Bits;
use crate::cache::LayerStats;

/// The cache of one sequence in figures, all layers together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Held {
    /// Tokens that the first layer keeps.
    pub tokens: usize,
    /// Bytes of codes and exact values, where the cache tells them from scales and zeros.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<usize>,
    /// Bytes of all that is stored.
    pub bytes: usize,
    /// The narrowest and the widest width of what is quantized, where there is some and the cache tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub widths: Option<(Bits, Bits)>,
    /// Bits a value in the mean, exact ones counted as they are stored, where the cache tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_bits: Option<f64>,
}

impl Held {
    /// Of the layers of a sequence.
    fn of(tokens: usize, bytes: Option<Bytes>, layers: &[LayerStats]) -> Self {
        let sum = |of: &dyn Fn(&LayerStats) -> usize| layers.iter().map(of).sum::<usize>();
        let payload = sum(&|l| l.payload);
        let all = if layers.is_empty() {
            bytes.map_or(0, |b| b.payload)
        } else {
            sum(&|l| l.payload + l.parameters)
        };
        let widths = layers.iter().filter_map(|l| l.widths);
        let widths = widths.reduce(|(a, b), (c, d)| (a.min(c), b.max(d)));
        let mean = layers.iter().map(|l| l.mean_bits).sum::<f64>() / layers.len() as f64;
        let told = !layers.is_empty();
        Self { tokens, payload: told.then_some(payload), bytes: all, widths, mean_bits: told.then_some(mean) }
    }
}

/// What was seen.
#[derive(Debug, Default)]
struct Seen {
    /// Sequences in the order in which they were opened.
    opened: Vec<SeqId>,
    /// How each was when it was last written to.
    last: BTreeMap<SeqId, Held>,
    /// The most bytes at a time of all sequences.
    peak: Bytes,
}

/// Where what was seen is read.
#[derive(Debug, Clone, Default)]
pub struct Log(Arc<Mutex<Seen>>);

impl Log {
    /// The `n`-th sequence that was opened, from 0, as it was when it was last written to, also after it was closed.
    pub fn sequence(&self, n: usize) -> Option<Held> {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.last.get(seen.opened.get(n)?).copied()
    }

    /// The most bytes at a time of all sequences together.
    pub fn peak(&self) -> Bytes {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).peak
    }
}

/// A cache that is watched.
pub struct Watched<C> {
    inner: C,
    layers: usize,
    stats: fn(&C, SeqId) -> Vec<LayerStats>,
    log: Log,
}

impl<C: KvCache> Watched<C> {
    /// `inner` for a model of `layers` layers, with what tells its layers in figures, e.g.
    /// [`PagedCache::stats`](crate::cache::PagedCache::stats); a cache that tells nothing gives an empty list.
    pub fn new(inner: C, layers: usize, stats: fn(&C, SeqId) -> Vec<LayerStats>) -> Self {
        Self { inner, layers, stats, log: Log::default() }
    }

    /// Where what is seen can be read, now and later.
    pub fn log(&self) -> Log {
        self.log.clone()
    }

    fn opened(&self, s: SeqId) -> SeqId {
        self.log.0.lock().unwrap_or_else(PoisonError::into_inner).opened.push(s);
        s
    }

    fn look(&self, seqs: &[SeqId]) {
        let mut seen = self.log.0.lock().unwrap_or_else(PoisonError::into_inner);
        for &s in seqs {
            let held = Held::of(self.inner.kept(s, 0), self.inner.held(s), &(self.stats)(&self.inner, s));
            seen.last.insert(s, held);
        }
        let now = self.inner.bytes();
        seen.peak.payload = seen.peak.payload.max(now.payload);
        seen.peak.allocated = seen.peak.allocated.max(now.allocated);
    }
}

impl<C: KvCache> KvCache for Watched<C> {
    fn attend(&mut self, at: &Site, q: &Tensor, k: &Tensor, v: &Tensor) -> nics_core::Result<Attended> {
        let attended = self.inner.attend(at, q, k, v)?;
        if at.layer + 1 == self.layers {
            self.look(at.rows.seqs());
        }
        Ok(attended)
    }

    fn open(&mut self, max_tokens: usize) -> nics_core::Result<SeqId> {
        let s = self.inner.open(max_tokens)?;
        Ok(self.opened(s))
    }

    fn close(&mut self, s: SeqId) {
        self.inner.close(s);
    }

    fn kept(&self, s: SeqId, layer: usize) -> usize {
        self.inner.kept(s, layer)
    }

    fn truncate(&mut self, s: SeqId, position: usize) -> nics_core::Result<()> {
        self.inner.truncate(s, position)
    }

    fn bytes(&self) -> Bytes {
        self.inner.bytes()
    }

    fn forecast(&self, dims: &ModelDims, tokens: usize) -> usize {
        self.inner.forecast(dims, tokens)
    }

    fn held(&self, s: SeqId) -> Option<Bytes> {
        self.inner.held(s)
    }

    fn branch(&mut self, s: SeqId, position: usize, max_tokens: usize) -> nics_core::Result<Option<SeqId>> {
        let branch = self.inner.branch(s, position, max_tokens)?;
        Ok(branch.map(|s| self.opened(s)))
    }

    fn resume(&mut self, s: SeqId, position: usize, max_tokens: usize) -> nics_core::Result<bool> {
        self.inner.resume(s, position, max_tokens)
    }

    fn fork(&mut self, s: SeqId) -> nics_core::Result<SeqId> {
        let s = self.inner.fork(s)?;
        Ok(self.opened(s))
    }

    fn snapshot(&self, s: SeqId) -> nics_core::Result<Snapshot> {
        self.inner.snapshot(s)
    }

    fn restore(&mut self, snapshot: &Snapshot) -> nics_core::Result<SeqId> {
        let s = self.inner.restore(snapshot)?;
        Ok(self.opened(s))
    }
}

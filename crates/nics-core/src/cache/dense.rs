//! The dense cache: every key (rotated) and value in the model's dtype, per sequence and layer.

use std::collections::HashMap;

use tch::Tensor;

use super::decode::{self, Stored};
use super::rows::MAX_LAYERS;
use super::{KeptRows, attend_one, check_qkv, probabilities};
use crate::seam::{Attended, Bytes, KvCache, SeqId, Site, Snapshot};
use crate::{Error, Result};

/// Keys and values as they are, preallocated in steps, one storage per sequence and layer.
#[derive(Debug, Default)]
pub struct DenseCache {
    next: u64,
    sequences: HashMap<SeqId, Sequence>,
}

#[derive(Debug)]
struct Sequence {
    max_tokens: usize,
    layers: Vec<KeptRows>,
}

impl DenseCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// Rotated keys and values of a layer, `[kv_heads, kept, head_dim]` each; `None` when it keeps nothing.
    pub fn rows(&self, s: SeqId, layer: usize) -> Option<(Tensor, Tensor)> {
        self.sequences.get(&s)?.layers.get(layer)?.tensors()
    }

    fn sequence(&self, s: SeqId) -> Result<&Sequence> {
        self.sequences.get(&s).ok_or_else(|| unknown(s))
    }

    fn insert(&mut self, sequence: Sequence) -> SeqId {
        let id = SeqId(self.next);
        self.next += 1;
        self.sequences.insert(id, sequence);
        id
    }
}

fn sum(all: impl Iterator<Item = Bytes>) -> Bytes {
    all.fold(Bytes::default(), |sum, one| Bytes {
        payload: sum.payload + one.payload,
        allocated: sum.allocated + one.allocated,
    })
}

fn unknown(s: SeqId) -> Error {
    Error::Input(format!("sequence {} is not open in this cache", s.0))
}

impl Sequence {
    /// Whether every layer keeps exactly the rows at positions 0 to `position`, and they fit `max_tokens`.
    fn begins_with(&self, position: usize, max_tokens: usize) -> bool {
        position <= max_tokens
            && !self.layers.is_empty()
            && self.layers.iter().all(|l| l.begins_with(position))
    }

    fn bytes(&self) -> Bytes {
        sum(self.layers.iter().map(KeptRows::bytes))
    }
}

impl DenseCache {
    /// A few new rows of each sequence, by the kernels; `None`, with nothing counted, when it is not a case for them.
    fn attend_few_rows(&mut self, at: &Site, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Option<Tensor>> {
        for (s, _, positions) in at.rows.iter() {
            let sequence = self.sequences.get_mut(&s).ok_or_else(|| unknown(s))?;
            if sequence.layers.len() <= at.layer {
                sequence.layers.resize_with(at.layer + 1, KeptRows::default);
            }
            sequence.layers[at.layer].make_room(positions.len(), k, v, sequence.max_tokens)?;
        }
        // Handles of the tensors, so that several sequences can be held at once; the storage stays theirs.
        let mut handles = Vec::with_capacity(at.rows.seqs().len());
        for s in at.rows.seqs() {
            let layer = &self.sequence(*s)?.layers[at.layer];
            let Some((keys, values)) = layer.storage() else { return Ok(None) };
            handles.push((keys.shallow_clone(), values.shallow_clone(), layer.positions()));
        }
        let mut stored: Vec<Stored> =
            handles.iter_mut().map(|(keys, values, positions)| Stored { keys, values, positions }).collect();
        let out = decode::attend_rows(at, q, k, v, &mut stored)?;
        if out.is_some() {
            for (s, _, positions) in at.rows.iter() {
                if let Some(sequence) = self.sequences.get_mut(&s) {
                    sequence.layers[at.layer].count(positions);
                }
            }
        }
        Ok(out)
    }
}

impl KvCache for DenseCache {
    fn open(&mut self, max_tokens: usize) -> Result<SeqId> {
        Ok(self.insert(Sequence { max_tokens, layers: Vec::new() }))
    }

    fn close(&mut self, s: SeqId) {
        self.sequences.remove(&s);
    }

    fn attend(&mut self, at: &Site, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
        check_qkv(at, q, k, v)?;
        if at.layer >= MAX_LAYERS {
            return Err(Error::Input(format!(
                "layer {} is beyond the {MAX_LAYERS} that a cache has",
                at.layer
            )));
        }
        if decode::fits(at, q, k, v)
            && let Some(out) = self.attend_few_rows(at, q, k, v)?
        {
            return Ok(Attended { out, scores: None, exhausted: Vec::new() });
        }
        let (q, k) = (at.rope.apply(q)?, at.rope.apply(k)?);
        let mut outs = Vec::with_capacity(at.rows.seqs().len());
        let mut scores = at.want_scores.map(|_| Vec::new());
        for (s, from, positions) in at.rows.iter().filter(|(.., p)| !p.is_empty()) {
            let sequence = self.sequences.get_mut(&s).ok_or_else(|| unknown(s))?;
            let max_tokens = sequence.max_tokens;
            if sequence.layers.len() <= at.layer {
                sequence.layers.resize_with(at.layer + 1, KeptRows::default);
            }
            let layer = &mut sequence.layers[at.layer];
            let (from, len) = (from as i64, positions.len() as i64);
            let (q, k, v) = (q.f_narrow(0, from, len)?, k.f_narrow(0, from, len)?, v.f_narrow(0, from, len)?);
            layer.write(&k, &v, max_tokens)?;
            let kept = layer.len();
            let Some((keys, values)) = layer.tensors_with(positions.len()) else { continue };
            layer.count(positions);
            let attended = attend_one(&q, &keys, &values, positions, layer.positions(), at.mask, at.scale);
            let wanted = match (&attended, at.want_scores) {
                (Ok(_), Some(last)) => {
                    Some(probabilities(&q, &keys, positions, layer.positions(), at.mask, at.scale, last))
                }
                _ => None,
            };
            // Counted only once the whole call has succeeded.
            layer.keep_first(kept);
            outs.push(attended?);
            if let (Some(all), Some(wanted)) = (scores.as_mut(), wanted) {
                all.push(wanted?);
            }
        }
        for (s, _, positions) in at.rows.iter().filter(|(.., p)| !p.is_empty()) {
            if let Some(sequence) = self.sequences.get_mut(&s) {
                sequence.layers[at.layer].count(positions);
            }
        }
        let out = if outs.len() == 1 { outs.remove(0) } else { Tensor::f_cat(&outs, 0)? };
        Ok(Attended { out, scores, exhausted: Vec::new() })
    }

    fn kept(&self, s: SeqId, layer: usize) -> usize {
        self.sequences.get(&s).and_then(|s| s.layers.get(layer)).map_or(0, KeptRows::len)
    }

    fn truncate(&mut self, s: SeqId, position: usize) -> Result<()> {
        let sequence = self.sequences.get_mut(&s).ok_or_else(|| unknown(s))?;
        for layer in &mut sequence.layers {
            layer.keep_first(layer.before(position));
        }
        Ok(())
    }

    fn bytes(&self) -> Bytes {
        sum(self.sequences.values().map(Sequence::bytes))
    }

    fn held(&self, s: SeqId) -> Option<Bytes> {
        self.sequences.get(&s).map(Sequence::bytes)
    }

    fn branch(&mut self, s: SeqId, position: usize, max_tokens: usize) -> Result<Option<SeqId>> {
        let sequence = self.sequence(s)?;
        if !sequence.begins_with(position, max_tokens) {
            return Ok(None);
        }
        let layers = sequence.layers.iter().map(|l| l.first(position, max_tokens)).collect::<Result<_>>()?;
        Ok(Some(self.insert(Sequence { max_tokens, layers })))
    }

    fn resume(&mut self, s: SeqId, position: usize, max_tokens: usize) -> Result<bool> {
        let sequence = self.sequences.get_mut(&s).ok_or_else(|| unknown(s))?;
        if !sequence.begins_with(position, max_tokens) {
            return Ok(false);
        }
        let larger = |l: &KeptRows| l.capacity() > max_tokens;
        if sequence.layers.iter().any(larger) {
            // Never more than the sequence may hold.
            let layers = sequence.layers.iter().map(|l| l.first(position, max_tokens));
            sequence.layers = layers.collect::<Result<_>>()?;
        }
        for layer in &mut sequence.layers {
            layer.keep_first(position);
        }
        sequence.max_tokens = max_tokens;
        Ok(true)
    }

    fn fork(&mut self, s: SeqId) -> Result<SeqId> {
        let snapshot = self.snapshot(s)?;
        self.restore(&snapshot)
    }

    fn snapshot(&self, s: SeqId) -> Result<Snapshot> {
        let sequence = self.sequence(s)?;
        let mut tensors = Vec::new();
        for (l, layer) in sequence.layers.iter().enumerate() {
            layer.save(l, &mut tensors)?;
        }
        Ok(Snapshot { cache: "dense".into(), max_tokens: sequence.max_tokens, tensors })
    }

    fn restore(&mut self, snapshot: &Snapshot) -> Result<SeqId> {
        if snapshot.cache != "dense" {
            let cache = &snapshot.cache;
            return Err(Error::Input(format!(
                "a snapshot of a `{cache}` cache cannot go into a dense cache"
            )));
        }
        let layers = KeptRows::restored(snapshot)?;
        Ok(self.insert(Sequence { max_tokens: snapshot.max_tokens, layers }))
    }
}

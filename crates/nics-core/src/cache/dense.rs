//! The dense cache: every key (rotated) and value in the model's dtype, per sequence and layer.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::decode::{self, Stored};
use super::{attend_one, check_qkv, probabilities};
use crate::seam::{Attended, Bytes, KvCache, SeqId, Site, Snapshot};
use crate::{Error, Result};

/// Rows by which a layer's storage grows at least.
const GROWTH: usize = 64;
/// Layers are numbered below this. No model comes near it; a number from a damaged snapshot must not fill the memory.
const MAX_LAYERS: usize = 1 << 16;

/// Keys and values as they are, preallocated in steps, one storage per sequence and layer.
#[derive(Debug, Default)]
pub struct DenseCache {
    next: u64,
    sequences: HashMap<SeqId, Sequence>,
}

#[derive(Debug)]
struct Sequence {
    max_tokens: usize,
    layers: Vec<Layer>,
}

#[derive(Debug, Default)]
struct Layer {
    /// Keys (rotated) and values, `[kv_heads, capacity, head_dim]` each; rows past `positions.len()` are unused.
    storage: Option<(Tensor, Tensor)>,
    /// Position of each kept row, ascending.
    positions: Vec<i64>,
}

impl DenseCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// Rotated keys and values of a layer, `[kv_heads, kept, head_dim]` each; `None` when it keeps nothing.
    pub fn rows(&self, s: SeqId, layer: usize) -> Option<(Tensor, Tensor)> {
        let layer = self.sequences.get(&s)?.layers.get(layer)?;
        let (k, v) = layer.storage.as_ref()?;
        let kept = layer.positions.len() as i64;
        Some((k.f_narrow(1, 0, kept).ok()?, v.f_narrow(1, 0, kept).ok()?))
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

fn unknown(s: SeqId) -> Error {
    Error::Input(format!("sequence {} is not open in this cache", s.0))
}

/// Storage of a layer, in huge pages where it is large and on the CPU: it is read in every step.
fn room(shape: [i64; 3], like: &Tensor) -> Result<Tensor> {
    const LARGE: usize = 256 << 10;
    let own = like.f_new_empty(shape, (like.kind(), like.device()))?;
    let bytes = own.numel() * own.kind().elt_size_in_bytes();
    if own.device() == Device::Cpu && bytes >= LARGE {
        nics_kernels::memory::prefer_huge_pages(own.data_ptr().cast_const().cast(), bytes);
    }
    Ok(own)
}

fn copied(t: &Tensor) -> Result<Tensor> {
    let mut own = t.f_new_empty(t.size(), (t.kind(), t.device()))?;
    own.f_copy_(t)?;
    Ok(own)
}

impl Layer {
    /// A copy of the first `rows` rows, with room to grow within `max_tokens`.
    fn first(&self, rows: usize, max_tokens: usize) -> Result<Self> {
        let capacity = (rows + GROWTH).next_multiple_of(GROWTH).min(max_tokens) as i64;
        let copied = |t: &Tensor| -> Result<Tensor> {
            let (heads, _, d) = t.size3()?;
            let own = room([heads, capacity, d], t)?;
            own.f_narrow(1, 0, rows as i64)?.f_copy_(&t.f_narrow(1, 0, rows as i64)?)?;
            Ok(own)
        };
        let storage = match &self.storage {
            Some((k, v)) => Some((copied(k)?, copied(v)?)),
            None => None,
        };
        Ok(Self { storage, positions: self.positions[..rows].to_vec() })
    }

    /// Writes rows behind the kept ones without counting them yet.
    fn write(&mut self, k: &Tensor, v: &Tensor, max_tokens: usize) -> Result<()> {
        self.make_room(k, v, max_tokens)?;
        let (kept, more) = (self.positions.len() as i64, k.size()[0]);
        if let Some((keys, values)) = &self.storage {
            keys.f_narrow(1, kept, more)?.f_copy_(&k.f_transpose(0, 1)?)?;
            values.f_narrow(1, kept, more)?.f_copy_(&v.f_transpose(0, 1)?)?;
        }
        Ok(())
    }

    /// Makes room for the rows of `k` and `v` (`[rows, kv_heads, head_dim]`) behind the kept ones.
    fn make_room(&mut self, k: &Tensor, v: &Tensor, max_tokens: usize) -> Result<()> {
        let (more, heads, d) = k.size3()?;
        if let Some((keys, _)) = &self.storage {
            let (kept_heads, _, kept_d) = keys.size3()?;
            if (kept_heads, kept_d, keys.kind()) != (heads, d, k.kind()) {
                return Err(Error::Input(format!(
                    "the cache keeps {kept_heads} heads of {kept_d} channels ({:?}), new rows have {heads} of {d} ({:?})",
                    keys.kind(),
                    k.kind()
                )));
            }
        }
        let (kept, more) = (self.positions.len(), more as usize);
        let need = kept + more;
        if need > max_tokens {
            return Err(Error::ContextOverflow { need, max: max_tokens, what: "the sequence's cache" });
        }
        let capacity = self.storage.as_ref().map_or(0, |(k, _)| k.size()[1] as usize);
        if need > capacity {
            // A quarter more each time keeps the copying linear in the length.
            let capacity =
                need.max(capacity + (capacity / 4).max(GROWTH)).next_multiple_of(GROWTH).min(max_tokens);
            let grow = |new: &Tensor, old: Option<&Tensor>| -> Result<Tensor> {
                let (_, heads, d) = new.size3()?;
                let grown = room([heads, capacity as i64, d], new)?;
                if let Some(old) = old {
                    let kept = kept as i64;
                    grown.f_narrow(1, 0, kept)?.f_copy_(&old.f_narrow(1, 0, kept)?)?;
                }
                Ok(grown)
            };
            let old = self.storage.as_ref();
            let grown = (grow(k, old.map(|o| &o.0))?, grow(v, old.map(|o| &o.1))?);
            self.storage = Some(grown);
        }
        Ok(())
    }
}

impl Sequence {
    /// Whether every layer keeps exactly the rows at positions 0 to `position`, and they fit `max_tokens`.
    fn begins_with(&self, position: usize, max_tokens: usize) -> bool {
        // Positions ascend from 0, so the row of that number tells of all before it.
        position > 0
            && position <= max_tokens
            && !self.layers.is_empty()
            && self.layers.iter().all(|l| l.positions.get(position - 1) == Some(&(position as i64 - 1)))
    }

    fn bytes(&self) -> Bytes {
        let mut bytes = Bytes::default();
        for layer in &self.layers {
            for t in layer.storage.iter().flat_map(|(k, v)| [k, v]) {
                let (heads, capacity, d) = (t.size()[0], t.size()[1], t.size()[2]);
                let row = (heads * d) as usize * t.kind().elt_size_in_bytes();
                bytes.payload += row * layer.positions.len();
                bytes.allocated += row * capacity as usize;
            }
        }
        bytes
    }
}

impl DenseCache {
    /// One new row of each sequence, by the kernels; `None`, with nothing counted, when it is not a case for them.
    fn attend_one_row_each(
        &mut self,
        at: &Site,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Option<Tensor>> {
        for (s, from, _) in at.rows.iter() {
            let sequence = self.sequences.get_mut(&s).ok_or_else(|| unknown(s))?;
            if sequence.layers.len() <= at.layer {
                sequence.layers.resize_with(at.layer + 1, Layer::default);
            }
            let from = from as i64;
            let (k, v) = (k.f_narrow(0, from, 1)?, v.f_narrow(0, from, 1)?);
            sequence.layers[at.layer].make_room(&k, &v, sequence.max_tokens)?;
        }
        // Handles of the tensors, so that several sequences can be held at once; the storage stays theirs.
        let mut handles = Vec::with_capacity(at.rows.seqs().len());
        for s in at.rows.seqs() {
            let layer = &self.sequence(*s)?.layers[at.layer];
            let Some((keys, values)) = &layer.storage else { return Ok(None) };
            handles.push((keys.shallow_clone(), values.shallow_clone(), layer.positions.as_slice()));
        }
        let mut stored: Vec<Stored> =
            handles.iter_mut().map(|(keys, values, positions)| Stored { keys, values, positions }).collect();
        let out = decode::attend_rows(at, q, k, v, &mut stored)?;
        if out.is_some() {
            for (s, position) in at.rows.seqs().iter().zip(at.rows.positions()) {
                if let Some(sequence) = self.sequences.get_mut(s) {
                    sequence.layers[at.layer].positions.push(*position);
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
            && let Some(out) = self.attend_one_row_each(at, q, k, v)?
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
                sequence.layers.resize_with(at.layer + 1, Layer::default);
            }
            let layer = &mut sequence.layers[at.layer];
            let (from, len) = (from as i64, positions.len() as i64);
            let (q, k, v) = (q.f_narrow(0, from, len)?, k.f_narrow(0, from, len)?, v.f_narrow(0, from, len)?);
            layer.write(&k, &v, max_tokens)?;
            let kept = layer.positions.len();
            let Some((keys, values)) = &layer.storage else { continue };
            let all = (kept + positions.len()) as i64;
            let (keys, values) = (keys.f_narrow(1, 0, all)?, values.f_narrow(1, 0, all)?);
            layer.positions.extend_from_slice(positions);
            let attended = attend_one(&q, &keys, &values, positions, &layer.positions, at.mask, at.scale);
            let wanted = match (&attended, at.want_scores) {
                (Ok(_), Some(last)) => {
                    Some(probabilities(&q, &keys, positions, &layer.positions, at.mask, at.scale, last))
                }
                _ => None,
            };
            // Counted only once the whole call has succeeded.
            layer.positions.truncate(kept);
            outs.push(attended?);
            if let (Some(all), Some(wanted)) = (scores.as_mut(), wanted) {
                all.push(wanted?);
            }
        }
        for (s, _, positions) in at.rows.iter().filter(|(.., p)| !p.is_empty()) {
            if let Some(sequence) = self.sequences.get_mut(&s) {
                sequence.layers[at.layer].positions.extend_from_slice(positions);
            }
        }
        let out = if outs.len() == 1 { outs.remove(0) } else { Tensor::f_cat(&outs, 0)? };
        Ok(Attended { out, scores, exhausted: Vec::new() })
    }

    fn kept(&self, s: SeqId, layer: usize) -> usize {
        self.sequences.get(&s).and_then(|s| s.layers.get(layer)).map_or(0, |l| l.positions.len())
    }

    fn truncate(&mut self, s: SeqId, position: usize) -> Result<()> {
        let sequence = self.sequences.get_mut(&s).ok_or_else(|| unknown(s))?;
        for layer in &mut sequence.layers {
            let kept = layer.positions.partition_point(|&p| p < position as i64);
            layer.positions.truncate(kept);
        }
        Ok(())
    }

    fn bytes(&self) -> Bytes {
        self.sequences.values().map(Sequence::bytes).fold(Bytes::default(), |sum, one| Bytes {
            payload: sum.payload + one.payload,
            allocated: sum.allocated + one.allocated,
        })
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
        let larger = |l: &Layer| l.storage.as_ref().is_some_and(|(k, _)| k.size()[1] > max_tokens as i64);
        if sequence.layers.iter().any(larger) {
            // Never more than the sequence may hold.
            let layers = sequence.layers.iter().map(|l| l.first(position, max_tokens));
            sequence.layers = layers.collect::<Result<_>>()?;
        }
        for layer in &mut sequence.layers {
            layer.positions.truncate(position);
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
            let Some((k, v)) = self.rows(s, l) else { continue };
            tensors.push((format!("{l}.k"), copied(&k)?));
            tensors.push((format!("{l}.v"), copied(&v)?));
            tensors.push((format!("{l}.positions"), Tensor::f_from_slice(&layer.positions)?));
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
        let by_name: HashMap<&str, &Tensor> = snapshot.tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let mut layers = Vec::new();
        for (name, positions) in &by_name {
            let Some(l) = name.strip_suffix(".positions") else { continue };
            let damaged = || Error::Input(format!("the snapshot of layer {l} is incomplete or damaged"));
            let index = l.parse().ok().filter(|&index: &usize| index < MAX_LAYERS).ok_or_else(damaged)?;
            let k = by_name.get(format!("{l}.k").as_str()).ok_or_else(damaged)?;
            let v = by_name.get(format!("{l}.v").as_str()).ok_or_else(damaged)?;
            if positions.kind() != Kind::Int64 || k.size() != v.size() || k.dim() != 3 {
                return Err(damaged());
            }
            let positions = Vec::<i64>::try_from(*positions).map_err(|_| damaged())?;
            let ascending = positions.windows(2).all(|p| p[0] < p[1]);
            if k.size()[1] != positions.len() as i64 || positions.len() > snapshot.max_tokens || !ascending {
                return Err(damaged());
            }
            if layers.len() <= index {
                layers.resize_with(index + 1, Layer::default);
            }
            layers[index] = Layer { storage: Some((copied(k)?, copied(v)?)), positions };
        }
        Ok(self.insert(Sequence { max_tokens: snapshot.max_tokens, layers }))
    }
}

//! One cache for all baselines.
//!
//! It simulates: rows are kept as they read back from the method's format, and attention is the core's. What a method
//! stores when, and the bytes that its format takes, is a [`Method`]. So the numbers are those of the method and
//! [`Bytes::payload`] is its true size, while [`Bytes::allocated`] and the speed are those of the simulation.

use std::collections::HashMap;

use nics_core::cache::{attend_one, probabilities};
use nics_core::models::ModelDims;
use nics_core::nn::Rope;
use nics_core::seam::{Attended, Bytes, KvCache, Mask, SeqId, Site, Snapshot};
use tch::{Kind, Tensor};

use super::rows::Rows;
use crate::Result;
use crate::cache::call::{self, unknown};

/// New rows of one sequence in one layer.
#[derive(Debug)]
pub struct Arrived<'a> {
    /// The layer, from 0.
    pub layer: usize,
    /// The number of the first new row; those before it were kept already.
    pub first: usize,
    /// How many are new.
    pub len: usize,
    /// Rotated queries, `[rows, heads, head_dim]`.
    pub q: &'a Tensor,
    /// Keys before rotation, `[rows, kv_heads, head_dim]`.
    pub k: &'a Tensor,
    /// Rotary rows.
    pub rope: &'a Rope,
    /// The layer's input, `[rows, hidden]`.
    pub input: &'a Tensor,
}

impl Arrived<'_> {
    /// Numbers of the new rows.
    pub fn rows(&self) -> Vec<usize> {
        (self.first..self.first + self.len).collect()
    }
}

/// When a baseline stores which rows.
pub trait Method: Send {
    /// Its name and settings: a snapshot goes only where they are the same.
    fn name(&self) -> String;

    /// Whether it can be used with a model.
    ///
    /// # Errors
    /// What does not fit: the width of a head, the number of layers.
    fn check(&self, dims: &ModelDims) -> Result<()>;

    /// Bytes that the format takes in one layer for so many stored and exact rows.
    fn bytes(&self, dims: &ModelDims, stored: usize, exact: usize) -> usize;

    /// Bytes of what it keeps for a sequence in one layer beside the rows.
    fn state_bytes(&self, dims: &ModelDims) -> usize {
        let _ = dims;
        0
    }

    /// Which keys new rows see.
    fn mask<'a>(&self, given: Mask<'a>, new: &Arrived) -> Mask<'a> {
        let _ = new;
        given
    }

    /// Whether it asks for the attention that each row receives.
    fn wants_received(&self) -> bool {
        false
    }

    /// Called with the new rows appended, before they attend.
    fn before(&self, new: &Arrived, rows: &mut Rows) -> Result<()> {
        let _ = (new, rows);
        Ok(())
    }

    /// Called after the new rows have attended. `received`: the probabilities that each row got from the new ones, summed
    /// over heads and rows, float32 `[rows]`, when asked for.
    fn after(&self, new: &Arrived, rows: &mut Rows, received: Option<&Tensor>) -> Result<()> {
        let _ = (new, rows, received);
        Ok(())
    }

    /// Whether a row reads back the same whatever comes after it, so that sequences may share a beginning.
    fn stands_alone(&self) -> bool {
        false
    }

    /// Rows of a sequence of `tokens` that may be exact at once.
    fn exact(&self, tokens: usize) -> usize {
        let _ = tokens;
        0
    }
}

/// A baseline as a cache.
pub struct Simulated {
    method: Box<dyn Method>,
    dims: ModelDims,
    next: u64,
    sequences: HashMap<SeqId, Sequence>,
}

#[derive(Debug)]
struct Sequence {
    max_tokens: usize,
    layers: Vec<Rows>,
}

impl Sequence {
    /// Whether every layer keeps exactly the rows at positions 0 to `position`, and they fit `max_tokens`.
    fn begins_with(&self, position: usize, max_tokens: usize) -> bool {
        position <= max_tokens && self.layers.iter().all(|rows| rows.begins_with(position))
    }
}

impl Simulated {
    /// A cache for a model of these dimensions.
    ///
    /// # Errors
    /// A format that does not fit the model's heads.
    pub fn new(dims: &ModelDims, method: impl Method + 'static) -> Result<Self> {
        method.check(dims)?;
        Ok(Self { method: Box::new(method), dims: dims.clone(), next: 0, sequences: HashMap::new() })
    }

    /// Keys (rotated) and values of a layer as they read back, `[kv_heads, kept, head_dim]` each.
    pub fn rows(&self, s: SeqId, layer: usize) -> Option<(Tensor, Tensor)> {
        self.sequences.get(&s)?.layers.get(layer)?.tensors().ok()
    }

    fn insert(&mut self, max_tokens: usize, mut layers: Vec<Rows>) -> SeqId {
        layers.resize_with(self.dims.layers, Rows::default);
        let id = SeqId(self.next);
        self.next += 1;
        self.sequences.insert(id, Sequence { max_tokens, layers });
        id
    }

    fn sequence(&self, s: SeqId) -> Result<&Sequence> {
        self.sequences.get(&s).ok_or_else(|| unknown(s))
    }

    fn size(&self, sequence: &Sequence) -> Bytes {
        let mut bytes = Bytes::default();
        for rows in &sequence.layers {
            let stored = rows.stored();
            bytes.payload += self.method.bytes(&self.dims, stored, rows.len() - stored) + rows.state_bytes();
            bytes.allocated += rows.allocated();
        }
        bytes
    }

    /// Whether a call can be taken at all; nothing has changed yet.
    fn check(&self, at: &Site, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        call::fits(at, q, k, v, call::Kept::of(&self.dims))?;
        call::finite(at.layer, [k, v])?;
        for (s, _, positions) in at.rows.iter() {
            let sequence = self.sequence(s)?;
            let need = sequence.layers[at.layer].len() + positions.len();
            if need > sequence.max_tokens {
                return Err(call::overflow(need, sequence.max_tokens));
            }
        }
        Ok(())
    }

    fn attend_all(&mut self, at: &Site, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
        let (rotated_q, rotated_k) = (at.rope.apply(q)?, at.rope.apply(k)?);
        let mut outs = Vec::with_capacity(at.rows.seqs().len());
        let mut scores = at.want_scores.map(|_| Vec::new());
        for (s, from, positions) in at.rows.iter().filter(|(.., p)| !p.is_empty()) {
            let sequence = self.sequences.get_mut(&s).ok_or_else(|| unknown(s))?;
            let rows = &mut sequence.layers[at.layer];
            let (from, len) = (from as i64, positions.len() as i64);
            let own = |t: &Tensor| t.f_narrow(0, from, len);
            let q = own(&rotated_q)?;
            let new = Arrived {
                layer: at.layer,
                first: rows.len(),
                len: positions.len(),
                q: &q,
                k: &own(k)?,
                rope: &at.rope.narrow(from, len)?,
                input: &own(at.input)?,
            };
            rows.begin(&own(&rotated_k)?, &own(v)?, positions, sequence.max_tokens)?;
            self.method.before(&new, rows)?;
            let mask = self.method.mask(at.mask, &new);
            let (keys, values) = rows.tensors()?;
            outs.push(attend_one(&q, &keys, &values, positions, rows.positions(), mask, at.scale)?);
            if let (Some(all), Some(last)) = (scores.as_mut(), at.want_scores) {
                all.push(probabilities(&q, &keys, positions, rows.positions(), mask, at.scale, last)?);
            }
            let received = if self.method.wants_received() {
                Some(received(&q, &keys, positions, rows.positions(), mask, at.scale)?)
            } else {
                None
            };
            self.method.after(&new, rows, received.as_ref())?;
        }
        let out = if outs.len() == 1 { outs.remove(0) } else { Tensor::f_cat(&outs, 0)? };
        Ok(Attended { out, scores, exhausted: Vec::new() })
    }
}

/// Probabilities that each of the `kept` keys gets from all rows of `q`, summed over heads and rows, float32 `[kept]`.
fn received(
    q: &Tensor,
    keys: &Tensor,
    positions: &[i64],
    kept: &[i64],
    mask: Mask,
    scale: f64,
) -> Result<Tensor> {
    /// Rows at a time, so that a long prompt needs no square of its length.
    const CHUNK: usize = 128;
    let sums = Tensor::f_zeros([kept.len() as i64], (Kind::Float, q.device()))?;
    for from in (0..positions.len()).step_by(CHUNK) {
        let to = (from + CHUNK).min(positions.len());
        // The rows of a chunk are the last of the keys that it is shown.
        let seen = match mask {
            Mask::Full => kept.len(),
            _ => kept.len() - positions.len() + to,
        };
        let part = probabilities(
            &q.f_narrow(0, from as i64, (to - from) as i64)?,
            &keys.f_narrow(1, 0, seen as i64)?,
            &positions[from..to],
            &kept[..seen],
            mask,
            scale,
            to - from,
        )?;
        let part = part.f_sum_dim_intlist([0, 1].as_slice(), false, Kind::Float)?;
        let _ = sums.f_narrow(0, 0, seen as i64)?.f_add_(&part)?;
    }
    Ok(sums)
}

impl KvCache for Simulated {
    fn open(&mut self, max_tokens: usize) -> nics_core::Result<SeqId> {
        Ok(self.insert(max_tokens, Vec::new()))
    }

    fn close(&mut self, s: SeqId) {
        self.sequences.remove(&s);
    }

    fn attend(&mut self, at: &Site, q: &Tensor, k: &Tensor, v: &Tensor) -> nics_core::Result<Attended> {
        self.check(at, q, k, v)?;
        let result = self.attend_all(at, q, k, v);
        for s in at.rows.seqs() {
            let Some(sequence) = self.sequences.get_mut(s) else { continue };
            match result {
                Ok(_) => sequence.layers[at.layer].commit(),
                Err(_) => sequence.layers[at.layer].roll_back()?,
            }
        }
        Ok(result?)
    }

    fn kept(&self, s: SeqId, layer: usize) -> usize {
        self.sequences.get(&s).and_then(|s| s.layers.get(layer)).map_or(0, Rows::len)
    }

    fn truncate(&mut self, s: SeqId, position: usize) -> nics_core::Result<()> {
        let sequence = self.sequences.get_mut(&s).ok_or_else(|| unknown(s))?;
        sequence.layers.iter_mut().for_each(|rows| rows.truncate(position));
        Ok(())
    }

    fn bytes(&self) -> Bytes {
        let mut all = Bytes::default();
        for sequence in self.sequences.values() {
            let one = self.size(sequence);
            all.payload += one.payload;
            all.allocated += one.allocated;
        }
        all
    }

    fn held(&self, s: SeqId) -> Option<Bytes> {
        self.sequences.get(&s).map(|sequence| self.size(sequence))
    }

    fn forecast(&self, dims: &ModelDims, tokens: usize) -> usize {
        let exact = self.method.exact(tokens).min(tokens);
        // Blocks of very few tokens take more for their scales than exact rows would.
        let mixed = self.method.bytes(dims, tokens - exact, exact);
        let rows = mixed.max(self.method.bytes(dims, tokens, 0));
        dims.layers * (rows + self.method.state_bytes(dims))
    }

    fn branch(&mut self, s: SeqId, position: usize, max_tokens: usize) -> nics_core::Result<Option<SeqId>> {
        let sequence = self.sequence(s)?;
        if !(self.method.stands_alone() && sequence.begins_with(position, max_tokens)) {
            return Ok(None);
        }
        let first = sequence.layers.iter().map(|rows| rows.first(position, max_tokens));
        let layers = first.collect::<Result<_>>()?;
        Ok(Some(self.insert(max_tokens, layers)))
    }

    fn resume(&mut self, s: SeqId, position: usize, max_tokens: usize) -> nics_core::Result<bool> {
        let Some(branch) = self.branch(s, position, max_tokens)? else { return Ok(false) };
        if let Some(cut) = self.sequences.remove(&branch) {
            self.sequences.insert(s, cut);
        }
        Ok(true)
    }

    fn fork(&mut self, s: SeqId) -> nics_core::Result<SeqId> {
        let snapshot = self.snapshot(s)?;
        self.restore(&snapshot)
    }

    fn snapshot(&self, s: SeqId) -> nics_core::Result<Snapshot> {
        let sequence = self.sequence(s)?;
        let mut tensors = Vec::new();
        for (l, rows) in sequence.layers.iter().enumerate() {
            rows.save(l, &mut tensors)?;
        }
        Ok(Snapshot { cache: self.method.name(), max_tokens: sequence.max_tokens, tensors })
    }

    fn restore(&mut self, snapshot: &Snapshot) -> nics_core::Result<SeqId> {
        let own = self.method.name();
        if snapshot.cache != own {
            let found = &snapshot.cache;
            return Err(nics_core::Error::Input(format!(
                "a snapshot of a `{found}` cache cannot go into a `{own}` cache"
            )));
        }
        let layers = Rows::restored(snapshot)?;
        let shape = |rows: &Rows| rows.tensors().map(|(k, _)| (k.size()[0], k.size()[2]));
        let expected = (self.dims.kv_heads, self.dims.head_dim);
        let fits = |rows: &Rows| rows.is_empty() || shape(rows).is_ok_and(|found| found == expected);
        if layers.len() > self.dims.layers || !layers.iter().all(fits) {
            return Err(nics_core::Error::input("the snapshot is of a model of other dimensions"));
        }
        Ok(self.insert(snapshot.max_tokens, layers))
    }
}

//! The method for use: low-bit pages, budgets for each layer of each sequence, attention that reads codes where they lie.

use std::collections::HashMap;

use nics_core::models::ModelDims;
use nics_core::seam::{Attended, Bytes, KvCache, SeqId, Site, Snapshot};
use tch::{Kind, Tensor};

use super::attend::{Call, Incoming, Part, past};
use super::call::{self, unknown};
use super::config::{CacheConfig, Exhausted};
use super::positions::Positions;
use super::snapshot;
use super::store::{Layout, Pools, Store};
use crate::ledger::{Ledger, Rules};
use crate::{Bits, Error, Result};

/// A cache whose layers step down in width as their budgets fill.
///
/// Each sequence has its own state; pages of all sequences share one pool. What a sequence stores after some rows does not
/// depend on how they were divided into calls, nor on other sequences.
///
/// Cutting back ([`KvCache::truncate`]) to a number of rows gives the state that those rows alone would have led to, down
/// to the number at which a width last changed or a block last left the window for less than 16 bits
/// ([`PagedCache::exact_from`]); further back, rows that were quantized stay so.
///
/// On another device than the CPU the pages are in the CPU's memory and attention is computed there.
#[derive(Debug)]
pub struct PagedCache {
    name: String,
    exhausted: Exhausted,
    kept: call::Kept,
    layout: Layout,
    /// Of each layer.
    rules: Vec<Rules>,
    pools: Pools,
    next: u64,
    sequences: HashMap<SeqId, Sequence>,
}

#[derive(Debug)]
struct Sequence {
    max_tokens: usize,
    layers: Vec<Layer>,
}

/// What a layer keeps of a sequence.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) ledger: Ledger,
    pub(super) store: Store,
    pub(super) positions: Positions,
}

/// New rows of one sequence.
struct Arrival<'a> {
    s: SeqId,
    /// The first in the call.
    from: usize,
    /// Their positions.
    new: &'a [i64],
    /// The layer's books with them.
    after: Ledger,
    /// Whether every one of them fits the budget: after one that does not, a block may leave the window and make room.
    fits: bool,
}

/// One layer of one sequence in figures.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct LayerStats {
    /// Tokens of the sink.
    pub sink: usize,
    /// Tokens of the middle.
    pub middle: usize,
    /// Tokens of the window.
    pub window: usize,
    /// The narrowest and the widest width of the middle; `None` when it is empty.
    pub widths: Option<(Bits, Bits)>,
    /// Bits a value over all tokens, scales and zeros not counted.
    pub mean_bits: f64,
    /// Bytes of codes and exact rows.
    pub payload: usize,
    /// Bytes of scales and zeros.
    pub parameters: usize,
    /// Bytes of the pages that it holds.
    pub allocated: usize,
}

impl PagedCache {
    /// A cache for a model of these dimensions.
    ///
    /// # Errors
    /// Settings that do not fit the model.
    pub fn new(dims: &ModelDims, config: &CacheConfig) -> Result<Self> {
        let (layout, rules) = config.resolve(dims)?;
        let settings = serde_json::to_string(config).map_err(|e| Error::Input(e.to_string()))?;
        let pools = Pools::new(&layout);
        Ok(Self {
            name: format!("pm-kvq {settings}"),
            exhausted: config.exhausted,
            kept: call::Kept::of(dims),
            layout,
            rules,
            pools,
            next: 0,
            sequences: HashMap::new(),
        })
    }

    /// The rules of each layer.
    pub fn rules(&self) -> &[Rules] {
        &self.rules
    }

    /// The books of a layer; `None` for an unknown sequence.
    pub fn ledger(&self, s: SeqId, layer: usize) -> Option<&Ledger> {
        Some(&self.layer(s, layer)?.ledger)
    }

    /// The layers of a sequence in figures; empty for an unknown one.
    pub fn stats(&self, s: SeqId) -> Vec<LayerStats> {
        let layers = self.sequences.get(&s).map_or(&[][..], |s| &s.layers);
        let stats = |layer: &Layer| {
            let ledger = &layer.ledger;
            let (payload, parameters) = ledger.bytes(&self.layout.shape);
            LayerStats {
                sink: ledger.sink(),
                middle: ledger.middle(),
                window: ledger.window(),
                widths: ledger.widths(),
                mean_bits: ledger.mean_bits(&self.layout.shape),
                payload,
                parameters,
                allocated: layer.store.allocated(&self.layout),
            }
        };
        layers.iter().map(stats).collect()
    }

    /// Rotated keys and values of a layer as they read, float32 `[kv_heads, kept, head_dim]` each.
    ///
    /// # Errors
    /// An unknown sequence or layer, or lack of memory.
    pub fn rows(&self, s: SeqId, layer: usize) -> Result<[Tensor; 2]> {
        let layer = self.layer(s, layer).ok_or_else(|| unknown(s))?;
        past(&layer.store, &self.pools, &self.layout, &layer.ledger, Kind::Float)
    }

    /// The least number of rows that cutting back to is exact; `None` when the sequence was cut back further before, or is
    /// unknown.
    pub fn exact_from(&self, s: SeqId) -> Option<usize> {
        self.sequences.get(&s)?.layers.iter().try_fold(0, |most, l| Some(most.max(l.ledger.exact_from()?)))
    }

    /// Bytes of the pools, and those of them that sequences hold.
    pub fn pool_bytes(&self) -> (usize, usize) {
        (self.pools.allocated(), self.pools.used())
    }

    fn layer(&self, s: SeqId, layer: usize) -> Option<&Layer> {
        self.sequences.get(&s)?.layers.get(layer)
    }

    fn insert(&mut self, max_tokens: usize, layers: Vec<Layer>) -> SeqId {
        let id = SeqId(self.next);
        self.next += 1;
        self.sequences.insert(id, Sequence { max_tokens, layers });
        id
    }

    /// Takes in keys and values as [`KvCache::attend`] does, without attending: for a cache that is filled from elsewhere.
    /// Gives the sequences whose budget is now full.
    ///
    /// # Errors
    /// As [`KvCache::attend`]; nothing of the call is then kept in that layer.
    pub fn append(&mut self, at: &Site, k: &Tensor, v: &Tensor) -> Result<Vec<SeqId>> {
        call::check(at, k, k, v, self.kept)?;
        let arrivals = self.arrivals(at)?;
        let incoming = Incoming::of(at, k, v, self.layout.exact)?;
        Ok(self.commit(at, arrivals, &incoming))
    }

    fn attend_all(&mut self, at: &Site, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
        call::check(at, q, k, v, self.kept)?;
        let arrivals = self.arrivals(at)?;
        let incoming = Incoming::of(at, k, v, self.layout.exact)?;
        let mut parts = Vec::with_capacity(arrivals.len());
        for Arrival { s, from, new, .. } in &arrivals {
            let Layer { ledger, store, positions } = self.layer(*s, at.layer).ok_or_else(|| unknown(*s))?;
            parts.push(Part { store, ledger, positions, from: *from, new });
        }
        let call = Call { at, q, k, v, incoming: &incoming, pools: &self.pools, layout: &self.layout };
        let (out, scores) = call.attend(&parts)?;
        Ok(Attended { out, scores, exhausted: self.commit(at, arrivals, &incoming) })
    }

    /// The sequences of a call that have rows in it, with their books after it.
    fn arrivals<'a>(&self, at: &'a Site) -> Result<Vec<Arrival<'a>>> {
        let rules = &self.rules[at.layer];
        let mut arrivals = Vec::with_capacity(at.rows.seqs().len());
        for (s, from, new) in at.rows.iter().filter(|(.., p)| !p.is_empty()) {
            let sequence = self.sequences.get(&s).ok_or_else(|| unknown(s))?;
            let Layer { ledger, positions, .. } = &sequence.layers[at.layer];
            let need = positions.len() + new.len();
            if need > sequence.max_tokens {
                return Err(call::overflow(need, sequence.max_tokens));
            }
            if positions.last().is_some_and(|last| last >= new[0]) || new.windows(2).any(|p| p[0] >= p[1]) {
                return Err(Error::Input(format!(
                    "layer {}: the positions {new:?} of sequence {} do not ascend from those that are kept",
                    at.layer, s.0
                )));
            }
            let mut after = ledger.clone();
            let has_room = ledger.has_room(rules);
            let fits = after.append(rules, new.len());
            if !has_room || !fits && self.exhausted == Exhausted::Error {
                let (tokens, bits) = (ledger.tokens(), rules.floor);
                return Err(Error::CacheExhausted { layer: at.layer, tokens, bits });
            }
            arrivals.push(Arrival { s, from, new, after, fits });
        }
        Ok(arrivals)
    }

    /// Stores the rows of a call; gives the sequences whose budget is now full.
    fn commit(&mut self, at: &Site, arrivals: Vec<Arrival>, incoming: &Incoming) -> Vec<SeqId> {
        let rules = &self.rules[at.layer];
        let mut exhausted = Vec::new();
        for Arrival { s, from, new, after, fits } in arrivals {
            let Some(sequence) = self.sequences.get_mut(&s) else { continue };
            let layer = &mut sequence.layers[at.layer];
            let rows = incoming.rows(from, new.len());
            layer.store.append(&mut self.pools, &self.layout, &layer.ledger, &after, rows);
            layer.positions.extend(new);
            layer.ledger = after;
            if self.exhausted != Exhausted::Error && !(fits && layer.ledger.has_room(rules)) {
                exhausted.push(s);
            }
        }
        exhausted
    }

    /// Whether every layer keeps the rows at positions 0 to `position`, in the state that those alone would have led to.
    fn begins_with(&self, s: SeqId, position: usize, max_tokens: usize) -> Result<bool> {
        let sequence = self.sequences.get(&s).ok_or_else(|| unknown(s))?;
        let fits = |layer: &Layer| {
            layer.positions.begin_with(position)
                && layer.ledger.exact_from().is_some_and(|from| position >= from)
        };
        Ok(position > 0 && position <= max_tokens && sequence.layers.iter().all(fits))
    }

    fn held_by(&self, sequence: &Sequence) -> Bytes {
        sequence.layers.iter().fold(Bytes::default(), |sum, layer| {
            let (payload, parameters) = layer.ledger.bytes(&self.layout.shape);
            Bytes {
                payload: sum.payload + payload + parameters,
                allocated: sum.allocated + layer.store.allocated(&self.layout),
            }
        })
    }

    /// The most bytes of blocks that a layer holds of `tokens` tokens that fit its budget.
    fn most(&self, rules: &Rules, tokens: usize) -> usize {
        let page = self.layout.page_bytes(Bits::B16);
        let pages = tokens.saturating_sub(rules.sink).div_ceil(self.layout.page);
        let unbounded = self.layout.sink_bytes().saturating_add(pages.saturating_mul(page));
        let Some(budget) = rules.budget else { return unbounded };
        let shape = &self.layout.shape;
        let parameters = match rules.count {
            crate::ledger::Count::Total => 0,
            crate::ledger::Count::Payload => tokens.saturating_mul(shape.parameters(Bits::B8)),
        };
        // The sink's block and the page that is being filled may be larger than their tokens.
        let bounded =
            (budget as usize).saturating_add(parameters).saturating_add(page + self.layout.sink_bytes());
        unbounded.min(bounded)
    }
}

impl KvCache for PagedCache {
    fn open(&mut self, max_tokens: usize) -> nics_core::Result<SeqId> {
        let empty = |rules| Layer {
            ledger: Ledger::new(rules),
            store: Store::default(),
            positions: Positions::default(),
        };
        let layers = self.rules.iter().map(empty).collect();
        Ok(self.insert(max_tokens, layers))
    }

    fn close(&mut self, s: SeqId) {
        if let Some(mut sequence) = self.sequences.remove(&s) {
            sequence.layers.iter_mut().for_each(|layer| layer.store.close(&mut self.pools));
        }
    }

    fn attend(&mut self, at: &Site, q: &Tensor, k: &Tensor, v: &Tensor) -> nics_core::Result<Attended> {
        Ok(self.attend_all(at, q, k, v)?)
    }

    fn kept(&self, s: SeqId, layer: usize) -> usize {
        self.layer(s, layer).map_or(0, |layer| layer.positions.len())
    }

    fn truncate(&mut self, s: SeqId, position: usize) -> nics_core::Result<()> {
        let sequence = self.sequences.get_mut(&s).ok_or_else(|| unknown(s))?;
        for (layer, rules) in sequence.layers.iter_mut().zip(&self.rules) {
            let kept = layer.positions.before(position as i64);
            layer.positions.truncate(kept);
            layer.ledger.truncate(rules, kept);
            layer.store.truncate(&mut self.pools, &layer.ledger);
        }
        Ok(())
    }

    /// [`Bytes::payload`]: codes, exact rows, scales and zeros. [`Bytes::allocated`]: the pools, free pages included.
    fn bytes(&self) -> Bytes {
        let payload = self.sequences.values().map(|s| self.held_by(s).payload).sum();
        Bytes { payload, allocated: self.pools.allocated() }
    }

    fn forecast(&self, _dims: &ModelDims, tokens: usize) -> usize {
        self.rules.iter().fold(0, |sum: usize, rules| sum.saturating_add(self.most(rules, tokens)))
    }

    fn held(&self, s: SeqId) -> Option<Bytes> {
        Some(self.held_by(self.sequences.get(&s)?))
    }

    fn branch(&mut self, s: SeqId, position: usize, max_tokens: usize) -> nics_core::Result<Option<SeqId>> {
        if !self.begins_with(s, position, max_tokens)? {
            return Ok(None);
        }
        let sequence = self.sequences.get(&s).ok_or_else(|| unknown(s))?;
        let mut layers = Vec::with_capacity(sequence.layers.len());
        for (layer, rules) in sequence.layers.iter().zip(&self.rules) {
            let (mut ledger, mut positions) = (layer.ledger.clone(), layer.positions.clone());
            ledger.truncate(rules, position);
            positions.truncate(position);
            let store = layer.store.copy(&mut self.pools, ledger.pages().len());
            layers.push(Layer { ledger, store, positions });
        }
        Ok(Some(self.insert(max_tokens, layers)))
    }

    fn resume(&mut self, s: SeqId, position: usize, max_tokens: usize) -> nics_core::Result<bool> {
        if !self.begins_with(s, position, max_tokens)? {
            return Ok(false);
        }
        self.truncate(s, position)?;
        if let Some(sequence) = self.sequences.get_mut(&s) {
            sequence.max_tokens = max_tokens;
        }
        Ok(true)
    }

    fn fork(&mut self, s: SeqId) -> nics_core::Result<SeqId> {
        let sequence = self.sequences.get(&s).ok_or_else(|| unknown(s))?;
        let max_tokens = sequence.max_tokens;
        let mut layers = Vec::with_capacity(sequence.layers.len());
        for layer in &sequence.layers {
            let store = layer.store.copy(&mut self.pools, layer.ledger.pages().len());
            layers.push(Layer { ledger: layer.ledger.clone(), store, positions: layer.positions.clone() });
        }
        Ok(self.insert(max_tokens, layers))
    }

    fn snapshot(&self, s: SeqId) -> nics_core::Result<Snapshot> {
        let sequence = self.sequences.get(&s).ok_or_else(|| unknown(s))?;
        let mut tensors = Vec::with_capacity(5 * sequence.layers.len());
        for (i, layer) in sequence.layers.iter().enumerate() {
            snapshot::save(i, layer, &self.pools, &mut tensors)?;
        }
        Ok(Snapshot { cache: self.name.clone(), max_tokens: sequence.max_tokens, tensors })
    }

    fn restore(&mut self, snapshot: &Snapshot) -> nics_core::Result<SeqId> {
        if snapshot.cache != self.name {
            let (found, own) = (&snapshot.cache, &self.name);
            return Err(nics_core::Error::Input(format!(
                "a snapshot of a `{found}` cache cannot go into a `{own}` cache: the settings have to be the same"
            )));
        }
        let mut layers = Vec::with_capacity(self.rules.len());
        let mut damaged = None;
        for (i, rules) in self.rules.iter().enumerate() {
            match snapshot::restored(i, snapshot, &mut self.pools, &self.layout, rules) {
                Ok(layer) => layers.push(layer),
                Err(e) => {
                    damaged = Some(e);
                    break;
                }
            }
        }
        if let Some(e) = damaged {
            for layer in &mut layers {
                layer.store.close(&mut self.pools);
            }
            return Err(e.into());
        }
        Ok(self.insert(snapshot.max_tokens, layers))
    }
}

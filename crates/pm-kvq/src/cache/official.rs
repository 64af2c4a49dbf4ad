//! The reference's two caches in its own numerics, as a yardstick: what they return and when their widths change is equal
//! to the bit.
//!
//! | | [`Backend::Packed`] | [`Backend::Simulated`] |
//! |---|---|---|
//! | keeps | codes, scales, zeros | numbers that were quantized and dequantized |
//! | a halving | shifts the codes ([`Codes::halved`]) | quantizes anew |
//! | sink and window | codes of 16 bits | a round trip at 16 bits, for tokens that stay there |
//!
//! Both halve at most once a call, so that a long prompt stays over its budget for some calls, and both end with an error
//! when the budget is full at 2 bits. Of the reference's defects none is kept: prompts may be shorter than sink and window,
//! any number of rows may come at once, and each sequence has its own state. Such a cache can be cut back by its last call
//! alone, and cannot be copied or saved. For use rather than for comparison there is [`super::PagedCache`].

use std::collections::HashMap;

use nics_core::cache::{attend_one, probabilities};
use nics_core::models::ModelDims;
use nics_core::seam::{Attended, Bytes, KvCache, SeqId, Site, Snapshot};
use tch::{Kind, Tensor};

use super::call::{self, unknown};
use crate::quantize::{Codes, Mode, fake_quant};
use crate::{Bits, Error, Result};

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Codes, the reference's `real`.
    Packed,
    /// Round trips, the reference's `fake`.
    Simulated,
}

/// The rules of a cache.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Which cache.
    pub backend: Backend,
    /// Tokens of the sink.
    pub sink: usize,
    /// Tokens of the window, at least 1.
    pub window: usize,
    /// First width of the middle.
    pub init: Bits,
    /// Channels that share a scale.
    pub group: i64,
    /// Bytes of each layer, scales and zeros not counted.
    pub budgets: Vec<u64>,
}

/// How many tokens of a layer stand where.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// In the sink.
    pub sink: usize,
    /// In the middle.
    pub middle: usize,
    /// In the window.
    pub window: usize,
}

impl Counts {
    /// After `n` tokens more: the counts, and how many of them entered the sink and left the window.
    fn after(self, n: usize, settings: &Settings) -> (Self, usize, usize) {
        let to_sink = n.min(settings.sink - self.sink);
        let waiting = self.window + n - to_sink;
        let flush = waiting / settings.window * settings.window;
        let counts = Self { sink: self.sink + to_sink, middle: self.middle + flush, window: waiting - flush };
        (counts, to_sink, flush)
    }

    /// Bytes of codes in a layer of `values` keys and values a token.
    fn payload(self, values: usize, bits: Bits) -> u64 {
        (Bits::B16.bytes(values * (self.sink + self.window)) + bits.bytes(values * self.middle)) as u64
    }
}

/// Keys and values of one layer of one sequence.
#[derive(Debug)]
pub struct LayerState {
    bits: Bits,
    counts: Counts,
    positions: Vec<i64>,
    kept: Kept,
}

#[derive(Debug)]
enum Kept {
    /// Sink, middle and window, each keys then values; `None` when empty.
    Packed([Option<[Codes; 2]>; 3]),
    /// Keys and values, `[kv_heads, tokens, d]`.
    Simulated(Option<[Tensor; 2]>),
}

impl LayerState {
    /// An empty layer.
    pub fn new(settings: &Settings) -> Self {
        Self {
            bits: settings.init,
            counts: Counts::default(),
            positions: Vec::new(),
            kept: match settings.backend {
                Backend::Packed => Kept::Packed([None, None, None]),
                Backend::Simulated => Kept::Simulated(None),
            },
        }
    }

    /// Width of the middle.
    pub fn bits(&self) -> Bits {
        self.bits
    }

    /// Where tokens stand.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Codes of the middle, keys then values; `None` while it is empty or in a simulated cache.
    pub fn middle(&self) -> Option<&[Codes; 2]> {
        match &self.kept {
            Kept::Packed([_, middle, _]) => middle.as_ref(),
            Kept::Simulated(_) => None,
        }
    }

    /// Keys and values as they read now, `[kv_heads, tokens, d]`; `None` while there are none.
    pub fn rows(&self) -> Result<Option<[Tensor; 2]>> {
        match &self.kept {
            Kept::Simulated(rows) => Ok(rows.as_ref().map(|kv| kv.each_ref().map(Tensor::shallow_clone))),
            Kept::Packed(regions) => {
                let there: Vec<&[Codes; 2]> = regions.iter().flatten().collect();
                if there.is_empty() {
                    return Ok(None);
                }
                let joined = |i: usize| -> Result<Tensor> {
                    let values: Vec<Tensor> = there.iter().map(|kv| kv[i].values()).collect::<Result<_>>()?;
                    Ok(Tensor::f_cat(&values, 1)?)
                };
                Ok(Some([joined(0)?, joined(1)?]))
            }
        }
    }

    /// What the call's queries see, and the layer after the call. New keys and values, `[kv_heads, n, d]`, are seen as they
    /// are.
    ///
    /// # Errors
    /// The budget is full and nothing can be halved.
    pub fn update(
        &self,
        layer: usize,
        settings: &Settings,
        new: [&Tensor; 2],
        positions: &[i64],
    ) -> Result<([Tensor; 2], Self)> {
        let (heads, n, d) = new[0].size3()?;
        let seen = match self.rows()? {
            None => new.map(Tensor::shallow_clone),
            Some([k, v]) => [Tensor::f_cat(&[&k, new[0]], 1)?, Tensor::f_cat(&[&v, new[1]], 1)?],
        };
        let (counts, to_sink, flush) = self.counts.after(n as usize, settings);
        let over = settings
            .budgets
            .get(layer)
            .is_some_and(|budget| counts.payload(2 * (heads * d) as usize, self.bits) > *budget);
        let halved = if over {
            let half = self.bits.half().filter(|_| counts.middle > 0);
            let tokens = counts.sink + counts.middle + counts.window;
            Some(half.ok_or(Error::CacheExhausted { layer, tokens, bits: self.bits })?)
        } else {
            None
        };
        let kept = match &self.kept {
            Kept::Packed(regions) => {
                Kept::Packed(packed(regions, settings, new, (to_sink, flush), self.bits, halved)?)
            }
            Kept::Simulated(_) => {
                let [k, v] = &seen;
                let first = self.counts.sink + self.counts.middle + self.counts.window;
                let trip =
                    |rows: &Tensor| round_trips(rows, settings, first, counts, flush, self.bits, halved);
                Kept::Simulated(Some([trip(k)?, trip(v)?]))
            }
        };
        let positions = [&self.positions, positions].concat();
        Ok((seen, Self { bits: halved.unwrap_or(self.bits), counts, positions, kept }))
    }
}

/// The regions of a packed cache after a call.
fn packed(
    [sink, middle, window]: &[Option<[Codes; 2]>; 3],
    settings: &Settings,
    new: [&Tensor; 2],
    (to_sink, flush): (usize, usize),
    bits: Bits,
    halved: Option<Bits>,
) -> Result<[Option<[Codes; 2]>; 3]> {
    let one = |i: usize| -> Result<[Option<Codes>; 3]> {
        let part = |region: &Option<[Codes; 2]>| region.as_ref().map(|kv| kv[i].shallow_clone());
        let codes = Codes::of(new[i], 16, settings.group)?;
        let n = new[i].size3()?.1;
        let (to_sink, flush) = (to_sink as i64, flush as i64);
        let sink = join(part(sink), codes.narrow(0, to_sink)?)?;
        let waiting = join(part(window), codes.narrow(to_sink, n - to_sink)?)?;
        let (mut leaving, window) = match waiting {
            None => (None, None),
            Some(waiting) => {
                let staying = waiting.codes.size3()?.1 - flush;
                (waiting.narrow(0, flush)?, waiting.narrow(flush, staying)?)
            }
        };
        let mut width = Bits::B16;
        while width > bits {
            leaving = leaving.map(|codes| codes.halved(width)).transpose()?;
            width = width.half().unwrap_or(bits);
        }
        let mut middle = join(part(middle), leaving)?;
        if halved.is_some() {
            middle = middle.map(|codes| codes.halved(bits)).transpose()?;
        }
        Ok([sink, middle, window])
    };
    let [[sink_k, middle_k, window_k], [sink_v, middle_v, window_v]] = [one(0)?, one(1)?];
    let both = |k: Option<Codes>, v: Option<Codes>| Some([k?, v?]);
    Ok([both(sink_k, sink_v), both(middle_k, middle_v), both(window_k, window_v)])
}

fn join(a: Option<Codes>, b: Option<Codes>) -> Result<Option<Codes>> {
    match (a, b) {
        (Some(a), Some(b)) => Ok(Some(Codes::cat(&a, &b)?)),
        (a, b) => Ok(a.or(b)),
    }
}

/// The rows of a simulated cache after a call; those from `first` on are new.
fn round_trips(
    rows: &Tensor,
    settings: &Settings,
    first: usize,
    counts: Counts,
    flush: usize,
    bits: Bits,
    halved: Option<Bits>,
) -> Result<Tensor> {
    let mut own = rows.f_empty_like()?;
    own.f_copy_(rows)?;
    let rows = own;
    let trip = |from: usize, to: usize, bits: Bits| -> Result<()> {
        if from < to {
            let mut part = rows.f_narrow(1, from as i64, (to - from) as i64)?;
            part.f_copy_(&fake_quant(&part, bits.get(), settings.group, Mode::FloatZero)?)?;
        }
        Ok(())
    };
    let (middle, window) = (counts.sink, counts.sink + counts.middle);
    // A token that comes and leaves the window in one call never makes the trip at 16 bits.
    trip(first, counts.sink, Bits::B16)?;
    trip(window - flush, window, bits)?;
    trip(first.max(window), window + counts.window, Bits::B16)?;
    if let Some(bits) = halved {
        trip(middle, window, bits)?;
    }
    Ok(rows)
}

/// One of the reference's caches.
#[derive(Debug)]
pub struct OfficialCache {
    settings: Settings,
    kept: call::Kept,
    next: u64,
    sequences: HashMap<SeqId, Sequence>,
}

#[derive(Debug)]
struct Sequence {
    max_tokens: usize,
    layers: Vec<LayerState>,
    /// Each layer before its last call, so that a call that failed in a later layer can be undone.
    before: Vec<Option<LayerState>>,
}

impl OfficialCache {
    /// A cache for a model of these dimensions.
    ///
    /// # Errors
    /// A window of 0, groups that do not divide a head, or another number of budgets than of layers.
    pub fn new(dims: &ModelDims, settings: Settings) -> Result<Self> {
        if settings.window == 0 {
            return Err(Error::Setting {
                field: "window".into(),
                found: "0".into(),
                expected: "at least 1 token".into(),
            });
        }
        if settings.group <= 0 || dims.head_dim % settings.group != 0 {
            return Err(Error::GroupMismatch { head_dim: dims.head_dim, group: settings.group });
        }
        if settings.budgets.len() != dims.layers {
            let (found, layers) = (settings.budgets.len(), dims.layers);
            return Err(Error::Input(format!("{found} budgets for a model of {layers} layers")));
        }
        let kept = call::Kept::of(dims);
        Ok(Self { settings, kept, next: 0, sequences: HashMap::new() })
    }

    /// A layer of a sequence; `None` for unknown ones.
    pub fn layer(&self, s: SeqId, layer: usize) -> Option<&LayerState> {
        self.sequences.get(&s)?.layers.get(layer)
    }

    fn attend_all(&mut self, at: &Site, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
        call::check(at, q, k, v, self.kept)?;
        let (q, k) = (at.rope.apply(q)?, at.rope.apply(k)?);
        let (mut outs, mut next) = (Vec::new(), Vec::new());
        let mut scores = at.want_scores.map(|_| Vec::new());
        for (s, from, positions) in at.rows.iter().filter(|(.., p)| !p.is_empty()) {
            let sequence = self.sequences.get(&s).ok_or_else(|| unknown(s))?;
            let layer = &sequence.layers[at.layer];
            let need = layer.positions.len() + positions.len();
            if need > sequence.max_tokens {
                return Err(call::overflow(need, sequence.max_tokens));
            }
            let own = |t: &Tensor| t.f_narrow(0, from as i64, positions.len() as i64);
            let (new_k, new_v) = (own(&k)?.f_transpose(0, 1)?, own(v)?.f_transpose(0, 1)?);
            call::finite(at.layer, [&new_k, &new_v])?;
            let (seen, after) = layer.update(at.layer, &self.settings, [&new_k, &new_v], positions)?;
            let [keys, values] = [seen[0].f_to_kind(q.kind())?, seen[1].f_to_kind(q.kind())?];
            let q = own(&q)?;
            outs.push(attend_one(&q, &keys, &values, positions, &after.positions, at.mask, at.scale)?);
            if let (Some(all), Some(last)) = (scores.as_mut(), at.want_scores) {
                all.push(probabilities(&q, &keys, positions, &after.positions, at.mask, at.scale, last)?);
            }
            next.push((s, after));
        }
        let out = if outs.len() == 1 { outs.remove(0) } else { Tensor::f_cat(&outs, 0)? };
        for (s, after) in next {
            if let Some(sequence) = self.sequences.get_mut(&s) {
                let before = std::mem::replace(&mut sequence.layers[at.layer], after);
                sequence.before[at.layer] = Some(before);
            }
        }
        Ok(Attended { out, scores, exhausted: Vec::new() })
    }

    fn size(&self, layers: &[LayerState]) -> Bytes {
        let values = 2 * (self.kept.kv_heads * self.kept.head_dim) as usize;
        let mut bytes = Bytes::default();
        for layer in layers {
            bytes.payload += layer.counts.payload(values, layer.bits) as usize;
            // Codes are held as int32, numbers in the model's dtype of at most as many bytes.
            bytes.allocated += layer.positions.len() * values * Kind::Int.elt_size_in_bytes();
        }
        bytes
    }
}

fn refused(what: &str) -> nics_core::Error {
    nics_core::Error::Input(format!("the reference's cache cannot be {what}; take the paged one"))
}

impl KvCache for OfficialCache {
    fn open(&mut self, max_tokens: usize) -> nics_core::Result<SeqId> {
        let layers = (0..self.kept.layers).map(|_| LayerState::new(&self.settings)).collect();
        let id = SeqId(self.next);
        self.next += 1;
        let before = (0..self.kept.layers).map(|_| None).collect();
        self.sequences.insert(id, Sequence { max_tokens, layers, before });
        Ok(id)
    }

    fn close(&mut self, s: SeqId) {
        self.sequences.remove(&s);
    }

    fn attend(&mut self, at: &Site, q: &Tensor, k: &Tensor, v: &Tensor) -> nics_core::Result<Attended> {
        Ok(self.attend_all(at, q, k, v)?)
    }

    fn kept(&self, s: SeqId, layer: usize) -> usize {
        self.layer(s, layer).map_or(0, |l| l.positions.len())
    }

    fn truncate(&mut self, s: SeqId, position: usize) -> nics_core::Result<()> {
        let Sequence { layers, before, .. } = self.sequences.get_mut(&s).ok_or_else(|| unknown(s))?;
        let within = |l: &LayerState| l.positions.last().is_none_or(|last| *last < position as i64);
        // Nothing is lost in between either.
        let undone = |now: &LayerState, before: &LayerState| {
            let first = now.positions.get(before.positions.len());
            within(before) && first.is_some_and(|first| *first >= position as i64)
        };
        let fits = |(now, before): (&LayerState, &Option<LayerState>)| {
            within(now) || before.as_ref().is_some_and(|before| undone(now, before))
        };
        if !layers.iter().zip(&*before).all(fits) {
            return Err(refused("cut back by more than its last call"));
        }
        for (now, before) in layers.iter_mut().zip(before) {
            if !within(now)
                && let Some(before) = before.take()
            {
                *now = before;
            }
        }
        Ok(())
    }

    fn bytes(&self) -> Bytes {
        self.sequences.values().map(|s| self.size(&s.layers)).fold(Bytes::default(), |sum, one| Bytes {
            payload: sum.payload + one.payload,
            allocated: sum.allocated + one.allocated,
        })
    }

    fn held(&self, s: SeqId) -> Option<Bytes> {
        self.sequences.get(&s).map(|s| self.size(&s.layers))
    }

    fn fork(&mut self, _s: SeqId) -> nics_core::Result<SeqId> {
        Err(refused("copied"))
    }

    fn snapshot(&self, _s: SeqId) -> nics_core::Result<Snapshot> {
        Err(refused("saved"))
    }

    fn restore(&mut self, _snapshot: &Snapshot) -> nics_core::Result<SeqId> {
        Err(refused("restored"))
    }
}

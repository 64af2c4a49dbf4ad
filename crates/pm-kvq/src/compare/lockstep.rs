//! All caches read the same tokens in turn.

use std::time::{Duration, Instant};

use nics_base::interrupt::Interrupt;
use nics_core::cache::DenseCache;
use nics_core::models::{Batch, Input, Model};
use nics_core::seam::{KvCache, Ragged, SeqId};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::watch::Log;
use crate::{Bits, Error, Result};

/// Rows of a prompt that are read in one call.
const CHUNK: usize = 1024;

/// A cache that is compared.
pub struct Rival {
    /// Its name in results.
    pub name: String,
    /// The cache, without a sequence.
    pub cache: Box<dyn KvCache>,
    /// What is seen of it, when it is [watched](crate::watch::Watched) and tells more than its bytes.
    pub log: Option<Log>,
}

/// What is read.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    /// Tokens that are given.
    pub prompt: &'a [u32],
    /// Tokens that were written behind them.
    pub reply: &'a [u32],
}

/// Some consecutive tokens of a reply.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Bin {
    /// Tokens.
    pub tokens: usize,
    /// Those of them of which all logits were numbers.
    pub finite: usize,
    /// Kullback-Leibler divergence of the cache's distribution from the dense one's, in nats, summed over those.
    pub kl: f64,
    /// Tokens of which both hold the same to be the likeliest.
    pub agreed: usize,
}

impl Bin {
    /// The divergence in the mean; not a number where some logits were none.
    pub fn mean_kl(&self) -> f64 {
        if self.finite < self.tokens { f64::NAN } else { self.kl / self.tokens.max(1) as f64 }
    }

    /// Two bins as one.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            tokens: self.tokens + other.tokens,
            finite: self.finite + other.finite,
            kl: self.kl + other.kl,
            agreed: self.agreed + other.agreed,
        }
    }
}

/// What came of one cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The cache's name.
    pub name: String,
    /// Rows that it kept when its budget was full; none: it took all.
    pub exhausted_at: Option<usize>,
    /// The most bytes of codes and exact values, where the cache tells them.
    pub peak_payload: Option<usize>,
    /// The most bytes of all that is stored.
    pub peak_bytes: usize,
    /// Bytes of all that is stored, averaged over the tokens of the reply.
    pub mean_bytes: f64,
    /// The lowest width in the end, where the cache tells it.
    pub narrowest: Option<Bits>,
    /// By place in the reply.
    pub bins: Vec<Bin>,
    /// Calls of a single row, and their seconds.
    pub steps: usize,
    /// Seconds of those.
    pub seconds: f64,
    /// Whether the answer of the reply that is written through this cache is right; `None`: it was not judged.
    #[serde(default)]
    pub right: Option<bool>,
}

impl Measured {
    /// All of the reply.
    pub fn total(&self) -> Bin {
        self.bins.iter().fold(Bin::default(), |sum, bin| sum.and(*bin))
    }
}

/// A cache on its way.
struct Runner<'a> {
    cache: &'a mut dyn KvCache,
    log: Option<&'a Log>,
    seq: SeqId,
    /// No further row fits.
    full: bool,
    spent: Duration,
    sum: f64,
    looked: usize,
    measured: Measured,
}

impl<'a> Runner<'a> {
    fn new(name: &str, cache: &'a mut dyn KvCache, log: Option<&'a Log>, tokens: usize) -> Result<Self> {
        let seq = cache.open(tokens)?;
        let measured = Measured {
            name: name.to_owned(),
            exhausted_at: None,
            peak_payload: None,
            peak_bytes: 0,
            mean_bytes: 0.0,
            narrowest: None,
            bins: Vec::new(),
            steps: 0,
            seconds: 0.0,
            right: None,
        };
        Ok(Self { cache, log, seq, full: false, spent: Duration::ZERO, sum: 0.0, looked: 0, measured })
    }

    /// Reads rows; the log-probabilities after the last one, float32 `[vocab]`.
    fn read(&mut self, model: &dyn Model, at: usize, ids: &[u32]) -> Result<Tensor> {
        let start = Instant::now();
        let mut hidden = None;
        for (n, chunk) in ids.chunks(CHUNK).enumerate() {
            let rows = Ragged::contiguous(&[(self.seq, at + n * CHUNK, chunk.len())]);
            let ids: Vec<i64> = chunk.iter().map(|&id| i64::from(id)).collect();
            let input = Tensor::f_from_slice(&ids)?.f_to_device(model.dims().device)?;
            let output = model.forward(&Batch::new(rows, Input::Ids(&input)), self.cache, None)?;
            self.full |= !output.exhausted.is_empty();
            hidden = Some(output.hidden.f_narrow(0, chunk.len() as i64 - 1, 1)?);
        }
        let hidden = hidden.ok_or_else(|| Error::Input("there is no token to read".into()))?;
        let logits = model.logits(&hidden)?.f_squeeze_dim(0)?.f_to_kind(Kind::Float)?;
        let probabilities = logits.f_log_softmax(-1, Kind::Float)?;
        if ids.len() == 1 {
            self.spent += start.elapsed();
            self.measured.steps += 1;
        }
        self.look();
        Ok(probabilities)
    }

    fn look(&mut self) {
        let held = self.log.and_then(|log| log.sequence(0));
        let own = || self.cache.held(self.seq).unwrap_or_else(|| self.cache.bytes()).payload;
        let bytes = held.as_ref().map_or_else(own, |h| h.bytes);
        let measured = &mut self.measured;
        measured.peak_bytes = measured.peak_bytes.max(bytes);
        if let Some(payload) = held.and_then(|h| h.payload) {
            measured.peak_payload = Some(measured.peak_payload.unwrap_or(0).max(payload));
        }
        measured.narrowest = held.and_then(|h| h.widths).map(|(low, _)| low);
        self.sum += bytes as f64;
        self.looked += 1;
    }

    fn note(&mut self, bin: usize, dense: &Tensor, own: &Tensor) -> Result<()> {
        if self.measured.bins.len() <= bin {
            self.measured.bins.resize(bin + 1, Bin::default());
        }
        let kl = dense.f_exp()?.f_mul(&dense.f_sub(own)?)?.f_sum(Kind::Float)?.f_double_value(&[])?;
        let likeliest = |t: &Tensor| -> Result<i64> { Ok(t.f_argmax(0, false)?.f_int64_value(&[])?) };
        let agreed = likeliest(dense)? == likeliest(own)?;
        let bin = &mut self.measured.bins[bin];
        bin.tokens += 1;
        bin.agreed += usize::from(agreed && kl.is_finite());
        if kl.is_finite() {
            bin.finite += 1;
            // Rounding makes equal distributions a little negative.
            bin.kl += kl.max(0.0);
        }
        Ok(())
    }

    fn finish(mut self) -> Measured {
        self.measured.mean_bytes = self.sum / self.looked.max(1) as f64;
        self.measured.seconds = self.spent.as_secs_f64();
        self.cache.close(self.seq);
        self.measured
    }
}

/// Lets a dense cache and some others read a text; gives the dense one first, then the others in their order. `bin`: tokens
/// of a [`Bin`]. `progress` is told of every token.
///
/// # Errors
/// An empty prompt or reply, what model and caches refuse, or a stop that was asked for.
pub fn lockstep(
    model: &dyn Model,
    text: Text,
    rivals: &mut [Rival],
    bin: usize,
    interrupt: &Interrupt,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Measured>> {
    let Text { prompt, reply } = text;
    if prompt.is_empty() || reply.is_empty() || bin == 0 {
        return Err(Error::Input(
            "a comparison needs a prompt, a reply and bins of at least one token".into(),
        ));
    }
    let _no_grad = tch::no_grad_guard();
    let tokens = prompt.len() + reply.len();
    let mut dense = DenseCache::new();
    let mut reference = Runner::new("dense", &mut dense, None, tokens)?;
    let mut others = Vec::with_capacity(rivals.len());
    for rival in rivals.iter_mut() {
        others.push(Runner::new(&rival.name, &mut *rival.cache, rival.log.as_ref(), tokens)?);
    }
    for t in 0..reply.len() {
        interrupt.check()?;
        let (at, ids) = match t {
            0 => (0, prompt),
            _ => (prompt.len() + t - 1, &reply[t - 1..t]),
        };
        let expected = reference.read(model, at, ids)?;
        reference.note(t / bin, &expected, &expected)?;
        for runner in &mut others {
            if runner.full {
                runner.measured.exhausted_at.get_or_insert(at);
                continue;
            }
            let own = runner.read(model, at, ids)?;
            runner.note(t / bin, &expected, &own)?;
        }
        progress(t + 1);
    }
    Ok(std::iter::once(reference).chain(others).map(Runner::finish).collect())
}

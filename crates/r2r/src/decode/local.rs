//! A large model in this process.

use std::collections::HashMap;
use std::time::Duration;

use nics_core::cache::DenseCache;
use nics_core::device::OneThread;
use nics_core::models::{self, Model, NewTokens};
use nics_core::sampling::{Sampler, Sampling};
use nics_core::seam::{KvCache, SeqId};
use nics_kernels::gemv::MAX_ROWS;
use tch::{Device, Kind, Tensor};

use super::CHUNK;
use super::large::{Answer, LargeModel, LargeRequest, LargeToken, ReadAhead, seed_at};
use crate::policy::Sequence;
use crate::{Error, Result};

/// So few rows are those of a sequence that is being written: they wait for nobody's prompt.
const FEW: usize = 64;

struct Open {
    seq: SeqId,
    sampling: Sampling,
    vocab: usize,
    /// Its tokens, as far as the last request or hint had them.
    ids: Vec<u32>,
    /// Rows that the cache had when it asked.
    cached: usize,
}

/// A large model in this process.
///
/// What is asked together is one ragged call; prompts of more than [`CHUNK`] rows together are spread over several calls of
/// [`answers`](LargeModel::answers), a chunk each, so that nobody waits for another's.
pub struct LocalLarge<'m> {
    model: &'m dyn Model,
    cache: Box<dyn KvCache>,
    open: HashMap<Sequence, Open>,
    /// Those that wait, oldest first.
    asked: Vec<Sequence>,
    read_ahead: ReadAhead,
}

impl<'m> LocalLarge<'m> {
    /// Over a loaded model. It reads nothing ahead.
    pub fn new(model: &'m dyn Model) -> Self {
        Self {
            model,
            cache: Box::new(DenseCache::new()),
            open: HashMap::new(),
            asked: Vec::new(),
            read_ahead: ReadAhead::default(),
        }
    }

    /// Keeps keys and values in `cache`, which has no sequence yet, in place of a dense one.
    pub fn with_cache(mut self, cache: Box<dyn KvCache>) -> Self {
        self.cache = cache;
        self
    }

    /// Reads ahead, a chunk a step at most: the same work, spread more evenly.
    pub fn with_read_ahead(mut self, read_ahead: ReadAhead) -> Self {
        self.read_ahead = read_ahead;
        self
    }

    fn get(&self, sequence: Sequence) -> Result<&Open> {
        self.open.get(&sequence).ok_or_else(|| {
            Error::Input(format!("sequence {} was not opened with the large model", sequence.0))
        })
    }

    fn kept(&self, sequence: Sequence) -> Result<usize> {
        Ok(self.cache.kept(self.get(sequence)?.seq, 0))
    }

    /// Takes the ids of a request in; gives how many of them are cached.
    fn update(&mut self, request: &LargeRequest) -> Result<usize> {
        let (kept, known) = (self.kept(request.sequence)?, self.get(request.sequence)?.ids.len());
        let (sequence, len) = (request.sequence.0, request.ids.len());
        if kept < request.seen {
            return Err(Error::Input(format!(
                "sequence {sequence}: the large model has {kept} tokens, {} were said to be seen",
                request.seen
            )));
        }
        if len <= kept || len < known {
            return Err(Error::Input(format!(
                "sequence {sequence}: {} of {len} tokens were seen, none is new",
                kept.max(known)
            )));
        }
        if let Some(open) = self.open.get_mut(&request.sequence) {
            open.ids.extend_from_slice(&request.ids[known..]);
        }
        Ok(kept)
    }

    /// Reads the next rows of some sequences in one call: hidden states of each one's last row, `[which, hidden]`. After an
    /// error the cache has none of them.
    fn read(&mut self, which: &[(Sequence, usize)]) -> Result<Tensor> {
        let kept = which.iter().map(|&(sequence, _)| self.kept(sequence)).collect::<Result<Vec<_>>>()?;
        let new: Vec<NewTokens> = which
            .iter()
            .zip(kept)
            .filter_map(|(&(sequence, len), kept)| {
                let open = self.open.get(&sequence)?;
                Some((open.seq, kept, &open.ids[kept..kept + len]))
            })
            .collect();
        Ok(models::read_last(self.model, &mut *self.cache, &new)?)
    }

    /// One round: everybody who lags behind by a few rows and, oldest first, at most a chunk of others' rows. Those who come
    /// to their end share one call and are answered; one that has more than a chunk left reads a chunk by itself, at the
    /// same places whoever else is there.
    fn round(&mut self) -> Result<Vec<Answer>> {
        let (mut budget, mut ends, mut pieces) = (CHUNK, Vec::new(), Vec::new());
        for &sequence in &self.asked {
            let left = self.get(sequence)?.ids.len() - self.kept(sequence)?;
            let rows = left.min(CHUNK);
            if rows > FEW {
                if rows > budget {
                    budget = 0; // A younger one does not overtake.
                    continue;
                }
                budget -= rows;
            }
            if left > CHUNK { &mut pieces } else { &mut ends }.push((sequence, rows));
        }
        for piece in pieces {
            let _ = self.read(&[piece])?;
        }
        if ends.is_empty() {
            return Ok(Vec::new());
        }
        let before: Vec<(SeqId, usize)> = ends
            .iter()
            .map(|&(sequence, _)| Ok((self.get(sequence)?.seq, self.kept(sequence)?)))
            .collect::<Result<_>>()?;
        let answers = self.read(&ends).and_then(|hidden| self.choose(&ends, &hidden));
        match &answers {
            Ok(_) => self.asked.retain(|s| !ends.iter().any(|(end, _)| end == s)),
            Err(_) => {
                for (seq, kept) in before {
                    self.cache.truncate(seq, kept)?;
                }
            }
        }
        answers
    }

    fn choose(&self, ends: &[(Sequence, usize)], hidden: &Tensor) -> Result<Vec<Answer>> {
        // What lies between the kernels is too small to share (see `OneThread`).
        let _between_kernels = OneThread::when(ends.len() <= MAX_ROWS && hidden.device() == Device::Cpu);
        let logits = self.model.logits(hidden)?.f_to_kind(Kind::Float)?.f_to_device(Device::Cpu)?;
        let mut answers = Vec::with_capacity(ends.len());
        for (row, &(sequence, _)) in ends.iter().enumerate() {
            let mut logits: Vec<f32> = Vec::try_from(logits.f_get(row as i64)?)?;
            let open = self.get(sequence)?;
            // Rows of padding behind the vocabulary that both models share are nobody's tokens.
            logits.truncate(open.vocab);
            let position = open.ids.len();
            let sampling = Sampling { seed: seed_at(open.sampling.seed, position), ..open.sampling.clone() };
            let answer = Sampler::new(sampling, &open.ids)
                .and_then(|mut sampler| sampler.choose(&mut logits))
                .map(|choice| LargeToken {
                    token: choice.token,
                    cached: open.cached,
                    read: position - open.cached,
                });
            answers.push((sequence, answer.map_err(Error::from)));
        }
        Ok(answers)
    }
}

impl LargeModel for LocalLarge<'_> {
    fn vocab(&self) -> usize {
        self.model.dims().vocab as usize
    }

    fn context(&self) -> usize {
        self.model.dims().context
    }

    fn read_ahead(&self) -> ReadAhead {
        self.read_ahead
    }

    fn open(
        &mut self,
        sequence: Sequence,
        max_tokens: usize,
        sampling: &Sampling,
        vocab: usize,
    ) -> Result<()> {
        if self.open.contains_key(&sequence) {
            return Err(Error::Input(format!("sequence {} is open already", sequence.0)));
        }
        check_sampling(sampling)?;
        let seq = self.cache.open(max_tokens)?;
        let open = Open { seq, sampling: sampling.clone(), vocab, ids: Vec::new(), cached: 0 };
        self.open.insert(sequence, open);
        Ok(())
    }

    fn warm(&mut self, request: &LargeRequest) {
        let _guard = tch::no_grad_guard();
        let Ok(kept) = self.update(request) else { return };
        // Without the last row, which the token that is asked for next comes from.
        let rows = (request.ids.len() - kept - 1).min(CHUNK);
        if rows > 0 {
            // After an error the cache is as it was: the rows are read when they are needed.
            let _ = self.read(&[(request.sequence, rows)]);
        }
    }

    fn ask(&mut self, requests: &[LargeRequest]) -> Result<()> {
        for request in requests {
            let sequence = request.sequence;
            if self.asked.contains(&sequence) {
                return Err(Error::Input(format!("sequence {} is waiting already", sequence.0)));
            }
            let kept = self.update(request)?;
            if let Some(open) = self.open.get_mut(&sequence) {
                open.cached = kept;
            }
        }
        self.asked.extend(requests.iter().map(|r| r.sequence));
        Ok(())
    }

    fn answers(&mut self, _wait: Duration) -> Result<Vec<Answer>> {
        if self.asked.is_empty() {
            return Ok(Vec::new());
        }
        let _guard = tch::no_grad_guard();
        self.round()
    }

    fn close(&mut self, sequence: Sequence) {
        self.asked.retain(|s| *s != sequence);
        if let Some(open) = self.open.remove(&sequence) {
            self.cache.close(open.seq);
        }
    }
}

/// Sampling that means the same for every large model: each token is chosen from all tokens before it, the prompt's too.
pub(crate) fn check_sampling(sampling: &Sampling) -> Result<()> {
    sampling.validate()?;
    if !sampling.penalize_prompt && (sampling.repetition_penalty - 1.0).abs() > f32::EPSILON {
        return Err(Error::setting(
            "repetition_penalty",
            sampling.repetition_penalty,
            "1, or a penalty that sees the prompt too: the large model does not know where the prompt ends",
        ));
    }
    Ok(())
}

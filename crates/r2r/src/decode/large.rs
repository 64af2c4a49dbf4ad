//! The large model, wherever it is.

use std::collections::HashMap;

use nics_core::cache::DenseCache;
use nics_core::models::{Batch, Input, Model};
use nics_core::sampling::{Sampler, Sampling};
use nics_core::seam::{KvCache, Ragged, SeqId};
use tch::{Kind, Tensor};

use crate::policy::Sequence;
use crate::{Error, Result};

/// A sequence that wants its next token from the large model.
#[derive(Debug, Clone, Copy)]
pub struct LargeRequest<'a> {
    /// Which one.
    pub sequence: Sequence,
    /// All of its tokens, prompt and accepted ones.
    pub ids: &'a [u32],
    /// How many of them the large model has seen.
    pub seen: usize,
}

/// What the large model answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LargeToken {
    /// The token.
    pub token: u32,
    /// Tokens that it had cached.
    pub cached: usize,
    /// Tokens that it read for this one.
    pub read: usize,
}

/// Gives tokens to sequences that lag behind by different lengths, a batch at a time.
///
/// Its cache holds a sequence up to what it has seen and never more: a token that it returned is read with the tokens
/// after it, at its next call.
pub trait LargeModel {
    /// Ids below this are in its vocabulary.
    fn vocab(&self) -> usize;

    /// The most tokens of a sequence.
    fn context(&self) -> usize;

    /// Makes room for a sequence of at most `max_tokens`, whose tokens are chosen by `sampling` among ids below `vocab`.
    fn open(
        &mut self,
        sequence: Sequence,
        max_tokens: usize,
        sampling: &Sampling,
        vocab: usize,
    ) -> Result<()>;

    /// The next token of each request, in their order. On an error no request has been answered, and the same call may be
    /// made again.
    fn next(&mut self, requests: &[LargeRequest]) -> Result<Vec<LargeToken>>;

    /// Forgets a sequence; an unknown one is ignored.
    fn close(&mut self, sequence: Sequence);
}

struct Open {
    seq: SeqId,
    sampler: Sampler,
    vocab: usize,
}

/// A large model in this process.
pub struct LocalLarge<'m> {
    model: &'m dyn Model,
    cache: DenseCache,
    open: HashMap<Sequence, Open>,
}

impl<'m> LocalLarge<'m> {
    /// Over a loaded model.
    pub fn new(model: &'m dyn Model) -> Self {
        Self { model, cache: DenseCache::new(), open: HashMap::new() }
    }

    fn logits(&mut self, requests: &[LargeRequest]) -> Result<Tensor> {
        let (mut rows, mut ids) = (Vec::with_capacity(requests.len()), Vec::new());
        for request in requests {
            let new = request.ids.get(request.seen..).filter(|new| !new.is_empty()).ok_or_else(|| {
                let (seen, len) = (request.seen, request.ids.len());
                Error::Input(format!(
                    "sequence {}: {seen} of {len} tokens were seen, none is new",
                    request.sequence.0
                ))
            })?;
            let open = self.open.get(&request.sequence).ok_or_else(|| unknown(request.sequence))?;
            let kept = self.cache.kept(open.seq, 0);
            if kept != request.seen {
                return Err(Error::Input(format!(
                    "sequence {}: the large model has {kept} tokens, {} were said to be seen",
                    request.sequence.0, request.seen
                )));
            }
            rows.push((open.seq, request.seen, new.len()));
            ids.extend(new.iter().map(|&id| i64::from(id)));
        }
        let rows = Ragged::contiguous(&rows);
        let last = Tensor::f_from_slice(&rows.last_rows())?.f_to_device(self.model.dims().device)?;
        let input = Tensor::f_from_slice(&ids)?.f_to_device(self.model.dims().device)?;
        let out = self.model.forward(&Batch::new(rows, Input::Ids(&input)), &mut self.cache, None)?;
        let logits = self.model.logits(&out.hidden.f_index_select(0, &last)?)?;
        Ok(logits.f_to_kind(Kind::Float)?.f_to_device(tch::Device::Cpu)?)
    }

    fn answer(&mut self, requests: &[LargeRequest]) -> Result<Vec<LargeToken>> {
        let logits = self.logits(requests)?;
        let mut tokens = Vec::with_capacity(requests.len());
        for (row, request) in requests.iter().enumerate() {
            let mut logits: Vec<f32> = Vec::try_from(logits.f_get(row as i64)?)?;
            let open = self.open.get_mut(&request.sequence).ok_or_else(|| unknown(request.sequence))?;
            // Rows of padding behind the vocabulary that both models share are nobody's tokens.
            logits.truncate(open.vocab);
            let token = open.sampler.choose(&mut logits)?.token;
            tokens.push(LargeToken { token, cached: request.seen, read: request.ids.len() - request.seen });
        }
        Ok(tokens)
    }
}

fn unknown(sequence: Sequence) -> Error {
    Error::Input(format!("sequence {} was not opened with the large model", sequence.0))
}

impl LargeModel for LocalLarge<'_> {
    fn vocab(&self) -> usize {
        self.model.dims().vocab as usize
    }

    fn context(&self) -> usize {
        self.model.dims().context
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
        if sampling.penalize_prompt && (sampling.repetition_penalty - 1.0).abs() > f32::EPSILON {
            return Err(Error::setting(
                "repetition_penalty",
                sampling.repetition_penalty,
                "1: a penalty would see the large model's own tokens alone",
            ));
        }
        let sampler = Sampler::new(sampling.clone(), &[])?;
        let seq = self.cache.open(max_tokens)?;
        self.open.insert(sequence, Open { seq, sampler, vocab });
        Ok(())
    }

    fn next(&mut self, requests: &[LargeRequest]) -> Result<Vec<LargeToken>> {
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let _guard = tch::no_grad_guard();
        let result = self.answer(requests);
        if result.is_err() {
            // Layers before the one that failed have taken the rows in.
            for request in requests {
                if let Some(open) = self.open.get(&request.sequence) {
                    self.cache.truncate(open.seq, request.seen)?;
                }
            }
        }
        result
    }

    fn close(&mut self, sequence: Sequence) {
        if let Some(open) = self.open.remove(&sequence) {
            self.cache.close(open.seq);
        }
    }
}

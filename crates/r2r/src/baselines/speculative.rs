//! Vanilla speculative decoding: the small model drafts, the large one verifies a draft in one call.
//!
//! ```text
//! t_1 .. t_k ~ small          one token at a time
//! p_0 .. p_k = large          one call over the draft
//! keep t_i while r_i < min(1, p_{i-1}(t_i) / q_{i-1}(t_i)),  r_i uniform
//! then one token more: of max(0, p - q) where one was refused, of p_k where none was
//! ```
//!
//! The tokens have the large model's own distribution whatever the small one drafts (Leviathan et al., 2023, appendix A);
//! with greedy sampling they are its greedy output, token for token. Unlike routing this rolls back: both caches are cut
//! after the last accepted token. A batch is ragged: every sequence accepts what it accepts and lags as it lags.

use std::collections::HashSet;

use nics_core::cache::DenseCache;
use nics_core::generate::Finish;
use nics_core::models::{Model, NewTokens, read};
use nics_core::sampling::{Sampling, argmax, softmax};
use nics_core::seam::{KvCache, SeqId};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::decode::check_prompt;
use crate::{Error, Result};

/// Prompt rows that a model reads at once.
const CHUNK: usize = 1024;

/// A text to be continued.
#[derive(Debug, Clone)]
pub struct Request {
    /// What it begins with; not empty.
    pub prompt: Vec<u32>,
    /// The most tokens to write; at least 1.
    pub max_new_tokens: usize,
    /// Tokens that end it: the last token given out.
    pub eos: Vec<u32>,
    /// How the large model's token is chosen; the small one drafts with the same settings. A penalty is refused.
    pub sampling: Sampling,
}

/// A continuation.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// What it cost.
    pub usage: SpeculativeUsage,
}

/// What speculative decoding cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpeculativeUsage {
    /// Tokens written.
    pub tokens: u64,
    /// Tokens drafted.
    pub drafted: u64,
    /// Drafted tokens that were accepted.
    pub accepted: u64,
    /// Calls of the large model; a call gives one token of its own at most.
    pub calls: u64,
    /// Tokens that the large model read.
    pub large_read: u64,
}

impl SpeculativeUsage {
    /// Calls of the large model for a token written; 0 when there is none.
    pub fn calls_per_token(&self) -> f64 {
        if self.tokens == 0 { 0.0 } else { self.calls as f64 / self.tokens as f64 }
    }

    /// Share of drafted tokens that were accepted; 0 when nothing was drafted.
    pub fn acceptance(&self) -> f64 {
        if self.drafted == 0 { 0.0 } else { self.accepted as f64 / self.drafted as f64 }
    }

    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            tokens: self.tokens + other.tokens,
            drafted: self.drafted + other.drafted,
            accepted: self.accepted + other.accepted,
            calls: self.calls + other.calls,
            large_read: self.large_read + other.large_read,
        }
    }
}

/// One model with its cache.
struct Side<'m> {
    model: &'m dyn Model,
    cache: DenseCache,
}

/// Writes sequences by drafting and verifying.
pub struct Speculative<'m> {
    small: Side<'m>,
    large: Side<'m>,
    draft: usize,
    vocab: usize,
    context: usize,
}

struct Running {
    at: usize,
    small: SeqId,
    large: SeqId,
    /// Prompt and accepted tokens.
    ids: Vec<u32>,
    /// How many of them each model has read; the last one never is.
    small_read: usize,
    large_read: usize,
    prompt: usize,
    limit: usize,
    finish_at_limit: Finish,
    eos: Vec<u32>,
    sampling: Sampling,
    rng: ChaCha8Rng,
    usage: SpeculativeUsage,
    /// This round's tokens, each with the distribution that it was drawn from (empty when greedy).
    drafted: Vec<(u32, Vec<f32>)>,
}

impl<'m> Speculative<'m> {
    /// Two models of one tokenizer, which the caller has made sure of, and how many tokens are drafted at a time.
    ///
    /// # Errors
    /// [`Error::Setting`] for a draft of nothing.
    pub fn new(small: &'m dyn Model, large: &'m dyn Model, draft: usize) -> Result<Self> {
        if draft == 0 {
            return Err(Error::setting("the draft's length", 0, "at least 1"));
        }
        let vocab = small.dims().vocab.min(large.dims().vocab) as usize;
        let context = small.dims().context.min(large.dims().context);
        let side = |model| Side { model, cache: DenseCache::new() };
        Ok(Self { small: side(small), large: side(large), draft, vocab, context })
    }

    /// Writes requests to their ends, `batch` at a time: a reply for each, in their order.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], ids outside the shared vocabulary, a prompt that leaves no room, senseless sampling, and
    /// what a model refuses.
    pub fn generate(&mut self, requests: &[Request], batch: usize) -> Result<Vec<Reply>> {
        requests.iter().enumerate().try_for_each(|(at, request)| self.check(at, request))?;
        let _guard = tch::no_grad_guard();
        let mut running: Vec<Running> = Vec::new();
        let mut replies: Vec<Option<Reply>> = requests.iter().map(|_| None).collect();
        let mut waiting = requests.iter().enumerate();
        let result = loop {
            let admitted = loop {
                if running.len() >= batch.max(1) {
                    break Ok(());
                }
                let Some((at, request)) = waiting.next() else { break Ok(()) };
                match self.open(at, request) {
                    Ok(one) => running.push(one),
                    Err(e) => break Err(e),
                }
            };
            if running.is_empty() || admitted.is_err() {
                break admitted;
            }
            match self.round(&mut running) {
                Ok(ended) => {
                    for (one, reply) in ended {
                        replies[one.at] = Some(reply);
                        self.close(&one);
                    }
                }
                Err(e) => break Err(e),
            }
        };
        for one in &running {
            self.close(one);
        }
        result?;
        Ok(replies.into_iter().flatten().collect())
    }

    fn check(&self, at: usize, request: &Request) -> Result<()> {
        check_prompt(&request.prompt, at as u64, self.vocab, self.context)?;
        if request.max_new_tokens == 0 {
            return Err(Error::setting("max_new_tokens", 0, "at least 1"));
        }
        request.sampling.validate()?;
        let penalty = request.sampling.repetition_penalty;
        if (penalty - 1.0).abs() > f32::EPSILON {
            return Err(Error::setting(
                "repetition_penalty",
                penalty,
                "1: a draft would need the penalty of tokens that may be refused",
            ));
        }
        Ok(())
    }

    fn open(&mut self, at: usize, request: &Request) -> Result<Running> {
        let prompt = request.prompt.len();
        let limit = request.max_new_tokens.min(self.context - prompt);
        let small = self.small.cache.open(prompt + limit)?;
        let large = match self.large.cache.open(prompt + limit) {
            Ok(large) => large,
            Err(e) => {
                self.small.cache.close(small);
                return Err(e.into());
            }
        };
        let mut one = Running {
            at,
            small,
            large,
            ids: request.prompt.clone(),
            small_read: 0,
            large_read: 0,
            prompt,
            limit,
            finish_at_limit: if limit == request.max_new_tokens { Finish::Length } else { Finish::Context },
            eos: request.eos.clone(),
            sampling: request.sampling.clone(),
            rng: ChaCha8Rng::seed_from_u64(request.sampling.seed),
            usage: SpeculativeUsage::default(),
            drafted: Vec::new(),
        };
        // All of a prompt but its last token, a chunk at a time.
        let filled = self.prefill(&one);
        if let Err(e) = filled {
            self.close(&one);
            return Err(e);
        }
        (one.small_read, one.large_read) = (prompt - 1, prompt - 1);
        one.usage.large_read = one.large_read as u64;
        Ok(one)
    }

    fn prefill(&mut self, one: &Running) -> Result<()> {
        let body = &one.ids[..one.prompt - 1];
        for (side, seq) in [(&mut self.small, one.small), (&mut self.large, one.large)] {
            for (chunk, part) in body.chunks(CHUNK).enumerate() {
                let _ = read(side.model, &mut side.cache, &[(seq, chunk * CHUNK, part)])?;
            }
        }
        Ok(())
    }

    fn close(&mut self, one: &Running) {
        self.small.cache.close(one.small);
        self.large.cache.close(one.large);
    }

    /// Drafts and verifies for every sequence; takes out those that ended.
    fn round(&mut self, running: &mut Vec<Running>) -> Result<Vec<(Running, Reply)>> {
        self.draft(running)?;
        self.verify(running)?;
        let mut ended = Vec::new();
        let mut i = 0;
        while i < running.len() {
            let one = &running[i];
            let written = one.ids.len() - one.prompt;
            let finish = if one.ids.last().is_some_and(|id| one.eos.contains(id)) {
                Some(Finish::Eos)
            } else {
                (written >= one.limit).then_some(one.finish_at_limit)
            };
            let Some(finish) = finish else {
                i += 1;
                continue;
            };
            let one = running.remove(i);
            let (tokens, usage) = (one.ids[one.prompt..].to_vec(), one.usage);
            ended.push((one, Reply { tokens, finish, usage }));
        }
        Ok(ended)
    }

    fn draft(&mut self, running: &mut [Running]) -> Result<()> {
        for one in running.iter_mut() {
            one.drafted.clear();
        }
        for step in 0..self.draft {
            // Room for one token of the large model behind the draft.
            let drafts = |one: &Running| {
                let ended = one.drafted.last().is_some_and(|(id, _)| one.eos.contains(id));
                !ended && one.ids.len() - one.prompt + step + 1 < one.limit
            };
            let which: Vec<usize> = (0..running.len()).filter(|&i| drafts(&running[i])).collect();
            if which.is_empty() {
                break;
            }
            let new: Vec<Vec<u32>> =
                which.iter().map(|&i| running[i].unread(running[i].small_read)).collect();
            let parts: Vec<_> = which
                .iter()
                .zip(&new)
                .map(|(&i, new)| (running[i].small, running[i].small_read, new.as_slice()))
                .collect();
            let logits = self.small.last_logits(&parts, self.vocab)?;
            for ((&i, new), logits) in which.iter().zip(&new).zip(logits) {
                let one = &mut running[i];
                one.small_read += new.len();
                one.usage.drafted += 1;
                let drawn = one.draw(logits)?;
                one.drafted.push(drawn);
            }
        }
        Ok(())
    }

    fn verify(&mut self, running: &mut [Running]) -> Result<()> {
        let new: Vec<Vec<u32>> = running.iter().map(|one| one.unread(one.large_read)).collect();
        let parts: Vec<_> =
            running.iter().zip(&new).map(|(one, new)| (one.large, one.large_read, new.as_slice())).collect();
        let counts: Vec<usize> = running.iter().map(|one| one.drafted.len() + 1).collect();
        let mut rows = self.large.tail_logits(&parts, &counts, self.vocab)?.into_iter();
        for (one, new) in running.iter_mut().zip(&new) {
            one.usage.calls += 1;
            one.usage.large_read += new.len() as u64;
            let known = one.ids.len();
            let rows: Vec<Vec<f32>> = rows.by_ref().take(one.drafted.len() + 1).collect();
            one.accept(rows)?;
            // What was drafted and refused is forgotten; the last token is read with the next call.
            let accepted = one.ids.len() - 1;
            let small_had = one.small_read;
            one.small_read = small_had.min(accepted);
            one.large_read = accepted.min(known + one.drafted.len());
            self.small.cache.truncate(one.small, one.small_read)?;
            self.large.cache.truncate(one.large, one.large_read)?;
        }
        Ok(())
    }
}

impl Running {
    /// Accepted and drafted tokens from `read` on.
    fn unread(&self, read: usize) -> Vec<u32> {
        let drafted = self.drafted.iter().map(|(id, _)| *id);
        self.ids.iter().copied().chain(drafted).skip(read).collect()
    }

    fn is_greedy(&self) -> bool {
        self.sampling.temperature <= 0.0
    }

    /// The distribution of a row of logits; empty when greedy.
    fn distribution(&self, mut logits: Vec<f32>) -> Result<Vec<f32>> {
        if logits.iter().any(|x| x.is_nan() || *x == f32::INFINITY) {
            return Err(Error::NonFiniteFeatures { what: "logits" });
        }
        self.sampling.process(&mut logits, &HashSet::new());
        Ok(softmax(&logits))
    }

    /// The small model's next token with its distribution.
    fn draw(&mut self, logits: Vec<f32>) -> Result<(u32, Vec<f32>)> {
        if self.is_greedy() {
            return Ok((argmax(&logits), Vec::new()));
        }
        let q = self.distribution(logits)?;
        Ok((pick(&q, &mut self.rng), q))
    }

    /// Accepts what the large model would have drawn, and one token more. `rows` are its logits at the last accepted
    /// token and at each drafted one.
    fn accept(&mut self, rows: Vec<Vec<f32>>) -> Result<()> {
        let drafted = std::mem::take(&mut self.drafted);
        let mut drafts = drafted.iter();
        for row in rows {
            let draft = drafts.next();
            let token = self.verified(draft, row)?;
            self.ids.push(token);
            self.usage.tokens += 1;
            if draft.is_none_or(|(drafted, _)| *drafted != token) {
                break;
            }
            self.usage.accepted += 1;
            if self.eos.contains(&token) {
                break;
            }
        }
        self.drafted = drafted;
        Ok(())
    }

    /// The token that stands where `draft` was proposed: it, or another from what is left of the large model's
    /// distribution.
    fn verified(&mut self, draft: Option<&(u32, Vec<f32>)>, row: Vec<f32>) -> Result<u32> {
        if self.is_greedy() {
            return Ok(argmax(&row));
        }
        let p = self.distribution(row)?;
        let Some((token, q)) = draft else { return Ok(pick(&p, &mut self.rng)) };
        let at = *token as usize;
        // The draft was drawn from q, so q[at] is above 0.
        if self.rng.random::<f32>() * q[at] < p[at] {
            return Ok(*token);
        }
        let left: Vec<f32> = p.iter().zip(q).map(|(p, q)| (p - q).max(0.0)).collect();
        // Nothing is left where p and q are equal but for rounding: then p itself is right.
        let from = if left.iter().sum::<f32>() > 0.0 { &left } else { &p };
        Ok(pick(from, &mut self.rng))
    }
}

impl Side<'_> {
    /// Logits of each sequence's last row.
    fn last_logits(&mut self, parts: &[NewTokens], vocab: usize) -> Result<Vec<Vec<f32>>> {
        let counts = vec![1; parts.len()];
        self.tail_logits(parts, &counts, vocab)
    }

    /// Logits of each sequence's last `counts` rows, all sequences one after the other.
    fn tail_logits(&mut self, parts: &[NewTokens], counts: &[usize], vocab: usize) -> Result<Vec<Vec<f32>>> {
        let hidden = read(self.model, &mut self.cache, parts)?;
        let (mut wanted, mut end) = (Vec::new(), 0);
        for ((_, _, new), &count) in parts.iter().zip(counts) {
            end += new.len();
            wanted.extend((end - count..end).map(|row| row as i64));
        }
        let wanted = Tensor::f_from_slice(&wanted)?.f_to_device(hidden.device())?;
        let logits = self.model.logits(&hidden.f_index_select(0, &wanted)?)?;
        let logits = logits.f_to_kind(Kind::Float)?.f_to_device(Device::Cpu)?.f_narrow(1, 0, vocab as i64)?;
        let values: Vec<f32> = Vec::try_from(logits.f_contiguous()?.f_view([-1])?)?;
        Ok(values.chunks(vocab).map(<[f32]>::to_vec).collect())
    }
}

/// A token drawn from weights that need not sum to 1.
fn pick(weights: &[f32], rng: &mut ChaCha8Rng) -> u32 {
    let total: f64 = weights.iter().map(|&w| f64::from(w)).sum();
    let (mut left, mut last) = (rng.random::<f64>() * total, 0);
    for (i, &w) in weights.iter().enumerate().filter(|(_, w)| **w > 0.0) {
        left -= f64::from(w);
        last = i;
        if left < 0.0 {
            break;
        }
    }
    last as u32
}

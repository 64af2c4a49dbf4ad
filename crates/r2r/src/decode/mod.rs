//! The decoding loop: the small model writes, a policy decides, the large model is asked.
//!
//! ```text
//! loop   z, h = small.step(last accepted token)      the whole prompt at first
//!        t = sample(z)                               a proposal
//!        if policy(z, h, t): t = large.extend(ids[seen..]); seen = len(ids)
//!        append t
//! ```
//!
//! The small model never computes keys and values of a token that was not accepted, and the large one has those of exactly
//! the tokens that it has seen: both caches only grow, and nothing is rolled back. A step takes every live sequence one
//! token further; those that are routed share one call of the large model, however far each lags behind. A prompt is read
//! in calls of its own, so what is being read does not change what is being written.

mod large;
mod usage;

use nics_core::cache::DenseCache;
pub use nics_core::generate::Finish;
use nics_core::models::{Batch, Input, Model};
use nics_core::sampling::Sampling;
use nics_core::seam::{KvCache, Ragged, SeqId};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

pub use large::{LargeModel, LargeRequest, LargeToken, LocalLarge};
pub use usage::Usage;

use crate::policy::{Decision, Policy, Sequence, Settings, StepView};
use crate::sampling::SmallSampling;
use crate::{Error, Result};

/// Prompt rows that the small model reads at once.
const CHUNK: usize = 1024;

/// A text to be continued.
#[derive(Debug, Clone)]
pub struct Request {
    /// What it begins with; not empty.
    pub prompt: Vec<u32>,
    /// The most tokens to write; at least 1.
    pub max_new_tokens: usize,
    /// Tokens that end it, of both models: the last token given out.
    pub eos: Vec<u32>,
    /// How the small model's token is chosen.
    pub small: SmallSampling,
    /// How the large model's token is chosen.
    pub large: Sampling,
    /// Seed of the small model's draws; the large model's is in `large`.
    pub seed: u64,
    /// What the policy is to do differently for this text.
    pub settings: Settings,
}

impl Request {
    /// Both models take their likeliest token.
    pub fn greedy(prompt: Vec<u32>, max_new_tokens: usize, eos: &[u32]) -> Self {
        let (small, large) = (SmallSampling::default(), Sampling::default());
        Self {
            prompt,
            max_new_tokens,
            eos: eos.to_vec(),
            small,
            large,
            seed: 0,
            settings: Settings::default(),
        }
    }
}

/// Who chose a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The small model.
    Small,
    /// The large model, which had so many tokens cached and read so many more for it.
    Large {
        /// Tokens that it had cached.
        cached: usize,
        /// Tokens that it read.
        read: usize,
    },
}

/// A token that was written.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenEvent {
    /// Whose it is.
    pub sequence: Sequence,
    /// Its place among the written tokens, from 0.
    pub position: usize,
    /// Its id.
    pub token: u32,
    /// Who chose it.
    pub source: Source,
    /// What the policy looked at.
    pub score: f32,
    /// Set on a sequence's last token.
    pub finish: Option<Finish>,
}

struct Running {
    sequence: Sequence,
    seq: SeqId,
    /// Prompt and accepted tokens.
    ids: Vec<u32>,
    /// How many of them the small model has.
    read: usize,
    /// How many of them the large model has.
    seen: usize,
    written: usize,
    limit: usize,
    finish_at_limit: Finish,
    eos: Vec<u32>,
    sampling: SmallSampling,
    rng: ChaCha8Rng,
    usage: Usage,
    /// What the small model proposes next, and the policy's word on it.
    pending: Option<(u32, Decision)>,
}

/// Sequences being written by two models.
pub struct Decoder<'m> {
    small: &'m dyn Model,
    cache: DenseCache,
    large: Box<dyn LargeModel + 'm>,
    policy: Box<dyn Policy + 'm>,
    /// Ids that both models know.
    vocab: usize,
    context: usize,
    next: u64,
    running: Vec<Running>,
}

impl<'m> Decoder<'m> {
    /// Two models and a policy between them. Both have one tokenizer, which the caller has made sure of; ids beyond the
    /// smaller of the two vocabularies are never chosen.
    pub fn new(small: &'m dyn Model, large: Box<dyn LargeModel + 'm>, policy: Box<dyn Policy + 'm>) -> Self {
        let vocab = large.vocab().min(small.dims().vocab as usize);
        let context = large.context().min(small.dims().context);
        Self { small, cache: DenseCache::new(), large, policy, vocab, context, next: 0, running: Vec::new() }
    }

    /// Takes a request in; its tokens come with the following steps.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], ids outside the shared vocabulary, a prompt that leaves no room, senseless sampling.
    pub fn add(&mut self, request: Request) -> Result<Sequence> {
        let sequence = Sequence(self.next);
        let len = request.prompt.len();
        if len == 0 {
            return Err(Error::EmptyPrompt { seq: sequence.0 });
        }
        if let Some(id) = request.prompt.iter().find(|&&id| id as usize >= self.vocab) {
            return Err(Error::Input(format!(
                "prompt token {id} is outside the {} ids that both models know",
                self.vocab
            )));
        }
        if request.max_new_tokens == 0 {
            return Err(Error::setting("max_new_tokens", 0, "at least 1"));
        }
        request.small.validate()?;
        request.large.validate()?;
        if len >= self.context {
            let what = "the smaller context of the two models";
            return Err(nics_core::Error::ContextOverflow { need: len + 1, max: self.context, what }.into());
        }
        let limit = request.max_new_tokens.min(self.context - len);
        let finish_at_limit = if limit == request.max_new_tokens { Finish::Length } else { Finish::Context };
        self.policy.open(sequence, &request.settings)?;
        if let Err(e) = self.large.open(sequence, len + limit, &request.large, self.vocab) {
            self.policy.close(sequence);
            return Err(e);
        }
        let seq = match self.cache.open(len + limit) {
            Ok(seq) => seq,
            Err(e) => {
                self.large.close(sequence);
                self.policy.close(sequence);
                return Err(e.into());
            }
        };
        self.next += 1;
        self.running.push(Running {
            sequence,
            seq,
            ids: request.prompt,
            read: 0,
            seen: 0,
            written: 0,
            limit,
            finish_at_limit,
            eos: request.eos,
            sampling: request.small,
            rng: ChaCha8Rng::seed_from_u64(request.seed),
            usage: Usage::default(),
            pending: None,
        });
        Ok(sequence)
    }

    /// Sequences being written.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// What a running sequence has cost so far.
    pub fn usage(&self, sequence: Sequence) -> Option<Usage> {
        self.running.iter().find(|r| r.sequence == sequence).map(|r| r.usage)
    }

    /// Ends a sequence at once; an unknown one is ignored.
    pub fn cancel(&mut self, sequence: Sequence) {
        if let Some(at) = self.running.iter().position(|r| r.sequence == sequence) {
            let running = self.running.remove(at);
            self.forget(&running);
        }
    }

    fn forget(&mut self, running: &Running) {
        self.cache.close(running.seq);
        self.large.close(running.sequence);
        self.policy.close(running.sequence);
    }

    /// One token of every sequence, in the order in which their requests came. Empty when none is left.
    ///
    /// # Errors
    /// What either model or the policy refuses. No sequence is lost by it and none has written a token: after a call of the
    /// large model that failed, the next step makes the same call again.
    pub fn step(&mut self) -> Result<Vec<TokenEvent>> {
        if self.running.is_empty() {
            return Ok(Vec::new());
        }
        let _guard = tch::no_grad_guard();
        self.propose()?;
        let pending: Vec<(u32, Decision)> = self.running.iter().filter_map(|r| r.pending).collect();
        let requests: Vec<LargeRequest> = self
            .running
            .iter()
            .zip(&pending)
            .filter(|(_, (_, decision))| decision.large)
            .map(|(r, _)| LargeRequest { sequence: r.sequence, ids: &r.ids, seen: r.seen })
            .collect();
        let asked = requests.len();
        let answers = self.large.next(&requests)?;
        if answers.len() != asked {
            return Err(Error::Input(format!(
                "the large model answered {} of {asked} requests",
                answers.len()
            )));
        }
        if let Some(LargeToken { token, .. }) = answers.iter().find(|a| a.token as usize >= self.vocab) {
            let vocab = self.vocab;
            return Err(Error::Input(format!(
                "the large model chose {token}, outside the {vocab} ids in common"
            )));
        }
        let mut answers = answers.into_iter();
        let mut events = Vec::with_capacity(pending.len());
        for (r, (proposal, decision)) in self.running.iter_mut().zip(pending) {
            let answer = if decision.large { answers.next() } else { None };
            let (token, source) = match answer {
                Some(LargeToken { token, cached, read }) => (token, Source::Large { cached, read }),
                None => (proposal, Source::Small),
            };
            events.push(r.accept(token, source, decision.score));
        }
        for event in events.iter().filter(|e| e.finish.is_some()) {
            self.cancel(event.sequence);
        }
        Ok(events)
    }

    /// The small model's token and the policy's word for every sequence that has none yet. They are kept until the token
    /// is written, so that a call of the large model that failed changes no draw and no state of the policy.
    fn propose(&mut self) -> Result<()> {
        let fresh: Vec<usize> =
            (0..self.running.len()).filter(|&i| self.running[i].pending.is_none()).collect();
        if fresh.is_empty() {
            return Ok(());
        }
        let hidden = self.small_step(&fresh)?;
        let logits = self.small.logits(&hidden)?;
        let on_cpu = logits.f_to_kind(Kind::Float)?.f_to_device(Device::Cpu)?;
        let mut proposals = Vec::with_capacity(fresh.len());
        for (row, &i) in fresh.iter().enumerate() {
            let mut logits: Vec<f32> = Vec::try_from(on_cpu.f_get(row as i64)?)?;
            logits.truncate(self.vocab);
            let r = &mut self.running[i];
            proposals.push(r.sampling.choose(&logits, &mut r.rng)?);
        }
        let sequences: Vec<Sequence> = fresh.iter().map(|&i| self.running[i].sequence).collect();
        let token = Tensor::f_from_slice(&proposals.iter().map(|&t| i64::from(t)).collect::<Vec<_>>())?;
        let view = StepView { logits: &logits, hidden: &hidden, token: &token };
        let decisions = self.policy.decide(&view, &sequences)?;
        if decisions.len() != fresh.len() {
            let (name, found) = (self.policy.name(), decisions.len());
            return Err(Error::Input(format!("policy {name} decided {found} of {} rows", fresh.len())));
        }
        for ((&i, proposal), decision) in fresh.iter().zip(proposals).zip(decisions) {
            self.running[i].pending = Some((proposal, decision));
        }
        Ok(())
    }

    /// Lets the small model read what it has not of some sequences: hidden states of each one's last row, `[which,
    /// hidden]`.
    fn small_step(&mut self, which: &[usize]) -> Result<Tensor> {
        // What a step that failed had read to the end is read again from its last row.
        for &i in which {
            let r = &mut self.running[i];
            if r.read == r.ids.len() {
                r.read -= 1;
                self.cache.truncate(r.seq, r.read)?;
            }
        }
        // Prompts one by one, up to their last row or the end of a chunk that has it.
        let mut last: Vec<Option<Tensor>> = which.iter().map(|_| None).collect();
        for (hidden, &i) in last.iter_mut().zip(which) {
            while self.running[i].ids.len() - self.running[i].read > 1 {
                *hidden = Some(self.read(&[i], CHUNK)?);
            }
        }
        let rest: Vec<usize> = (0..which.len())
            .filter(|&at| self.running[which[at]].read < self.running[which[at]].ids.len())
            .collect();
        if !rest.is_empty() {
            let rows: Vec<usize> = rest.iter().map(|&at| which[at]).collect();
            let hidden = self.read(&rows, 1)?;
            for (row, at) in rest.into_iter().enumerate() {
                last[at] = Some(hidden.f_narrow(0, row as i64, 1)?);
            }
        }
        let rows: Vec<Tensor> = last.into_iter().flatten().collect();
        Ok(Tensor::f_cat(&rows, 0)?)
    }

    /// Reads at most `most` rows of some sequences in one call: hidden states of the last row of each.
    fn read(&mut self, which: &[usize], most: usize) -> Result<Tensor> {
        let (mut rows, mut ids) = (Vec::new(), Vec::new());
        for &i in which {
            let r = &self.running[i];
            let new = &r.ids[r.read..r.ids.len().min(r.read + most)];
            rows.push((r.seq, r.read, new.len()));
            ids.extend(new.iter().map(|&id| i64::from(id)));
        }
        let ragged = Ragged::contiguous(&rows);
        let device = self.small.dims().device;
        let last = Tensor::f_from_slice(&ragged.last_rows())?.f_to_device(device)?;
        let input = Tensor::f_from_slice(&ids)?.f_to_device(device)?;
        let out = match self.small.forward(&Batch::new(ragged, Input::Ids(&input)), &mut self.cache, None) {
            Ok(out) => out,
            Err(e) => {
                // Layers before the one that failed have taken the rows in.
                for (seq, from, _) in rows {
                    self.cache.truncate(seq, from)?;
                }
                return Err(e.into());
            }
        };
        for (&i, (_, _, len)) in which.iter().zip(&rows) {
            self.running[i].read += len;
        }
        Ok(out.hidden.f_index_select(0, &last)?)
    }
}

impl Running {
    fn accept(&mut self, token: u32, source: Source, score: f32) -> TokenEvent {
        match source {
            Source::Small => self.usage.small_tokens += 1,
            Source::Large { read, .. } => {
                self.usage.large_tokens += 1;
                self.usage.large_read += read as u64;
                // Without the token itself, which it reads at its next call.
                self.seen = self.ids.len();
            }
        }
        self.ids.push(token);
        self.pending = None;
        let position = self.written;
        self.written += 1;
        let finish = if self.eos.contains(&token) {
            Some(Finish::Eos)
        } else {
            (self.written == self.limit).then_some(self.finish_at_limit)
        };
        TokenEvent { sequence: self.sequence, position, token, source, score, finish }
    }
}

/// Writes requests to their ends, `batch` at a time: the events of each, in the order of the requests.
pub fn collect(
    decoder: &mut Decoder,
    requests: impl IntoIterator<Item = Request>,
    batch: usize,
) -> Result<Vec<Vec<TokenEvent>>> {
    let mut waiting = requests.into_iter();
    let (mut sequences, mut events): (Vec<Sequence>, Vec<Vec<TokenEvent>>) = (Vec::new(), Vec::new());
    loop {
        while decoder.running() < batch.max(1) {
            let Some(request) = waiting.next() else { break };
            sequences.push(decoder.add(request)?);
            events.push(Vec::new());
        }
        if decoder.running() == 0 {
            return Ok(events);
        }
        for event in decoder.step()? {
            if let Some(at) = sequences.iter().position(|s| *s == event.sequence) {
                events[at].push(event);
            }
        }
    }
}

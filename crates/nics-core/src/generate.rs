//! Step-wise generation over a ragged batch.
//!
//! A [`Generator`] holds the sequences that are being written. Each [`step`](Generator::step) is one call of the model:
//! the next rows of prompts not yet read, and one row for every sequence that writes. Sequences come and go between
//! steps, and none changes another's tokens.

use std::collections::VecDeque;

use tch::{Kind, Tensor};

use crate::models::{Batch, Input, Model};
use crate::sampling::{Sampler, Sampling};
use crate::seam::{KvCache, LayerHook, Ragged, SeqId};
use crate::{Error, Result};

/// What a sequence starts from.
#[derive(Debug)]
pub enum Prompt {
    /// Token ids.
    Ids(Vec<u32>),
    /// Embeddings, `[rows, hidden]`: the repetition penalty then sees generated tokens alone.
    Embeds(Tensor),
}

impl Prompt {
    fn len(&self) -> usize {
        match self {
            Self::Ids(ids) => ids.len(),
            Self::Embeds(x) => x.size().first().map_or(0, |&n| n as usize),
        }
    }
}

/// A sequence to be written.
#[derive(Debug)]
pub struct Request {
    /// What it starts from; not empty.
    pub prompt: Prompt,
    /// How its tokens are chosen.
    pub sampling: Sampling,
    /// The most tokens to write; at least 1.
    pub max_new_tokens: usize,
    /// Tokens that end it; they are the last token given out.
    pub eos: Vec<u32>,
}

impl Request {
    /// Greedy continuation of token ids.
    pub fn greedy(prompt: Vec<u32>, max_new_tokens: usize, eos: &[u32]) -> Self {
        Self { prompt: Prompt::Ids(prompt), sampling: Sampling::default(), max_new_tokens, eos: eos.to_vec() }
    }
}

/// Names a request of a [`Generator`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// It wrote one of its end tokens.
    Eos,
    /// It wrote as many tokens as it may.
    Length,
    /// It filled the model's context or its budget in the cache.
    Context,
}

/// A token that a step wrote.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Whose it is.
    pub request: RequestId,
    /// Its id.
    pub token: u32,
    /// Its log-probability before any processor, when asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens, when asked for.
    pub top: Vec<(u32, f32)>,
    /// Set on a sequence's last token.
    pub finish: Option<Finish>,
}

struct Running {
    id: RequestId,
    seq: SeqId,
    prompt: Prompt,
    /// Prompt rows that the cache holds.
    read: usize,
    /// Position of the next row.
    position: usize,
    written: usize,
    last: u32,
    limit: usize,
    finish_at_limit: Finish,
    sampler: Sampler,
    eos: Vec<u32>,
}

/// Rows that go into a call: `(sequence, first position, rows)`.
type NewRows = (SeqId, usize, usize);

/// Sequences being written with one model.
pub struct Generator<'a> {
    model: &'a dyn Model,
    cache: &'a mut dyn KvCache,
    hook: Option<&'a mut dyn LayerHook>,
    context: usize,
    prefill_chunk: usize,
    next: u64,
    running: Vec<Running>,
}

impl<'a> Generator<'a> {
    /// A generator without sequences.
    pub fn new(model: &'a dyn Model, cache: &'a mut dyn KvCache) -> Self {
        let context = model.dims().context;
        Self { model, cache, hook: None, context, prefill_chunk: 1024, next: 0, running: Vec::new() }
    }

    /// Calls `hook` in every layer; prompts are then read in one piece, since a hook sees whole prompts.
    #[must_use]
    pub fn with_hook(mut self, hook: &'a mut dyn LayerHook) -> Self {
        self.hook = Some(hook);
        self
    }

    /// The most positions a sequence may take, in place of the checkpoint's own limit.
    #[must_use]
    pub fn with_context(mut self, context: usize) -> Self {
        self.context = context;
        self
    }

    /// The most prompt rows of a sequence that one step reads (1,024 unless said otherwise; at least 1).
    #[must_use]
    pub fn with_prefill_chunk(mut self, rows: usize) -> Self {
        self.prefill_chunk = rows.max(1);
        self
    }

    /// Takes a request in; its tokens come with the following steps.
    ///
    /// # Errors
    /// `Error::Input` for an empty prompt or senseless values, `Error::ContextOverflow` for a prompt that leaves no room
    /// for a single token.
    pub fn add(&mut self, request: Request) -> Result<RequestId> {
        let len = request.prompt.len();
        if len == 0 {
            return Err(Error::input("the prompt is empty: it has no token to continue from"));
        }
        if request.max_new_tokens == 0 {
            return Err(Error::input("max_new_tokens is 0, expected at least 1"));
        }
        if len >= self.context {
            return Err(Error::ContextOverflow {
                need: len + 1,
                max: self.context,
                what: "the model's context",
            });
        }
        let (vocab, hidden) = (self.model.dims().vocab, self.model.dims().hidden);
        let ids: &[u32] = match &request.prompt {
            Prompt::Ids(ids) => ids,
            Prompt::Embeds(x) if x.size() == [len as i64, hidden] => &[],
            Prompt::Embeds(x) => {
                return Err(Error::Input(format!(
                    "the prompt's embeddings are of shape {:?}, expected [rows, {hidden}]",
                    x.size()
                )));
            }
        };
        if let Some(id) = ids.iter().find(|&&id| i64::from(id) >= vocab) {
            return Err(Error::Input(format!("prompt token {id} is outside the vocabulary of {vocab}")));
        }
        let sampler = Sampler::new(request.sampling, ids)?;
        let room = self.context - len;
        let (limit, finish_at_limit) = if request.max_new_tokens <= room {
            (request.max_new_tokens, Finish::Length)
        } else {
            (room, Finish::Context)
        };
        let seq = self.cache.open(len + limit)?;
        let id = RequestId(self.next);
        self.next += 1;
        self.running.push(Running {
            id,
            seq,
            prompt: request.prompt,
            read: 0,
            position: 0,
            written: 0,
            last: 0,
            limit,
            finish_at_limit,
            sampler,
            eos: request.eos,
        });
        Ok(id)
    }

    /// Sequences being written.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Ends a sequence at once and frees its cache; unknown ones are ignored.
    pub fn cancel(&mut self, id: RequestId) {
        if let Some(i) = self.running.iter().position(|r| r.id == id) {
            let ended = self.running.remove(i);
            self.cache.close(ended.seq);
        }
    }

    /// One call of the model. Gives the tokens written, in the order in which the requests came; none when every
    /// sequence is still reading its prompt or there is no sequence.
    ///
    /// # Errors
    /// What the model or a sampler returns. A sequence whose own logits are at fault has been ended; the others go on.
    pub fn step(&mut self) -> Result<Vec<Token>> {
        if self.running.is_empty() {
            return Ok(Vec::new());
        }
        let _no_grad = tch::no_grad_guard();
        let chunk = if self.hook.is_some() { usize::MAX } else { self.prefill_chunk };
        let (rows, x) = self.next_rows(chunk)?;
        let batch = Batch::new(Ragged::contiguous(&rows), Input::Embeds(&x));
        let hook: Option<&mut dyn LayerHook> = match &mut self.hook {
            Some(hook) => Some(&mut **hook),
            None => None,
        };
        let output = match self.model.forward(&batch, self.cache, hook) {
            Ok(output) => output,
            Err(e) => {
                // Some layers may have kept the rows: back to where every layer was.
                for &(seq, start, _) in &rows {
                    self.cache.truncate(seq, start)?;
                }
                return Err(e);
            }
        };
        for (running, &(_, start, len)) in self.running.iter_mut().zip(&rows) {
            running.read = running.prompt.len().min(start + len);
            running.position = start + len;
        }
        self.write(&output)
    }

    /// The next rows of every sequence: `(sequence, first position, rows)` and their embeddings.
    fn next_rows(&self, chunk: usize) -> Result<(Vec<NewRows>, Tensor)> {
        let device = self.model.dims().device;
        let mut rows = Vec::with_capacity(self.running.len());
        let mut parts: Vec<Tensor> = Vec::new();
        let mut ids: Vec<i64> = Vec::new();
        let flush = |ids: &mut Vec<i64>, parts: &mut Vec<Tensor>| -> Result<()> {
            if !ids.is_empty() {
                parts.push(self.model.embed(&Tensor::f_from_slice(ids)?.f_to_device(device)?)?);
                ids.clear();
            }
            Ok(())
        };
        for r in &self.running {
            let len = (r.prompt.len() - r.read).min(chunk);
            if len == 0 {
                ids.push(i64::from(r.last));
                rows.push((r.seq, r.position, 1));
                continue;
            }
            match &r.prompt {
                Prompt::Ids(prompt) => {
                    ids.extend(prompt[r.read..r.read + len].iter().map(|&id| i64::from(id)));
                }
                Prompt::Embeds(x) => {
                    flush(&mut ids, &mut parts)?;
                    parts.push(x.f_narrow(0, r.read as i64, len as i64)?.f_to_device(device)?);
                }
            }
            rows.push((r.seq, r.position, len));
        }
        flush(&mut ids, &mut parts)?;
        let x = if parts.len() == 1 { parts.remove(0) } else { Tensor::f_cat(&parts, 0)? };
        Ok((rows, x))
    }

    /// Chooses a token for every sequence whose prompt is read.
    fn write(&mut self, output: &crate::models::Output) -> Result<Vec<Token>> {
        let last: std::collections::HashMap<SeqId, i64> = output
            .rows
            .iter()
            .filter(|(.., p)| !p.is_empty())
            .map(|(s, from, p)| (s, (from + p.len() - 1) as i64))
            .collect();
        let writing: Vec<usize> = (0..self.running.len())
            .filter(|&i| self.running[i].read == self.running[i].prompt.len())
            .collect();
        if writing.is_empty() {
            return Ok(Vec::new());
        }
        let picked = writing
            .iter()
            .map(|&i| {
                last.get(&self.running[i].seq)
                    .copied()
                    .ok_or_else(|| Error::input("a layer hook removed the last row of a sequence"))
            })
            .collect::<Result<Vec<i64>>>()?;
        let picked = Tensor::f_from_slice(&picked)?.f_to_device(output.hidden.device())?;
        let logits = self.model.logits(&output.hidden.f_index_select(0, &picked)?)?;
        let logits = logits.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?;
        let vocab = logits.size2()?.1 as usize;
        let mut flat = vec![0f32; logits.numel()];
        logits.f_copy_data(&mut flat, logits.numel())?;

        let (mut tokens, mut ended, mut failed) = (Vec::new(), Vec::new(), None);
        for (row, &i) in flat.chunks_mut(vocab).zip(&writing) {
            let r = &mut self.running[i];
            let choice = match r.sampler.choose(row) {
                Ok(choice) => choice,
                Err(e) => {
                    ended.push(r.id);
                    failed.get_or_insert(e);
                    continue;
                }
            };
            r.written += 1;
            r.last = choice.token;
            let finish = if r.eos.contains(&choice.token) {
                Some(Finish::Eos)
            } else if r.written >= r.limit {
                Some(r.finish_at_limit)
            } else if output.exhausted.contains(&r.seq) {
                Some(Finish::Context)
            } else {
                None
            };
            if finish.is_some() {
                ended.push(r.id);
            }
            tokens.push(Token {
                request: r.id,
                token: choice.token,
                logprob: choice.logprob,
                top: choice.top,
                finish,
            });
        }
        for id in ended {
            self.cancel(id);
        }
        failed.map_or(Ok(tokens), Err)
    }
}

impl Drop for Generator<'_> {
    fn drop(&mut self) {
        for r in &self.running {
            self.cache.close(r.seq);
        }
    }
}

/// Runs many requests, at most `batch` at a time, and hands every token to `each` with the index of its request.
/// `each` returns whether the sequence shall go on.
///
/// # Errors
/// The first error of [`Generator::add`] or [`Generator::step`].
pub fn run(
    generator: &mut Generator,
    requests: impl IntoIterator<Item = Request>,
    batch: usize,
    each: &mut dyn FnMut(usize, &Token) -> Result<bool>,
) -> Result<()> {
    let mut waiting = requests.into_iter().enumerate();
    let mut indices: VecDeque<(RequestId, usize)> = VecDeque::new();
    loop {
        while generator.running() < batch.max(1) {
            let Some((index, request)) = waiting.next() else { break };
            indices.push_back((generator.add(request)?, index));
        }
        if generator.running() == 0 {
            return Ok(());
        }
        for token in generator.step()? {
            let Some(&(_, index)) = indices.iter().find(|(id, _)| *id == token.request) else { continue };
            let goes_on = each(index, &token)?;
            if token.finish.is_some() || !goes_on {
                generator.cancel(token.request);
                indices.retain(|(id, _)| *id != token.request);
            }
        }
    }
}

/// Token ids that `requests` write, without end tokens cut off.
pub fn collect(
    generator: &mut Generator,
    requests: impl IntoIterator<Item = Request>,
    batch: usize,
) -> Result<Vec<Vec<u32>>> {
    let mut all: Vec<Vec<u32>> = Vec::new();
    run(generator, requests, batch, &mut |index, token| {
        if all.len() <= index {
            all.resize_with(index + 1, Vec::new);
        }
        all[index].push(token.token);
        Ok(true)
    })?;
    Ok(all)
}

/// Log-probability of each token of `continuation` after `prompt`, without a cache: `Σ log p` is the score of a
/// multiple-choice answer.
pub fn score(model: &dyn Model, prompt: &[u32], continuation: &[u32]) -> Result<Vec<f32>> {
    if prompt.is_empty() || continuation.is_empty() {
        return Err(Error::input("scoring needs a prompt and a continuation, one of them is empty"));
    }
    let need = prompt.len() + continuation.len();
    if need > model.dims().context {
        return Err(Error::ContextOverflow { need, max: model.dims().context, what: "the model's context" });
    }
    let _no_grad = tch::no_grad_guard();
    let device = model.dims().device;
    let ids: Vec<i64> = prompt.iter().chain(continuation).map(|&id| i64::from(id)).collect();
    let (rows, n) = (need as i64 - 1, continuation.len() as i64);
    let input = Tensor::f_from_slice(&ids[..rows as usize])?.f_to_device(device)?;
    let batch = Batch::new(Ragged::contiguous(&[(SeqId(0), 0, rows as usize)]), Input::Ids(&input));
    let output = model.forward(&batch, &mut crate::cache::NoCache::new(), None)?;
    let logits = model.logits(&output.hidden.f_narrow(0, rows - n, n)?)?.f_to_kind(Kind::Float)?;
    let targets = Tensor::f_from_slice(&ids[prompt.len()..])?.f_to_device(device)?.f_unsqueeze(1)?;
    let picked = logits.f_log_softmax(-1, Kind::Float)?.f_gather(1, &targets, false)?.f_squeeze_dim(1)?;
    Ok(Vec::<f32>::try_from(picked.f_to_device(tch::Device::Cpu)?)?)
}

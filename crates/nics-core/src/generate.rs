//! Step-wise generation over a ragged batch.
//!
//! A [`Generator`] holds the sequences that are being written. Sequences come and go between steps, and none changes
//! another's tokens. A step ([`Generator::advance`]) makes these calls of the model:
//!
//! 1. one with a single row for every sequence that writes, and for those of whose prompt one row is left;
//! 2. one with the next rows of prompts, the oldest first, at most `prefill_chunk` of a sequence and `prefill_budget` in
//!    all; or, with `isolate_prompts`, one such call for each sequence.
//!
//! # Batch invariance
//! A prompt is always split at the same rows, the multiples of the chunk (of the budget where that is less), and prompts
//! and writing sequences never share a call. With `isolate_prompts`, and projections and a cache that give a row the same
//! bits whatever rows of single-row sequences stand beside it, a sequence's tokens are therefore the same, to the bit of
//! every logit, whoever else is being served. On the CPU the core's projections and dense cache do that for up to
//! [`MAX_ROWS`](nics_kernels::gemv::MAX_ROWS) sequences; a decoding call of more goes through libtorch's products, whose
//! last bits depend on the number of rows. It stays one call, since two would read the weights twice.
//!
//! With `last_row_apart` the rows before a prompt's last one depend on nothing but the ids up to them and where the
//! chunks' boundaries are: a prompt that goes on from whole chunks of another one, or from all rows but the last of an
//! equal one ([`Generator::add_from`]), writes what it would write alone, to the bit. Otherwise the last chunk of a
//! prompt has its last row, too.
//!
//! The time between two tokens of a sequence is bounded by `prefill_budget` rows.

mod many;
mod step;

use tch::Tensor;

pub use many::{collect, run, score};

use crate::models::{Embedded, Model};
use crate::sampling::{Sampler, Sampling};
use crate::seam::{KvCache, LayerHook, SeqId};
use crate::{Error, Result};

/// What a sequence starts from.
#[derive(Debug)]
pub enum Prompt {
    /// Token ids.
    Ids(Vec<u32>),
    /// Embeddings, `[rows, hidden]`: the repetition penalty then sees generated tokens alone.
    Embeds(Tensor),
    /// A prompt with images or videos, as [`Vlm::embed_prompt`](crate::models::Vlm::embed_prompt) makes it.
    Embedded(Embedded),
}

impl Prompt {
    fn len(&self) -> usize {
        match self {
            Self::Ids(ids) => ids.len(),
            Self::Embeds(x) => x.size().first().map_or(0, |&n| n as usize),
            Self::Embedded(prompt) => prompt.ids.len(),
        }
    }

    /// Its ids, as far as they are known.
    fn ids(&self) -> &[u32] {
        match self {
            Self::Ids(ids) => ids,
            Self::Embeds(_) => &[],
            Self::Embedded(prompt) => &prompt.ids,
        }
    }

    /// Its embeddings, where they are given.
    fn embeddings(&self) -> Option<&Tensor> {
        match self {
            Self::Ids(_) => None,
            Self::Embeds(x) | Self::Embedded(Embedded { embeddings: x, .. }) => Some(x),
        }
    }

    /// Where the row at `position` is in time, height and width: in the prompt or behind it.
    fn plane(&self, position: usize) -> [i64; 3] {
        match self {
            Self::Embedded(Embedded { rotary: Some(rotary), .. }) => {
                rotary.planes.get(position).copied().unwrap_or([position as i64 + rotary.delta; 3])
            }
            _ => [position as i64; 3],
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

/// What a step did.
#[derive(Debug, Default)]
pub struct Step {
    /// The tokens written, in the order in which their requests came.
    pub tokens: Vec<Token>,
    /// Sequences that failed by themselves (e.g. logits that are not finite). They have been ended; others went on.
    pub failed: Vec<(RequestId, Error)>,
    /// Sequences that ended and stay open in the cache, their owner's to close: only after
    /// [`Generator::release_ended`].
    pub ended: Vec<Released>,
}

/// A sequence that the generator let go of and the cache still holds.
#[derive(Debug)]
pub struct Released {
    /// Which request it was.
    pub request: RequestId,
    /// Its name in the cache.
    pub seq: SeqId,
    /// The id of every row that the cache holds; `None` when rows of the prompt were not just their ids. The last token that was written
    /// has no row.
    pub ids: Option<Vec<u32>>,
}

struct Running {
    id: RequestId,
    seq: SeqId,
    prompt: Prompt,
    /// Prompt rows that the cache holds.
    read: usize,
    /// Position of the next row.
    position: usize,
    written: Vec<u32>,
    limit: usize,
    finish_at_limit: Finish,
    sampler: Sampler,
    eos: Vec<u32>,
}

/// Sequences being written with one model.
pub struct Generator<'a> {
    model: &'a dyn Model,
    cache: &'a mut dyn KvCache,
    hook: Option<&'a mut dyn LayerHook>,
    context: usize,
    prefill_chunk: usize,
    prefill_budget: usize,
    isolate_prompts: bool,
    last_row_apart: bool,
    release_ended: bool,
    next: u64,
    running: Vec<Running>,
    /// Logits of a step, kept for their memory.
    logits: Vec<f32>,
}

impl<'a> Generator<'a> {
    /// A generator without sequences.
    pub fn new(model: &'a dyn Model, cache: &'a mut dyn KvCache) -> Self {
        Self {
            context: model.dims().context,
            model,
            cache,
            hook: None,
            prefill_chunk: 1024,
            prefill_budget: usize::MAX,
            isolate_prompts: false,
            last_row_apart: false,
            release_ended: false,
            next: 0,
            running: Vec::new(),
            logits: Vec::new(),
        }
    }

    /// Calls `hook` in every layer; prompts are then read in one piece, since a hook sees whole prompts.
    #[must_use]
    pub fn with_hook(mut self, hook: &'a mut dyn LayerHook) -> Self {
        self.set_hook(hook);
        self
    }

    /// [`with_hook`](Self::with_hook) in place.
    pub fn set_hook(&mut self, hook: &'a mut dyn LayerHook) {
        self.hook = Some(hook);
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

    /// The most prompt rows that one step reads of all sequences together (no limit unless said otherwise; at least 1).
    #[must_use]
    pub fn with_prefill_budget(mut self, rows: usize) -> Self {
        self.prefill_budget = rows.max(1);
        self
    }

    /// Reads each prompt in calls of its own: see [batch invariance](self#batch-invariance). A failure of such a call
    /// then is its sequence's alone.
    #[must_use]
    pub fn isolate_prompts(mut self, isolate: bool) -> Self {
        self.isolate_prompts = isolate;
        self
    }

    /// Reads the last row of a prompt of token ids in the call of those that write, also where it could go with the rows
    /// before it: see [batch invariance](self#batch-invariance). Ignored with a hook, which sees whole prompts.
    #[must_use]
    pub fn last_row_apart(mut self, apart: bool) -> Self {
        self.last_row_apart = apart;
        self
    }

    /// Hands sequences that end by themselves out in [`Step::ended`] instead of closing them.
    #[must_use]
    pub fn release_ended(mut self, release: bool) -> Self {
        self.release_ended = release;
        self
    }

    /// Checks a request and gives the most positions that its sequence may take.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn check(&self, request: &Request) -> Result<usize> {
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
        match request.prompt.embeddings() {
            None => {
                let ids = request.prompt.ids();
                if let Some(id) = ids.iter().find(|&&id| i64::from(id) >= vocab) {
                    return Err(Error::Input(format!(
                        "prompt token {id} is outside the vocabulary of {vocab}"
                    )));
                }
            }
            Some(x) if x.size() == [len as i64, hidden] => {}
            Some(x) => {
                return Err(Error::Input(format!(
                    "the prompt's embeddings are of shape {:?}, expected [rows, {hidden}]",
                    x.size()
                )));
            }
        }
        if let Prompt::Embedded(Embedded { rotary: Some(rotary), .. }) = &request.prompt
            && rotary.planes.len() != len
        {
            return Err(Error::Input(format!(
                "{} positions in time, height and width for a prompt of {len} tokens",
                rotary.planes.len()
            )));
        }
        request.sampling.validate()?;
        Ok(len + request.max_new_tokens.min(self.context - len))
    }

    /// Takes a request in; its tokens come with the following steps.
    ///
    /// # Errors
    /// `Error::Input` for an empty prompt or senseless values, `Error::ContextOverflow` for a prompt that leaves no room
    /// for a single token.
    pub fn add(&mut self, request: Request) -> Result<RequestId> {
        let room = self.check(&request)?;
        let seq = self.cache.open(room)?;
        self.take_in(request, room, seq, 0)
    }

    /// Takes a request in of whose prompt the first `read` rows are in the cache already, as sequence `seq` with room
    /// for what [`check`](Self::check) says. The generator owns the sequence from then on.
    ///
    /// # Errors
    /// As [`add`](Self::add), and `Error::Input` when the cache holds another number of rows or the whole prompt, whose
    /// last row has to be computed. The sequence then is still the caller's.
    pub fn add_from(&mut self, request: Request, seq: SeqId, read: usize) -> Result<RequestId> {
        let room = self.check(&request)?;
        let (len, kept) = (request.prompt.len(), self.cache.kept(seq, 0));
        if read >= len || read != kept {
            return Err(Error::Input(format!(
                "a prompt of {len} tokens cannot go on at row {read} of sequence {}, which holds {kept}: expected as \
                 many as it holds, and fewer than the prompt",
                seq.0
            )));
        }
        self.take_in(request, room, seq, read)
    }

    fn take_in(&mut self, request: Request, room: usize, seq: SeqId, read: usize) -> Result<RequestId> {
        let sampler = Sampler::new(request.sampling, request.prompt.ids())?;
        let limit = room - request.prompt.len();
        let finish_at_limit = if limit == request.max_new_tokens { Finish::Length } else { Finish::Context };
        let id = RequestId(self.next);
        self.next += 1;
        self.running.push(Running {
            id,
            seq,
            prompt: request.prompt,
            read,
            position: read,
            written: Vec::new(),
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

    /// The cache in which the sequences are.
    pub fn cache(&self) -> &dyn KvCache {
        self.cache
    }

    /// The cache, for sequences that are not the generator's: it takes no change to its own.
    pub fn cache_mut(&mut self) -> &mut dyn KvCache {
        self.cache
    }

    /// A running request's sequence and how many rows of its prompt the cache holds.
    pub fn reading(&self, id: RequestId) -> Option<(SeqId, usize)> {
        self.running.iter().find(|r| r.id == id).map(|r| (r.seq, r.read))
    }

    /// Ends a sequence at once and frees its cache; unknown ones are ignored.
    pub fn cancel(&mut self, id: RequestId) {
        if let Some(released) = self.release(id) {
            self.cache.close(released.seq);
        }
    }

    /// Ends a sequence at once and hands it out, still open in the cache; `None` for an unknown one.
    pub fn release(&mut self, id: RequestId) -> Option<Released> {
        let i = self.running.iter().position(|r| r.id == id)?;
        let r = self.running.remove(i);
        let ids = match r.prompt {
            Prompt::Ids(mut ids) => {
                ids.extend(r.written);
                ids.truncate(r.position);
                Some(ids)
            }
            Prompt::Embeds(_) | Prompt::Embedded(_) => None,
        };
        Some(Released { request: id, seq: r.seq, ids })
    }
}

impl Drop for Generator<'_> {
    fn drop(&mut self) {
        for r in &self.running {
            self.cache.close(r.seq);
        }
    }
}

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
//! the tokens that it has seen: both caches only grow, and nothing is rolled back. A step takes every sequence that is not
//! waiting one token further. Those that are routed ask the large model together, however far each lags behind; one in this
//! process answers within the step, one on a server when it can, and the others go on meanwhile. A prompt is read in calls
//! of its own, a chunk a step, so what is being read neither changes what is being written nor holds it up for long.

mod large;
mod local;
mod step;
mod usage;

use std::collections::HashMap;

use nics_core::cache::DenseCache;
pub use nics_core::generate::Finish;
use nics_core::models::Model;
use nics_core::sampling::Sampling;
use nics_core::seam::{KvCache, SeqId};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

pub use large::{Answer, LargeModel, LargeRequest, LargeToken, ReadAhead, seed_at};
pub use local::LocalLarge;
pub(crate) use local::check_sampling;
pub use usage::{MeanParameters, Sizes, Traffic, Usage};

use crate::policy::{Decision, Policy, Sequence, Settings};
use crate::sampling::SmallSampling;
use crate::{Error, Result};

/// Rows of prompts that either model reads in a step at most, beside the rows of those that write.
pub const CHUNK: usize = 512;

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

impl Source {
    /// Its name in results and on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Large { .. } => "large",
        }
    }
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
    /// Whether the large model was asked and failed, so that the small one's token stands ([`OnFailure::KeepSmall`]).
    pub degraded: bool,
    /// Set on a sequence's last token.
    pub finish: Option<Finish>,
}

/// What becomes of a sequence whose token the large model could not give, all retries spent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// It ends with the error; others go on.
    #[default]
    Abort,
    /// The small model's token stands, marked as [degraded](TokenEvent::degraded).
    KeepSmall,
}

/// What a step did.
#[derive(Debug, Default)]
pub struct Step {
    /// At most one token of each sequence, in the order in which their requests came.
    pub tokens: Vec<TokenEvent>,
    /// Sequences that have ended with an error, and what it was.
    pub failed: Vec<(Sequence, Error)>,
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
    /// How many of them the large model has been told to read ahead.
    warmed: usize,
    /// What the small model proposes next, and the policy's word on it.
    pending: Option<(u32, Decision)>,
    /// Whether the large model has been asked and not answered.
    waiting: bool,
}

/// Sequences being written by two models.
pub struct Decoder<'m> {
    small: &'m dyn Model,
    cache: Box<dyn KvCache>,
    large: Box<dyn LargeModel + 'm>,
    policy: Box<dyn Policy + 'm>,
    /// Ids that both models know.
    vocab: usize,
    context: usize,
    on_failure: OnFailure,
    next: u64,
    running: Vec<Running>,
}

impl<'m> Decoder<'m> {
    /// Two models and a policy between them. Both have one tokenizer, which the caller has made sure of; ids beyond the
    /// smaller of the two vocabularies are never chosen.
    pub fn new(small: &'m dyn Model, large: Box<dyn LargeModel + 'm>, policy: Box<dyn Policy + 'm>) -> Self {
        let vocab = large.vocab().min(small.dims().vocab as usize);
        let context = large.context().min(small.dims().context);
        Self {
            small,
            cache: Box::new(DenseCache::new()),
            large,
            policy,
            vocab,
            context,
            on_failure: OnFailure::default(),
            next: 0,
            running: Vec::new(),
        }
    }

    /// Keeps the small model's keys and values in `cache`, which has no sequence yet, in place of a dense one. A sequence whose
    /// budget there is full ends its call with an error: the budget has to hold the longest text.
    pub fn with_cache(mut self, cache: Box<dyn KvCache>) -> Self {
        self.cache = cache;
        self
    }

    /// What becomes of sequences that the large model fails.
    pub fn on_failure(mut self, on_failure: OnFailure) -> Self {
        self.on_failure = on_failure;
        self
    }

    /// Ids below this are known to both models.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Tokens that prompt and reply may have together: the smaller of the two models' contexts.
    pub fn context(&self) -> usize {
        self.context
    }

    /// What the large model's calls have cost, all sequences together; `None` when it is in this process.
    pub fn traffic(&self) -> Option<Traffic> {
        self.large.traffic()
    }

    /// Takes a request in; its tokens come with the following steps.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], ids outside the shared vocabulary, a prompt that leaves no room, senseless sampling.
    pub fn add(&mut self, request: Request) -> Result<Sequence> {
        let sequence = Sequence(self.next);
        check_prompt(&request.prompt, sequence.0, self.vocab, self.context)?;
        if request.max_new_tokens == 0 {
            return Err(Error::setting("max_new_tokens", 0, "at least 1"));
        }
        request.small.validate()?;
        request.large.validate()?;
        let len = request.prompt.len();
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
            warmed: 0,
            pending: None,
            waiting: false,
        });
        if let (true, Some(r)) = (self.large.read_ahead().prompt, self.running.last_mut()) {
            self.large.warm(&LargeRequest { sequence, ids: &r.ids, seen: 0 });
            r.warmed = r.ids.len();
        }
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
}

/// Whether two models that share `vocab` ids and `context` positions can go on with the prompt of sequence `seq`.
pub(crate) fn check_prompt(prompt: &[u32], seq: u64, vocab: usize, context: usize) -> Result<()> {
    if prompt.is_empty() {
        return Err(Error::EmptyPrompt { seq });
    }
    if let Some(id) = prompt.iter().find(|&&id| id as usize >= vocab) {
        return Err(Error::Input(format!(
            "prompt token {id} is outside the {vocab} ids that both models know"
        )));
    }
    if prompt.len() >= context {
        let what = "the smaller context of the two models";
        return Err(nics_core::Error::ContextOverflow { need: prompt.len() + 1, max: context, what }.into());
    }
    Ok(())
}

/// Writes requests to their ends, `batch` at a time. `each` is told of every token, and of the failure of a request that
/// has ended with one, by the request's place; `false` ends that request.
///
/// # Errors
/// A request that is refused, what [`Decoder::advance`] or `each` return: `each` may have errors of its caller's own.
pub fn run<E: From<Error>>(
    decoder: &mut Decoder,
    requests: impl IntoIterator<Item = Request>,
    batch: usize,
    each: &mut dyn FnMut(usize, Result<TokenEvent>) -> Result<bool, E>,
) -> Result<(), E> {
    let mut waiting = requests.into_iter().enumerate();
    let mut places: HashMap<Sequence, usize> = HashMap::new();
    loop {
        while decoder.running() < batch.max(1) {
            let Some((place, request)) = waiting.next() else { break };
            places.insert(decoder.add(request)?, place);
        }
        if decoder.running() == 0 {
            return Ok(());
        }
        let step = decoder.advance()?;
        let tokens = step.tokens.into_iter().map(|event| (event.sequence, Ok(event)));
        for (sequence, outcome) in tokens.chain(step.failed.into_iter().map(|(s, e)| (s, Err(e)))) {
            let Some(&place) = places.get(&sequence) else { continue };
            let ends = outcome.as_ref().map_or(true, |event| event.finish.is_some());
            if !each(place, outcome)? && !ends {
                decoder.cancel(sequence);
            }
            if ends {
                places.remove(&sequence);
            }
        }
    }
}

/// Writes requests to their ends, `batch` at a time: the events of each, in the order of the requests.
///
/// # Errors
/// What [`run`] returns, and the first failure of a request.
pub fn collect(
    decoder: &mut Decoder,
    requests: impl IntoIterator<Item = Request>,
    batch: usize,
) -> Result<Vec<Vec<TokenEvent>>> {
    let mut events: Vec<Vec<TokenEvent>> = Vec::new();
    run(decoder, requests, batch, &mut |place, event| -> Result<bool> {
        events.resize_with(events.len().max(place + 1), Vec::new);
        events[place].push(event?);
        Ok(true)
    })?;
    Ok(events)
}

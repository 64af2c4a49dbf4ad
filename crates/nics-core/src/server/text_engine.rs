//! The default [`Engine`]: one model, continuous batching over a [`Generator`], memory held to a limit, prefixes reused.
//!
//! # Memory
//! A job is taken in when what it may need at the worst, prompt and all new tokens
//! ([`KvCache::forecast`]), fits what the limit leaves beside the jobs that run. A running job can therefore always be
//! finished: nothing is preempted. What is left holds sequences that have ended; they give way, least recently used
//! first, before a job is kept waiting.
//!
//! # Prefixes
//! A prompt that begins like a kept sequence, or like the prompt of a running one, starts from a copy of those rows
//! ([`KvCache::branch`]); one that begins with all of a kept sequence takes it over ([`KvCache::resume`]). When an older
//! prompt that is still being read will have more to give, it waits for that: `n` choices of one request compute their
//! prompt once. Its last token is always computed, for its logits. Caches that cannot give the beginning of a sequence are
//! asked once and then left alone.
//!
//! # Batch invariance
//! Prompts are read in calls of their own, split at the chunk's multiples, their last rows with those that write, so
//! whether others are served does not change a job's tokens (see [`crate::generate`]). With
//! [`exact_prefix`](TextSettings::exact_prefix) rows are reused only where the same calls would compute them again, so
//! what was served before does not either.

mod prefix;
mod reuse;
mod settings;

use std::sync::Arc;

use prefix::Kept;
pub use settings::TextSettings;

use super::engine::{Admission, Engine, EngineStats, Event, Job, JobId, Written};
use crate::generate::{Generator, Prompt, Request, RequestId};
use crate::models::{Model, ModelDims};
use crate::seam::{KvCache, LayerHook, SeqId};
use crate::{Error, Result};

/// A job that was taken in.
struct Held {
    id: JobId,
    prompt: Arc<[u32]>,
    /// What the generator will be given; `None` once it has it.
    waiting: Option<Request>,
    running: Option<RequestId>,
    /// The most positions that it takes.
    room: usize,
    /// Bytes set aside for them.
    reserved: usize,
    /// Prompt tokens that came from another sequence.
    cached: usize,
    /// Prompt rows in the cache, those included.
    read: usize,
}

/// Writes text with one model.
pub struct TextEngine<'a> {
    generator: Generator<'a>,
    dims: ModelDims,
    settings: TextSettings,
    /// Oldest first.
    jobs: Vec<Held>,
    kept: Kept,
    /// Bytes set aside for the jobs.
    reserved: usize,
    /// Jobs that failed outside a step, to be told in the next one.
    failed: Vec<(JobId, Error)>,
    stats: EngineStats,
}

impl<'a> TextEngine<'a> {
    /// An engine without jobs.
    ///
    /// # Errors
    /// `Error::Input` for limits of 0, and for a memory limit that not even two tokens fit.
    pub fn new(model: &'a dyn Model, cache: &'a mut dyn KvCache, settings: TextSettings) -> Result<Self> {
        settings.check(model, cache)?;
        let dims = model.dims().clone();
        let generator = settings.generator(model, cache).release_ended(true);
        Ok(Self {
            generator,
            dims,
            settings,
            jobs: Vec::new(),
            kept: Kept::default(),
            reserved: 0,
            failed: Vec::new(),
            stats: EngineStats::default(),
        })
    }

    /// Calls `hook` in every layer. Prompts are then read in one piece whatever their length, and no prefix is reused,
    /// since a hook sees whole prompts.
    #[must_use]
    pub fn with_hook(mut self, hook: &'a mut dyn LayerHook) -> Self {
        self.generator.set_hook(hook);
        self.settings.min_prefix = None;
        self
    }

    /// The cache in which the sequences are.
    pub fn cache(&self) -> &dyn KvCache {
        self.generator.cache()
    }

    fn close(&mut self, seq: SeqId) {
        self.generator.cache_mut().close(seq);
    }

    /// Whether so many more bytes are too many beside what is reserved and kept.
    fn is_over(&self, more: usize) -> bool {
        self.reserved.saturating_add(self.kept.bytes()).saturating_add(more) > self.settings.kv_limit_bytes
    }

    /// Lets kept sequences go until `more` bytes fit; `spare` stays.
    fn make_room(&mut self, more: usize, spare: Option<SeqId>) {
        while self.is_over(more) {
            let Some(entry) = self.kept.evict(spare) else { return };
            self.close(entry.seq);
        }
    }

    /// Takes a job off the list.
    fn forget(&mut self, request: RequestId) -> Option<Held> {
        let i = self.jobs.iter().position(|job| job.running == Some(request))?;
        let job = self.jobs.remove(i);
        self.reserved -= job.reserved;
        Some(job)
    }
}

impl Engine for TextEngine<'_> {
    fn admit(&mut self, job: &Job) -> Admission {
        if self.jobs.len() >= self.settings.max_sequences {
            return Admission::Full;
        }
        let request = Request {
            prompt: Prompt::Ids(job.prompt.to_vec()),
            sampling: job.sampling.clone(),
            max_new_tokens: job.max_new_tokens,
            eos: job.eos.clone(),
        };
        let room = match self.generator.check(&request) {
            Ok(room) => room,
            Err(error) => return Admission::Refused(error),
        };
        let reserved = self.generator.cache().forecast(&self.dims, room);
        let limit = self.settings.kv_limit_bytes;
        if reserved > limit {
            return Admission::Refused(Error::Input(format!(
                "{room} tokens of prompt and reply take {reserved} bytes of keys and values, the server's limit is \
                 {limit}: shorten the prompt or ask for fewer new tokens"
            )));
        }
        if self.reserved + reserved > limit {
            return Admission::Full;
        }
        let best =
            self.settings.min_prefix.and_then(|min| self.kept.best(&job.prompt, self.settings.rule(), min));
        self.make_room(reserved, best.map(|best| best.seq));
        // What it begins with does not fit beside it: it takes that over rather than compute it again.
        let take_over = self.is_over(reserved);
        self.reserved += reserved;
        self.jobs.push(Held {
            id: job.id,
            prompt: job.prompt.clone(),
            waiting: Some(request),
            running: None,
            room,
            reserved,
            cached: 0,
            read: 0,
        });
        if let Err(error) = self.enter(self.jobs.len() - 1, take_over) {
            self.jobs.pop();
            self.reserved -= reserved;
            return Admission::Refused(error);
        }
        self.make_room(0, None);
        Admission::Taken
    }

    fn step(&mut self, emit: &mut dyn FnMut(Event)) -> Result<()> {
        for (job, error) in std::mem::take(&mut self.failed) {
            emit(Event::Failed { job, error });
        }
        if self.generator.running() == 0 {
            return Ok(());
        }
        let step = self.generator.advance()?;
        self.stats.steps_total += 1;
        self.stats.generated_tokens_total += step.tokens.len() as u64;
        for job in &mut self.jobs {
            let Some(request) = job.running else { continue };
            if step.failed.iter().any(|(failed, _)| *failed == request) {
                continue;
            }
            // One that has ended is no longer in the generator.
            let read = self.generator.reading(request).map_or(job.prompt.len(), |(_, read)| read);
            self.stats.prompt_tokens_total += (read - job.read) as u64;
            job.read = read;
        }
        for token in step.tokens {
            let Some(job) = self.jobs.iter().find(|job| job.running == Some(token.request)) else { continue };
            let id = job.id;
            emit(Event::Token(Written {
                job: id,
                token: token.token,
                logprob: token.logprob,
                top: token.top,
                ..Written::default()
            }));
            if let Some(finish) = token.finish {
                emit(Event::Finished { job: id, finish });
            }
        }
        for (request, error) in step.failed {
            if let Some(job) = self.forget(request) {
                emit(Event::Failed { job: job.id, error });
            }
        }
        for released in step.ended {
            match self.forget(released.request) {
                Some(job) => self.keep(released, &job),
                None => self.close(released.seq),
            }
        }
        self.enter_waiting();
        Ok(())
    }

    fn cancel(&mut self, job: JobId) {
        self.failed.retain(|(failed, _)| *failed != job);
        let Some(i) = self.jobs.iter().position(|held| held.id == job) else { return };
        let held = self.jobs.remove(i);
        self.reserved -= held.reserved;
        if let Some(released) = held.running.and_then(|id| self.generator.release(id)) {
            self.keep(released, &held);
        }
        self.enter_waiting();
    }

    fn running(&self) -> usize {
        self.jobs.len() + self.failed.len()
    }

    fn cached_tokens(&self, job: JobId) -> usize {
        self.jobs.iter().find(|held| held.id == job).map_or(0, |held| held.cached)
    }

    fn stats(&self) -> EngineStats {
        EngineStats {
            running: self.running(),
            kv_bytes: self.reserved + self.kept.bytes(),
            kv_limit_bytes: self.settings.kv_limit_bytes,
            ..self.stats
        }
    }
}

impl Drop for TextEngine<'_> {
    fn drop(&mut self) {
        // The cache is its owner's and outlives the engine.
        while let Some(entry) = self.kept.evict(None) {
            self.close(entry.seq);
        }
    }
}

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
//! ([`KvCache::branch`]); one that wholly continues a kept sequence takes it over ([`KvCache::resume`]). When an older
//! prompt that is still being read will have more in common with it, it waits for that: `n` choices of one request
//! compute their prompt once. Its last token is always computed, for its logits. Caches that cannot give the beginning of
//! a sequence are asked once and then left alone.
//!
//! # Batch invariance
//! Prompts are read in calls of their own, so whether others are served does not change a job's tokens (see
//! [`crate::generate`]). Reuse splits a prompt at another row than reading it anew: the last bits of its logits may then
//! differ, as between any two splits.

use std::sync::Arc;

use super::engine::{Admission, Engine, EngineStats, Event, Job, JobId, Written};
use super::prefix::{Entry, Kept, common};
use crate::generate::{Generator, Prompt, Released, Request, RequestId};
use crate::models::{Model, ModelDims};
use crate::seam::{KvCache, LayerHook, SeqId};
use crate::{Error, Result};

/// Limits of a [`TextEngine`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextSettings {
    /// The most bytes of keys and values, kept prefixes included.
    pub kv_limit_bytes: usize,
    /// The most sequences that are written at a time; at least 1.
    pub max_sequences: usize,
    /// The most rows of a prompt that one call reads; at least 1.
    pub prefill_chunk: usize,
    /// The most prompt rows of all sequences that one step reads, which bounds the time between two tokens; at least 1.
    pub prefill_budget: usize,
    /// Prefixes of at least so many tokens are reused; `None` reuses none.
    pub min_prefix: Option<usize>,
    /// The most positions of a sequence, in place of the checkpoint's own limit.
    pub context: Option<usize>,
}

impl Default for TextSettings {
    /// 2 GiB, 16 sequences, 512 prompt rows a step, prefixes from 16 tokens on.
    fn default() -> Self {
        Self {
            kv_limit_bytes: 2 << 30,
            max_sequences: 16,
            prefill_chunk: 512,
            prefill_budget: 512,
            min_prefix: Some(16),
            context: None,
        }
    }
}

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

/// Where a prompt can start from.
#[derive(Clone, Copy)]
enum Source {
    Kept(SeqId),
    Running(SeqId),
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
        let TextSettings { max_sequences, prefill_chunk, prefill_budget, .. } = settings;
        for (name, value) in [
            ("max_sequences", max_sequences),
            ("prefill_chunk", prefill_chunk),
            ("prefill_budget", prefill_budget),
        ] {
            if value == 0 {
                return Err(Error::Input(format!("{name} is 0, expected at least 1")));
            }
        }
        let least = cache.forecast(model.dims(), 2);
        if settings.kv_limit_bytes < least {
            return Err(Error::Input(format!(
                "the limit of {} bytes for keys and values is too small: a prompt of one token and its reply of one \
                 take {least}",
                settings.kv_limit_bytes
            )));
        }
        let dims = model.dims().clone();
        let generator = Generator::new(model, cache)
            .with_context(settings.context.unwrap_or(dims.context))
            .with_prefill_chunk(prefill_chunk)
            .with_prefill_budget(prefill_budget)
            .isolate_prompts(true)
            .release_ended(true);
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

    /// The best beginning that there is for a prompt, and whether an older prompt that is being read will be a better one.
    fn beginning(&self, index: usize, min: usize) -> (Option<(Source, usize)>, bool) {
        let job = &self.jobs[index];
        let most = job.prompt.len() - 1; // The last one's logits are needed.
        let mut best = self.kept.best(&job.prompt).map(|(seq, n)| (Source::Kept(seq), n.min(most)));
        let mut coming = 0;
        for (i, other) in self.jobs.iter().enumerate().filter(|(i, _)| *i != index) {
            let shared = common(&other.prompt, &job.prompt).min(most);
            let now = shared.min(other.read);
            if i < index {
                coming = coming.max(shared);
            }
            let running = other.running.and_then(|id| self.generator.reading(id));
            if let Some((seq, _)) = running.filter(|_| now > best.map_or(0, |(_, n)| n)) {
                best = Some((Source::Running(seq), now));
            }
        }
        let now = best.map_or(0, |(_, n)| n);
        (best.filter(|(_, n)| *n >= min), coming >= min && coming > now)
    }

    /// Gives a waiting job to the generator, unless it should wait longer. With `take_over`, a kept sequence is never
    /// copied.
    fn enter(&mut self, index: usize, take_over: bool) -> Result<()> {
        let room = self.jobs[index].room;
        let mut from = None;
        if let Some(min) = self.settings.min_prefix {
            let (best, better_coming) = self.beginning(index, min.max(1));
            if better_coming {
                return Ok(());
            }
            if let Some((source, rows)) = best {
                from = self.begin_from(source, rows, room, take_over)?.map(|seq| (seq, rows));
                if from.is_none() {
                    self.give_up_reuse();
                }
            }
        }
        let job = &mut self.jobs[index];
        let Some(request) = job.waiting.take() else { return Ok(()) };
        let id = match from {
            None => self.generator.add(request)?,
            Some((seq, rows)) => {
                let added = self.generator.add_from(request, seq, rows);
                if added.is_err() {
                    self.generator.cache_mut().close(seq);
                }
                job.cached = rows;
                job.read = rows;
                self.stats.prompt_tokens_reused_total += rows as u64;
                added?
            }
        };
        job.running = Some(id);
        Ok(())
    }

    /// A sequence that begins with the first `rows` rows of another; `None` when the cache cannot.
    fn begin_from(
        &mut self,
        source: Source,
        rows: usize,
        room: usize,
        take_over: bool,
    ) -> Result<Option<SeqId>> {
        match source {
            Source::Running(seq) => self.generator.cache_mut().branch(seq, rows, room),
            Source::Kept(seq) if take_over || self.kept.rows(seq) == rows => {
                self.kept.remove(seq);
                match self.generator.cache_mut().resume(seq, rows, room) {
                    Ok(true) => Ok(Some(seq)),
                    otherwise => {
                        self.close(seq);
                        otherwise.map(|_| None)
                    }
                }
            }
            Source::Kept(seq) => {
                self.kept.touch(seq);
                self.generator.cache_mut().branch(seq, rows, room)
            }
        }
    }

    /// The cache does not give beginnings of sequences: nothing more is kept.
    fn give_up_reuse(&mut self) {
        tracing::debug!("this cache cannot give the beginning of a sequence: prefixes are not reused");
        self.settings.min_prefix = None;
        while let Some(entry) = self.kept.evict(None) {
            self.close(entry.seq);
        }
    }

    /// Lets waiting jobs go on whose wait is over.
    fn enter_waiting(&mut self) {
        let mut index = 0;
        while index < self.jobs.len() {
            if self.jobs[index].waiting.is_some()
                && let Err(error) = self.enter(index, false)
            {
                let job = self.jobs.remove(index);
                self.reserved -= job.reserved;
                self.failed.push((job.id, error));
                continue;
            }
            index += 1;
        }
    }

    /// Keeps an ended sequence when prompts can begin with it, else closes it. Its reservation is gone by now.
    fn keep(&mut self, released: Released, reserved: usize) {
        let Released { seq, ids, .. } = released;
        let cache = self.generator.cache();
        let whole = |ids: &Vec<u32>| (0..self.dims.layers).all(|l| cache.kept(seq, l) == ids.len());
        let (Some(min), Some(ids)) = (self.settings.min_prefix, ids.filter(whole)) else {
            return self.close(seq);
        };
        if ids.len() < min.max(1) {
            return self.close(seq);
        }
        let bytes = cache.held(seq).map_or(reserved, |held| held.allocated);
        for entry in self.kept.insert(Entry { seq, ids, bytes }) {
            self.close(entry.seq);
        }
        self.make_room(0, None);
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
        let best = self.kept.best(&job.prompt).map(|(seq, _)| seq);
        self.make_room(reserved, best);
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
            let reserved = self.forget(released.request).map_or(0, |job| job.reserved);
            self.keep(released, reserved);
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
            self.keep(released, held.reserved);
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

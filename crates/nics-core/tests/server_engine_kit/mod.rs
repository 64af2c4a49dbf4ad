//! What the tests of the engine share: jobs, an engine stepped by hand, models and caches that misbehave.
#![allow(dead_code, missing_docs)]

use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nics_core::cache::DenseCache;
use nics_core::generate::{Finish, Prompt, Request, collect};
use nics_core::models::{Batch, Decoder, Input, Model, ModelDims, Output, ProjectionVisitor};
use nics_core::sampling::Sampling;
use nics_core::seam::{Attended, Bytes, KvCache, LayerHook, SeqId, Site, Snapshot};
use nics_core::server::{Admission, Engine, Event, Job, JobId, TextEngine, TextSettings};
use nics_core::{Error, Result};
use tch::Tensor;

/// A job that draws, from a seed of its own.
pub fn drawn(id: u64, prompt: Vec<u32>, new: usize) -> Job {
    let sampling = Sampling { temperature: 1.0, seed: 1000 + id, ..Sampling::default() };
    Job { sampling, ..greedy(id, prompt, new) }
}

pub fn greedy(id: u64, prompt: Vec<u32>, new: usize) -> Job {
    Job {
        id: JobId(id),
        prompt: prompt.into(),
        sampling: Sampling::default(),
        max_new_tokens: new,
        eos: Vec::new(),
        own: serde_json::Map::new(),
    }
}

/// What the job writes when nothing else runs, by the plain generator, its prompt read as [`settings`] say: a draw may
/// stand so near to a border that the last bit of a logit tells.
pub fn alone(model: &Decoder, job: &Job) -> Vec<u32> {
    let request = Request {
        prompt: Prompt::Ids(job.prompt.to_vec()),
        sampling: job.sampling.clone(),
        max_new_tokens: job.max_new_tokens,
        eos: job.eos.clone(),
    };
    let mut cache = DenseCache::new();
    let mut generator = settings().generator(model, &mut cache);
    collect(&mut generator, [request], 1).unwrap().remove(0)
}

/// Small limits, so that a test reaches them.
pub fn settings() -> TextSettings {
    TextSettings { kv_limit_bytes: 64 << 20, prefill_chunk: 8, prefill_budget: 16, ..TextSettings::default() }
}

/// How a job ended.
#[derive(Debug, PartialEq)]
pub enum End {
    Finished(Finish),
    Failed(String),
}

/// An engine stepped by hand, with what it told of each job.
pub struct Stepped<'a> {
    pub engine: TextEngine<'a>,
    pub tokens: BTreeMap<u64, Vec<u32>>,
    pub ends: BTreeMap<u64, End>,
    /// Prompt tokens of each job that were reused, as of its last step.
    pub cached: BTreeMap<u64, usize>,
}

impl<'a> Stepped<'a> {
    pub fn new(model: &'a dyn Model, cache: &'a mut dyn KvCache, settings: TextSettings) -> Self {
        let engine = TextEngine::new(model, cache, settings).unwrap();
        Self { engine, tokens: BTreeMap::new(), ends: BTreeMap::new(), cached: BTreeMap::new() }
    }

    #[track_caller]
    pub fn take(&mut self, job: &Job) {
        let admission = self.engine.admit(job);
        assert!(matches!(admission, Admission::Taken), "job {}: {admission:?}", job.id.0);
        self.tokens.insert(job.id.0, Vec::new());
        self.cached.insert(job.id.0, self.engine.cached_tokens(job.id));
    }

    pub fn try_step(&mut self) -> Result<()> {
        for (&id, cached) in self.cached.iter_mut().filter(|(id, _)| !self.ends.contains_key(id)) {
            *cached = self.engine.cached_tokens(JobId(id));
        }
        let (tokens, ends) = (&mut self.tokens, &mut self.ends);
        let result = self.engine.step(&mut |event| match event {
            Event::Token(written) => {
                assert!(!ends.contains_key(&written.job.0), "a token after the end");
                tokens.get_mut(&written.job.0).unwrap().push(written.token);
            }
            Event::Finished { job, finish } => {
                assert!(ends.insert(job.0, End::Finished(finish)).is_none(), "two ends");
            }
            Event::Failed { job, error } => {
                assert!(ends.insert(job.0, End::Failed(error.to_string())).is_none(), "two ends");
            }
        });
        self.check_memory();
        result
    }

    /// What is allocated is never more than what is counted, and that never more than the limit.
    #[track_caller]
    pub fn check_memory(&self) {
        let (stats, bytes) = (self.engine.stats(), self.engine.cache().bytes());
        assert!(bytes.allocated <= stats.kv_bytes, "{bytes:?} are allocated, counted are {stats:?}");
        assert!(stats.kv_bytes <= stats.kv_limit_bytes, "{stats:?}");
    }

    #[track_caller]
    pub fn step(&mut self) {
        self.try_step().unwrap();
    }

    /// Steps until nothing runs.
    #[track_caller]
    pub fn finish(&mut self) {
        let mut steps = 0;
        while self.engine.running() > 0 {
            self.step();
            steps += 1;
            assert!(steps < 10_000, "no end");
        }
    }
}

/// Serves jobs, as many at a time as `settings` let in, and gives the bits of all log-probabilities of each; also how
/// many prompt tokens were reused.
pub fn bits(model: &dyn Model, settings: &TextSettings, jobs: &[Job]) -> (BTreeMap<u64, Vec<u32>>, u64) {
    let mut cache = DenseCache::new();
    let mut engine = TextEngine::new(model, &mut cache, settings.clone()).unwrap();
    let mut bits: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    let mut waiting: VecDeque<&Job> = jobs.iter().collect();
    while !waiting.is_empty() || engine.running() > 0 {
        while let Some(job) = waiting.front()
            && matches!(engine.admit(job), Admission::Taken)
        {
            waiting.pop_front();
        }
        let mut see = |event| {
            let Event::Token(written) = event else { return };
            let of = bits.entry(written.job.0).or_default();
            of.extend(written.logprob.map(f32::to_bits));
            of.extend(written.top.iter().map(|(_, logprob)| logprob.to_bits()));
        };
        engine.step(&mut see).unwrap();
    }
    (bits, engine.stats().prompt_tokens_reused_total)
}

/// A model that records its calls and misbehaves on demand.
pub struct Watched {
    pub inner: Decoder,
    /// Every call's rows: sequence, first position, count.
    pub calls: Mutex<Vec<Vec<(u64, i64, usize)>>>,
    /// Calls of at least so many rows fail.
    pub broken: AtomicUsize,
    /// A row of this id has logits that are not finite.
    pub poison: Option<i64>,
}

impl Watched {
    pub fn new(inner: Decoder) -> Self {
        let calls = Mutex::new(Vec::new());
        Self { inner, calls, broken: AtomicUsize::new(usize::MAX), poison: None }
    }

    pub fn taken_calls(&self) -> Vec<Vec<(u64, i64, usize)>> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

impl Model for Watched {
    fn dims(&self) -> &ModelDims {
        self.inner.dims()
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        self.inner.embed(ids)
    }

    fn forward(
        &self,
        batch: &Batch,
        cache: &mut dyn KvCache,
        hook: Option<&mut dyn LayerHook>,
    ) -> Result<Output> {
        let rows = batch.rows.iter().map(|(s, _, p)| (s.0, p[0], p.len())).collect();
        self.calls.lock().unwrap().push(rows);
        let mut output = self.inner.forward(batch, cache, hook)?;
        // After the call, so that the cache holds rows that have to go again.
        if batch.rows.len() >= self.broken.load(Ordering::SeqCst) {
            return Err(Error::input("broken on demand"));
        }
        if let (Input::Ids(ids), Some(poison)) = (batch.input, self.poison) {
            let rows = ids.eq(poison).unsqueeze(1);
            output.hidden = output.hidden.masked_fill(&rows, f64::NAN);
        }
        Ok(output)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.inner.logits(hidden)
    }

    fn visit_projections(&mut self, _f: &mut ProjectionVisitor) -> Result<()> {
        Ok(())
    }

    fn visit_parameters(&mut self, _f: &mut dyn FnMut(&str, &mut Tensor) -> Result<()>) -> Result<()> {
        Ok(())
    }
}

/// A dense cache that cannot give the beginning of a sequence, and is full after so many rows.
pub struct Plain {
    pub inner: DenseCache,
    pub rows: usize,
}

impl KvCache for Plain {
    fn open(&mut self, max_tokens: usize) -> Result<SeqId> {
        self.inner.open(max_tokens)
    }

    fn close(&mut self, s: SeqId) {
        self.inner.close(s);
    }

    fn attend(&mut self, at: &Site, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
        let mut attended = self.inner.attend(at, q, k, v)?;
        let full = at.rows.seqs().iter().filter(|s| self.inner.kept(**s, at.layer) >= self.rows);
        attended.exhausted.extend(full);
        Ok(attended)
    }

    fn kept(&self, s: SeqId, layer: usize) -> usize {
        self.inner.kept(s, layer)
    }

    fn truncate(&mut self, s: SeqId, position: usize) -> Result<()> {
        self.inner.truncate(s, position)
    }

    fn bytes(&self) -> Bytes {
        self.inner.bytes()
    }

    fn fork(&mut self, s: SeqId) -> Result<SeqId> {
        self.inner.fork(s)
    }

    fn snapshot(&self, s: SeqId) -> Result<Snapshot> {
        self.inner.snapshot(s)
    }

    fn restore(&mut self, snapshot: &Snapshot) -> Result<SeqId> {
        self.inner.restore(snapshot)
    }
}

/// A deadline against hanging, not a claim of speed.
#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < until, "not within 20 seconds: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

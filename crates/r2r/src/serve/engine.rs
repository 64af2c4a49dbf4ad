//! The engine: a job is a sequence of the decoder's.

use nics_core::cache::DenseCache;
use nics_core::models::ModelDims;
use nics_core::sampling::Sampling;
use nics_core::seam::KvCache;
use nics_core::server::{Admission, Counter, Engine, EngineStats, Event, Job, JobId, Written};
use nics_core::{Error, Result};
use serde_json::{Map, Value};

use super::{OwnFields, served};
use crate::decode::{Decoder, Request, Source, TokenEvent, Usage};
use crate::policy::{Sequence, Settings};
use crate::sampling::SmallSampling;

/// Memory of a large model in this process.
#[derive(Debug, Clone)]
pub struct LargeMemory {
    /// Its shape.
    pub dims: ModelDims,
    /// The most bytes of its keys and values.
    pub kv_limit_bytes: usize,
}

/// Limits of a [`PairEngine`].
#[derive(Debug, Clone)]
pub struct PairSettings {
    /// The most sequences that are written at a time; at least 1.
    pub max_sequences: usize,
    /// Shape of the small model.
    pub small: ModelDims,
    /// The most bytes of the small model's keys and values.
    pub kv_limit_bytes: usize,
    /// `None` for a large model on a server, whose memory is the server's business.
    pub large: Option<LargeMemory>,
}

impl PairSettings {
    /// Bytes that a token takes in both models of this process together.
    pub fn token_bytes(small: &ModelDims, large: Option<&ModelDims>) -> (usize, usize) {
        let cost = |dims: &ModelDims| DenseCache::new().forecast(dims, 1).max(1);
        (cost(small), large.map_or(0, cost))
    }

    /// Divides `bytes` between two models so that both hold as many tokens.
    pub fn share(bytes: usize, max_sequences: usize, small: &ModelDims, large: Option<&ModelDims>) -> Self {
        let (a, b) = Self::token_bytes(small, large);
        // In 128 bits: bytes times bytes.
        let of_small = (bytes as u128 * a as u128 / (a + b) as u128) as usize;
        let large = large.map(|dims| LargeMemory { dims: dims.clone(), kv_limit_bytes: bytes - of_small });
        Self { max_sequences, small: small.clone(), kv_limit_bytes: of_small, large }
    }
}

/// A job that was taken in.
struct Held {
    id: JobId,
    sequence: Sequence,
    prompt: usize,
    started: bool,
    /// Bytes set aside with the small and the large model.
    reserved: (usize, usize),
    /// Whether its client is told each token's source.
    sources: bool,
}

/// Writes text with two models and a policy between them: continuous batching, every sequence under its own settings.
///
/// # Memory
/// A job is taken in when what it may need at the worst, prompt and all new tokens, fits what is left of *both* models'
/// memory; it then always finishes. Sequences are closed at their ends: no prefix is kept.
///
/// # Failures
/// What the large model does not give for one job is that job's failure, or a degraded token, as the decoder was told. Only
/// what no job can be held to ends all.
pub struct PairEngine<'m> {
    decoder: Decoder<'m>,
    settings: PairSettings,
    /// Oldest first.
    jobs: Vec<Held>,
    /// Bytes set aside with the small and the large model.
    reserved: (usize, usize),
    total: Usage,
    stats: EngineStats,
}

impl<'m> PairEngine<'m> {
    /// An engine without jobs over a decoder without sequences.
    ///
    /// # Errors
    /// `Error::Input` for limits of 0, and for memory that not even two tokens fit.
    pub fn new(decoder: Decoder<'m>, settings: PairSettings) -> Result<Self> {
        if settings.max_sequences == 0 {
            return Err(Error::input("max_sequences is 0, expected at least 1"));
        }
        let new = Self {
            decoder,
            settings,
            jobs: Vec::new(),
            reserved: (0, 0),
            total: Usage::default(),
            stats: EngineStats::default(),
        };
        let (least, limits) = (new.forecast(2), new.limits());
        for (which, least, limit) in [("small", least.0, limits.0), ("large", least.1, limits.1)]
            .into_iter()
            .filter(|(_, l, _)| *l > 0)
        {
            if limit < least {
                return Err(Error::Input(format!(
                    "the limit of {limit} bytes for keys and values of the {which} model is too small: a prompt of one \
                     token and its reply of one take {least}"
                )));
            }
        }
        Ok(new)
    }

    /// Bytes that a sequence of so many tokens may take, with the small and the large model.
    fn forecast(&self, tokens: usize) -> (usize, usize) {
        let cache = DenseCache::new();
        let large = self.settings.large.as_ref().map_or(0, |l| cache.forecast(&l.dims, tokens));
        (cache.forecast(&self.settings.small, tokens), large)
    }

    fn limits(&self) -> (usize, usize) {
        (self.settings.kv_limit_bytes, self.settings.large.as_ref().map_or(0, |l| l.kv_limit_bytes))
    }

    /// A job as a request to the decoder.
    fn request(job: &Job, own: &OwnFields) -> Request {
        let sampling = &job.sampling;
        Request {
            prompt: job.prompt.to_vec(),
            max_new_tokens: job.max_new_tokens,
            eos: job.eos.clone(),
            small: SmallSampling::from(sampling),
            large: Sampling { logprobs: None, ..sampling.clone() },
            seed: sampling.seed,
            settings: Settings { seed: Some(sampling.seed), ..own.settings },
        }
    }

    /// Takes a job off the list.
    fn forget(&mut self, sequence: Sequence) -> Option<Held> {
        let i = self.jobs.iter().position(|job| job.sequence == sequence)?;
        let job = self.jobs.remove(i);
        self.reserved = (self.reserved.0 - job.reserved.0, self.reserved.1 - job.reserved.1);
        Some(job)
    }

    fn tell(&mut self, event: &TokenEvent, emit: &mut dyn FnMut(Event)) {
        let Some(job) = self.jobs.iter_mut().find(|job| job.sequence == event.sequence) else { return };
        self.total.note(event);
        self.stats.generated_tokens_total += 1;
        if !job.started {
            job.started = true;
            self.stats.prompt_tokens_total += job.prompt as u64;
        }
        let id = job.id;
        let own = if job.sources { own(event) } else { Map::new() };
        emit(Event::Token(Written {
            job: id,
            token: event.token,
            own,
            counts: counts(event),
            ..Written::default()
        }));
        if let Some(finish) = event.finish {
            self.forget(event.sequence);
            emit(Event::Finished { job: id, finish });
        }
    }
}

impl Engine for PairEngine<'_> {
    fn admit(&mut self, job: &Job) -> Admission {
        let own = match OwnFields::of_job(&job.own) {
            Ok(own) => own,
            Err(error) => return Admission::Refused(error),
        };
        // In the smaller of the two contexts.
        let tokens = job.prompt.len().saturating_add(job.max_new_tokens).min(self.decoder.context());
        let (need, limits) = (self.forecast(tokens), self.limits());
        for (which, need, limit) in [("small", need.0, limits.0), ("large", need.1, limits.1)] {
            if need > limit {
                return Admission::Refused(Error::Input(format!(
                    "{tokens} tokens of prompt and reply take {need} bytes of the {which} model's keys and values, the \
                     server's limit is {limit}: shorten the prompt or ask for fewer new tokens"
                )));
            }
        }
        let is_over = self.reserved.0 + need.0 > limits.0 || self.reserved.1 + need.1 > limits.1;
        if self.jobs.len() >= self.settings.max_sequences || is_over {
            return Admission::Full;
        }
        match self.decoder.add(Self::request(job, &own)) {
            Ok(sequence) => {
                self.reserved = (self.reserved.0 + need.0, self.reserved.1 + need.1);
                let (id, prompt) = (job.id, job.prompt.len());
                let (started, sources) = (false, own.sources);
                self.jobs.push(Held { id, sequence, prompt, started, reserved: need, sources });
                Admission::Taken
            }
            Err(error) => Admission::Refused(served(error)),
        }
    }

    fn step(&mut self, emit: &mut dyn FnMut(Event)) -> Result<()> {
        let step = self.decoder.advance().map_err(served)?;
        self.stats.steps_total += 1;
        for event in step.tokens {
            self.tell(&event, emit);
        }
        for (sequence, error) in step.failed {
            if let Some(job) = self.forget(sequence) {
                emit(Event::Failed { job: job.id, error: served(error) });
            }
        }
        Ok(())
    }

    fn cancel(&mut self, job: JobId) {
        let Some(sequence) = self.jobs.iter().find(|held| held.id == job).map(|held| held.sequence) else {
            return;
        };
        self.decoder.cancel(sequence);
        self.forget(sequence);
    }

    fn running(&self) -> usize {
        self.jobs.len()
    }

    fn stats(&self) -> EngineStats {
        let limits = self.limits();
        EngineStats {
            running: self.jobs.len(),
            kv_bytes: self.reserved.0 + self.reserved.1,
            kv_limit_bytes: limits.0.saturating_add(limits.1),
            ..self.stats
        }
    }

    fn counters(&self) -> Vec<Counter> {
        let (reserved, limits, total) = (self.reserved, self.limits(), self.total);
        let counter = |name, help, value| Counter { name, help, value };
        let traffic = self.decoder.traffic();
        let calls = traffic.map_or(total.large_tokens, |t| t.calls);
        let mut all = vec![
            counter("small_tokens_total", "Tokens that the small model chose.", total.small_tokens as f64),
            counter("large_tokens_total", "Tokens that the large model chose.", total.large_tokens as f64),
            counter(
                "large_calls_total",
                "Calls of the large model: of a server, or sequences it answered.",
                calls as f64,
            ),
            counter("large_tokens_read_total", "Tokens that the large model read.", total.large_read as f64),
            counter(
                "degraded_tokens_total",
                "Tokens of the small model's that the large one was asked for and did not give.",
                total.degraded_tokens as f64,
            ),
            counter("small_kv_bytes", "Bytes reserved with the small model.", reserved.0 as f64),
            counter("small_kv_limit_bytes", "The most that may be reserved there.", limits.0 as f64),
        ];
        if self.settings.large.is_some() {
            all.extend([
                counter("large_kv_bytes", "Bytes reserved with the large model.", reserved.1 as f64),
                counter("large_kv_limit_bytes", "The most that may be reserved there.", limits.1 as f64),
            ]);
        }
        if let Some(t) = traffic {
            all.extend([
                counter("large_retries_total", "Calls made again after one that failed.", t.retries as f64),
                counter("large_warm_calls_total", "Calls that read ahead.", t.warm_calls as f64),
                counter("large_failures_total", "Tokens that no call gave.", t.failures as f64),
                counter("large_sent_bytes_total", "Bytes sent to the large model.", t.bytes_up as f64),
                counter("large_received_bytes_total", "Bytes received from it.", t.bytes_down as f64),
            ]);
            all.extend(t.cached_ratio().map(|ratio| {
                counter("large_cached_ratio", "Share of what it was sent before that it still had.", ratio)
            }));
        }
        all
    }
}

/// What the client is told of a token.
fn own(event: &TokenEvent) -> Map<String, Value> {
    // As short as it was computed: the next number of 64 bits has more digits than mean anything.
    let score = event.score.to_string().parse::<f64>().unwrap_or(f64::NAN);
    let mut own = Map::from_iter([
        ("id".to_owned(), event.token.into()),
        ("source".to_owned(), event.source.name().into()),
        ("score".to_owned(), score.into()),
    ]);
    if event.degraded {
        own.insert("degraded".to_owned(), true.into());
    }
    own
}

/// What a token adds to the reply's counts, under the names of [`super::frontend`].
fn counts(event: &TokenEvent) -> Vec<(&'static str, u64)> {
    let mut counts = match event.source {
        Source::Small => vec![(super::frontend::SMALL, 1)],
        Source::Large { read, .. } => {
            vec![(super::frontend::LARGE, 1), (super::frontend::LARGE_READ, read as u64)]
        }
    };
    if event.degraded {
        counts.push((super::frontend::DEGRADED, 1));
    }
    counts
}

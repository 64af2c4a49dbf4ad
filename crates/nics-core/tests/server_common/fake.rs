//! An engine without a model.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use nics_core::generate::Finish;
use nics_core::server::{Admission, Engine, EngineStats, Event, Job, JobId, Written};
use nics_core::{Error, Result};
use serde_json::json;

use super::Front;

/// What a [`Fake`] engine has seen.
#[derive(Default)]
pub struct Seen {
    pub steps: AtomicUsize,
    pub tokens: AtomicUsize,
    pub admitted: AtomicUsize,
    pub cancelled: AtomicUsize,
    pub running: AtomicUsize,
    /// While it is set, a step does not end.
    pub hold: AtomicBool,
    /// A step is being held.
    pub held: AtomicBool,
}

/// Which tokens a job is answered with; a `Err` fails the job after the tokens of `Ok`.
pub type Script = dyn Fn(&Job) -> Vec<u32> + Send + Sync;

/// An engine without a model: it writes what a script says, one token a step.
pub struct Fake {
    pub script: Arc<Script>,
    /// Jobs at a time.
    pub room: usize,
    /// Time of a step.
    pub pace: Duration,
    /// The step, counted from a job's begin, at which jobs fail.
    pub fail_at: Option<usize>,
    pub seen: Arc<Seen>,
    pub jobs: Vec<(Job, Vec<u32>, usize)>,
}

impl Fake {
    pub fn new(script: impl Fn(&Job) -> Vec<u32> + Send + Sync + 'static) -> Self {
        Self {
            script: Arc::new(script),
            room: 64,
            pace: Duration::ZERO,
            fail_at: None,
            seen: Arc::default(),
            jobs: Vec::new(),
        }
    }

    /// Says the same text whoever asks, then the end token.
    pub fn saying(text: &str) -> Self {
        let front = Front::new();
        let mut ids = front.tokenizer.encode(text, false).unwrap();
        ids.push(front.card.eos[0]);
        Self::new(move |_| ids.clone())
    }

    /// Says as much as it may, depending on prompt and seed.
    pub fn babbling() -> Self {
        Self::new(babble)
    }
}

/// Tokens that depend on prompt and seed alone; never an end token.
pub fn babble(job: &Job) -> Vec<u32> {
    let mut state = job.prompt.iter().fold(job.sampling.seed ^ 0x9e37_79b9_7f4a_7c15, |h, &id| {
        (h ^ u64::from(id)).wrapping_mul(0x0100_0000_01b3).rotate_left(23)
    });
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % 280) as u32
    };
    (0..job.max_new_tokens).map(|_| next()).collect()
}

impl Engine for Fake {
    fn admit(&mut self, job: &Job) -> Admission {
        if job.prompt.len() == 13 && job.own.get("mood").is_some() {
            return Admission::Refused(Error::input("13 is a bad number in any mood"));
        }
        if self.jobs.len() >= self.room {
            return Admission::Full;
        }
        self.seen.admitted.fetch_add(1, Ordering::SeqCst);
        self.jobs.push((job.clone(), (self.script)(job), 0));
        self.seen.running.store(self.jobs.len(), Ordering::SeqCst);
        Admission::Taken
    }

    fn step(&mut self, emit: &mut dyn FnMut(Event)) -> Result<()> {
        std::thread::sleep(self.pace);
        while self.seen.hold.load(Ordering::SeqCst) {
            self.seen.held.store(true, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(1));
        }
        self.seen.held.store(false, Ordering::SeqCst);
        self.seen.steps.fetch_add(1, Ordering::SeqCst);
        let seen = self.seen.clone();
        let fail_at = self.fail_at;
        self.jobs.retain_mut(|(job, tokens, at)| {
            if fail_at == Some(*at) {
                emit(Event::Failed { job: job.id, error: Error::input("the script ends here") });
                return false;
            }
            let Some(&token) = tokens.get(*at) else {
                emit(Event::Finished { job: job.id, finish: Finish::Length });
                return false;
            };
            *at += 1;
            seen.tokens.fetch_add(1, Ordering::SeqCst);
            let mut written = Written { job: job.id, token, ..Written::default() };
            if let Some(n) = job.sampling.logprobs {
                written.logprob = Some(-0.5);
                written.top = (0..n as u32).map(|i| (token + i, -0.5 - i as f32)).collect();
            }
            if let Some(mood) = job.own.get("mood") {
                written.own.insert("mood".into(), mood.clone());
                written.own.insert("at".into(), json!(*at - 1));
                written.counts = vec![("moods", 1), ("prompt_tokens", 1000)];
            }
            emit(Event::Token(written));
            let finish = if job.eos.contains(&token) {
                Some(Finish::Eos)
            } else {
                (*at >= job.max_new_tokens).then_some(Finish::Length)
            };
            if let Some(finish) = finish {
                emit(Event::Finished { job: job.id, finish });
            }
            finish.is_none()
        });
        self.seen.running.store(self.jobs.len(), Ordering::SeqCst);
        Ok(())
    }

    fn cancel(&mut self, job: JobId) {
        let before = self.jobs.len();
        self.jobs.retain(|(j, ..)| j.id != job);
        self.seen.cancelled.fetch_add(before - self.jobs.len(), Ordering::SeqCst);
        self.seen.running.store(self.jobs.len(), Ordering::SeqCst);
    }

    fn running(&self) -> usize {
        self.jobs.len()
    }

    fn stats(&self) -> EngineStats {
        EngineStats { running: self.jobs.len(), kv_bytes: 64 * self.jobs.len(), ..EngineStats::default() }
    }
}

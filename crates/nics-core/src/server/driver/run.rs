//! The engine thread's loop.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::{Failure, Phase, Shared, State, Update, message};
use crate::server::engine::{Admission, Engine, Event, Job, JobId};
use crate::server::metrics;

/// The engine thread's end of the channels.
pub struct Driver {
    shared: Arc<Shared>,
    /// Jobs that the engine holds.
    running: HashMap<JobId, Running>,
    /// Requests of which the engine holds a job: how many jobs, and since when the first.
    requests: HashMap<u64, (usize, Instant)>,
}

struct Running {
    request: u64,
    updates: mpsc::UnboundedSender<Update>,
    cached_tokens: usize,
    started: bool,
    /// Tokens that it may still write.
    left: usize,
}

/// Takes cancelled jobs out of the queue; what is not found there stays for the thread.
pub(super) fn drop_cancelled(state: &mut State) {
    if state.cancelled.is_empty() {
        return;
    }
    let (cancelled, queue) = (&mut state.cancelled, &mut state.queue);
    let mut dropped = 0;
    queue.retain_mut(|waiting| {
        let before = waiting.jobs.len();
        waiting.jobs.retain(|job| !cancelled.remove(&job.id));
        dropped += before - waiting.jobs.len();
        waiting.in_hand || !waiting.jobs.is_empty()
    });
    state.stats.cancelled_total += dropped as u64;
    state.stats.queued = state.queue.len();
}

impl Driver {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, running: HashMap::new(), requests: HashMap::new() }
    }

    /// Whether the server has been told to stop: loading may be given up.
    pub fn stopping(&self) -> bool {
        *self.shared.phase.borrow() == Phase::Stopped
    }

    /// Answers requests with `engine` until the server drains or stops; sleeps while there are none. A step that fails
    /// ends the jobs that ran, and the next ones are answered.
    ///
    /// # Panics
    /// With the engine's own panic, once every job has been told.
    pub fn run(mut self, engine: &mut dyn Engine) {
        match catch_unwind(AssertUnwindSafe(|| self.serve(engine))) {
            Ok(()) => self.fail_running(&Failure::Stopped),
            Err(payload) => {
                let why: Arc<str> = format!("the engine thread panicked: {}", message(&*payload)).into();
                tracing::error!("{why}");
                self.shared.advance(&Phase::Dead(why.clone()));
                self.shared.fail_queue(&Failure::Dead(why.clone()));
                self.fail_running(&Failure::Dead(why));
                resume_unwind(payload);
            }
        }
    }

    fn serve(&mut self, engine: &mut dyn Engine) {
        for wrong in engine.counters().iter().filter(|c| !metrics::fits(c)) {
            tracing::error!(
                name = wrong.name,
                "a counter of the engine cannot be shown: its name or help is wrong"
            );
        }
        self.note(engine, 0);
        self.shared.advance(&Phase::Ready);
        while self.wait() {
            self.cancel(engine);
            self.admit(engine);
            if !self.running.is_empty() {
                self.step(engine);
            }
            self.note(engine, self.requests.len());
        }
        for job in self.running.keys() {
            engine.cancel(*job);
        }
        self.note(engine, 0);
    }

    /// Puts down what the engine counts, for whoever asks, beside how many requests run.
    fn note(&self, engine: &dyn Engine, running: usize) {
        let (stats, counters) = (engine.stats(), engine.counters());
        let mut state = self.shared.lock();
        (state.stats.engine, state.stats.counters) = (stats, counters);
        state.stats.running = running;
    }

    /// Sleeps until there is something to do. `false` ends the loop.
    fn wait(&self) -> bool {
        let mut state = self.shared.lock();
        loop {
            let idle = self.running.is_empty() && state.queue.is_empty();
            match &*self.shared.phase.borrow() {
                Phase::Stopped | Phase::Dead(_) => return false,
                Phase::Draining if idle => return false,
                Phase::Draining | Phase::Loading | Phase::Ready => {}
            }
            if !idle || !state.cancelled.is_empty() {
                return true;
            }
            state = self.shared.wake.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// Ends what was cancelled since the last step.
    fn cancel(&mut self, engine: &mut dyn Engine) {
        let cancelled = {
            let mut state = self.shared.lock();
            drop_cancelled(&mut state);
            std::mem::take(&mut state.cancelled)
        };
        let mut ended = 0;
        for job in cancelled {
            if self.running.contains_key(&job) {
                engine.cancel(job);
                self.forget(job);
                ended += 1;
            }
        }
        self.shared.lock().stats.cancelled_total += ended;
    }

    /// Hands waiting jobs to the engine, oldest first, until it has no room for the oldest.
    fn admit(&mut self, engine: &mut dyn Engine) {
        while let Some((request, job, updates)) = self.next_waiting() {
            let admission = engine.admit(&job);
            let failure = match admission {
                Admission::Taken => {
                    let cached_tokens = engine.cached_tokens(job.id);
                    self.requests.entry(request).or_insert_with(|| (0, Instant::now())).0 += 1;
                    let left = job.max_new_tokens;
                    let running = Running { request, updates, cached_tokens, started: false, left };
                    self.running.insert(job.id, running);
                    self.settle(request);
                    continue;
                }
                Admission::Full if !self.running.is_empty() => return self.put_back(request, job, &updates),
                Admission::Full => {
                    // Nothing runs that could make room later: waiting would be for ever.
                    Failure::Refused("the engine has no room for this request even when nothing runs".into())
                }
                Admission::Refused(error) => Failure::Refused(error.to_string().into()),
            };
            self.shared.lock().stats.failed_total += 1;
            let _ = updates.send(Update::Failed { job: job.id, failure });
            self.settle(request);
        }
    }

    /// The oldest waiting job. Its request stays in the queue until its fate is known.
    fn next_waiting(&self) -> Option<(u64, Job, mpsc::UnboundedSender<Update>)> {
        let mut state = self.shared.lock();
        let waiting = state.queue.front_mut()?;
        let job = waiting.jobs.pop_front()?;
        waiting.in_hand = true;
        Some((waiting.request, job, waiting.updates.clone()))
    }

    fn put_back(&self, request: u64, job: Job, updates: &mpsc::UnboundedSender<Update>) {
        let mut state = self.shared.lock();
        match state.queue.front_mut() {
            Some(front) if front.request == request => {
                front.in_hand = false;
                front.jobs.push_front(job);
            }
            // The queue has been failed meanwhile.
            _ => {
                state.stats.failed_total += 1;
                let _ = updates.send(Update::Failed { job: job.id, failure: Failure::Stopped });
            }
        }
    }

    /// The job in hand has found its end or the engine: its request leaves the queue with its last job.
    fn settle(&self, request: u64) {
        let mut state = self.shared.lock();
        if let Some(front) = state.queue.front_mut().filter(|front| front.request == request) {
            front.in_hand = false;
            if front.jobs.is_empty() {
                state.queue.pop_front();
            }
        }
        state.stats.queued = state.queue.len();
    }

    fn step(&mut self, engine: &mut dyn Engine) {
        for (job, running) in self.running.iter_mut().filter(|(_, running)| !running.started) {
            running.cached_tokens = engine.cached_tokens(*job);
        }
        let began = Instant::now();
        let (mut over, mut finished, mut failed) = (Vec::new(), 0, 0);
        let result = engine.step(&mut |event| {
            let (job, update) = match event {
                Event::Token(written) => (written.job, Update::Token(written)),
                Event::Finished { job, finish } => (job, Update::Finished { job, finish }),
                Event::Failed { job, error } => {
                    (job, Update::Failed { job, failure: Failure::Job(error.to_string().into()) })
                }
            };
            let Some(running) = self.running.get_mut(&job) else { return };
            match &update {
                Update::Token(_) => {
                    if !running.started {
                        running.started = true;
                        let cached_tokens = running.cached_tokens;
                        let _ = running.updates.send(Update::Started { job, cached_tokens });
                    }
                    let Some(left) = running.left.checked_sub(1) else {
                        over.push(job);
                        return;
                    };
                    running.left = left;
                }
                Update::Finished { .. } => finished += 1,
                _ => failed += 1,
            }
            let last = update.is_last();
            // A reader that has gone has cancelled the job, which the next round sees.
            let _ = running.updates.send(update);
            if last {
                self.forget(job);
            }
        });
        let mut state = self.shared.lock();
        state.stats.step_time_total += began.elapsed();
        state.stats.finished_total += finished;
        state.stats.failed_total += failed;
        drop(state);
        for job in over {
            engine.cancel(job);
            self.fail(job, &Failure::Job("the engine wrote more tokens than the job may have".into()));
        }
        match result {
            Err(error) => {
                tracing::error!("a step failed, {} jobs end: {error}", self.running.len());
                let failure = Failure::Step(error.to_string().into());
                for job in self.running.keys().copied().collect::<Vec<_>>() {
                    engine.cancel(job);
                    self.fail(job, &failure);
                }
            }
            // Without this an engine's slip would keep the thread turning for ever.
            Ok(()) if engine.running() == 0 => {
                self.fail_running(&Failure::Job("the engine has lost the job".into()));
            }
            Ok(()) => {}
        }
    }

    fn fail(&mut self, job: JobId, failure: &Failure) {
        if let Some(running) = self.running.get(&job) {
            let _ = running.updates.send(Update::Failed { job, failure: failure.clone() });
            self.shared.lock().stats.failed_total += 1;
            self.forget(job);
        }
    }

    fn fail_running(&mut self, failure: &Failure) {
        for job in self.running.keys().copied().collect::<Vec<_>>() {
            self.fail(job, failure);
        }
    }

    /// A job has ended; with the last one of a request its time is known.
    fn forget(&mut self, job: JobId) {
        let Some(running) = self.running.remove(&job) else { return };
        let Some((jobs, since)) = self.requests.get_mut(&running.request) else { return };
        *jobs -= 1;
        if *jobs == 0 {
            let took = since.elapsed().as_secs_f64();
            self.requests.remove(&running.request);
            let mut state = self.shared.lock();
            state.service += 0.2 * (took - state.service);
        }
    }
}

//! Between connections and the one engine thread: a bounded queue of requests towards it, updates of each request back.
//!
//! [`spawn`] starts the thread and gives a [`Handle`], which every connection may hold. [`Handle::submit`] queues a
//! request (all its jobs are one entry) and gives its [`Updates`]. On the thread, [`Driver::run`] takes jobs in first
//! come, first served, and steps the engine; it sleeps when there is nothing to do.
//!
//! # What a caller may rely on
//! - The queue holds at most so many *requests* that are not wholly taken in; one more is [`Refusal::Busy`]. The oldest
//!   waiting job goes first: while the engine has no room for it, no younger one is tried, so none starves.
//! - Dropping [`Updates`] (or [`Updates::cancel`]) ends what it stands for before the engine's next step, in the queue
//!   and in the engine.
//! - A reader that does not read never holds up the engine, and what waits for it is bounded: a job sends at most
//!   `max_new_tokens` tokens and two updates beside them, and the driver ends a job whose engine writes more. The
//!   channel behind [`Updates`] therefore needs no bound of its own.
//! - Every job that was taken ends with exactly one [`Update::Finished`] or [`Update::Failed`], whatever happens to the
//!   thread.

mod message;
mod run;
mod updates;

use std::collections::{HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

pub use message::{BoxError, Death, Failure, Phase, Refusal, Stats, Update};
pub use run::Driver;
pub use updates::Updates;

use super::engine::{Job, JobId};

/// A request that waits: the jobs of it that the engine has not taken yet.
struct Waiting {
    request: u64,
    jobs: VecDeque<Job>,
    updates: mpsc::UnboundedSender<Update>,
    /// The thread is asking the engine about a further job.
    in_hand: bool,
}

struct State {
    queue: VecDeque<Waiting>,
    /// Jobs to be ended before the next step.
    cancelled: HashSet<JobId>,
    stats: Stats,
    /// Moving average of the seconds that a request takes once taken in.
    service: f64,
}

struct Shared {
    state: Mutex<State>,
    /// Something for the engine thread to look at.
    wake: Condvar,
    phase: watch::Sender<Phase>,
    jobs: AtomicU64,
    requests: AtomicU64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held, and counts alone would be at stake.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes on to `next`, except from an end.
    fn advance(&self, next: &Phase) -> bool {
        let moved = self.phase.send_if_modified(|phase| {
            let allowed = match (&*phase, next) {
                (Phase::Stopped, Phase::Dead(_)) => true,
                (Phase::Stopped | Phase::Dead(_), _) | (Phase::Draining, Phase::Ready) => false,
                (now, next) => now != next,
            };
            if allowed {
                *phase = next.clone();
            }
            allowed
        });
        // Under the lock, so that a thread which has just looked at the phase is not missed.
        let _state = self.lock();
        self.wake.notify_all();
        moved
    }

    /// Fails all that waits.
    fn fail_queue(&self, failure: &Failure) {
        let mut state = self.lock();
        for waiting in std::mem::take(&mut state.queue) {
            state.stats.failed_total += waiting.jobs.len() as u64;
            for job in waiting.jobs {
                let _ = waiting.updates.send(Update::Failed { job: job.id, failure: failure.clone() });
            }
        }
        state.stats.queued = 0;
    }
}

/// What connections hold of the engine thread; clones are the same thread.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

impl Handle {
    /// A name for a new job.
    pub fn job_id(&self) -> JobId {
        JobId(self.shared.jobs.fetch_add(1, Ordering::Relaxed))
    }

    /// Queues the jobs of one request, in the order in which they shall be taken in.
    ///
    /// # Errors
    /// [`Refusal`]; nothing of the request is queued then.
    pub fn submit(&self, jobs: Vec<Job>) -> Result<Updates, Refusal> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let open = jobs.iter().map(|job| job.id).collect();
        let mut state = self.shared.lock();
        match &*self.shared.phase.borrow() {
            Phase::Loading | Phase::Ready => {}
            Phase::Draining | Phase::Stopped => return Err(Refusal::Stopping),
            Phase::Dead(why) => return Err(Refusal::Dead(why.clone())),
        }
        if state.queue.len() >= state.stats.queue_limit {
            state.stats.busy_total += 1;
            let each = state.service / state.stats.running.max(1) as f64;
            return Err(Refusal::Busy {
                queued: state.queue.len(),
                retry_after: Duration::from_secs_f64(each.clamp(1.0, 60.0)),
            });
        }
        state.stats.accepted_total += 1;
        if !jobs.is_empty() {
            let request = self.shared.requests.fetch_add(1, Ordering::Relaxed);
            state.queue.push_back(Waiting { request, jobs: jobs.into(), updates: sender, in_hand: false });
            state.stats.queued = state.queue.len();
            self.shared.wake.notify_all();
        }
        drop(state);
        Ok(Updates::new(self.shared.clone(), open, receiver))
    }

    /// Counts as of now.
    pub fn stats(&self) -> Stats {
        self.shared.lock().stats.clone()
    }

    /// Where the engine thread stands.
    pub fn phase(&self) -> Phase {
        self.shared.phase.borrow().clone()
    }

    /// Whether requests are answered now: loaded, and neither draining nor gone.
    pub fn ready(&self) -> bool {
        self.phase() == Phase::Ready
    }

    /// The phases as they come, for code that waits for one.
    pub fn watch(&self) -> watch::Receiver<Phase> {
        self.shared.phase.subscribe()
    }

    /// Takes no new request, finishes those that were taken (waiting ones too), then ends the thread.
    pub fn drain(&self) {
        self.shared.advance(&Phase::Draining);
    }

    /// Ends the thread after the step that it is in; what waits or runs fails with [`Failure::Stopped`].
    pub fn stop(&self) {
        self.shared.advance(&Phase::Stopped);
        // While the model is being loaded nobody else would tell them.
        self.shared.fail_queue(&Failure::Stopped);
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle").field("phase", &self.phase()).finish_non_exhaustive()
    }
}

/// Takes jobs out of the queue; those that are not there the engine thread ends before its next step.
fn cancel(shared: &Shared, jobs: &[JobId]) {
    let mut state = shared.lock();
    state.cancelled.extend(jobs);
    run::drop_cancelled(&mut state);
    shared.wake.notify_all();
}

/// The engine thread, to be waited for.
#[derive(Debug)]
pub struct EngineThread {
    thread: thread::JoinHandle<Result<(), Death>>,
}

impl EngineThread {
    /// Waits for its end; blocks. Tensors and their memory are gone afterwards.
    ///
    /// # Errors
    /// [`Death`], when it did not end by draining or stopping.
    pub fn join(self) -> Result<(), Death> {
        self.thread.join().unwrap_or_else(|payload| Err(Death::Panicked(message(&*payload))))
    }
}

/// Starts the engine thread with a queue of at most `queue` requests (at least 1).
///
/// `start` runs on the new thread: it loads the model, builds an engine, which may borrow from the closure's own stack,
/// and calls [`Driver::run`], which returns when the server drains or stops. An error or a panic of it, before or within,
/// is the engine's death: all jobs fail and every later request is refused.
///
/// # Errors
/// [`Death::NoThread`].
pub fn spawn<E: Into<BoxError>>(
    queue: usize,
    start: impl FnOnce(Driver) -> Result<(), E> + Send + 'static,
) -> Result<(Handle, EngineThread), Death> {
    let stats = Stats { queue_limit: queue.max(1), ..Stats::default() };
    let state = State { queue: VecDeque::new(), cancelled: HashSet::new(), stats, service: 1.0 };
    let shared = Arc::new(Shared {
        state: Mutex::new(state),
        wake: Condvar::new(),
        phase: watch::Sender::new(Phase::Loading),
        jobs: AtomicU64::new(0),
        requests: AtomicU64::new(0),
    });
    let handle = Handle { shared: shared.clone() };
    let body = move || {
        let driver = Driver::new(shared.clone());
        // The edge at which panics of an engine, and of libtorch behind it, end.
        let ended = match catch_unwind(AssertUnwindSafe(|| start(driver))) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Death::Failed(error.into())),
            Err(payload) => Err(Death::Panicked(message(&*payload))),
        };
        let failure = match &ended {
            Ok(()) => {
                shared.advance(&Phase::Stopped);
                Failure::Stopped
            }
            Err(death) => {
                let why: Arc<str> = death.to_string().into();
                if shared.advance(&Phase::Dead(why.clone())) {
                    tracing::error!("the engine thread ended: {why}");
                }
                Failure::Dead(why)
            }
        };
        shared.fail_queue(&failure);
        ended
    };
    let thread = thread::Builder::new().name("engine".into()).spawn(body).map_err(Death::NoThread)?;
    Ok((handle, EngineThread { thread }))
}

/// What a panic said.
fn message(payload: &(dyn std::any::Any + Send)) -> String {
    let text =
        payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
    // A backtrace of C++ may follow the first line.
    text.and_then(|t| t.lines().next()).unwrap_or("no message").to_owned()
}

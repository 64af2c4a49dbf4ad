//! Threads that call the server while the decoder goes on.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::client::Client;
use super::fault::Fault;
use super::protocol::{Ask, Chosen, Given, Protocol};
use super::settings::RemoteSettings;
use crate::decode::Traffic;
use crate::policy::Sequence;
use crate::{Error, Result};

/// Ids that a sequence's answer may turn out to be before the server is given up.
const MAX_BANNED: usize = 8;
/// Rows of a block of vLLM's prefix cache: what a server can be expected to have is counted in these.
const BLOCK: usize = 16;
/// Calls before a low share of cached tokens is worth a word.
const ENOUGH_CALLS: u64 = 16;

/// What a sequence wants of the server.
pub(super) struct Task {
    pub sequence: Sequence,
    pub ask: Ask,
    /// Tokens of it that the server has been sent before.
    pub sent: usize,
    /// Ids below this are known to both models.
    pub vocab: usize,
    /// Set when nobody wants it any more.
    pub gone: Arc<AtomicBool>,
}

/// What has become of a task.
pub(super) enum Done {
    /// Those of a call together, so that sequences which share calls go on sharing them.
    Answers(Vec<(Sequence, Result<Chosen>)>),
    Warmed {
        sequence: Sequence,
        read: Option<usize>,
    },
}

#[derive(Default)]
struct Queue {
    asks: VecDeque<Vec<Task>>,
    /// Done when nobody asks.
    warms: VecDeque<Task>,
    stop: bool,
}

enum Work {
    Ask(Vec<Task>),
    Warm(Task),
}

#[derive(Default)]
struct Counters {
    calls: AtomicU64,
    retries: AtomicU64,
    warm_calls: AtomicU64,
    failures: AtomicU64,
    bytes_up: AtomicU64,
    bytes_down: AtomicU64,
    sent_before: AtomicU64,
    cached: AtomicU64,
    /// Calls that count in the last two.
    telling: AtomicU64,
    warned: AtomicBool,
}

struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    ending: Condvar,
    client: Client,
    protocol: Protocol,
    settings: RemoteSettings,
    counters: Counters,
}

/// The threads. They end with this, each after the call that it is in.
pub(super) struct Pool {
    shared: Arc<Shared>,
    done: Receiver<Done>,
}

impl Pool {
    pub fn new(client: Client, protocol: Protocol, settings: RemoteSettings) -> Result<Self> {
        let (send, done) = channel();
        let threads = settings.connections;
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            work: Condvar::new(),
            ending: Condvar::new(),
            client,
            protocol,
            settings,
            counters: Counters::default(),
        });
        let pool = Self { shared, done };
        for i in 0..threads {
            let (shared, send) = (Arc::clone(&pool.shared), send.clone());
            let started = thread::Builder::new()
                .name(format!("large-{i}"))
                .spawn(move || shared.serve(&send))
                .map_err(|e| {
                    Error::Input(format!("a thread that calls the server cannot be started: {e}"))
                })?;
            drop(started);
        }
        Ok(pool)
    }

    /// Queues tasks of one moment, in as few calls as the protocol allows.
    pub fn ask(&self, tasks: Vec<Task>) {
        let mut calls: Vec<Vec<Task>> = Vec::new();
        for task in tasks {
            let most = self.shared.settings.max_batch;
            let fits = |call: &&mut Vec<Task>| {
                call.len() < most && self.shared.protocol.together(&call[0].ask, &task.ask)
            };
            match calls.iter_mut().find(fits) {
                Some(call) => call.push(task),
                None => calls.push(vec![task]),
            }
        }
        self.shared.lock().asks.extend(calls);
        self.shared.work.notify_all();
    }

    /// Queues a task whose answer nobody needs.
    pub fn warm(&self, task: Task) {
        self.shared.lock().warms.push_back(task);
        self.shared.work.notify_one();
    }

    /// Takes back what is queued for a sequence and nobody needs; gives how many tasks that were.
    pub fn withdraw(&self, sequence: Sequence) -> usize {
        let mut queue = self.shared.lock();
        let before = queue.warms.len();
        queue.warms.retain(|task| task.sequence != sequence);
        before - queue.warms.len()
    }

    /// The next result, waiting until `deadline` for it.
    ///
    /// # Errors
    /// All threads have ended.
    pub fn next(&self, deadline: Instant) -> Result<Option<Done>> {
        use std::sync::mpsc::RecvTimeoutError;
        match self.done.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(done) => Ok(Some(done)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                Err(Error::Input("the threads that call the server have ended".into()))
            }
        }
    }

    pub fn traffic(&self) -> Traffic {
        let c = &self.shared.counters;
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        Traffic {
            calls: get(&c.calls),
            retries: get(&c.retries),
            warm_calls: get(&c.warm_calls),
            failures: get(&c.failures),
            bytes_up: get(&c.bytes_up),
            bytes_down: get(&c.bytes_down),
            sent_before: get(&c.sent_before),
            cached: get(&c.cached),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_all();
        self.shared.ending.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, done: &Sender<Done>) {
        while let Some(work) = self.next() {
            match work {
                Work::Ask(tasks) => self.answer(tasks, done),
                Work::Warm(task) => {
                    if task.gone.load(Ordering::Relaxed) {
                        continue;
                    }
                    self.counters.warm_calls.fetch_add(1, Ordering::Relaxed);
                    let read = match self.call(&[&task]) {
                        Ok(_) => Some(task.ask.ids.len()),
                        Err(fault) => {
                            tracing::debug!(sequence = task.sequence.0, ?fault, "reading ahead failed");
                            None
                        }
                    };
                    let _ = done.send(Done::Warmed { sequence: task.sequence, read });
                }
            }
        }
    }

    /// The next work, asks first; `None` at the end.
    fn next(&self) -> Option<Work> {
        let mut queue = self.lock();
        loop {
            if queue.stop {
                return None;
            }
            if let Some(tasks) = queue.asks.pop_front() {
                return Some(Work::Ask(tasks));
            }
            if let Some(task) = queue.warms.pop_front() {
                return Some(Work::Warm(task));
            }
            queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits; false when the pool ends meanwhile.
    fn pause(&self, time: Duration) -> bool {
        let waited = self.ending.wait_timeout_while(self.lock(), time, |queue| !queue.stop);
        let (queue, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !queue.stop
    }

    /// Brings tasks that share a call to their ends.
    fn answer(&self, mut tasks: Vec<Task>, done: &Sender<Done>) {
        let settings = &self.settings;
        let mut calls = 0;
        let fault = loop {
            tasks.retain(|task| !task.gone.load(Ordering::Relaxed));
            if tasks.is_empty() {
                return;
            }
            calls += 1;
            let fault = match self.call(&tasks.iter().collect::<Vec<_>>()) {
                Ok(given) => {
                    self.settle(tasks, given.chosen, calls, done);
                    return;
                }
                Err(fault) => fault,
            };
            if !fault.may_pass() || calls > settings.retries {
                break fault;
            }
            let pause = settings.pause(calls - 1, fault.retry_after());
            tracing::info!(?fault, ?pause, calls, "a call of the large model failed and is made again");
            self.counters.retries.fetch_add(1, Ordering::Relaxed);
            if !self.pause(pause) {
                return;
            }
        };
        if tasks.len() > 1 && fault.may_be_one() {
            // Who is to blame shows when each is alone.
            for task in tasks {
                self.answer(vec![task], done);
            }
            return;
        }
        let failed = |task: &Task| (task.sequence, Err(self.failure(fault.clone(), calls)));
        let _ = done.send(Done::Answers(tasks.iter().map(failed).collect()));
    }

    /// Hands answers over, and asks again without ids that only the large model knows.
    fn settle(&self, tasks: Vec<Task>, chosen: Vec<Chosen>, calls: usize, done: &Sender<Done>) {
        let (mut answers, mut again) = (Vec::new(), Vec::new());
        for (mut task, chosen) in tasks.into_iter().zip(chosen) {
            if (chosen.token as usize) < task.vocab {
                answers.push((task.sequence, Ok(chosen)));
                continue;
            }
            let repeated = task.ask.banned.contains(&chosen.token);
            if self.protocol.can_ban() && !repeated && task.ask.banned.len() < MAX_BANNED {
                task.ask.banned.push(chosen.token);
                again.push(task);
                continue;
            }
            let reason = format!(
                "it chose token {}, outside the {} ids that both models know{}",
                chosen.token,
                task.vocab,
                if repeated { ", though that was ruled out" } else { "" }
            );
            answers.push((task.sequence, Err(self.failure(Fault::Protocol(reason), calls))));
        }
        let _ = done.send(Done::Answers(answers));
        for task in again {
            self.answer(vec![task], done);
        }
    }

    fn failure(&self, fault: Fault, calls: usize) -> Error {
        self.counters.failures.fetch_add(1, Ordering::Relaxed);
        fault.error(&self.client.url, calls, self.settings.timeout)
    }

    fn call(&self, tasks: &[&Task]) -> Result<Given, Fault> {
        let asks: Vec<&Ask> = tasks.iter().map(|task| &task.ask).collect();
        let body = self.protocol.body(&asks);
        let count = |counter: &AtomicU64, n: usize| counter.fetch_add(n as u64, Ordering::Relaxed);
        count(&self.counters.calls, 1);
        count(&self.counters.bytes_up, body.len());
        let reply = self.client.post(self.protocol.path(), &body)?;
        count(&self.counters.bytes_down, reply.bytes);
        let given = self.protocol.read(&reply.json, asks.len())?;
        let expected: usize = tasks.iter().map(|task| task.sent / BLOCK * BLOCK).sum();
        if let Some(cached) = given.cached.filter(|_| expected > 0) {
            count(&self.counters.sent_before, expected);
            count(&self.counters.cached, cached.min(expected));
            self.judge_cache();
        }
        Ok(given)
    }

    /// Says once when the server computes again what it had.
    fn judge_cache(&self) {
        let c = &self.counters;
        let calls = c.telling.fetch_add(1, Ordering::Relaxed) + 1;
        let (sent, cached) = (c.sent_before.load(Ordering::Relaxed), c.cached.load(Ordering::Relaxed));
        if calls >= ENOUGH_CALLS && 2 * cached < sent && !c.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "{} has cached only {cached} of {sent} tokens that it was sent before: it computes long prefixes again at \
                 each call; give it more memory for its prefix cache, or fewer clients",
                self.client.url
            );
        }
    }
}

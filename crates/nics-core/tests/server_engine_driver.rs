//! Between connections and the engine thread: the queue and its order, cancelling, draining, stopping, and what is left
//! of an engine that fails.
#![cfg(feature = "server")]

mod server_engine_kit;

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nics_core::Error;
use nics_core::generate::Finish;
use nics_core::server::{
    Admission, Death, Driver, Engine, EngineStats, EngineThread, Event, Handle, Job, JobId, Phase, Refusal,
    Update, Updates, Written, spawn,
};
use server_engine_kit::*;

/// What a stub did, in order.
type Log = Arc<Mutex<Vec<String>>>;

/// Writes token 1, 2, 3, … for each job; a step begins when the test says so, or at once when the test has gone.
struct Stub {
    slots: usize,
    jobs: Vec<(JobId, usize, usize)>,
    gate: Receiver<Say>,
    /// Tells the test that a step has begun.
    began: Sender<()>,
    log: Log,
}

/// What the next step does.
#[derive(Clone, Copy, PartialEq)]
enum Say {
    Go,
    Fail,
    Panic,
    /// Writes on past the end.
    Overrun,
    /// Forgets its jobs without a word.
    Lose,
}

impl Engine for Stub {
    fn admit(&mut self, job: &Job) -> Admission {
        if job.prompt[0] == 99 {
            return Admission::Refused(Error::input("never"));
        }
        if job.prompt[0] == 96 {
            // Takes its time, so that things happen meanwhile.
            let _ = self.began.send(());
            let _ = self.gate.recv();
        }
        if job.prompt[0] == 98 || self.jobs.len() >= self.slots {
            return Admission::Full;
        }
        assert!(job.prompt[0] != 97, "it hurts to take this in");
        self.log.lock().unwrap().push(format!("take {}", job.id.0));
        self.jobs.push((job.id, 0, job.max_new_tokens));
        Admission::Taken
    }

    fn step(&mut self, emit: &mut dyn FnMut(Event)) -> nics_core::Result<()> {
        let _ = self.began.send(());
        let say = self.gate.recv().unwrap_or(Say::Go);
        match say {
            Say::Fail => return Err(Error::input("no luck")),
            Say::Panic => panic!("it broke\nwith a long story"),
            Say::Lose => self.jobs.clear(),
            Say::Go | Say::Overrun => {}
        }
        for (id, written, max) in &mut self.jobs {
            *written += 1;
            emit(Event::Token(Written { job: *id, token: *written as u32, ..Written::default() }));
            if written == max && say == Say::Go {
                emit(Event::Finished { job: *id, finish: Finish::Length });
            }
        }
        if say == Say::Go {
            self.jobs.retain(|(_, written, max)| written < max);
        }
        Ok(())
    }

    fn cancel(&mut self, job: JobId) {
        self.log.lock().unwrap().push(format!("cancel {}", job.0));
        self.jobs.retain(|(id, ..)| *id != job);
    }

    fn running(&self) -> usize {
        self.jobs.len()
    }

    fn cached_tokens(&self, job: JobId) -> usize {
        job.0 as usize * 10
    }

    fn stats(&self) -> EngineStats {
        EngineStats { running: self.jobs.len(), ..EngineStats::default() }
    }
}

struct Rig {
    handle: Handle,
    thread: EngineThread,
    gate: Sender<Say>,
    began: Receiver<()>,
    log: Log,
}

fn rig(queue: usize, slots: usize) -> Rig {
    let ((gate, wait), (tell, began), log) = (channel(), channel(), Log::default());
    let seen = log.clone();
    let (handle, thread) = spawn(queue, move |driver: Driver| -> nics_core::Result<()> {
        driver.run(&mut Stub { slots, jobs: Vec::new(), gate: wait, began: tell, log: seen });
        Ok(())
    })
    .unwrap();
    Rig { handle, thread, gate, began, log }
}

impl Rig {
    /// A request of `n` jobs of `new` tokens each.
    fn submit(&self, n: usize, new: usize) -> Result<Updates, Refusal> {
        self.handle
            .submit((0..n).map(|_| Job { id: self.handle.job_id(), ..greedy(0, vec![5], new) }).collect())
    }

    /// Submits once the engine is inside a step, and waits for the next one, before which this is taken in.
    fn after(&self, n: usize, new: usize) -> Updates {
        self.in_step();
        let updates = self.submit(n, new).unwrap();
        self.gate.send(Say::Go).unwrap();
        self.in_step();
        updates
    }

    /// Waits until the engine is inside a step, so that nothing is taken in meanwhile.
    fn in_step(&self) {
        self.began.recv_timeout(Duration::from_secs(20)).expect("no step began");
    }

    fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }
}

/// All updates of a request to its end, in short.
fn all(mut updates: Updates) -> Vec<String> {
    let mut seen = Vec::new();
    while let Some(update) = updates.blocking_recv() {
        seen.push(match update {
            Update::Started { job, cached_tokens } => format!("{} started {cached_tokens}", job.0),
            Update::Token(written) => format!("{} token {}", written.job.0, written.token),
            Update::Finished { job, finish } => format!("{} {finish:?}", job.0),
            Update::Failed { job, failure } => format!("{} failed: {failure}", job.0),
        });
    }
    seen
}

#[test]
fn a_request_hears_of_its_jobs_and_of_nothing_else() {
    let rig = rig(4, 8);
    let (one, two) = (rig.submit(1, 2).unwrap(), rig.submit(2, 1).unwrap());
    drop(rig.gate);
    assert_eq!(all(one), ["0 started 0", "0 token 1", "0 token 2", "0 Length"]);
    assert_eq!(all(two), ["1 started 10", "1 token 1", "1 Length", "2 started 20", "2 token 1", "2 Length"]);
    assert!(rig.handle.ready());
    assert_eq!(all(rig.handle.submit(Vec::new()).unwrap()), [""; 0]);
    rig.handle.drain();
    rig.thread.join().unwrap();
    assert_eq!(rig.handle.phase(), Phase::Stopped);
    let stats = rig.handle.stats();
    assert_eq!((stats.accepted_total, stats.finished_total, stats.running, stats.queued), (3, 3, 0, 0));
}

#[test]
fn the_queue_is_bounded_in_requests_and_the_oldest_goes_first() {
    let rig = rig(3, 2);
    let first = rig.submit(2, 1).unwrap();
    rig.in_step();
    // Nothing is taken in now: three requests wait, whatever their jobs, and no fourth.
    let waiting = [rig.submit(3, 1).unwrap(), rig.submit(1, 1).unwrap(), rig.submit(1, 1).unwrap()];
    assert_eq!(rig.handle.stats().queued, 3);
    let Err(Refusal::Busy { queued: 3, retry_after }) = rig.submit(1, 1) else { panic!("not busy") };
    assert!((1..=60).contains(&retry_after.as_secs()));
    // The three jobs of the oldest do not fit together; its last one still goes before the younger.
    rig.gate.send(Say::Go).unwrap();
    rig.in_step();
    assert_eq!(rig.handle.stats().queued, 3, "it is not wholly taken in");
    rig.gate.send(Say::Go).unwrap();
    rig.in_step();
    assert_eq!(rig.handle.stats().queued, 1);
    let more = rig.submit(1, 1).unwrap();
    drop(rig.gate);
    for updates in [first].into_iter().chain(waiting).chain([more]) {
        assert!(all(updates).iter().all(|line| !line.contains("failed")));
    }
    // Ids are given in the order of the requests; 7 was the refused one's.
    let took: Vec<String> = [0, 1, 2, 3, 4, 5, 6, 8].iter().map(|i| format!("take {i}")).collect();
    assert_eq!(rig.log.lock().unwrap()[..], took);
    assert_eq!((rig.handle.stats().busy_total, rig.handle.stats().accepted_total), (1, 5));
}

#[test]
fn dropping_a_request_frees_its_slots_before_the_next_step() {
    let rig = rig(4, 2);
    let gone = rig.submit(1, 50).unwrap();
    let mut stays = rig.after(1, 5);
    let (queued, next) = (rig.submit(2, 50).unwrap(), rig.submit(1, 1).unwrap());
    // In the queue: gone at once, while the engine is inside a step.
    drop(queued);
    assert_eq!(rig.handle.stats().queued, 1);
    // Running: its slot is the next request's in the very next step.
    drop(gone);
    rig.gate.send(Say::Go).unwrap();
    rig.in_step();
    assert_eq!(rig.log(), ["take 0", "take 1", "cancel 0", "take 4"]);
    drop(rig.gate);
    assert_eq!(all(next), ["4 started 40", "4 token 1", "4 Length"]);
    // One job of a request, by name; twice is once. Its updates that were on their way are not given.
    let mut two = vec![];
    while let Some(update) = stays.blocking_recv() {
        two.push(update);
    }
    assert_eq!(two.len(), 1 + 5 + 1);
    assert_eq!(rig.handle.stats().cancelled_total, 3);
}

#[test]
fn one_choice_is_cancelled_and_the_others_go_on() {
    let rig = rig(4, 2);
    let mut updates = rig.submit(3, 3).unwrap();
    rig.in_step();
    // The third waits for a slot; the second runs.
    updates.cancel(JobId(2));
    rig.gate.send(Say::Go).unwrap();
    rig.in_step();
    updates.cancel(JobId(1));
    updates.cancel(JobId(1));
    assert_eq!(updates.open(), [JobId(0)]);
    drop(rig.gate);
    assert_eq!(all(updates), ["0 started 0", "0 token 1", "0 token 2", "0 token 3", "0 Length"]);
    assert_eq!(rig.log.lock().unwrap()[..], ["take 0", "take 1", "cancel 1"]);
}

#[test]
fn a_job_between_queue_and_engine_is_cancelled_too() {
    let rig = rig(4, 1);
    let _running = rig.submit(1, 1000).unwrap();
    rig.in_step();
    // The driver tries the head of the queue again and again while it is dropped.
    for _ in 0..200 {
        let waiting = rig.submit(2, 5).unwrap();
        rig.gate.send(Say::Go).unwrap();
        drop(waiting);
        rig.in_step();
    }
    assert_eq!(rig.handle.stats().queued, 0);
    assert_eq!(rig.handle.stats().cancelled_total, 400);
    assert_eq!(rig.log(), ["take 0"]);
}

#[test]
fn the_rest_of_a_request_may_go_while_the_engine_is_asked_about_its_first_job() {
    let rig = rig(4, 1);
    let _running = rig.submit(1, 2).unwrap();
    rig.in_step();
    let ids = [rig.handle.job_id(), rig.handle.job_id()];
    let jobs = ids.map(|id| Job { id, ..greedy(0, vec![96], 1) });
    let mut updates = rig.handle.submit(jobs.to_vec()).unwrap();
    rig.gate.send(Say::Go).unwrap();
    rig.in_step(); // inside `admit`, which will say that there is no room
    updates.cancel(ids[1]);
    assert_eq!(rig.handle.stats().queued, 1);
    drop(rig.gate);
    assert_eq!(all(updates), ["1 started 10", "1 token 1", "1 Length"]);
}

#[test]
fn draining_finishes_what_was_taken_and_refuses_the_rest() {
    let rig = rig(4, 1);
    let (running, queued) = (rig.submit(1, 3).unwrap(), rig.submit(1, 2).unwrap());
    rig.in_step();
    rig.handle.drain();
    assert!(matches!(rig.submit(1, 1), Err(Refusal::Stopping)));
    assert_eq!(rig.handle.phase(), Phase::Draining);
    assert!(!rig.handle.ready());
    drop(rig.gate);
    assert_eq!(all(running).last().unwrap(), "0 Length");
    assert_eq!(all(queued).last().unwrap(), "1 Length");
    rig.thread.join().unwrap();
    assert_eq!(rig.handle.phase(), Phase::Stopped);
    assert!(matches!(rig.handle.submit(vec![greedy(7, vec![1], 1)]), Err(Refusal::Stopping)));
}

#[test]
fn draining_ends_a_thread_that_sleeps() {
    let rig = rig(4, 1);
    eventually("ready", || rig.handle.ready());
    rig.handle.drain();
    rig.thread.join().unwrap();
}

#[test]
fn stopping_ends_all_after_the_step_that_runs() {
    let rig = rig(4, 1);
    let (running, queued) = (rig.submit(1, 1000).unwrap(), rig.submit(2, 2).unwrap());
    rig.in_step();
    rig.handle.stop();
    // What waits is told at once, inside the step.
    assert_eq!(
        all(queued),
        ["1 failed: the server is shutting down", "2 failed: the server is shutting down"]
    );
    rig.gate.send(Say::Go).unwrap();
    assert_eq!(all(running), ["0 started 0", "0 token 1", "0 failed: the server is shutting down"]);
    rig.thread.join().unwrap();
    assert_eq!(rig.log.lock().unwrap().last().unwrap(), "cancel 0");
    assert_eq!(rig.handle.stats().failed_total, 3);
    rig.handle.drain();
    assert_eq!(rig.handle.phase(), Phase::Stopped, "an end is an end");
}

#[test]
fn a_step_that_fails_ends_the_running_and_the_next_are_answered() {
    let rig = rig(4, 2);
    let a = rig.submit(1, 9).unwrap();
    let b = rig.after(2, 1);
    rig.gate.send(Say::Fail).unwrap();
    assert_eq!(all(a), ["0 started 0", "0 token 1", "0 failed: the engine failed: no luck"]);
    drop(rig.gate);
    let b = all(b);
    assert_eq!(b[0], "1 failed: the engine failed: no luck");
    assert_eq!(b[1..], ["2 started 20", "2 token 1", "2 Length"], "it waited and is none of it");
    assert!(rig.handle.ready());
    assert_eq!(rig.handle.stats().failed_total, 2);
}

#[test]
fn a_panic_fails_everything_and_later_requests_are_refused() {
    let rig = rig(4, 1);
    let (running, queued) = (rig.submit(1, 9).unwrap(), rig.submit(1, 1).unwrap());
    rig.in_step();
    rig.gate.send(Say::Panic).unwrap();
    let said = "the engine is gone: the engine thread panicked: it broke";
    assert_eq!(all(running), [format!("0 failed: {said}")]);
    assert_eq!(all(queued), [format!("1 failed: {said}")]);
    let Err(Refusal::Dead(why)) = rig.submit(1, 1) else { panic!("accepted") };
    assert_eq!(&*why, "the engine thread panicked: it broke");
    assert_eq!(rig.handle.phase(), Phase::Dead(why));
    assert!(matches!(rig.thread.join(), Err(Death::Panicked(why)) if why == "it broke"));
}

#[test]
fn a_panic_on_taking_a_job_in_is_an_end_too() {
    let rig = rig(4, 1);
    let updates = rig.handle.submit(vec![greedy(0, vec![97], 1), greedy(1, vec![1], 1)]).unwrap();
    let seen = all(updates);
    assert_eq!(seen.len(), 2);
    assert!(seen.iter().all(|line| line.contains("it hurts")), "{seen:?}");
    assert!(rig.thread.join().is_err());
}

#[test]
fn a_model_that_does_not_load_fails_what_waited_for_it() {
    let (go, gate) = channel::<bool>();
    let load = move |_driver: Driver| -> nics_core::Result<()> {
        assert!(!gate.recv().unwrap(), "loading went wrong");
        Err(Error::Config("no such model".into()))
    };
    let (handle, thread) = spawn(1, load).unwrap();
    assert_eq!((handle.phase(), handle.ready()), (Phase::Loading, false));
    let waiting = handle.submit(vec![greedy(0, vec![1], 1)]).unwrap();
    assert!(matches!(handle.submit(vec![greedy(1, vec![1], 1)]), Err(Refusal::Busy { .. })));
    go.send(false).unwrap();
    assert_eq!(all(waiting), ["0 failed: the engine is gone: no such model"]);
    let Err(Death::Failed(error)) = thread.join() else { panic!("it ended well") };
    assert!(matches!(error.downcast_ref::<Error>(), Some(Error::Config(_))), "callers can tell errors apart");
    assert!(matches!(handle.submit(Vec::new()), Err(Refusal::Dead(_))));

    // Told to stop while loading: what waits is told at once, and `run` returns at once.
    let (go, gate) = channel::<()>();
    let load = move |driver: Driver| -> Result<(), std::fmt::Error> {
        gate.recv().unwrap();
        assert!(driver.stopping());
        let (_gate, wait) = channel();
        driver.run(&mut Stub {
            slots: 1,
            jobs: Vec::new(),
            gate: wait,
            began: channel().0,
            log: Log::default(),
        });
        Ok(())
    };
    let (handle, thread) = spawn(1, load).unwrap();
    let waiting = handle.submit(vec![greedy(0, vec![1], 1)]).unwrap();
    handle.stop();
    assert_eq!(all(waiting), ["0 failed: the server is shutting down"]);
    go.send(()).unwrap();
    thread.join().unwrap();
}

#[test]
fn jobs_that_cannot_be_taken_are_told_why() {
    let rig = rig(4, 1);
    let jobs = vec![greedy(0, vec![99], 1), greedy(1, vec![98], 1), greedy(2, vec![1], 1)];
    let updates = rig.handle.submit(jobs).unwrap();
    drop(rig.gate);
    let seen = all(updates);
    assert_eq!(seen[0], "0 failed: never");
    assert!(seen[1].contains("no room for this request even when nothing runs"), "{seen:?}");
    assert_eq!(seen[2..], ["2 started 20", "2 token 1", "2 Length"]);
}

#[test]
fn an_engine_cannot_write_more_than_a_job_may_have() {
    let rig = rig(4, 1);
    let updates = rig.submit(1, 2).unwrap();
    for _ in 0..3 {
        rig.gate.send(Say::Overrun).unwrap();
    }
    let seen = all(updates);
    assert_eq!(seen[..3], ["0 started 0", "0 token 1", "0 token 2"]);
    assert!(seen[3].contains("more tokens than the job may have"), "{seen:?}");
    eventually("it is cancelled", || rig.log().last().is_some_and(|l| l == "cancel 0"));
}

#[test]
fn an_engine_that_loses_a_job_leaves_nobody_waiting() {
    let rig = rig(4, 1);
    let (lost, next) = (rig.submit(1, 5).unwrap(), rig.submit(1, 1).unwrap());
    rig.in_step();
    rig.gate.send(Say::Lose).unwrap();
    assert_eq!(all(lost), ["0 failed: the engine has lost the job"]);
    drop(rig.gate);
    assert_eq!(all(next), ["1 started 10", "1 token 1", "1 Length"]);
}

//! `kill -9` at random moments: the run that goes on ends with the weights and the log of one that was never killed.

mod train_toy;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nics_core::device::set_threads;
use nics_core::train::{Hooks, METRICS_FILE, TrainConfig, TrainError};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use train_toy::{Toy, config, state_tensors, trainer, untimed_log};

/// Where the training process works; without it the process is a test of its own in a folder of its own.
const FOLDER: &str = "NICS_TEST_TRAIN_FOLDER";
/// How long a step takes at least, in microseconds, so that kills find it at work.
const PACE: &str = "NICS_TEST_TRAIN_PACE";
const STEPS: u64 = 400;

/// The process that the others start and kill. By itself: a run in one go ends at its last step.
#[test]
fn training_process() {
    let own = tempfile::tempdir().unwrap();
    let dir = std::env::var_os(FOLDER).map_or_else(|| own.path().to_owned(), Into::into);
    let pace = std::env::var(PACE).map_or(0, |p| p.parse().unwrap());
    // Products this small only lose by a second thread, most of all on a busy machine.
    set_threads(Some(1)).unwrap();
    let toy = Toy::new();
    let settings = TrainConfig { accumulation: 2, ema: 0.99, save_every: 5, log_every: 2, ..config(STEPS) };
    let mut trainer = match trainer(&toy, settings, &dir) {
        // The lock of a killed process can outlive it for a moment.
        Err(TrainError::Base(nics_core::base::Error::Busy(_))) => std::process::exit(75),
        other => other.unwrap(),
    };
    let mut loss = |micro| {
        sleep(Duration::from_micros(pace));
        toy.loss(micro)
    };
    let summary = trainer.run(&mut loss, Hooks::default()).unwrap();
    assert_eq!((summary.steps, summary.last.unwrap().step), (STEPS, STEPS));
}

fn start(dir: &Path, pace: u64) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "training_process"]).env(FOLDER, dir).env(PACE, pace.to_string());
    command.stdout(Stdio::null()).stderr(Stdio::inherit()).spawn().unwrap()
}

fn log_length(dir: &Path) -> u64 {
    std::fs::metadata(dir.join(METRICS_FILE)).map_or(0, |m| m.len())
}

/// Kills runs in `dir` until `kills` of them died at work, each a random while after it was seen to make progress, and
/// lets the last one end.
fn kill_and_resume(dir: &Path, kills: usize, seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let deadline = Instant::now() + Duration::from_secs(600);
    let mut killed = 0;
    while killed < kills {
        assert!(Instant::now() < deadline, "{killed} kills so far");
        let before = log_length(dir);
        let mut child = start(dir, 400);
        let at_work = |child: &mut Child| child.try_wait().unwrap().is_none();
        // A resumed run first cuts the log: what counts is that it differs.
        while at_work(&mut child) && log_length(dir) == before && Instant::now() < deadline {
            sleep(Duration::from_millis(1));
        }
        sleep(Duration::from_micros(rng.random_range(0..20_000)));
        if at_work(&mut child) {
            child.kill().unwrap();
            killed += 1;
        }
        let status = child.wait().unwrap();
        assert!(!status.success(), "the run ended before {kills} kills: {killed}");
    }
    loop {
        match start(dir, 0).wait().unwrap().code() {
            Some(0) => break,
            Some(75) => sleep(Duration::from_millis(10)),
            other => panic!("the resumed run failed: {other:?}"),
        }
        assert!(Instant::now() < deadline);
    }
}

fn killed_equals_unbroken(kills: usize, seed: u64) {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    assert!(start(whole.path(), 0).wait().unwrap().success());
    kill_and_resume(broken.path(), kills, seed);
    assert_eq!(untimed_log(broken.path()), untimed_log(whole.path()));
    assert_eq!(state_tensors(broken.path()), state_tensors(whole.path()));
}

#[test]
fn a_killed_run_ends_like_an_unbroken_one() {
    killed_equals_unbroken(1, 1);
}

#[test]
#[ignore = "long"]
fn a_run_killed_twenty_times_ends_like_an_unbroken_one() {
    killed_equals_unbroken(20, 2);
}

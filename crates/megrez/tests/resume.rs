//! `train`, `eval` and `generate` killed at random moments: no half file is left to be seen, and the same command ends with
//! the result of a run that was never killed.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nics_core::checkpoint::Checkpoint;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use support::*;

/// A long command of which the result is known.
struct Work {
    /// The command, in the folder that it works in.
    start: fn(&Path) -> Command,
    /// Fails when a half file can be seen.
    whole: fn(&Path),
    /// The result without what a clock wrote.
    result: fn(&Path) -> Value,
}

/// What the command reads: made once, beside the folders of its runs.
fn inputs(dir: &Path) {
    // Some 300 steps, saved often.
    let recipe = include_str!("support/tiny.toml").replace("steps = 40", "steps = 300");
    std::fs::write(dir.join("tiny.toml"), recipe).unwrap();
    let model = with_context(1024);
    std::fs::rename(model.keep(), dir.join("model")).unwrap();
    let lines = (0..240).map(|i| json!({"prompt": format!("{i} apples and {} pears", 7 * i)}).to_string());
    std::fs::write(dir.join("prompts.jsonl"), lines.collect::<Vec<_>>().join("\n")).unwrap();
}

/// A command in folder `dir`, which lies beside its inputs.
fn command(dir: &Path, words: &str) -> Command {
    std::fs::create_dir_all(dir).unwrap();
    let mut command = megrez(words.split_whitespace());
    command.current_dir(dir).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn untimed(path: &Path, clocks: &[&str]) -> Vec<Value> {
    let mut rows = read_lines(path);
    for row in &mut rows {
        row.as_object_mut().unwrap().retain(|field, _| !clocks.contains(&field.as_str()));
    }
    rows
}

const TRAIN: Work = Work {
    start: |dir| command(dir, "train --recipe ../tiny.toml --out made"),
    whole: |dir| {
        if dir.join("made").exists() {
            Checkpoint::open_dir(&dir.join("made")).unwrap().weights_hash().unwrap();
        }
    },
    result: |dir| {
        let hash = |name: &str| nics_base::hash::bytes(std::fs::read(dir.join("made").join(name)).unwrap());
        let files = ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"];
        let log = untimed(&dir.join("made.training/metrics.jsonl"), &["seconds", "tokens_per_s"]);
        json!({ "files": files.map(hash), "log": log })
    },
};

const EVAL: Work = Work {
    start: |dir| {
        command(
            dir,
            "eval --model ../model --task word-problems --limit 150 --max-new-tokens 24 --greedy --batch 4 --out o",
        )
    },
    whole: |dir| {
        let items = dir.join("o/items.jsonl");
        assert!(!items.exists() || read_lines(&items).len() == 150);
    },
    result: |dir| {
        let files: Vec<PathBuf> =
            std::fs::read_dir(dir.join("o")).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(files.iter().all(|f| f.extension().is_some_and(|e| e == "jsonl")), "{files:?}");
        json!([read_lines(&dir.join("o/items.jsonl")), untimed(&dir.join("o/rows.jsonl"), &["wall_s"])])
    },
};

const GENERATE: Work = Work {
    start: |dir| {
        command(
            dir,
            "generate --model ../model --input ../prompts.jsonl --max-new-tokens 16 --greedy --batch 4 --out r.jsonl",
        )
    },
    // The file grows line by line; what a kill leaves behind the last whole line is cut off.
    whole: |_| {},
    result: |dir| {
        let mut lines = read_lines(&dir.join("r.jsonl"));
        lines.sort_by_key(|line| line["index"].as_u64());
        lines.into()
    },
};

/// Runs to the end.
fn finish(work: &Work, dir: &Path) {
    let deadline = Instant::now() + Duration::from_secs(300);
    loop {
        let output = (work.start)(dir).output().unwrap();
        match output.status.code() {
            Some(0) => return,
            // The lock of a killed process can outlive it for a moment.
            Some(75) if Instant::now() < deadline => sleep(Duration::from_millis(10)),
            code => panic!("code {code:?}: {}", String::from_utf8_lossy(&output.stderr)),
        }
    }
}

/// Starts a run and ends it by `end` after some time; whether it was still at work.
fn broken(work: &Work, dir: &Path, after: Duration, end: fn(&mut Child)) -> bool {
    let mut child = (work.start)(dir).stderr(Stdio::null()).spawn().unwrap();
    sleep(after);
    let at_work = child.try_wait().unwrap().is_none();
    if at_work {
        end(&mut child);
    }
    child.wait().unwrap();
    at_work
}

/// Kills `kills` runs, each in a folder of its own and some of them twice, and holds what their resumed runs end with
/// against the result of an unbroken one.
fn killed_equals_unbroken(work: &Work, kills: usize, seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    inputs(dir.path());
    let unbroken = dir.path().join("unbroken");
    let start = Instant::now();
    finish(work, &unbroken);
    let duration = start.elapsed();
    let expected = (work.result)(&unbroken);

    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let deadline = Instant::now() + Duration::from_secs(900);
    let mut killed = 0;
    for run in 0.. {
        if killed >= kills {
            break;
        }
        assert!(Instant::now() < deadline, "{killed} kills so far");
        let folder = dir.path().join(format!("run-{run}"));
        let mut moment = || duration.mul_f64(rng.random_range(0.2..1.0));
        for _ in 0..2 {
            let after = moment();
            if !broken(work, &folder, after, |child| child.kill().unwrap()) {
                break;
            }
            killed += 1;
            println!("killed after {after:.2?} of about {duration:.2?}");
            (work.whole)(&folder);
            // Half of the runs are killed again.
            if run % 2 == 0 || killed == kills {
                break;
            }
        }
        finish(work, &folder);
        assert!((work.result)(&folder) == expected, "run {run} ends otherwise than an unbroken one");
    }
}

#[test]
fn a_training_killed_once_ends_like_an_unbroken_one() {
    killed_equals_unbroken(&TRAIN, 1, 1);
}

#[test]
fn an_evaluation_killed_once_ends_like_an_unbroken_one() {
    killed_equals_unbroken(&EVAL, 1, 2);
}

#[test]
fn a_generation_killed_once_ends_like_an_unbroken_one() {
    killed_equals_unbroken(&GENERATE, 1, 3);
}

#[test]
#[ignore = "long"]
fn trainings_killed_twenty_times_end_like_an_unbroken_one() {
    killed_equals_unbroken(&TRAIN, 20, 11);
}

#[test]
#[ignore = "long"]
fn evaluations_killed_twenty_times_end_like_an_unbroken_one() {
    killed_equals_unbroken(&EVAL, 20, 12);
}

#[test]
#[ignore = "long"]
fn generations_killed_twenty_times_end_like_an_unbroken_one() {
    killed_equals_unbroken(&GENERATE, 20, 13);
}

/// SIGTERM is what batch systems send first: the run saves what it has and says so.
#[test]
fn a_run_that_is_asked_to_stop_says_so_and_goes_on_later() {
    let dir = tempfile::tempdir().unwrap();
    inputs(dir.path());
    for (work, name) in [(&TRAIN, "train"), (&EVAL, "eval"), (&GENERATE, "generate")] {
        let unbroken = dir.path().join(format!("{name}-unbroken"));
        let start = Instant::now();
        finish(work, &unbroken);
        let mut after = start.elapsed().mul_f64(0.7);
        let folder = dir.path().join(name);
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            assert!(Instant::now() < deadline, "{name} is never at work when it is asked to stop");
            let mut child = (work.start)(&folder).spawn().unwrap();
            sleep(after);
            let stop = format!("kill -TERM {}", child.id());
            // It may have ended by itself.
            let _ = Command::new("sh").args(["-c", &stop]).stderr(Stdio::null()).status().unwrap();
            let mut stderr = String::new();
            std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut stderr).unwrap();
            match child.wait().unwrap().code() {
                Some(130) => {
                    assert!(stderr.contains("error: ") && stderr.contains("interrupted"), "{stderr}");
                    break;
                }
                // Too late, or so early that nobody listened yet.
                code @ (Some(0) | None) => {
                    std::fs::remove_dir_all(&folder).unwrap();
                    after = if code.is_none() { after.mul_f64(1.1) } else { after.mul_f64(0.9) };
                }
                code => panic!("code {code:?}: {stderr}"),
            }
        }
        (work.whole)(&folder);
        finish(work, &folder);
        assert!((work.result)(&folder) == (work.result)(&unbroken), "{name} ends otherwise");
    }
}

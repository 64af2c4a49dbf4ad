//! `label run` and `train` killed at random moments: the same command ends with the bytes of a run that was never killed.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::kit::*;

/// A long command of which the result is known.
struct Work {
    /// Makes what it reads, beside the folders of its runs.
    inputs: fn(&Path),
    /// The command, in the folder that it works in.
    command: &'static str,
    /// Names of the result's files, from the end of the path.
    result: &'static [&'static str],
}

const LABEL: Work = Work {
    inputs: |dir| {
        std::fs::write(dir.join("queries.jsonl"), queries(160)).unwrap();
        std::fs::write(dir.join("synonyms.toml"), table()).unwrap();
    },
    command: "label run --queries ../queries.jsonl --small SMALL --large LARGE --judge rule:../synonyms.toml \
        --max-new-tokens LONGEST --top-k 12 --shard-tokens 500 --batch 4 --group 8 --out made",
    // All of it: also what stands between queries and labels is the same to the byte.
    result: &[".safetensors", ".jsonl", ".json"],
};

const TRAIN: Work = Work {
    inputs: |dir| {
        (LABEL.inputs)(dir);
        std::fs::write(dir.join("queries.jsonl"), queries(60)).unwrap();
        std::fs::write(dir.join("router.toml"), crate::train::RECIPE.replace("epochs = 5", "epochs = 40"))
            .unwrap();
        std::fs::create_dir_all(dir.join("labels")).unwrap();
        say(&dir.join("labels"), LABEL.command).ok();
    },
    command: "train --config ../router.toml --labels ../labels/made --small SMALL --out made",
    result: &["router.safetensors", "router.json", "train_log.jsonl"],
};

impl Work {
    fn start(&self, dir: &Path) -> Command {
        std::fs::create_dir_all(dir).unwrap();
        let mut command = command(dir, words(self.command));
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    fn finish(&self, dir: &Path) {
        let deadline = Instant::now() + Duration::from_secs(300);
        loop {
            let output = self.start(dir).output().unwrap();
            match output.status.code() {
                Some(0) => return,
                // The lock of a killed process can outlive it for a moment.
                Some(75) if Instant::now() < deadline => sleep(Duration::from_millis(10)),
                code => panic!("code {code:?}: {}", String::from_utf8_lossy(&output.stderr)),
            }
        }
    }

    fn result(&self, dir: &Path) -> Vec<(String, String)> {
        let mut all = files(dir);
        // What a killed writer was writing has a name of its own and is removed a day later.
        all.retain(|(name, _)| {
            let hidden = Path::new(name).file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
            !hidden && self.result.iter().any(|end| name.ends_with(end))
        });
        assert!(!all.is_empty());
        all
    }

    /// Starts a run and ends it by `end` after some time; whether it was still at work.
    fn broken(&self, dir: &Path, after: Duration, end: fn(&mut Child)) -> bool {
        let mut child = self.start(dir).stderr(Stdio::null()).spawn().unwrap();
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
    fn killed_equals_unbroken(&self, kills: usize, seed: u64) {
        let dir = tempfile::tempdir().unwrap();
        (self.inputs)(dir.path());
        let unbroken = dir.path().join("unbroken");
        let start = Instant::now();
        self.finish(&unbroken);
        let duration = start.elapsed();
        let expected = self.result(&unbroken);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let deadline = Instant::now() + Duration::from_secs(900);
        let mut killed = 0;
        for run in 0.. {
            if killed >= kills {
                break;
            }
            assert!(Instant::now() < deadline, "{killed} kills so far");
            let folder = dir.path().join(format!("run-{run}"));
            for _ in 0..2 {
                let after = duration.mul_f64(rng.random_range(0.1..1.0));
                if !self.broken(&folder, after, |child| child.kill().unwrap()) {
                    break;
                }
                killed += 1;
                println!("killed after {after:.2?} of about {duration:.2?}");
                // Half of the runs are killed again.
                if run % 2 == 0 || killed == kills {
                    break;
                }
            }
            self.finish(&folder);
            assert_eq!(self.result(&folder), expected, "run {run} ends otherwise than an unbroken one");
        }
    }
}

#[test]
fn labels_of_a_run_that_was_killed_are_those_of_an_unbroken_one() {
    LABEL.killed_equals_unbroken(1, 1);
}

#[test]
fn a_training_killed_once_ends_like_an_unbroken_one() {
    TRAIN.killed_equals_unbroken(1, 2);
}

#[test]
#[ignore = "long"]
fn labels_of_runs_killed_twenty_times_are_those_of_an_unbroken_one() {
    LABEL.killed_equals_unbroken(20, 11);
}

#[test]
#[ignore = "long"]
fn trainings_killed_twenty_times_end_like_an_unbroken_one() {
    TRAIN.killed_equals_unbroken(20, 12);
}

/// Every file cut at every step: a run goes on from whatever a crash leaves behind.
#[test]
fn files_cut_anywhere_are_made_whole_again() {
    let dir = inputs(16);
    label(dir.path(), "whole", "").ok();
    let whole = dir.path().join("whole");
    let expected = files(&whole);
    let copy = |cut: &str| {
        let to = dir.path().join(cut);
        std::fs::create_dir_all(&to).unwrap();
        for (name, _) in &expected {
            std::fs::copy(whole.join(name), to.join(name)).unwrap();
        }
        to
    };
    // Steps that were not done, with a part of what they make.
    let steps = ["respond", "prefill", "continue", "judge", "build"];
    let made = ["responses.jsonl", "", "mismatch.jsonl", "judged.jsonl", ""];
    for (first, file) in made.iter().enumerate() {
        for share in [0.0, 0.37, 0.81, 1.0] {
            let folder = copy(&format!("cut-{first}-{share}"));
            edit(&folder.join("run.json"), |run| {
                run["steps"][steps[first]]["done"] = serde_json::Value::Null;
                for step in &steps[first + 1..] {
                    run["steps"].as_object_mut().unwrap().remove(*step);
                }
            });
            // What later steps have made.
            for (step, name) in
                ["responses.jsonl", "index.json", "mismatch.jsonl", "judged.jsonl", "labels.json"]
                    .iter()
                    .enumerate()
            {
                if step > first {
                    std::fs::remove_file(folder.join(name)).unwrap();
                }
            }
            if !file.is_empty() {
                let bytes = std::fs::read(whole.join(file)).unwrap();
                std::fs::write(folder.join(file), &bytes[..(bytes.len() as f64 * share) as usize]).unwrap();
            } else if first == 1 || first == 4 {
                // An index of the first files alone.
                let name = if first == 1 { "index.json" } else { "labels.json" };
                edit(&folder.join(name), |index| {
                    let list = index["files"].as_array_mut().unwrap();
                    list.truncate((list.len() as f64 * share) as usize);
                });
            }
            label(dir.path(), &format!("cut-{first}-{share}"), "").ok();
            assert_eq!(files(&folder), expected, "{} cut at {share}", steps[first]);
        }
    }
}

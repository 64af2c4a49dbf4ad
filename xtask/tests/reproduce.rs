//! `cargo xtask reproduce` with steps that are shell scripts: what runs again and what does not, failures, kills,
//! interrupts, shards, and mistakes in the experiment file.

mod support;

use std::fs;
use std::path::PathBuf;
use std::process::Child;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use support::{Sandbox, ends_with, lines, stderr, wait_until};

/// A step that notes each of its runs in `ran-NAME` and then runs `script`.
fn step(name: &str, script: &str, more: &str) -> String {
    let script = format!("echo x >> {{root}}/ran-{name}; {script}");
    format!("[[step]]\nname = {name:?}\ncommand = [\"sh\", \"-ec\", {script:?}]\n{more}\n")
}

const ROW: &str = r#"{{"method": "fake", "metric": "accuracy", "value": 0.5}}"#;

struct Lab(Sandbox);

impl Lab {
    fn new(experiment: &str) -> Self {
        let lab = Self(Sandbox::new());
        lab.0.write("ws/crates/fake/Cargo.toml", "[package]\nname = \"fake\"\n");
        lab.experiment(experiment);
        lab
    }

    fn experiment(&self, text: &str) {
        self.0.write("ws/crates/fake/experiments/nano.toml", text);
    }

    fn input(&self, text: &str) {
        self.0.write("ws/data/input.txt", text);
    }

    #[track_caller]
    fn run(&self, flags: &[&str], code: i32) -> String {
        ends_with(&mut self.0.xtask(&[&["reproduce"], flags].concat()), code)
    }

    fn start(&self, flags: &[&str]) -> Child {
        self.0.xtask(&[&["reproduce"], flags].concat()).spawn().unwrap()
    }

    fn ran(&self, name: &str) -> usize {
        lines(&self.0.root().join(format!("ran-{name}")))
    }

    fn out(&self, relative: &str) -> PathBuf {
        self.0.root().join("reports").join(relative)
    }
}

fn two_steps() -> String {
    step("copy", "cat {inputs.0} > {outputs.0}", "inputs = [\"data/input.txt\"]\noutputs = [\"copy.txt\"]")
        + &step(
            "rows",
            &format!("cat {{inputs.0}} > /dev/null; echo '{ROW}' > {{dir}}/rows.jsonl"),
            "inputs = [\"{dir:copy}/copy.txt\"]\nrows = \"rows.jsonl\"",
        )
}

#[test]
fn only_what_is_missing_or_stale_runs() {
    let lab = Lab::new(&two_steps());
    lab.input("one");
    lab.run(&[], 0);
    assert_eq!((lab.ran("copy"), lab.ran("rows")), (1, 1));
    let html = fs::read_to_string(lab.out("report.html")).unwrap();
    assert!(html.contains("fake (nano)") && html.contains("accuracy"), "{html}");
    assert_eq!(fs::read_to_string(lab.out("fake/nano/copy/copy.txt")).unwrap(), "one");

    let e = lab.run(&[], 0);
    assert_eq!((lab.ran("copy"), lab.ran("rows")), (1, 1), "nothing changed");
    assert_eq!(e.matches("up to date").count(), 2, "{e}");
    assert_eq!(fs::read_to_string(lab.out("report.html")).unwrap(), html);

    lab.input("two");
    lab.run(&[], 0);
    assert_eq!(
        (lab.ran("copy"), lab.ran("rows")),
        (2, 2),
        "the input changed, and so did what depends on it"
    );

    fs::write(lab.out("fake/nano/copy/copy.txt"), "tampered").unwrap();
    lab.run(&[], 0);
    assert_eq!(
        (lab.ran("copy"), lab.ran("rows")),
        (3, 2),
        "an output was mended; what depends on it is the same"
    );

    lab.experiment(&two_steps().replace("> /dev/null", "> /dev/zero"));
    lab.run(&[], 0);
    assert_eq!((lab.ran("copy"), lab.ran("rows")), (3, 3), "the arguments changed");

    fs::remove_dir_all(lab.out("fake/nano/rows")).unwrap();
    lab.run(&["--resume"], 0);
    assert_eq!((lab.ran("copy"), lab.ran("rows")), (3, 4), "an output vanished");
}

#[test]
fn a_moved_report_stays_fresh() {
    let lab = Lab::new(&two_steps());
    lab.input("one");
    lab.run(&[], 0);
    fs::rename(lab.out(""), lab.0.root().join("elsewhere")).unwrap();
    lab.run(&["--out", "elsewhere"], 0);
    assert_eq!((lab.ran("copy"), lab.ran("rows")), (1, 1));
}

#[test]
fn a_failure_names_command_and_log_and_others_still_run() {
    let lab = Lab::new(
        &(step("bad", "echo to be read in the log; exit 3", "outputs = [\"o\"]")
            + &step("silent", "true", "outputs = [\"o\"]")
            + &step("child", "true", "after = [\"bad\"]\noutputs = [\"o\"]")
            + &step("good", &format!("echo '{ROW}' > {{dir}}/rows.jsonl"), "rows = \"rows.jsonl\"")),
    );
    let e = lab.run(&[], 1);
    let log = lab.out("fake/nano/bad.log");
    assert!(e.contains("error: 2 of 4 steps failed"), "{e}");
    assert!(
        e.contains("exit 3' (exit code 3)") && e.contains(&format!("its log is {}", log.display())),
        "{e}"
    );
    assert!(e.contains("it ended well but left no o"), "{e}");
    assert!(e.contains("fake/child skipped: needs bad"), "{e}");
    assert!(fs::read_to_string(log).unwrap().contains("\nto be read in the log\n"));
    assert_eq!((lab.ran("bad"), lab.ran("child"), lab.ran("good")), (1, 0, 1));
    assert!(fs::read_to_string(lab.out("report.md")).unwrap().contains("accuracy"));
    lab.run(&[], 1);
    assert_eq!((lab.ran("bad"), lab.ran("good")), (2, 1), "failed steps run again, good ones do not");
}

#[test]
fn broken_rows_are_a_failure_of_their_step() {
    let lab = Lab::new(&step("rows", "echo '{{}}' > {dir}/rows.jsonl", "rows = \"rows.jsonl\""));
    let e = lab.run(&[], 1);
    assert!(e.contains("rows.jsonl, line 1: not a valid record"), "{e}");
}

#[test]
fn a_missing_input_is_named() {
    let lab = Lab::new(&two_steps());
    let e = lab.run(&[], 1);
    assert!(
        e.contains("its input data/input.txt is missing") && e.contains("fake/rows skipped: needs copy"),
        "{e}"
    );
}

#[test]
fn a_step_that_asks_to_be_tried_again_is() {
    let count = "if [ $(wc -l < {root}/ran-net) -lt 2 ]; then exit 75; fi; echo > {dir}/o";
    let lab = Lab::new(&step("net", count, "outputs = [\"o\"]"));
    lab.run(&[], 0);
    assert_eq!(lab.ran("net"), 2);
}

/// Writes twenty rows, one at a time, going on where the file ends.
fn slow_rows() -> String {
    let script = "echo x >> {dir}/runs; touch {dir}/rows.jsonl; i=$(wc -l < {dir}/rows.jsonl); \
                  while [ $i -lt 20 ]; do echo \"{{\\\"method\\\": \\\"fake\\\", \\\"metric\\\": \\\"m\\\", \
                  \\\"value\\\": $i}}\" >> {dir}/rows.jsonl; i=$((i + 1)); sleep 0.05; done";
    step("slow", script, "rows = \"rows.jsonl\"")
}

fn expected_rows() -> Vec<f64> {
    (0..20).map(f64::from).collect()
}

fn values(lab: &Lab) -> Vec<f64> {
    nics_base::row::read(lab.out("fake/nano/rows.jsonl")).unwrap().iter().map(|r| r.value).collect()
}

/// Kills xtask once `rows` rows are there, and waits until its step is dead too.
fn kill_after(lab: &Lab, rows: usize, flags: &[&str]) {
    let written = || lines(&lab.out("fake/nano/slow/rows.jsonl"));
    let mut child = lab.start(flags);
    wait_until("rows are written", || written() >= rows);
    child.kill().unwrap();
    child.wait().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let before = written();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(written(), before, "the step outlived xtask");
    assert!(!lab.out("fake/nano/rows.jsonl").exists(), "rows of a half step were collected");
}

#[test]
fn killed_and_resumed_gives_the_same_rows() {
    let lab = Lab::new(&slow_rows());
    kill_after(&lab, 5, &[]);
    lab.run(&["--resume"], 0);
    assert_eq!(values(&lab), expected_rows());
    assert_eq!(lines(&lab.out("fake/nano/slow/runs")), 2, "the second run went on in the same folder");
}

#[test]
fn killed_and_run_again_starts_clean() {
    let lab = Lab::new(&slow_rows());
    kill_after(&lab, 5, &[]);
    lab.run(&[], 0);
    assert_eq!(values(&lab), expected_rows());
    assert_eq!(lines(&lab.out("fake/nano/slow/runs")), 1, "the second run began in an empty folder");
}

#[test]
fn resume_does_not_mix_settings() {
    let lab = Lab::new(&slow_rows());
    kill_after(&lab, 5, &[]);
    lab.experiment(&slow_rows().replace("sleep 0.05", "sleep 0.01"));
    lab.run(&["--resume"], 0);
    assert_eq!(lines(&lab.out("fake/nano/slow/runs")), 1, "another command does not go on in the old folder");
}

/// Kills at moments that fall anywhere: while xtask starts, between steps, while a step or a stamp is being written.
#[test]
#[ignore = "long"]
fn twenty_kills() {
    let experiment = slow_rows().replace("-lt 20", "-lt 150")
        + &step(
            "copy",
            "cat {inputs.0} > {dir}/rows.jsonl",
            "inputs = [\"{dir:slow}/rows.jsonl\"]\nrows = \"rows.jsonl\"",
        );
    let lab = Lab::new(&experiment);
    // A linear congruential generator: the moments are the same in every run of the test.
    let mut state: u64 = 2;
    for _ in 0..20 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut child = lab.start(&["--resume"]);
        std::thread::sleep(Duration::from_millis((state >> 33) % 500));
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be killed: too few rows");
        child.kill().unwrap();
        child.wait().unwrap();
    }
    lab.run(&["--resume"], 0);
    let unbroken = Lab::new(&experiment);
    unbroken.run(&[], 0);
    assert_eq!(values(&lab).len(), 300);
    assert_eq!(values(&lab), values(&unbroken));
    assert_eq!(lab.ran("copy"), 1);
}

#[test]
fn an_interrupt_reaches_the_step_and_ends_with_130() {
    let script =
        "trap 'echo saved > {root}/saved; exit 130' INT; touch {root}/begun; while :; do sleep 0.05; done";
    let lab =
        Lab::new(&(step("loop", script, "outputs = [\"o\"]") + &step("next", "true", "outputs = [\"o\"]")));
    let child = lab.start(&[]);
    wait_until("the step runs", || lab.0.root().join("begun").exists());
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(lab.0.root().join("saved").exists());
    assert_eq!(lab.ran("next"), 0);
}

#[test]
fn two_runs_do_not_share_a_folder() {
    let lab = Lab::new(&step("wait", "touch {root}/begun; sleep 30", "outputs = [\"o\"]"));
    let mut first = lab.start(&[]);
    wait_until("the step runs", || lab.0.root().join("begun").exists());
    let e = lab.run(&[], 75);
    assert!(e.contains("being written by another process"), "{e}");
    first.kill().unwrap();
    first.wait().unwrap();
}

#[test]
fn shards_are_run_and_merged_and_seeds_have_folders() {
    let script = "sleep 0.1; i={shard_index}; while [ $i -lt 7 ]; do echo \"$i\" >> \
                  {dir}/items-0123456789ab.{shard_index}-of-{shard_count}.jsonl; i=$((i + {shard_count})); done; \
                  [ {shard} = {shard_index}/{shard_count} ]";
    let rows = "echo '{{\"method\": \"fake\", \"metric\": \"m\", \"value\": {seed}, \"seed\": {seed}}}' > {dir}/r.jsonl";
    let lab = Lab::new(
        &(step("items", script, "outputs = [\"items.jsonl\"]\nshards = 3\nparallel = 2\nseeds = [4, 5]")
            + &step(
                "rows",
                rows,
                "inputs = [\"{dir:items}/items.jsonl\"]\nseeds = [4, 5]\nrows = \"r.jsonl\"",
            )),
    );
    lab.run(&["--profile"], 0);
    assert_eq!(lab.ran("items"), 6);
    for seed in [4, 5] {
        let merged =
            fs::read_to_string(lab.out(&format!("fake/nano/items.seed-{seed}/items.jsonl"))).unwrap();
        assert_eq!(merged, "0\n1\n2\n3\n4\n5\n6\n");
    }
    assert_eq!(values(&lab), [4.0, 5.0]);
    assert!(fs::read_to_string(lab.out("profile.md")).unwrap().contains("| fake/items.seed-4 |"));
}

#[test]
fn resume_repeats_only_the_shards_that_were_not_done() {
    let script = "if [ {shard_index} = 1 ] && [ ! -e {root}/mended ]; then exit 1; fi; \
                  echo {shard_index} > {dir}/items-0123456789ab.{shard_index}-of-2.jsonl";
    let lab = Lab::new(&step("items", script, "outputs = [\"items.jsonl\"]\nshards = 2"));
    lab.run(&[], 1);
    fs::write(lab.0.root().join("mended"), "").unwrap();
    lab.run(&["--resume"], 0);
    assert_eq!(lab.ran("items"), 3);
    assert_eq!(fs::read_to_string(lab.out("fake/nano/items/items.jsonl")).unwrap(), "0\n1\n");
}

#[test]
fn mistakes_are_found_before_anything_runs() {
    let lab = Lab::new(&(step("a", "true", "outputs = [\"o\"]") + &step("a", "true", "outputs = [\"o\"]")));
    let e = lab.run(&[], 1);
    assert!(
        e.contains("nano.toml is not a valid experiment") && e.contains("two steps are called \"a\""),
        "{e}"
    );
    lab.experiment(&step("a", "true", "outputs = [\"o\"]\ninput = [\"x\"]"));
    let e = lab.run(&[], 1);
    assert!(e.contains("unknown field `input`"), "{e}");
    let e = lab.run(&["nope"], 1);
    assert!(e.contains("\"nope\" has no experiments/nano.toml; methods that do: fake"), "{e}");
    let e = lab.run(&["--preset", "huge"], 1);
    assert!(e.contains("no crate has experiments/huge.toml"), "{e}");
    assert_eq!(lab.ran("a"), 0);
}

#[test]
fn report_renders_again_and_merge_merges() {
    let lab = Lab::new(&two_steps());
    lab.input("one");
    lab.run(&[], 0);
    let markdown = fs::read_to_string(lab.out("report.md")).unwrap();
    fs::remove_file(lab.out("report.md")).unwrap();
    ends_with(&mut lab.0.xtask(&["report", "reports"]), 0);
    assert_eq!(fs::read_to_string(lab.out("report.md")).unwrap(), markdown);
    let e = ends_with(&mut lab.0.xtask(&["report", "data"]), 1);
    assert!(e.contains("there is no rows.jsonl in data"), "{e}");

    for i in 0..2 {
        lab.0.write(&format!("ws/items-0123456789ab.{i}-of-2.jsonl"), &format!("{i}\n"));
    }
    let names = ["items-0123456789ab.1-of-2.jsonl", "items-0123456789ab.0-of-2.jsonl"];
    ends_with(&mut lab.0.xtask(&[&["merge", "--out", "all.jsonl"], &names[..]].concat()), 0);
    assert_eq!(fs::read_to_string(lab.0.root().join("all.jsonl")).unwrap(), "0\n1\n");
    let e = ends_with(&mut lab.0.xtask(&["merge", "--out", "all.jsonl", names[0]]), 1);
    assert!(e.contains("these are missing: 0"), "{e}");
}

#[test]
fn an_unknown_training_is_named() {
    let lab = Lab::new(&two_steps());
    lab.0.write("ws/crates/fake/experiments/train-tiny.toml", "package = \"fake\"\nargs = []\nsteps = 3\n");
    let e = ends_with(&mut lab.0.xtask(&["train", "huge"]), 1);
    assert!(e.contains("no training called \"huge\"") && e.contains("there are: tiny"), "{e}");
    let e = ends_with(&mut lab.0.xtask(&["train", "tiny"]), 1);
    assert!(
        e.contains("train-tiny.toml is not a valid training") && e.contains("unknown field `steps`"),
        "{e}"
    );
}

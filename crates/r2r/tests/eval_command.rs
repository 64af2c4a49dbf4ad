//! `r2r eval` on LiveCodeBench: replies that are written, scored when programs may run, and gone on with.

#![cfg(feature = "cli")]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The tiny checkpoint with room for these prompts: twice the same model is a pair.
fn model(dir: &Path) -> PathBuf {
    let (from, to) = (repository().join("datasets/golden/megrez"), dir.join("model"));
    std::fs::create_dir(&to).unwrap();
    for name in ["generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
    let config = std::fs::read(from.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["max_position_embeddings"] = json!(4096);
    std::fs::write(to.join("config.json"), config.to_string()).unwrap();
    to
}

/// Exit code, standard output, standard error.
fn eval(dir: &Path, release: &str, more: &[&str]) -> (Option<i32>, String, String) {
    let model = dir.join("model");
    let source = repository().join("datasets/tests/fixtures/live-code-bench");
    let mut command = Command::new(env!("CARGO_BIN_EXE_r2r"));
    command.env("OMP_NUM_THREADS", "1").env("HF_HUB_OFFLINE", "1").env_remove("NICS_LOG");
    command.args(["eval", "--dataset", "livecodebench", "--policy", "always-small", "--dtype", "f32"]);
    command.arg("--small").arg(&model).arg("--large").arg(&model).arg("--source").arg(source);
    command
        .args(["--release", release, "--max-new-tokens", "4"])
        .arg("--out")
        .arg(dir.join("out"))
        .args(more);
    let ran = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (ran.status.code(), text(ran.stdout), text(ran.stderr))
}

fn lines(dir: &Path, name: &str) -> Vec<Value> {
    nics_base::jsonl::read(dir.join("out").join(name)).unwrap()
}

/// As if the model had answered this.
fn answer(dir: &Path, replies: &[(&str, &str)]) {
    let mut items = lines(dir, "items.jsonl");
    for item in &mut items {
        if let Some((_, program)) = replies.iter().find(|(id, _)| item["id"] == *id) {
            (item["answer"], item["correct"]) = (json!(program), Value::Null);
        }
    }
    nics_base::jsonl::write(dir.join("out/items.jsonl"), &items).unwrap();
}

const SUM: &str = "print(sum(map(int, input().split())))";
const LONGEST: &str =
    "class Solution:\n    def longestWord(self, words):\n        return min(words, key=len)";

#[test]
fn without_leave_to_run_programs_replies_are_written_and_not_scored() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let (code, _, errors) = eval(dir.path(), "v1_v2", &["--to", "2024-12-31"]);
    assert_eq!(code, Some(0), "{errors}");
    let items = lines(dir.path(), "items.jsonl");
    assert_eq!(items.iter().map(|i| i["id"].as_str().unwrap()).collect::<Vec<_>>(), ["101", "102"]);
    // No program in the reply: that is wrong without running anything.
    assert!(items.iter().all(|i| i["correct"] == json!(false) && i["answer"].is_null()), "{items:?}");
    answer(dir.path(), &[("101", SUM)]);
    let (code, said, errors) = eval(dir.path(), "v1_v2", &["--to", "2024-12-31"]);
    assert_eq!(code, Some(0), "{errors}");
    assert!(said.contains("1 programs are in") && said.contains("--run-code"), "{said}");
    let rows = lines(dir.path(), "rows.jsonl");
    assert!(rows.iter().all(|row| row["metric"] != "accuracy"), "{rows:?}");
    assert!(rows.iter().any(|row| row["metric"] == "tokens a reply" && row["dataset"] == "livecodebench"));
    assert!(!dir.path().join("out/judged.jsonl").exists());
}

#[test]
#[ignore = "long: needs python3 on PATH, or NICS_PYTHON"]
fn programs_are_judged_once() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let python = std::env::var("NICS_PYTHON").unwrap_or_else(|_| "python3".into());
    let run = ["--run-code", "--python", &python, "--code-jobs", "2"];
    assert_eq!(eval(dir.path(), "v1_v2", &[]).0, Some(0));
    answer(dir.path(), &[("101", SUM), ("102", LONGEST), ("201", "while True: pass")]);
    let (code, said, errors) = eval(dir.path(), "v1_v2", &run);
    assert_eq!(code, Some(0), "{errors}");
    assert!(said.contains("accuracy"), "{said}");
    let accuracy = |dir: &Path| {
        let rows = lines(dir, "rows.jsonl");
        rows.into_iter().find(|row| row["metric"] == "accuracy").unwrap()["value"].as_f64().unwrap()
    };
    assert!((accuracy(dir.path()) - 0.25).abs() < 1e-9);
    let mut judged = lines(dir.path(), "judged.jsonl");
    judged.sort_by_key(|line| line["id"].to_string());
    let verdicts: Vec<&Value> = judged.iter().map(|line| &line["verdict"]).collect();
    assert_eq!(
        verdicts,
        [
            &json!({"passed": 3, "tests": 3, "fault": null}),
            &json!({"passed": 0, "tests": 3, "fault": "wrong_answer"}),
            &json!({"passed": 0, "tests": 2, "fault": "slow"}),
        ]
    );
    // What was judged is not run again; another program is.
    answer(dir.path(), &[("102", &LONGEST.replace("min", "max"))]);
    assert_eq!(eval(dir.path(), "v1_v2", &run).0, Some(0));
    assert_eq!(lines(dir.path(), "judged.jsonl").len(), 4);
    assert!((accuracy(dir.path()) - 0.5).abs() < 1e-9);
}

#[test]
fn what_does_not_fit_is_said_before_a_model_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    for (release, more, code, reason) in [
        ("v1_v2", &["--from", "2030-01-01"][..], 1, "problems from 2030-01-01 to any day"),
        ("v1_v2", &["--from", "tomorrow"], 2, "\"tomorrow\" is no day"),
        ("v9", &[], 2, "\"v9\" is no release"),
        ("v3", &[], 1, "test3.jsonl"),
        ("v1_v2", &["--run-code", "--python", "/nowhere/python3"], 1, "/nowhere/python3 is no Python"),
    ] {
        let (found, _, errors) = eval(dir.path(), release, more);
        assert_eq!(found, Some(code), "{errors}");
        assert!(errors.contains(reason), "{errors}");
    }
    // Other benchmarks have no programs.
    let aime = dir.path().join("train.jsonl");
    std::fs::write(aime, r#"{"ID": "1", "Problem": "1 + 1?", "Answer": "2"}"#).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_r2r"));
    command.args(["eval", "--dataset", "aime", "--policy", "always-small", "--run-code", "--out", "out"]);
    command.args(["--small", "nowhere", "--large", "nowhere", "--source"]).arg(dir.path());
    let ran = command.output().unwrap();
    let errors = String::from_utf8(ran.stderr).unwrap();
    assert_eq!(ran.status.code(), Some(2), "{errors}");
    assert!(errors.contains("--run-code is for livecodebench"), "{errors}");
}

//! Benchmarks: responses that are written, killed and gone on with, and scored again.

use std::path::Path;

use serde_json::Value;

use crate::args;
use crate::kit::*;

/// Problems with answers, as AIME's file has them.
fn aime(dir: &Path) -> std::path::PathBuf {
    let folder = dir.join("aime");
    std::fs::create_dir(&folder).unwrap();
    let lines: Vec<String> = (0..3)
        .map(|i| {
            format!(
                "{{\"ID\": \"2024-{i}\", \"Problem\": \"What is {i} plus one?\", \"Answer\": \"00{}\"}}\n",
                i + 1
            )
        })
        .collect();
    std::fs::write(folder.join("train.jsonl"), lines.concat()).unwrap();
    folder
}

fn value(rows: &[Value], metric: &str) -> f64 {
    let row = rows.iter().find(|r| r["metric"] == metric).unwrap_or_else(|| panic!("no {metric}: {rows:?}"));
    row["value"].as_f64().unwrap()
}

#[test]
fn a_killed_evaluation_goes_on_and_its_responses_are_scored_again() {
    let dir = tempfile::tempdir().unwrap();
    let (model, source) = (talker(dir.path()), aime(dir.path()));
    let eval = |out: &str, more: &[&str]| {
        let mut all = args![
            "eval",
            "--model",
            model,
            "--bench",
            "aime",
            "--source",
            source,
            "--n-responses",
            "4",
            "--max-new-tokens",
            "24",
            "--batch",
            "2",
            "--kv",
            "window=8,min-bits=4,max-len=300",
            "--out",
            dir.path().join(out),
        ]
        .to_vec();
        all.extend(more.iter().map(Into::into));
        all
    };
    run(eval("whole", &[])).ok();
    let responses = dir.path().join("killed/responses.jsonl");
    let some = || std::fs::metadata(&responses).is_ok_and(|m| m.len() > 0);
    assert!(killed_when(command(eval("killed", &[])), some), "it ended before it could be killed");
    run(eval("killed", &[])).ok();
    let sorted = |path: &Path| {
        let mut all = read_lines(path);
        all.sort_by_key(|r| (r["id"].to_string(), r["response"].as_u64()));
        all
    };
    let whole = sorted(&dir.path().join("whole/responses.jsonl"));
    assert_eq!(whole.len(), 12);
    assert_eq!(whole, sorted(&responses));
    assert_eq!(whole[1]["seed"], 43);
    assert!(whole.iter().all(|r| r["cache"]["bytes"].as_u64().unwrap() > 0));
    // Other settings do not mix.
    run(eval("whole", &["--double-begin"])).refused(1, "responses of other settings");

    // As if the model had answered: three of four right, in the form of the file, or plainly.
    let mut all = whole;
    for response in &mut all {
        let (n, gold) = (response["response"].as_u64().unwrap(), response["gold"].as_str().unwrap());
        let answer = if n == 0 { "77" } else { gold.trim_start_matches('0') };
        response["text"] = format!("so \\boxed{{{answer}}}").into();
    }
    nics_base::jsonl::write(&responses, &all).unwrap();
    let judge = |more: &[&str]| {
        let mut args = args!["judge", responses, "--json"].to_vec();
        args.extend(more.iter().map(Into::into));
        lines(&run(args).ok())
    };
    let strict = judge(&[]);
    assert!((value(&strict, "pass@1") - 75.0).abs() < 1e-9);
    assert!((value(&strict, "voting") - 100.0).abs() < 1e-9);
    assert!((value(&strict, "pass@2") - 100.0).abs() < 1e-9);
    // The published rule holds 001 and 1 to be two things.
    let official = judge(&["--judging", "official"]);
    assert!(value(&official, "pass@1").abs() < 1e-9 && value(&official, "voting").abs() < 1e-9);
}

#[test]
fn programs_are_written_and_not_scored_without_leave() {
    let dir = tempfile::tempdir().unwrap();
    let model = talker(dir.path());
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/tests/fixtures/live-code-bench");
    let eval = args![
        "eval",
        "--model",
        model,
        "--bench",
        "livecodebench",
        "--source",
        source,
        "--release",
        "v1_v2",
        "--to",
        "2024-12-31",
        "--n-responses",
        "1",
        "--max-new-tokens",
        "4",
        "--kv",
        "dense",
        "--out",
        dir.path().join("out"),
    ];
    let said = run(eval).ok();
    assert!(said.contains("--run-code"), "{said}");
    let responses = read_lines(&dir.path().join("out/responses.jsonl"));
    assert_eq!(responses.len(), 2);
    assert!(!dir.path().join("out/rows.jsonl").exists());
}

//! `megrez bench`, over small models.

#![cfg(feature = "bench")]

mod support;

use nics_base::row;
use serde_json::Value;
use support::*;

#[test]
fn a_checkpoint_is_measured_and_rows_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("rows.jsonl");
    let protocol = ["--input-len", "20", "--output-len", "5", "--seqs", "3", "--batch", "2", "--repeat", "2"];
    let mut args = args!["bench", "--model", golden(), "--out", out].to_vec();
    args.extend(protocol.iter().map(Into::into));
    let text = run(&args).ok();
    assert!(text.contains("20 in, 5 out, 3 sequences, 2 at a time"), "{text}");
    for metric in ["requests", "prefill", "decode", "keys and values"] {
        assert!(text.contains(metric), "{text}");
    }
    let rows = row::read(&out).unwrap();
    let value = |metric: &str| rows.iter().find(|r| r.metric == metric).unwrap().value;
    assert!(value("prefill") > 0.0 && value("decode") > 0.0 && value("requests") > 0.0);
    // 3 layers, 2 sequences, at least 24 rows of keys and values.
    assert!(value("keys and values") >= 3.0 * 2.0 * 24.0);
    assert!(rows.iter().all(|r| r.n == Some(2) && r.paper.is_none()));

    args.extend(args!["--json"]);
    let json: Value = serde_json::from_str(&run(&args).ok()).unwrap();
    assert_eq!((json["runs"].as_array().unwrap().len(), &json["protocol"]["input_len"]), (2, &20.into()));
    assert_eq!(json["dtype"], "f32");
}

#[test]
fn shapes_without_a_checkpoint() {
    let config = golden().join("config.json");
    let short = ["--input-len", "4", "--output-len", "1", "--seqs", "1", "--repeat", "1", "--dtype", "bf16"];
    let mut args = args!["bench", "--random-weights", config].to_vec();
    args.extend(short.iter().map(Into::into));
    let text = run(args).ok();
    assert!(text.contains("random weights") && text.contains("bf16"), "{text}");
}

#[test]
fn what_is_wrong_is_said_once() {
    let model = golden();
    for (args, code, word) in [
        (args!["bench"].to_vec(), 2, "--model"),
        (args!["bench", "--model", model, "--url", "http://x"].to_vec(), 2, "--url"),
        (args!["bench", "--model", model, "--seqs", "0"].to_vec(), 2, "--seqs is 0"),
        (
            args!["bench", "--model", model, "--input-len", "9999"].to_vec(),
            1,
            "the model's context holds 256",
        ),
        (args!["bench", "--random-weights", "gpt-7"].to_vec(), 1, "megrez-3b, qwen2.5-0.5b"),
        (args!["bench", "--model", model, "--kv", "magic"].to_vec(), 1, "this binary knows"),
        (args!["bench", "--url", "http://127.0.0.1:1"].to_vec(), 1, "127.0.0.1:1"),
    ] {
        let run = run(&args);
        assert_eq!(run.code, Some(code), "{args:?}: {}", run.stderr);
        assert!(run.stderr.contains(word), "{args:?}: {}", run.stderr);
        assert_eq!(run.stderr.matches("error:").count(), 1, "{}", run.stderr);
    }
}

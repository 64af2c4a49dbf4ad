//! `--kv pm-kvq:SETTINGS` of the binary, which the feature `with-pm-kvq` gives it.

#[path = "support/server.rs"]
mod server;
mod support;

use std::path::{Path, PathBuf};

use serde_json::json;
use server::Server;
use support::*;

const QUESTION: &str = "Tom has 3 apples and buys 4 more. How many apples does he have?";

fn nano() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/nano/megrez-text")
}

/// The ids of a prompt of `n` tokens, as a line of a file of prompts.
fn prompt(dir: &Path, n: u32) -> PathBuf {
    let path = dir.join("prompts.jsonl");
    let ids: Vec<u32> = (0..n).map(|i| 1 + i * 7 % 250).collect();
    std::fs::write(&path, json!({ "ids": ids }).to_string()).unwrap();
    path
}

#[test]
fn an_unbounded_cache_writes_what_the_dense_one_writes() {
    let dense = run(args!["generate", "--model", nano(), "--prompt", QUESTION, "--greedy"]).ok();
    let kv = "pm-kvq:exact=f32";
    let paged = run(args!["generate", "--model", nano(), "--prompt", QUESTION, "--greedy", "--kv", kv]).ok();
    assert_eq!(paged, dense);
    assert!(dense.contains("#### 7"), "{dense}");
}

#[test]
fn a_full_budget_ends_the_reply() {
    let dir = tempfile::tempdir().unwrap();
    let write = |kv: &str| {
        let command = args![
            "generate",
            "--model",
            golden(),
            "--input",
            prompt(dir.path(), 20),
            "--greedy",
            "--max-new-tokens",
            "60",
            "--kv",
            kv
        ];
        lines(&run(command).ok()).remove(0)
    };
    let whole = write("pm-kvq:window=8");
    assert_eq!(whole["tokens"].as_array().unwrap().len(), 60);
    assert_eq!(whole["finish"], "length");
    let cut = write("pm-kvq:window=8,min-bits=4,max-len=50");
    // Row 50 is the last that fits; the token after it is written and has no row.
    assert_eq!(20 + cut["tokens"].as_array().unwrap().len() - 1, 50);
    assert_eq!(cut["finish"], "context");
}

#[test]
fn settings_that_are_wrong_are_one_line() {
    let refused =
        run(args!["generate", "--model", golden(), "--prompt", "a", "--raw", "--kv", "pm-kvq:depth=3"]);
    assert_eq!(refused.code, Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains("`depth` is no setting"), "{}", refused.stderr);
    assert_eq!(refused.stderr.lines().count(), 1, "{}", refused.stderr);
}

#[test]
fn a_server_ends_replies_where_their_budget_does_and_goes_on_serving() {
    let server = Server::start(args!["--model", golden(), "--kv", "pm-kvq:window=8,min-bits=4,max-len=50"]);
    let ids: Vec<u32> = (0..20).map(|i| 1 + i * 7 % 250).collect();
    for _ in 0..3 {
        let reply = server
            .complete(&json!({ "prompt": ids, "max_tokens": 100, "temperature": 0, "ignore_eos": true }));
        assert_eq!(reply["choices"][0]["finish_reason"], "length", "{reply}");
        assert_eq!(reply["usage"]["completion_tokens"], 31, "{reply}");
    }
    let short =
        server.complete(&json!({ "prompt": ids, "max_tokens": 5, "temperature": 0, "ignore_eos": true }));
    assert_eq!(short["usage"]["completion_tokens"], 5, "{short}");
}

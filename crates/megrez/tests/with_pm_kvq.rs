//! `--kv pm-kvq:SETTINGS` of the binary, which the feature `with-pm-kvq` gives it.

mod support;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::{Value, json};
use support::*;

/// No claim about speed: a busy machine is slow.
const LIVENESS: Duration = Duration::from_secs(120);
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

/// A running server; ended with the test.
struct Server(Child, String);

impl Server {
    fn start(kv: &str) -> Self {
        let mut command = megrez(args!["serve", "--model", golden(), "--port", "0", "--kv", kv]);
        command.env_remove("MEGREZ_API_KEY");
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let stderr = child.stderr.take().unwrap();
        let (send, receive) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if let Some(url) = line.strip_prefix("listening on ") {
                    let _ = send.send(url.to_owned());
                }
            }
        });
        let url = receive.recv_timeout(LIVENESS).expect("it says where it listens");
        Self(child, url)
    }

    fn complete(&self, body: &Value) -> Value {
        let config = ureq::Agent::config_builder().http_status_as_error(false).proxy(None);
        let agent = ureq::Agent::new_with_config(config.timeout_global(Some(LIVENESS)).build());
        let request = agent.post(format!("{}/v1/completions", self.1)).content_type("application/json");
        let mut answer = request.send(body.to_string()).unwrap();
        let text = answer.body_mut().read_to_string().unwrap();
        assert_eq!(answer.status(), 200, "{text}");
        serde_json::from_str(&text).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_server_ends_replies_where_their_budget_does_and_goes_on_serving() {
    let server = Server::start("pm-kvq:window=8,min-bits=4,max-len=50");
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

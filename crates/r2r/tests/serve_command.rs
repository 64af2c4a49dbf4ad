//! `r2r serve`: the real binary on a free port, over two tiny random checkpoints and a router on disk.

#![cfg(all(feature = "cli", feature = "serve"))]

#[allow(dead_code)] // The other half of it is for servers within a test.
#[path = "serve/kit.rs"]
mod kit;

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Instant;

use kit::*;
use nics_core::checkpoint::save;
use nics_core::models::Model as _;
use r2r::checkpoint::{Card, CommonArgs};
use r2r::policy::{Kind, PolicySpec, Settings};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Folders of the pair, and of its router at a threshold of 0.5.
fn folders() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut pair = Pair::new();
    for (name, model, config) in
        [("small", &mut pair.small, config(32, 2)), ("large", &mut pair.large, config(48, 3))]
    {
        let mut tensors = Vec::new();
        model
            .visit_parameters(&mut |name, tensor| {
                tensors.push((name.to_owned(), tensor.shallow_clone()));
                Ok(())
            })
            .unwrap();
        let folder = dir.path().join(name);
        save(&folder, tensors, &Value::Object(config), 1 << 30).unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            std::fs::copy(tokenizer_folder().join(file), folder.join(file)).unwrap();
        }
    }
    let router = pair.router.lock().unwrap();
    let common = CommonArgs { threshold: 0.5, input_type: Vec::new() };
    let card = Card::new(router.config(), common);
    r2r::checkpoint::save(&dir.path().join("router"), &router, &card).unwrap();
    drop(router);
    dir
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_r2r"));
    command.args(args).env("OMP_NUM_THREADS", "1").env_remove("R2R_API_KEY").stdout(Stdio::null());
    command
}

/// A running server; killed with the test.
struct Process {
    child: Child,
    url: String,
}

impl Process {
    /// Over the pair and the router of a folder.
    fn start(dir: &Path, more: &[&str], key: Option<&str>) -> Self {
        let large = format!("local:{}", dir.join("large").display());
        Self::over(
            dir,
            "small",
            &large,
            &[&["--router", &dir.join("router").display().to_string()], more].concat(),
            key,
        )
    }

    fn over(dir: &Path, small: &str, large: &str, more: &[&str], key: Option<&str>) -> Self {
        let small = dir.join(small).display().to_string();
        let mut command =
            command(&["serve", "--slm", &small, "--llm", large, "--port", "0", "--dtype", "f32"]);
        command.args(more);
        if let Some(key) = key {
            command.env("R2R_API_KEY", key);
        }
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr = child.stderr.take().unwrap();
        let (send, receive) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                match line.strip_prefix("listening on ") {
                    Some(url) => drop(send.send(url.to_owned())),
                    None => eprintln!("{line}"),
                }
            }
        });
        let url = receive.recv_timeout(LIVENESS).expect("it says where it listens");
        Self { child, url }
    }

    fn post(&self, body: &Value, key: Option<&str>) -> ureq::http::Response<ureq::Body> {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .proxy(None)
            .timeout_global(Some(LIVENESS));
        let request = ureq::Agent::new_with_config(config.build())
            .post(format!("{}/v1/completions", self.url))
            .content_type("application/json");
        let request = match key {
            Some(key) => request.header("Authorization", format!("Bearer {key}")),
            None => request,
        };
        request.send(body.to_string()).unwrap()
    }

    fn ask(&self, body: &Value) -> (u16, Value) {
        let mut answer = self.post(body, None);
        let text = answer.body_mut().read_to_string().unwrap();
        (answer.status().as_u16(), serde_json::from_str(&text).unwrap())
    }

    fn terminate(&self) {
        let sent = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    fn exit(&mut self) -> Option<i32> {
        let deadline = Instant::now() + LIVENESS;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "the server does not end");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_pair_on_disk_is_served_and_drained() {
    let dir = folders();
    let pair = Pair::new();
    let mut server = Process::start(dir.path(), &["--max-batch", "4"], None);
    let prompt = prompt(6);
    for (fields, settings) in [
        (json!({}), Settings::default()),
        (json!({"target_llm_ratio": 0.5}), Settings { target: Some(0.5), ..Settings::default() }),
        (json!({"threshold": 0}), Settings { threshold: Some(0.0), ..Settings::default() }),
    ] {
        let mut body = body(&prompt, 30, fields);
        body["return_sources"] = true.into();
        let (status, reply) = server.ask(&body);
        assert_eq!(status, 200, "{reply}");
        // Not the scores, which a router in bfloat16 gives less exactly.
        let found = sources(&reply["choices"][0]["tokens"]);
        assert_eq!(found.len(), 30);
        if settings.threshold.is_some() {
            let expected = pair.write(&PolicySpec::new(Kind::Neural), request(&prompt, 30, settings));
            assert_eq!(found, written(&expected));
        }
        assert!(reply["usage"]["mean_parameters_billions"]["additive"].as_f64() > Some(0.0));
    }
    assert_eq!(server.ask(&body(&prompt, 3, json!({"threshold": 9}))).0, 400);

    // A signal while a stream runs: it is finished, then the server ends well.
    let mut streamed = body(&prompt, 200, json!({}));
    streamed["stream"] = true.into();
    let mut reader = server.post(&streamed, None).into_body().into_reader();
    let mut first = [0; 16];
    reader.read_exact(&mut first).unwrap();
    server.terminate();
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    assert!(rest.trim_end().ends_with("data: [DONE]"), "{rest}");
    assert_eq!(server.exit(), Some(0));
}

#[test]
fn a_large_model_on_a_server_writes_what_it_writes_here() {
    let dir = folders();
    let pair = Pair::new();
    // The large model by itself, behind this project's own server.
    let itself = format!("local:{}", dir.path().join("large").display());
    let there = Process::over(dir.path(), "large", &itself, &["--policy", "always-small"], None);
    let router = dir.path().join("router").display().to_string();
    let (url, more) = (format!("nics:{}", there.url), ["--router", &router, "--sizes", "0.6,8"]);
    let mut server = Process::over(dir.path(), "small", &url, &more, None);
    for seed in 0..3 {
        let prompt = prompt(seed);
        for threshold in [0.0, 2.0] {
            let settings = Settings { threshold: Some(threshold), ..Settings::default() };
            let expected =
                written(&pair.write(&PolicySpec::new(Kind::Neural), request(&prompt, 20, settings)));
            let (status, reply) =
                server.ask(&body(&prompt, 20, json!({"threshold": threshold, "return_sources": true})));
            assert_eq!(status, 200, "{reply}");
            assert_eq!(sources(&reply["choices"][0]["tokens"]), expected);
            let exclusive = reply["usage"]["mean_parameters_billions"]["exclusive"].as_f64().unwrap();
            assert!((exclusive - if threshold < 1.0 { 8.0 } else { 0.6 }).abs() < 1e-9);
        }
    }
    server.terminate();
    assert_eq!(server.exit(), Some(0));
}

#[test]
fn a_key_from_the_environment_is_asked_for() {
    let dir = folders();
    let server = Process::start(dir.path(), &["--policy", "entropy", "--target-rate", "0.2"], Some("sk-one"));
    let body = body(&prompt(1), 4, json!({}));
    assert_eq!(server.post(&body, None).status(), 401);
    assert_eq!(server.post(&body, Some("sk-two")).status(), 401);
    assert_eq!(server.post(&body, Some("sk-one")).status(), 200);
}

#[test]
fn what_cannot_be_served_is_one_clear_error() {
    let dir = folders();
    let path = |name: &str| -> String { dir.path().join(name).display().to_string() };
    let (small, large, router) = (path("small"), path("large"), path("router"));
    let missing: PathBuf = dir.path().join("nothing");
    let missing = missing.display().to_string();
    let pair = ["serve", "--slm", &small, "--llm", &large, "--port", "0"];
    let with = |more: &[&'static str]| [&pair[..], &["--router", &router], more].concat();
    let cases: Vec<(Vec<&str>, i32, &str)> = vec![
        (pair.to_vec(), 1, "no --router is given"),
        (with(&["--threshold", "3"]), 1, "threshold is 3"),
        (with(&["--policy", "always-large", "--target-rate", "0.5"]), 1, "holds no share"),
        (with(&["--policy", "oracle"]), 2, "is no policy"),
        (with(&["--host", "0.0.0.0"]), 2, "no API key"),
        (with(&["--context", "100000"]), 1, "which is what both models can"),
        (with(&["--kv-memory", "16"]), 1, "keys and values"),
        (with(&["--max-seqs", "0"]), 2, "expected at least 1"),
        ([&pair[..], &["--router", &missing]].concat(), 1, "nothing"),
        (
            vec!["serve", "--slm", &small, "--llm", "http://host", "--policy", "entropy"],
            2,
            "vllm:http://host",
        ),
    ];
    for (args, code, said) in cases {
        let output = command(&args).stderr(Stdio::piped()).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(said), "{args:?}: {stderr}");
    }
}

//! `megrez serve`: the real binary on a free port, over the nano checkpoint that answers word problems.

#![cfg(feature = "serve")]

mod support;

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use megrez::sse::Events;
use serde_json::{Value, json};
use support::*;
use ureq::http::Response;

/// No claim about speed: a busy machine is slow.
const LIVENESS: Duration = Duration::from_secs(120);
const QUESTION: &str = "Tom has 3 apples and buys 4 more. How many apples does he have?";

fn nano() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/nano/megrez-text")
}

/// A running server; ended with the test.
struct Server {
    child: Child,
    url: String,
    key: Option<&'static str>,
}

impl Server {
    fn start(more: &[&str], key: Option<&'static str>) -> Self {
        let mut args = args!["serve", "--model", nano(), "--port", "0"].to_vec();
        args.extend(more.iter().map(Into::into));
        let mut command = megrez(args);
        command.env_remove("MEGREZ_API_KEY");
        if let Some(key) = key {
            command.env("MEGREZ_API_KEY", key);
        }
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
        Self { child, url, key }
    }

    fn agent() -> ureq::Agent {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .proxy(None)
            .timeout_global(Some(LIVENESS));
        ureq::Agent::new_with_config(config.build())
    }

    fn post(&self, path: &str, body: &Value) -> Response<ureq::Body> {
        let request = Self::agent().post(format!("{}{path}", self.url));
        let request = match self.key {
            Some(key) => request.header("Authorization", format!("Bearer {key}")),
            None => request,
        };
        request.content_type("application/json").send(body.to_string()).unwrap()
    }

    fn get(&self, path: &str) -> (u16, String) {
        let mut answer = Self::agent().get(format!("{}{path}", self.url)).call().unwrap();
        (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap())
    }

    /// Status and JSON of an answer.
    fn ask(&self, path: &str, body: &Value) -> (u16, Value) {
        let mut answer = self.post(path, body);
        let text = answer.body_mut().read_to_string().unwrap();
        (answer.status().as_u16(), serde_json::from_str(&text).unwrap())
    }

    /// The chunks of a stream, `[DONE]` held to be its end.
    fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let answer = self.post(path, body);
        assert_eq!(answer.status(), 200);
        let events: Vec<String> =
            Events::new(BufReader::new(answer.into_body().into_reader())).map(Result::unwrap).collect();
        assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
        events[..events.len() - 1].iter().map(|e| serde_json::from_str(e).unwrap()).collect()
    }

    fn signal(&self) {
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
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn chat(more: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": QUESTION}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn content(chunks: &[Value]) -> String {
    chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect()
}

#[test]
fn a_word_problem_is_answered_whole_and_in_pieces() {
    let server = Server::start(&["--served-name", "nano"], None);
    let local = run(args!["generate", "--model", nano(), "--prompt", QUESTION, "--greedy"]).ok();
    let (status, whole) = server.ask("/v1/chat/completions", &chat(&json!({"model": "nano"})));
    assert_eq!(status, 200, "{whole}");
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
    assert_eq!(text.trim_end(), local.trim_end(), "as the command writes it");
    assert!(text.contains("#### 7"), "{text}");
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    assert_eq!(whole["model"], "nano");

    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let chunks = server.stream("/v1/chat/completions", &chat(&options));
    assert_eq!(content(&chunks), text);
    let usage = chunks.last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    for count in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(usage["usage"][count], whole["usage"][count]);
    }
    assert!(
        usage["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() > Some(0),
        "the prompt came before"
    );
    let plain = server.stream("/v1/chat/completions", &chat(&json!({"stream": true})));
    assert!(plain.iter().all(|c| c["choices"].as_array().is_some_and(|c| c.len() == 1)));

    let (status, models) = server.get("/v1/models");
    assert_eq!(status, 200);
    assert!(models.contains("\"nano\"") && models.contains("\"max_model_len\":512"), "{models}");
    // Text as it is, without a template.
    let raw = json!({"prompt": "<|role_start|>user<|role_end|>Hi", "max_tokens": 3, "ignore_eos": true});
    let (status, raw) = server.ask("/v1/completions", &raw);
    assert_eq!((status, &raw["usage"]["completion_tokens"]), (200, &json!(3)), "{raw}");
    // What the model itself refuses.
    let image = json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]});
    let (status, refused) = server.ask("/v1/chat/completions", &image);
    assert_eq!(status, 400);
    assert!(refused["error"]["message"].as_str().unwrap().contains("image_url"));
    let (status, long) = server.ask("/v1/chat/completions", &chat(&json!({"max_tokens": 512})));
    assert_eq!(status, 400, "{long}");
    assert_eq!(server.get("/health").0, 200);
}

#[test]
fn tools_go_the_whole_way() {
    let server = Server::start(&[], None);
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
    let call = json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}});
    let messages = json!([
        {"role": "user", "content": "2+2?<|function_start|>"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "4"},
    ]);
    let body = json!({"messages": messages, "tools": tools, "max_tokens": 8});
    let (status, reply) = server.ask("/v1/chat/completions", &body);
    assert_eq!(status, 200, "{reply}");
    let (status, tokens) = server.ask("/tokenize", &json!({"messages": messages, "tools": tools}));
    assert_eq!(status, 200, "{tokens}");
    assert_eq!(tokens["count"], reply["usage"]["prompt_tokens"]);
    let (_, text) = server.ask("/detokenize", &json!({"tokens": tokens["tokens"]}));
    let text = text["prompt"].as_str().unwrap();
    assert!(text.contains("\"name\": \"f\""), "{text}");
    assert!(
        text.contains(
            "<|role_end|><|function_start|>{\"name\": \"f\", \"arguments\": {\"a\": 1}}<|function_end|><|turn_end|>\
             <|role_start|>observation<|role_end|>4<|turn_end|>"
        ),
        "{text}"
    );
    let start = json!({"prompt": "<|function_start|>"});
    let (_, mark) = server.ask("/tokenize", &start);
    let mark = &mark["tokens"].as_array().unwrap().last().unwrap().clone();
    let marks = tokens["tokens"].as_array().unwrap().iter().filter(|id| *id == mark).count();
    assert_eq!(marks, 1, "the call's own; what the user spells is text");
}

#[test]
fn a_key_guards_all_but_health() {
    let mut server = Server::start(&[], Some("sk-right"));
    assert_eq!(server.ask("/v1/chat/completions", &chat(&json!({"max_tokens": 2}))).0, 200);
    for key in [None, Some("sk-wrong")] {
        server.key = key;
        for (path, body) in [("/v1/chat/completions", chat(&json!({}))), ("/tokenize", json!({}))] {
            let (status, refused) = server.ask(path, &body);
            assert_eq!(status, 401, "{path}");
            assert!(refused["error"]["message"].as_str().unwrap().contains("API key"), "{refused}");
        }
    }
    assert_eq!(server.get("/v1/models").0, 401);
    assert_eq!(server.get("/metrics").0, 401);
    assert_eq!(server.get("/health").0, 200);
    // From a file too.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys");
    std::fs::write(&file, "# ours\nsk-a\n\nsk-b\n").unwrap();
    let mut server = Server::start(&["--api-key-file", file.to_str().unwrap()], Some("sk-b"));
    assert_eq!(server.ask("/tokenize", &json!({"prompt": "x"})).0, 200);
    server.key = Some("sk-c");
    assert_eq!(server.ask("/tokenize", &json!({"prompt": "x"})).0, 401);
}

/// A request whose reply is as long as the context allows, its first piece read.
fn open_stream(server: &Server, n: usize) -> BufReader<impl Read + use<>> {
    let body = json!({"max_tokens": 400, "ignore_eos": true, "stream": true, "n": n});
    let answer = server.post("/v1/chat/completions", &chat(&body));
    assert_eq!(answer.status(), 200);
    let mut reader = BufReader::new(answer.into_body().into_reader());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.starts_with("data: "), "{line}");
    reader
}

#[test]
fn the_first_signal_finishes_what_was_taken() {
    let mut server = Server::start(&[], None);
    let stream = open_stream(&server, 2);
    server.signal();
    let events: Vec<String> = Events::new(stream).map(Result::unwrap).collect();
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    assert!(events.len() > 100, "{} events", events.len());
    assert_eq!(server.exit(), Some(0));
}

#[test]
fn the_second_signal_ends_at_once() {
    let mut server = Server::start(&["--max-seqs", "1", "--drain-timeout", "600"], None);
    // Far more than can be written in the time that the test gives.
    let streams: Vec<_> = (0..3)
        .map(|_| {
            server.post(
                "/v1/chat/completions",
                &chat(&json!({
                    "max_tokens": 400, "ignore_eos": true, "stream": true, "n": 16
                })),
            )
        })
        .collect();
    server.signal();
    std::thread::sleep(Duration::from_millis(100));
    server.signal();
    assert_eq!(server.exit(), Some(0));
    let cut = streams.into_iter().any(|answer| {
        let events = Events::new(BufReader::new(answer.into_body().into_reader()));
        events.map_while(Result::ok).last().is_none_or(|last| last != "[DONE]")
    });
    assert!(cut, "what still ran was not waited for");
}

#[test]
fn what_is_wrong_is_said_once() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty");
    std::fs::write(&empty, "\n# none\n").unwrap();
    let (model, none) = (golden(), dir.path().join("none"));
    let serve = |more: &[&str]| {
        let mut args = args!["serve", "--model", model, "--port", "0"].to_vec();
        args.extend(more.iter().map(Into::into));
        args
    };
    for (args, code, word) in [
        (
            serve(&["--port", &port])[..3].iter().cloned().chain(args!["--port", port]).collect(),
            1,
            "cannot listen on",
        ),
        (serve(&["--api-key-file", none.to_str().unwrap()]), 1, "none"),
        (serve(&["--api-key-file", empty.to_str().unwrap()]), 1, "holds no API key"),
        (serve(&["--kv", "magic"]), 1, "this binary knows dense"),
        (serve(&["--host", "0.0.0.0"]), 2, "no API key"),
        (serve(&["--host", "here"]), 2, "--host"),
        (serve(&["--context", "9999"]), 1, "context of 9999"),
        (serve(&["--kv-memory", "3 bytes"]), 2, "amount of memory"),
        (serve(&["--kv-memory", "64"]), 1, "too small"),
        (serve(&["--max-seqs", "0"]), 2, "--max-seqs"),
        (args!["serve", "--model", none].to_vec(), 1, "none"),
        (serve(&["--prompts", none.to_str().unwrap()]), 1, "none"),
    ] {
        let mut command = megrez(&args);
        command.env_remove("MEGREZ_API_KEY");
        let run = run_with(command, "");
        assert_eq!(run.code, Some(code), "{args:?}: {}", run.stderr);
        assert!(run.stderr.contains(word), "{args:?}: {}", run.stderr);
        let errors = run.stderr.lines().filter(|l| l.to_lowercase().starts_with("error")).count();
        assert_eq!(errors, 1, "{args:?}: {}", run.stderr);
    }
}

/// The official Python client. Runs in the long tier, with a Python that NICS_PYTHON names and that has `openai`.
#[test]
#[ignore = "long"]
fn the_official_python_client() {
    let Some(python) = std::env::var_os("NICS_PYTHON") else {
        println!("NICS_PYTHON is not set: not run");
        return;
    };
    let has = Command::new(&python).args(["-c", "import openai"]).status();
    assert!(has.is_ok_and(|s| s.success()), "{} has no package openai: pip install openai", python.display());
    let server = Server::start(&[], Some("sk-test"));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/openai_client.py");
    let done = Command::new(&python).arg(script).args([&server.url, "sk-test"]).output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{said}{}", String::from_utf8_lossy(&done.stderr));
    assert!(said.matches("\nok ").count() > 20, "{said}");
}

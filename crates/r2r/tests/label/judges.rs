//! Judges that are asked: a chat model on a server that misbehaves, the large model itself, answers.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};

use crate::kit::*;

/// What the server does with a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mood {
    Well,
    /// Fails every second call with a 500.
    Failing,
    /// Breaks every third connection off.
    Dropping,
    /// Answers with what is no JSON every second time.
    Babbling,
    /// Refuses for good after so many replies.
    DeadAfter(usize),
    /// Says what is no score.
    Vague,
}

/// A chat model on a loopback port.
struct Server {
    url: String,
    calls: Arc<AtomicUsize>,
    asked: Arc<Mutex<Vec<Value>>>,
    stop: Arc<AtomicBool>,
}

impl Server {
    fn start(mood: Mood) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = Self { url, calls: Arc::default(), asked: Arc::default(), stop: Arc::default() };
        let (calls, asked, stop) =
            (Arc::clone(&server.calls), Arc::clone(&server.asked), Arc::clone(&server.stop));
        thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let (calls, asked) = (Arc::clone(&calls), Arc::clone(&asked));
                thread::spawn(move || serve(&stream.unwrap(), mood, &calls, &asked));
            }
        });
        server
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.url.trim_start_matches("http://"));
    }
}

/// By the question alone: the same one has the same answer.
fn opinion(body: &Value) -> usize {
    let user = body["messages"][1]["content"].as_str().unwrap();
    usize::from_str_radix(&nics_base::hash::bytes(user)[..4], 16).unwrap() % 2
}

fn serve(stream: &TcpStream, mood: Mood, calls: &AtomicUsize, asked: &Mutex<Vec<Value>>) {
    let mut reader = BufReader::new(stream);
    loop {
        let (mut first, mut length, mut key) = (String::new(), 0, false);
        if reader.read_line(&mut first).unwrap_or(0) == 0 {
            return;
        }
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).unwrap();
            let header = header.trim().to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(n) = header.strip_prefix("content-length:") {
                length = n.trim().parse().unwrap();
            }
            key |= header == "authorization: bearer secret";
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        let (status, reply) = if first.starts_with("GET /v1/models ") {
            (200, json!({ "data": [{ "id": "wise" }] }).to_string())
        } else {
            assert!(first.starts_with("POST /v1/chat/completions ") && key, "{first}");
            let body: Value = serde_json::from_slice(&body).unwrap();
            let call = calls.fetch_add(1, Ordering::Relaxed);
            let say = |text: String| json!({ "choices": [{ "message": { "content": text } }] }).to_string();
            let well = say(format!("Output: {}\nReason: so it seems in 2 of 3 cases.", opinion(&body)));
            asked.lock().unwrap().push(body);
            match mood {
                Mood::Failing if call.is_multiple_of(2) => {
                    (500, "{\"error\": {\"message\": \"tired\"}}".into())
                }
                Mood::Dropping if call.is_multiple_of(3) => return,
                Mood::Babbling if call.is_multiple_of(2) => (200, "well, you know".into()),
                Mood::DeadAfter(n) if call >= n => {
                    (401, "{\"error\": {\"message\": \"the key has expired\"}}".into())
                }
                Mood::Vague => (200, say("Hard to tell; 7 perhaps.".into())),
                _ => (200, well),
            }
        };
        let head = format!(
            "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            reply.len()
        );
        let mut writer = stream;
        if writer.write_all((head + &reply).as_bytes()).is_err() {
            return;
        }
    }
}

/// Everything up to the judge.
fn continued(n: u64) -> tempfile::TempDir {
    let dir = inputs(n);
    let batch = "--batch 4 --group 8";
    for step in [
        format!("respond --queries queries.jsonl --llm LARGE --max-new-tokens LONGEST {batch}"),
        "prefill --slm SMALL --llm LARGE --top-k 12 --shard-tokens 300".to_owned(),
        format!("continue --llm LARGE {batch}"),
    ] {
        say(dir.path(), &format!("label {step} --out base")).ok();
    }
    dir
}

/// A copy of what was made, with a name.
fn take(dir: &Path, name: &str) {
    std::fs::create_dir_all(dir.join(name)).unwrap();
    for (file, _) in files(&dir.join("base")) {
        std::fs::copy(dir.join("base").join(&file), dir.join(name).join(&file)).unwrap();
    }
}

fn judge(dir: &Path, name: &str, judge: &str) -> Run {
    let words = words(&format!("label judge --llm LARGE --batch 4 --out {name} --judge {judge}"));
    let output = command(dir, words).env("R2R_JUDGE_KEY", "secret").output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

fn scores(dir: &Path, name: &str) -> Vec<i64> {
    let lines = read_lines(&dir.join(name).join("judged.jsonl"));
    lines.iter().map(|l| l["score"].as_i64().unwrap()).collect()
}

#[test]
fn a_server_is_asked_once_for_each_question_whatever_its_mood() {
    let dir = continued(3);
    let dir = dir.path();
    let all = read_lines(&dir.join("base/mismatch.jsonl")).len();
    take(dir, "well");
    let server = Server::start(Mood::Well);
    judge(dir, "well", &format!("{}/v1/", server.url)).ok();
    let expected = scores(dir, "well");
    assert_eq!(expected.len(), all);
    assert!(expected.contains(&0) && expected.contains(&1));
    let lines = read_lines(&dir.join("well/judged.jsonl"));
    let replies = lines.iter().filter(|l| l["reply"].is_string()).count();
    let mut hashes: Vec<&str> = lines.iter().map(|l| l["prompt_hash"].as_str().unwrap()).collect();
    hashes.sort_unstable();
    hashes.dedup();
    assert_eq!((server.calls(), replies), (hashes.len(), hashes.len()));
    let asked = server.asked.lock().unwrap().clone();
    for body in &asked {
        let user = body["messages"][1]["content"].as_str().unwrap();
        assert_eq!(
            (&body["model"], &body["temperature"], &body["max_tokens"]),
            (&json!("wise"), &json!(0), &json!(16))
        );
        assert!(user.contains("Sentence 1:") && user.contains("<<") && !user.contains("{{"), "{user}");
    }
    for mood in [Mood::Failing, Mood::Dropping, Mood::Babbling] {
        let name = format!("{mood:?}");
        take(dir, &name);
        let server = Server::start(mood);
        judge(
            dir,
            &name,
            &format!("{} --judge-retries 2 --judge-connections 1 --judge-backoff 5", server.url),
        )
        .ok();
        assert_eq!(scores(dir, &name), expected, "{mood:?}");
    }
    take(dir, "vague");
    let server = Server::start(Mood::Vague);
    judge(dir, "vague", &server.url).ok();
    assert!(scores(dir, "vague").iter().all(|s| *s == -1));
    let said = say(dir, "label build --out vague").ok();
    assert!(said.is_empty());
}

#[test]
fn a_server_that_dies_loses_nothing() {
    let dir = continued(16);
    let dir = dir.path();
    take(dir, "well");
    let well = Server::start(Mood::Well);
    judge(dir, "well", &well.url).ok();
    let expected = scores(dir, "well");

    take(dir, "dying");
    let server = Server::start(Mood::DeadAfter(7));
    let flags = "--judge-connections 1 --judge-retries 2";
    let said = judge(dir, "dying", &format!("{} {flags}", server.url)).refused();
    assert!(said.contains("status 401") && said.contains("the key has expired"), "{said}");
    // What it said before is kept, in order.
    let kept = scores(dir, "dying");
    assert!(kept.len() >= 7 && kept.len() < expected.len() && expected.starts_with(&kept));
    let replies = |name: &str| {
        let lines = read_lines(&dir.join(name).join("judged.jsonl"));
        lines.iter().filter(|l| l["reply"].is_string()).count()
    };
    assert_eq!(replies("dying"), 7);
    // Nobody listens.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let said = judge(dir, "dying", &format!("http://{port} {flags} --judge-model wise")).refused();
    assert!(said.contains("cannot be reached, in 3 calls"), "{said}");
    assert_eq!(scores(dir, "dying"), kept);
    // A torn line, as a kill leaves it, and a server that is well again: only what is missing is asked for.
    let path = dir.join("dying/judged.jsonl");
    let mut text = std::fs::read_to_string(&path).unwrap();
    text.push_str("{\"doc\": 3, \"posi");
    std::fs::write(&path, text).unwrap();
    let before = well.calls();
    judge(dir, "dying", &format!("{} {flags}", well.url)).ok();
    assert_eq!(scores(dir, "dying"), expected);
    assert_eq!(well.calls() - before, replies("dying") - 7);
    // Another judge is another run.
    let said = judge(dir, "dying", "rule").refused();
    assert!(said.contains("`judge` of another run"), "{said}");
}

#[test]
fn the_large_model_and_answers_judge_too() {
    let dir = continued(8);
    let dir = dir.path();
    let mismatches = read_lines(&dir.join("base/mismatch.jsonl"));
    take(dir, "answer");
    judge(dir, "answer", "answer:regex=answer\\s(\\d+) --answer-tokens 60").ok();
    let lines = read_lines(&dir.join("answer/judged.jsonl"));
    assert_eq!(lines.len(), mismatches.len());
    for line in &lines {
        let (a, b) = line["reply"].as_str().unwrap().split_once(" / ").unwrap();
        let expected = if (a, b) == ("none", "none") { -1 } else { i64::from(a != b) };
        assert_eq!(line["score"], expected);
    }
    assert!(scores(dir, "answer").contains(&0));

    // The large model of the tests cannot judge, but it can be asked: what it says is no score.
    let model = dir.join("talker");
    with_template(&model, Some("{% for m in messages %}{{ m.content }} {% endfor %}"));
    std::fs::write(dir.join("task.txt"), "so {{small}} then {{large}} ?").unwrap();
    take(dir, "large");
    let words = words("label judge --batch 4 --out large --judge large --judge-template task.txt --llm");
    let output = command(dir, words).arg(&model).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(scores(dir, "large").len(), mismatches.len());
    std::fs::write(dir.join("task.txt"), "no places").unwrap();
    take(dir, "lost");
    let said = judge(dir, "lost", "http://127.0.0.1:9 --judge-model x --judge-template task.txt").refused();
    assert!(said.contains("task.txt") && said.contains("{{small}}"), "{said}");
}

//! What the server's tests share: a front end over the Megrez-shaped fixture, engines, a plain HTTP client.

#![allow(dead_code)] // Each test uses its part.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use nics_core::cache::DenseCache;
use nics_core::checkpoint::Checkpoint;
use nics_core::generate::Finish;
use nics_core::models::{self, Model};
use nics_core::sampling::Sampling;
use nics_core::server::{
    Admission, Driver, Engine, EngineStats, EngineThread, Event, Frontend, Handle, Job, JobId, ModelCard,
    Running, ServerConfig, TextEngine, TextSettings, ToolFormat, Written, spawn, start,
};
use nics_core::template::{ChatTemplate, Message, RenderOptions};
use nics_core::tokenizer::Tokenizer;
use nics_core::{Error, Result};
use serde_json::{Map, Value, json};
use tch::{Device, Kind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The default engine's settings with a chunk that the tests' prompts reach, so that their beginnings are reused.
pub fn settings() -> TextSettings {
    TextSettings { prefill_chunk: 16, ..TextSettings::default() }
}

/// No test waits longer than this for anything.
pub const LIVENESS: Duration = Duration::from_secs(60);

/// The name of the model.
pub const MODEL: &str = "org/tiny";

fn checkpoint() -> Checkpoint {
    Checkpoint::open_dir(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../datasets/golden/megrez")))
        .unwrap()
}

pub struct Front {
    pub card: ModelCard,
    pub tokenizer: Tokenizer,
    template: ChatTemplate,
}

impl Front {
    pub fn new() -> Self {
        let checkpoint = checkpoint();
        let tokenizer = Tokenizer::from_checkpoint(&checkpoint).unwrap();
        let token = |name: &str| tokenizer.token_id(name).unwrap();
        let card = ModelCard {
            id: MODEL.into(),
            owner: "tests".into(),
            context: 256,
            vocab: 320,
            sampling: Sampling::default(),
            max_new_tokens: 24,
            eos: tokenizer.special_ids().eos.clone(),
            tools: Some(ToolFormat { start: token("<|function_start|>"), end: token("<|function_end|>") }),
        };
        let template = ChatTemplate::from_checkpoint(&checkpoint).unwrap().unwrap();
        Self { card, tokenizer, template }
    }
}

impl Frontend for Front {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    fn chat(
        &self,
        messages: &[Message],
        tools: Option<&[Value]>,
        settings: &Map<String, Value>,
    ) -> Result<Vec<u32>> {
        let options = RenderOptions {
            add_generation_prompt: true,
            tools: tools.map(|t| t.to_vec().into()),
            extra: settings.clone(),
            ..RenderOptions::default()
        };
        let text = self.template.render(messages, &options)?;
        Ok(self.tokenizer.encode(&text, false)?)
    }

    fn own_fields(&self, fields: &Map<String, Value>) -> Result<Map<String, Value>> {
        match fields.get("mood") {
            None => Ok(Map::new()),
            Some(Value::String(mood)) => Ok(Map::from_iter([("mood".into(), mood.clone().into())])),
            Some(_) => Err(Error::input("mood is no string")),
        }
    }
}

/// What a [`Fake`] engine has seen.
#[derive(Default)]
pub struct Seen {
    pub steps: AtomicUsize,
    pub tokens: AtomicUsize,
    pub admitted: AtomicUsize,
    pub cancelled: AtomicUsize,
    pub running: AtomicUsize,
    /// While it is set, a step does not end.
    pub hold: AtomicBool,
    /// A step is being held.
    pub held: AtomicBool,
}

/// Which tokens a job is answered with; a `Err` fails the job after the tokens of `Ok`.
pub type Script = dyn Fn(&Job) -> Vec<u32> + Send + Sync;

/// An engine without a model: it writes what a script says, one token a step.
pub struct Fake {
    pub script: Arc<Script>,
    /// Jobs at a time.
    pub room: usize,
    /// Time of a step.
    pub pace: Duration,
    /// The step, counted from a job's begin, at which jobs fail.
    pub fail_at: Option<usize>,
    pub seen: Arc<Seen>,
    pub jobs: Vec<(Job, Vec<u32>, usize)>,
}

impl Fake {
    pub fn new(script: impl Fn(&Job) -> Vec<u32> + Send + Sync + 'static) -> Self {
        Self {
            script: Arc::new(script),
            room: 64,
            pace: Duration::ZERO,
            fail_at: None,
            seen: Arc::default(),
            jobs: Vec::new(),
        }
    }

    /// Says the same text whoever asks, then the end token.
    pub fn saying(text: &str) -> Self {
        let front = Front::new();
        let mut ids = front.tokenizer.encode(text, false).unwrap();
        ids.push(front.card.eos[0]);
        Self::new(move |_| ids.clone())
    }

    /// Says as much as it may, depending on prompt and seed.
    pub fn babbling() -> Self {
        Self::new(babble)
    }
}

/// Tokens that depend on prompt and seed alone; never an end token.
pub fn babble(job: &Job) -> Vec<u32> {
    let mut state = job.prompt.iter().fold(job.sampling.seed ^ 0x9e37_79b9_7f4a_7c15, |h, &id| {
        (h ^ u64::from(id)).wrapping_mul(0x0100_0000_01b3).rotate_left(23)
    });
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % 280) as u32
    };
    (0..job.max_new_tokens).map(|_| next()).collect()
}

impl Engine for Fake {
    fn admit(&mut self, job: &Job) -> Admission {
        if job.prompt.len() == 13 && job.own.get("mood").is_some() {
            return Admission::Refused(Error::input("13 is a bad number in any mood"));
        }
        if self.jobs.len() >= self.room {
            return Admission::Full;
        }
        self.seen.admitted.fetch_add(1, Ordering::SeqCst);
        self.jobs.push((job.clone(), (self.script)(job), 0));
        self.seen.running.store(self.jobs.len(), Ordering::SeqCst);
        Admission::Taken
    }

    fn step(&mut self, emit: &mut dyn FnMut(Event)) -> Result<()> {
        std::thread::sleep(self.pace);
        while self.seen.hold.load(Ordering::SeqCst) {
            self.seen.held.store(true, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(1));
        }
        self.seen.held.store(false, Ordering::SeqCst);
        self.seen.steps.fetch_add(1, Ordering::SeqCst);
        let seen = self.seen.clone();
        let fail_at = self.fail_at;
        self.jobs.retain_mut(|(job, tokens, at)| {
            if fail_at == Some(*at) {
                emit(Event::Failed { job: job.id, error: Error::input("the script ends here") });
                return false;
            }
            let Some(&token) = tokens.get(*at) else {
                emit(Event::Finished { job: job.id, finish: Finish::Length });
                return false;
            };
            *at += 1;
            seen.tokens.fetch_add(1, Ordering::SeqCst);
            let mut written = Written { job: job.id, token, ..Written::default() };
            if let Some(n) = job.sampling.logprobs {
                written.logprob = Some(-0.5);
                written.top = (0..n as u32).map(|i| (token + i, -0.5 - i as f32)).collect();
            }
            if let Some(mood) = job.own.get("mood") {
                written.own.insert("mood".into(), mood.clone());
                written.own.insert("at".into(), json!(*at - 1));
            }
            emit(Event::Token(written));
            let finish = if job.eos.contains(&token) {
                Some(Finish::Eos)
            } else {
                (*at >= job.max_new_tokens).then_some(Finish::Length)
            };
            if let Some(finish) = finish {
                emit(Event::Finished { job: job.id, finish });
            }
            finish.is_none()
        });
        self.seen.running.store(self.jobs.len(), Ordering::SeqCst);
        Ok(())
    }

    fn cancel(&mut self, job: JobId) {
        let before = self.jobs.len();
        self.jobs.retain(|(j, ..)| j.id != job);
        self.seen.cancelled.fetch_add(before - self.jobs.len(), Ordering::SeqCst);
        self.seen.running.store(self.jobs.len(), Ordering::SeqCst);
    }

    fn running(&self) -> usize {
        self.jobs.len()
    }

    fn stats(&self) -> EngineStats {
        EngineStats { running: self.jobs.len(), kv_bytes: 64 * self.jobs.len(), ..EngineStats::default() }
    }
}

/// A server on a port of its own.
pub struct Server {
    pub running: Running,
    pub handle: Handle,
    pub thread: EngineThread,
}

impl Server {
    pub async fn with(
        config: ServerConfig,
        queue: usize,
        run: impl FnOnce(Driver) -> Result<()> + Send + 'static,
    ) -> Self {
        let (handle, thread) = spawn(queue, run).unwrap();
        let config = ServerConfig { port: 0, ..config };
        let running = start(config, Arc::new(Front::new()), handle.clone()).await.unwrap();
        let server = Self { running, handle, thread };
        server.handle.watch().wait_for(|p| *p != nics_core::server::Phase::Loading).await.unwrap();
        server
    }

    pub async fn fake(config: ServerConfig, queue: usize, mut engine: Fake) -> Self {
        Self::with(config, queue, move |driver| {
            driver.run(&mut engine);
            Ok(())
        })
        .await
    }

    /// The tiny model of the fixture.
    pub async fn model(config: ServerConfig, queue: usize, settings: TextSettings) -> Self {
        Self::with(config, queue, move |driver| {
            nics_core::device::set_threads(Some(1))?;
            let model = models::load(&checkpoint(), Device::Cpu, Kind::Float)?;
            assert_eq!(model.dims().vocab, 320);
            let mut cache = DenseCache::new();
            let mut engine = TextEngine::new(&model, &mut cache, settings)?;
            driver.run(&mut engine);
            Ok(())
        })
        .await
    }

    pub fn address(&self) -> std::net::SocketAddr {
        self.running.address()
    }

    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        request(self.address(), "POST", path, &[], body.to_string().as_bytes()).await
    }

    pub async fn get(&self, path: &str) -> Reply {
        request(self.address(), "GET", path, &[], b"").await
    }

    /// Requests of a route that have ended, by `/metrics`.
    pub async fn ended(&self, route: &str) -> u64 {
        let label = format!("nics_http_requests_total{{route=\"{route}\"");
        let page = self.get("/metrics").await;
        let counts = page.text().lines().filter(|l| l.starts_with(&label));
        counts.map(|l| l.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }

    /// Ends the server and its engine, and holds both to have ended well.
    pub async fn end(self) {
        self.running.stopper().drain();
        timely(self.running.join()).await.unwrap();
        tokio::task::spawn_blocking(|| self.thread.join().unwrap()).await.unwrap();
    }
}

/// What a test waits for, or a panic when it does not come.
pub async fn timely<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIVENESS, future).await.expect("this takes too long")
}

/// Waits until something holds.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !holds() {
        assert!(start.elapsed() < LIVENESS, "{what}: not in time");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// An HTTP response.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The data of a stream's events; comments are left out.
    pub fn events(&self) -> Vec<String> {
        assert_eq!(self.header("content-type"), Some("text/event-stream; charset=utf-8"), "{self:?}");
        let blocks = self.text().strip_suffix("\n\n").unwrap().split("\n\n");
        let data = |b: &str| b.strip_prefix("data: ").map(str::to_owned);
        blocks.filter(|b| !b.starts_with(':')).map(|b| data(b).unwrap_or_else(|| panic!("{b}"))).collect()
    }

    /// The chunks of a stream that ends well.
    pub fn chunks(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text());
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|e| serde_json::from_str(e).unwrap()).collect()
    }

    /// Holds it to be an error in OpenAI's form, and gives `(param, code)`.
    pub fn error(&self, status: u16) -> (Option<String>, Option<String>) {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        let json = self.json();
        let error = json["error"].as_object().unwrap_or_else(|| panic!("{json}"));
        assert_eq!(error.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
        assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()), "{json}");
        assert!(error["type"].is_string());
        let text = |key: &str| error[key].as_str().map(str::to_owned);
        (text("param"), text("code"))
    }
}

/// The head of a request.
pub fn head(method: &str, path: &str, headers: &[(&str, &str)], length: usize) -> Vec<u8> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
    if !headers.iter().any(|(n, _)| n.eq_ignore_ascii_case("content-type")) {
        head += "Content-Type: application/json\r\n";
    }
    for (name, value) in headers {
        head.extend([name, ": ", value, "\r\n"]);
    }
    format!("{head}Content-Length: {length}\r\n\r\n").into_bytes()
}

/// One request on a connection of its own.
pub async fn request(
    address: std::net::SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Reply {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut bytes = head(method, path, headers, body.len());
    bytes.extend_from_slice(body);
    // A refused body may find the other side closed.
    let _ = stream.write_all(&bytes).await;
    read_reply(&mut stream).await
}

/// Reads up to the connection's end.
pub async fn read_reply(stream: &mut TcpStream) -> Reply {
    let mut bytes = Vec::new();
    timely(stream.read_to_end(&mut bytes)).await.unwrap();
    parse(&bytes)
}

pub fn parse(bytes: &[u8]) -> Reply {
    let at = bytes.windows(4).position(|w| w == b"\r\n\r\n");
    let at = at.unwrap_or_else(|| panic!("no HTTP response: {:?}", String::from_utf8_lossy(bytes)));
    let head = std::str::from_utf8(&bytes[..at]).unwrap();
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers: Vec<(String, String)> = lines
        .map(|l| l.split_once(": ").unwrap())
        .map(|(n, v)| (n.to_ascii_lowercase(), v.to_owned()))
        .collect();
    let mut rest = &bytes[at + 4..];
    let chunked = headers.iter().any(|(n, v)| n == "transfer-encoding" && v == "chunked");
    let mut body = if chunked { Vec::new() } else { std::mem::take(&mut rest).to_vec() };
    while !rest.is_empty() || (chunked && body.is_empty()) {
        let at = rest.windows(2).position(|w| w == b"\r\n").expect("the chunks break off");
        let n = usize::from_str_radix(std::str::from_utf8(&rest[..at]).unwrap(), 16).unwrap();
        body.extend_from_slice(&rest[at + 2..at + 2 + n]);
        rest = &rest[at + 4 + n..];
        if n == 0 {
            assert!(rest.is_empty(), "something follows the last chunk");
            return Reply { status, headers, body };
        }
    }
    assert!(!chunked, "the last chunk is missing");
    Reply { status, headers, body }
}

/// A chat of one turn, with further fields.
pub fn chat(text: &str, fields: Value) -> Value {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": text}]});
    extend(&mut body, fields);
    body
}

/// A completion, with further fields.
pub fn completion(prompt: impl Into<Value>, fields: Value) -> Value {
    let mut body = json!({"model": MODEL, "prompt": prompt.into()});
    extend(&mut body, fields);
    body
}

fn extend(body: &mut Value, fields: Value) {
    let Value::Object(fields) = fields else { panic!("{fields} is no object") };
    body.as_object_mut().unwrap().extend(fields);
}

/// The texts of a stream's choices, put together.
pub fn streamed_texts(chunks: &[Value], n: usize) -> Vec<String> {
    let mut texts = vec![String::new(); n];
    for choice in chunks.iter().filter_map(|c| c["choices"].get(0)) {
        let at = choice["index"].as_u64().unwrap() as usize;
        let text = choice.get("text").or_else(|| choice["delta"].get("content"));
        texts[at] += text.and_then(Value::as_str).unwrap_or_default();
    }
    texts
}

/// The texts of a whole reply's choices.
pub fn whole_texts(reply: &Value) -> Vec<String> {
    let text = |c: &Value| {
        c.get("text").or_else(|| c["message"].get("content")).unwrap().as_str().unwrap().to_owned()
    };
    reply["choices"].as_array().unwrap().iter().map(text).collect()
}

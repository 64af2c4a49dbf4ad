//! What the server's tests share: a front end over the Megrez-shaped fixture, engines, a plain HTTP client.

#![allow(dead_code, unused_imports)] // Each test uses its part.

mod fake;
mod http;

pub use fake::*;
pub use http::*;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nics_core::cache::DenseCache;
use nics_core::checkpoint::Checkpoint;
use nics_core::models::{self, Model};
use nics_core::sampling::Sampling;
use nics_core::server::{
    Driver, EngineThread, Frontend, Handle, ModelCard, Running, ServerConfig, TextEngine, TextSettings,
    ToolFormat, spawn, start,
};
use nics_core::template::{ChatTemplate, Message, RenderOptions};
use nics_core::tokenizer::Tokenizer;
use nics_core::{Error, Result};
use serde_json::{Map, Value, json};
use tch::{Device, Kind};

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

    fn check_sampling(&self, sampling: &Sampling) -> Result<()> {
        if sampling.min_p < 0.9 {
            return Ok(());
        }
        Err(Error::Field { field: "min_p".into(), message: "min_p is too much for this engine".into() })
    }

    fn own_fields(&self, fields: &Map<String, Value>) -> Result<Map<String, Value>> {
        match fields.get("mood") {
            None => Ok(Map::new()),
            Some(Value::String(mood)) => Ok(Map::from_iter([("mood".into(), mood.clone().into())])),
            Some(_) => Err(Error::Field { field: "mood".into(), message: "mood is no string".into() }),
        }
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

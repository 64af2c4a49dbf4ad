//! A pair of tiny random models over the core's tiny tokenizer, behind a server on a port of its own.

use std::io::Read;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nics_core::checkpoint::{Checkpoint, TensorPath};
use nics_core::models::{self, Decoder as Model, Model as _};
use nics_core::sampling::Sampling;
use nics_core::server::{ApiKeys, EngineThread, ModelCard, Phase, Running, ServerConfig, spawn, start};
use nics_core::template::ChatTemplate;
use nics_core::tokenizer::Tokenizer;
use r2r::decode::{Decoder, LargeModel, LocalLarge, OnFailure, Request, Source, TokenEvent};
use r2r::policy::{Kind, PolicySpec, Settings, SharedRouter};
use r2r::router::{Architecture, InitArgs, Router, RouterConfig};
use r2r::serve::{PairEngine, PairFrontend, PairSettings, Sizes};
use serde_json::{Map, Value, json};
use tch::Device;
use tokio::runtime::Runtime;
use ureq::http::Response;

/// No claim about speed: a busy machine is slow.
pub const LIVENESS: Duration = Duration::from_secs(120);
pub const CONTEXT: usize = 256;
const VOCAB: i64 = 320;
const HIDDEN: i64 = 32;

pub fn tokenizer_folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden/megrez")
}

pub fn config(hidden: i64, layers: i64) -> Map<String, Value> {
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": VOCAB, "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "hidden_act": "silu",
    });
    let Value::Object(config) = config else { unreachable!() };
    config
}

pub fn weights(seed: u64) -> TensorPath {
    TensorPath::random(seed, 0.25, Device::Cpu, tch::Kind::Float)
}

/// Two models and a router between them, the same wherever they are made.
pub struct Pair {
    pub small: Model,
    pub large: Model,
    pub router: SharedRouter,
}

impl Pair {
    pub fn new() -> Self {
        nics_core::device::set_threads(Some(1)).unwrap();
        let load = |hidden, layers, seed| {
            models::load_at(models::config(&config(hidden, layers)).unwrap(), &weights(seed)).unwrap()
        };
        let table = weights(1).tensor("model.embed_tokens.weight", &[VOCAB, HIDDEN]).unwrap();
        let args = InitArgs {
            hidden_states_size: Some(HIDDEN),
            logits_size: Some(16),
            hidden_dims: vec![24, 24],
            expansion_factor: 2,
            dropout_rate: 0.0,
            ..InitArgs::default()
        };
        let config = RouterConfig { architecture: Architecture::HiddenTokenLogits, args };
        let router = Router::random(config, Some(&table), None, 3, Device::Cpu).unwrap();
        Self { small: load(HIDDEN, 2, 1), large: load(48, 3, 2), router: Arc::new(Mutex::new(router)) }
    }

    /// What a decoder of this process writes, one text at a time.
    pub fn write(&self, spec: &PolicySpec, request: Request) -> Vec<TokenEvent> {
        let policy = spec.build(Some((self.router.clone(), 0.5))).unwrap();
        let mut decoder = Decoder::new(&self.small, Box::new(LocalLarge::new(&self.large)), policy);
        r2r::decode::collect(&mut decoder, [request], 1).unwrap().remove(0)
    }

    /// A threshold that half of the scores of this text reach.
    pub fn middle(&self, prompt: &[u32], new: usize) -> f64 {
        let never = PolicySpec { threshold: Some(2.0), ..PolicySpec::new(Kind::Neural) };
        let events = self.write(&never, Request::greedy(prompt.to_vec(), new, &[]));
        let mut scores: Vec<f32> = events.iter().map(|e| e.score).collect();
        scores.sort_by(f32::total_cmp);
        let (low, high) = (f64::from(scores[scores.len() / 2 - 1]), f64::from(scores[scores.len() / 2]));
        f64::midpoint(low, high)
    }
}

pub fn tokenizer() -> Tokenizer {
    Tokenizer::from_checkpoint(&Checkpoint::open_dir(&tokenizer_folder()).unwrap()).unwrap()
}

pub fn frontend(spec: &PolicySpec) -> PairFrontend {
    let checkpoint = Checkpoint::open_dir(&tokenizer_folder()).unwrap();
    let tokenizer = Tokenizer::from_checkpoint(&checkpoint).unwrap();
    let card = ModelCard {
        id: "pair".into(),
        owner: "tests".into(),
        context: CONTEXT,
        vocab: VOCAB as usize,
        sampling: Sampling::default(),
        max_new_tokens: 24,
        eos: tokenizer.special_ids().eos.clone(),
        tools: None,
    };
    let template = ChatTemplate::from_checkpoint(&checkpoint).unwrap();
    let frontend = PairFrontend::new(card, tokenizer, template, *spec);
    frontend.sizes().set(Sizes { small: 1.5, large: 32.0, router: 0.056 }).unwrap();
    frontend
}

/// How a test wants its server.
#[derive(Clone, Copy)]
pub struct Setup {
    pub spec: PolicySpec,
    pub key: Option<&'static str>,
    pub max_sequences: usize,
    pub on_failure: OnFailure,
    /// Bytes for keys and values of both models.
    pub kv_bytes: usize,
    /// Puts something between the decoder and the large model.
    pub wrap: for<'m> fn(LocalLarge<'m>) -> Box<dyn LargeModel + 'm>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            spec: PolicySpec::new(Kind::Neural),
            key: None,
            max_sequences: 16,
            on_failure: OnFailure::Abort,
            kv_bytes: 64 << 20,
            wrap: |large| Box::new(large),
        }
    }
}

/// A server; ended, and held to end well, by [`Server::end`].
pub struct Server {
    runtime: Runtime,
    running: Option<Running>,
    thread: Option<EngineThread>,
    pub url: String,
    key: Option<&'static str>,
}

impl Server {
    pub fn new(setup: Setup) -> Self {
        let runtime = Runtime::new().unwrap();
        let (spec, key) = (setup.spec, setup.key);
        let (handle, thread) = spawn(64, move |driver| -> nics_core::Result<()> {
            let pair = Pair::new();
            let policy = spec.build(Some((pair.router.clone(), 0.5))).map_err(nics_core::Error::input)?;
            let large = (setup.wrap)(LocalLarge::new(&pair.large));
            let decoder = Decoder::new(&pair.small, large, policy).on_failure(setup.on_failure);
            let dims = (pair.small.dims(), pair.large.dims());
            let settings = PairSettings::share(setup.kv_bytes, setup.max_sequences, dims.0, Some(dims.1));
            driver.run(&mut PairEngine::new(decoder, settings)?);
            Ok(())
        })
        .unwrap();
        let config = ServerConfig { port: 0, keys: ApiKeys::new(key).unwrap(), ..ServerConfig::default() };
        let frontend = Arc::new(frontend(&spec));
        let running = runtime.block_on(start(config, frontend, handle.clone())).unwrap();
        runtime.block_on(async {
            handle.watch().wait_for(|phase| *phase != Phase::Loading).await.unwrap();
        });
        let url = format!("http://{}", running.address());
        Self { runtime, running: Some(running), thread: Some(thread), url, key }
    }

    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    fn agent() -> ureq::Agent {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .proxy(None)
            .timeout_global(Some(LIVENESS));
        ureq::Agent::new_with_config(config.build())
    }

    pub fn post(&self, path: &str, body: &Value) -> Response<ureq::Body> {
        let request = Self::agent().post(format!("{}{path}", self.url)).content_type("application/json");
        let request = match self.key {
            Some(key) => request.header("Authorization", format!("Bearer {key}")),
            None => request,
        };
        request.send(body.to_string()).unwrap()
    }

    /// Status and JSON of an answer.
    pub fn ask(&self, path: &str, body: &Value) -> (u16, Value) {
        let mut answer = self.post(path, body);
        let text = answer.body_mut().read_to_string().unwrap();
        (answer.status().as_u16(), serde_json::from_str(&text).unwrap())
    }

    /// A completion that has to succeed.
    pub fn complete(&self, body: &Value) -> Value {
        let (status, reply) = self.ask("/v1/completions", body);
        assert_eq!(status, 200, "{reply}");
        reply
    }

    /// The chunks of a stream, `[DONE]` held to be its end.
    pub fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let answer = self.post(path, &body);
        assert_eq!(answer.status(), 200);
        let mut text = String::new();
        answer.into_body().into_reader().read_to_string(&mut text).unwrap();
        let events: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(events.last(), Some(&"[DONE]"), "{text}");
        events[..events.len() - 1].iter().map(|e| serde_json::from_str(e).unwrap()).collect()
    }

    /// A number of `/metrics`.
    pub fn metric(&self, name: &str) -> f64 {
        let page = Self::agent().get(format!("{}/metrics", self.url)).call().unwrap();
        let page = page.into_body().read_to_string().unwrap();
        let line = page.lines().find_map(|line| line.strip_prefix(&format!("nics_{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in {page}")).parse().unwrap()
    }

    /// Waits until a number of `/metrics` is as it should be.
    pub fn wait_for(&self, name: &str, expected: f64) {
        let began = Instant::now();
        while (self.metric(name) - expected).abs() > 1e-9 {
            assert!(began.elapsed() < LIVENESS, "{name} is {}, not {expected}", self.metric(name));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn end(mut self) {
        let running = self.running.take().unwrap();
        running.stopper().drain();
        self.runtime.block_on(running.join()).unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

/// A completion of token ids with further fields; token ids in, so that tests know what both sides read.
pub fn body(prompt: &[u32], new: usize, more: Value) -> Value {
    let mut body = json!({"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": true});
    let Value::Object(more) = more else { panic!("{more} is no object") };
    body.as_object_mut().unwrap().extend(more);
    body
}

/// The request of [`body`] as the decoder of this process takes it.
pub fn request(prompt: &[u32], new: usize, settings: Settings) -> Request {
    Request { settings, ..Request::greedy(prompt.to_vec(), new, &[]) }
}

pub fn prompt(seed: u32) -> Vec<u32> {
    (0..5 + seed % 7).map(|i| (seed * 37 + i * 11) % 280).collect()
}

/// Ids and sources of a reply's tokens.
pub fn sources(tokens: &Value) -> Vec<(u32, bool)> {
    let one = |t: &Value| (t["id"].as_u64().unwrap() as u32, t["source"] == "large");
    tokens.as_array().unwrap_or_else(|| panic!("no tokens: {tokens}")).iter().map(one).collect()
}

/// The same of the decoder's events.
pub fn written(events: &[TokenEvent]) -> Vec<(u32, bool)> {
    events.iter().map(|e| (e.token, e.source != Source::Small)).collect()
}

/// What the chunks of a completion's stream say, put together: text and tokens of choice `index`.
pub fn gathered(chunks: &[Value], index: usize) -> (String, Value) {
    let choices = chunks.iter().flat_map(|c| c["choices"].as_array().unwrap());
    let choices: Vec<&Value> = choices.filter(|c| c["index"] == index).collect();
    let text = choices.iter().map(|c| c["text"].as_str().unwrap()).collect();
    let tokens = choices.iter().filter_map(|c| c["tokens"].as_array()).flatten().cloned().collect();
    (text, Value::Array(tokens))
}

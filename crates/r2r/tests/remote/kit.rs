//! Two tiny models with one tokenizer, and running requests over them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nics_core::checkpoint::{Checkpoint, TensorPath};
use nics_core::golden::Golden;
use nics_core::models::{self, Decoder as Model};
use nics_core::tokenizer::Tokenizer;
use r2r::decode::{Decoder, LargeModel, LocalLarge, OnFailure, ReadAhead, Request, Source, Step, TokenEvent};
use r2r::policy::{AlwaysLarge, Policy, Random, Sequence};
use r2r::remote::{Engine, RemoteLarge, RemoteSettings};
use r2r::sampling::SmallSampling;
use tch::Tensor;

/// No test waits longer than this for anything.
pub const LIVENESS: Duration = Duration::from_secs(60);

/// Rows of both models' embedding tables.
pub const VOCAB: usize = 320;

pub fn checkpoint() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden/megrez")
}

pub fn tokenizer() -> Tokenizer {
    Tokenizer::from_checkpoint(&Checkpoint::open_dir(&checkpoint()).unwrap()).unwrap()
}

/// The fixture's model with weights changed by a factor of their place, and room for `context` tokens.
fn model(change: f64, context: usize) -> Model {
    let golden = Golden::at(checkpoint());
    let mut config = golden.json("config.json").unwrap();
    config["max_position_embeddings"] = context.into();
    let tensors = golden.tensors("model.safetensors").unwrap().into_iter().map(|(name, t)| {
        let t = t.to_kind(tch::Kind::Float);
        let places = Tensor::arange(t.numel() as i64, (tch::Kind::Float, tch::Device::Cpu)).view_as(&t);
        let changed = &t * ((places * 0.7).sin() * change + 1.0);
        (name, changed)
    });
    let config = models::config(config.as_object().unwrap()).unwrap();
    models::load_at(config, &TensorPath::from_tensors(tensors.collect())).unwrap()
}

pub fn small() -> Model {
    small_for(256)
}

pub fn small_for(context: usize) -> Model {
    model(0.6, context)
}

pub fn large() -> Model {
    large_for(256)
}

pub fn large_for(context: usize) -> Model {
    model(0.0, context)
}

/// Prompts of different lengths, the longest of 40 tokens.
pub fn prompts() -> Vec<Vec<u32>> {
    [3, 17, 1, 40, 9]
        .iter()
        .enumerate()
        .map(|(i, &len)| (0..len).map(|j| (11 + 37 * i as u32 + 13 * j) % 300).collect())
        .collect()
}

pub fn greedy(new_tokens: usize) -> Vec<Request> {
    prompts().into_iter().map(|p| Request::greedy(p, new_tokens, &[])).collect()
}

/// Both models draw, each request with seeds of its own.
pub fn drawn(new_tokens: usize) -> Vec<Request> {
    let draw = |(i, mut r): (usize, Request)| {
        r.small = SmallSampling { temperature: 0.8, top_k: 0, top_p: 0.95 };
        r.large.temperature = 0.9;
        r.large.top_p = 0.9;
        r.large.top_k = 50;
        r.large.repetition_penalty = 1.1;
        r.large.seed = 1000 + i as u64;
        r.seed = i as u64;
        r
    };
    greedy(new_tokens).into_iter().enumerate().map(draw).collect()
}

pub fn sometimes() -> Box<dyn Policy> {
    Box::new(Random::new(0.5, 5).unwrap())
}

pub fn always() -> Box<dyn Policy> {
    Box::new(AlwaysLarge)
}

/// Settings that give up within the time of a test.
pub fn settings() -> RemoteSettings {
    RemoteSettings {
        connect_timeout: Duration::from_secs(5),
        timeout: Duration::from_secs(20),
        retries: 3,
        backoff: Duration::from_millis(1),
        max_backoff: Duration::from_millis(20),
        read_ahead: ReadAhead::default(),
        ..RemoteSettings::default()
    }
}

pub fn connect(engine: Engine, url: &str, settings: RemoteSettings) -> RemoteLarge {
    RemoteLarge::connect(engine, url, settings, &tokenizer(), VOCAB, 256).unwrap()
}

/// What became of a request.
#[derive(Debug, Default)]
pub struct Written {
    pub events: Vec<TokenEvent>,
    pub error: Option<String>,
}

impl Written {
    pub fn tokens(&self) -> Vec<u32> {
        self.events.iter().map(|e| e.token).collect()
    }

    pub fn sources(&self) -> Vec<bool> {
        self.events.iter().map(|e| e.source != Source::Small).collect()
    }
}

/// Writes all requests together, and holds that no token is lost or doubled.
pub fn run(decoder: &mut Decoder, requests: Vec<Request>) -> Vec<Written> {
    run_watched(decoder, requests, &mut |_| {})
}

pub fn run_watched(
    decoder: &mut Decoder,
    requests: Vec<Request>,
    watch: &mut dyn FnMut(&Step),
) -> Vec<Written> {
    let start = std::time::Instant::now();
    let sequences: Vec<Sequence> = requests.into_iter().map(|r| decoder.add(r).unwrap()).collect();
    let mut written: Vec<Written> = sequences.iter().map(|_| Written::default()).collect();
    let place = |s: Sequence| sequences.iter().position(|other| *other == s).unwrap();
    while decoder.running() > 0 {
        assert!(start.elapsed() < LIVENESS, "this takes too long");
        let step = decoder.advance().unwrap();
        watch(&step);
        for event in step.tokens {
            let of = &mut written[place(event.sequence)];
            assert!(of.error.is_none() && of.events.last().is_none_or(|e| e.finish.is_none()));
            assert_eq!(event.position, of.events.len(), "tokens come one after another, each once");
            of.events.push(event);
        }
        for (sequence, error) in step.failed {
            let of = &mut written[place(sequence)];
            assert!(of.error.is_none() && of.events.last().is_none_or(|e| e.finish.is_none()));
            of.error = Some(error.to_string());
        }
    }
    for one in &written {
        assert_eq!(one.error.is_none(), one.events.last().is_some_and(|e| e.finish.is_some()));
    }
    written
}

/// What the large model writes in this process.
pub fn local(policy: Box<dyn Policy>, requests: Vec<Request>) -> Vec<Written> {
    let (small, large) = (small(), large());
    run(&mut Decoder::new(&small, Box::new(LocalLarge::new(&large)), policy), requests)
}

pub fn remote<L: LargeModel>(
    large: L,
    policy: Box<dyn Policy>,
    on_failure: OnFailure,
    requests: Vec<Request>,
) -> Vec<Written> {
    let small = small();
    run(&mut Decoder::new(&small, Box::new(large), policy).on_failure(on_failure), requests)
}

pub fn assert_same(found: &[Written], expected: &[Written], what: &str) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.error, None, "{what}, request {i}");
        assert_eq!(found.tokens(), expected.tokens(), "{what}, request {i}");
        assert_eq!(found.sources(), expected.sources(), "{what}, request {i}");
        assert!(found.events.iter().all(|e| !e.degraded), "{what}, request {i}");
    }
}

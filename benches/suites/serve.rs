//! The HTTP server on the loopback address beside the generator that it drives, in one process.
//!
//! Both get the same work: prompts of 32 tokens, replies of equal length, greedy, streamed to 1, 4 or 16 clients there,
//! and collected from as many sequences here. What the server costs is the difference: HTTP, JSON, tokens to text, and the
//! crossing between threads. Each side has a copy of the weights; no prefix is reused.

mod client;
mod front;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use nics_core::cache::DenseCache;
use nics_core::device::{dtype_name, set_threads};
use nics_core::generate::{Request, collect};
use nics_core::models::{Decoder, Model};
use nics_core::server::{Driver, Phase, ServerConfig, TextEngine, TextSettings, spawn, start};
use tch::Kind;

use crate::figure::{Case, id};
use crate::peers::decoder;
use crate::race::{Contender, race, tell};
use crate::settings::{Budget, SEED, Settings};
use crate::shapes::{Shape, ids, kept_bytes, parameter_bytes};
use front::Front;

const SUITE: &str = "serve";
const NAME: &str = "32 tokens in";
const AXIS: &str = "clients";
/// Tokens of a prompt.
const PROMPT: usize = 32;

/// Runs the suite.
pub fn run(settings: &Settings) -> Result<()> {
    let shape = Shape::of(settings)?;
    let all = [(Kind::BFloat16, &[1usize, 4, 16][..]), (Kind::Float, &[1][..])];
    let (one, few) = ([(Kind::BFloat16, &[1usize][..])], [(Kind::Float, &[1usize, 3][..])]);
    for &(kind, clients) in settings.pick(&all[..], &one[..], &few[..]) {
        let wanted = |n: usize| settings.wants(&id(SUITE, &dtype_name(kind), NAME, AXIS, n as f64));
        let clients: Vec<usize> = clients.iter().copied().filter(|&n| wanted(n)).collect();
        if !clients.is_empty() {
            measure(settings, &shape, kind, &clients)?;
        }
    }
    Ok(())
}

fn measure(settings: &Settings, shape: &Shape, kind: Kind, clients: &[usize]) -> Result<()> {
    let mut model = decoder(shape, kind)?;
    let weights = parameter_bytes(&mut model)?;
    let tokens = settings.pick(48, 16, 6);
    let rounds = settings.pick(10, 3, 2);
    let budget = Budget { rounds: rounds..=rounds, time: std::time::Duration::ZERO };
    let served = Served::start(shape, kind, settings.threads)?;
    for &clients in clients {
        let prompts: Vec<Vec<u32>> = (0..clients as u64)
            .map(|i| ids(model.dims().vocab, PROMPT, SEED + i).into_iter().map(|id| id as u32).collect())
            .collect();
        agree(&model, &served, &prompts[0], tokens)?;
        let each = (clients * tokens) as f64;
        let mut contenders = [
            Contender::new("server", || {
                let start = Instant::now();
                served.all(&prompts, tokens)?;
                Ok(start.elapsed().as_secs_f64() / each)
            }),
            Contender::new("generator", || {
                let start = Instant::now();
                generate(&model, &prompts, tokens)?;
                Ok(start.elapsed().as_secs_f64() / each)
            }),
        ];
        let runs = race(&mut contenders, &budget)?;
        let context = PROMPT + tokens / 2;
        let step = weights + kept_bytes(model.dims(), clients * context);
        let case = Case {
            suite: SUITE.into(),
            name: NAME.into(),
            dtype: dtype_name(kind),
            x: clients as f64,
            x_label: AXIS.into(),
            per: "token".into(),
            model: shape.name.into(),
            threads: settings.threads,
            seed: SEED,
            // The prompt's part in it is left out: what is printed is a little less than the share in decoding.
            bytes: Some(step / clients as u64),
            device: None,
            bandwidth: None,
            runs,
            absent: Vec::new(),
        };
        tell(settings, &case)?;
    }
    served.end()
}

/// Greedy replies by the generator alone, its prompts read as the engine reads them.
fn generate(model: &Decoder, prompts: &[Vec<u32>], tokens: usize) -> Result<Vec<Vec<u32>>> {
    let mut cache = DenseCache::new();
    let mut generator = TextSettings::default().generator(model, &mut cache);
    let requests = prompts.iter().map(|p| Request::greedy(p.clone(), tokens, &[]));
    Ok(collect(&mut generator, requests, prompts.len())?)
}

/// One reply of the server's against the generator's: the same text.
fn agree(model: &Decoder, served: &Served, prompt: &[u32], tokens: usize) -> Result<()> {
    let expected = generate(model, &[prompt.to_vec()], tokens)?;
    let expected = served.front.decode(&expected[0])?;
    let found = client::complete(served.address, prompt, tokens)?;
    if found != expected {
        bail!("the server writes {found:?}, the generator {expected:?}");
    }
    Ok(())
}

/// A server with an engine of its own.
struct Served {
    address: SocketAddr,
    front: Arc<Front>,
    running: nics_core::server::Running,
    thread: nics_core::server::EngineThread,
    runtime: tokio::runtime::Runtime,
}

impl Served {
    fn start(shape: &Shape, kind: Kind, threads: usize) -> Result<Self> {
        let model = decoder(shape, kind)?;
        let front = Arc::new(Front::new(model.dims())?);
        let (handle, thread) = spawn(64, move |driver: Driver| -> nics_core::Result<()> {
            // Thread counts belong to the thread that computes.
            set_threads(Some(threads))?;
            let _no_grad = tch::no_grad_guard();
            let mut cache = DenseCache::new();
            let settings = TextSettings { min_prefix: None, ..TextSettings::default() };
            let mut engine = TextEngine::new(&model, &mut cache, settings)?;
            driver.run(&mut engine);
            Ok(())
        })?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let config = ServerConfig { port: 0, ..ServerConfig::default() };
        let running = runtime.block_on(start(config, front.clone(), handle.clone()))?;
        let mut watch = handle.watch();
        let phase = runtime.block_on(watch.wait_for(|p| *p != Phase::Loading))?.clone();
        if phase != Phase::Ready {
            bail!("the engine does not serve: {phase:?}");
        }
        Ok(Self { address: running.address(), front, running, thread, runtime })
    }

    /// All prompts at once, each from a client of its own, to the last token of the last.
    fn all(&self, prompts: &[Vec<u32>], tokens: usize) -> Result<()> {
        std::thread::scope(|scope| {
            let clients: Vec<_> =
                prompts.iter().map(|p| scope.spawn(|| client::complete(self.address, p, tokens))).collect();
            for client in clients {
                client.join().map_err(|_| anyhow!("a client panicked"))??;
            }
            Ok(())
        })
    }

    fn end(self) -> Result<()> {
        self.running.stopper().drain();
        self.runtime.block_on(self.running.join()).context("the server's end")?;
        self.thread.join().context("the engine's end")
    }
}

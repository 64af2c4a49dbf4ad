//! `megrez serve`.

use std::convert::Infallible;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use megrez::prompts::Prompts;
use megrez::serve::MegrezFrontend;
use nics_base::exit::Usage;
use nics_core::checkpoint::Checkpoint;
use nics_core::cli::{ModelArgs, PluginArgs};
use nics_core::models::{Model, ModelDims};
use nics_core::seam::KvCache;
use nics_core::server::{
    ApiKeys, Driver, Handle, Phase, Server, ServerConfig, TextEngine, TextSettings, spawn,
};
use tch::Device;
use tokio::signal::unix::{SignalKind, signal};

use super::size::Size;
use super::{Loaded, key};

/// Answers OpenAI's API: /v1/models, /v1/chat/completions, /v1/completions, /tokenize, /detokenize, /health, /metrics.
///
/// Says `listening on http://HOST:PORT` on stderr once the model is loaded. SIGTERM or Ctrl-C finishes what was taken and
/// ends with code 0; a second one ends at once. Keys come from --api-key-file or the variable MEGREZ_API_KEY; an address
/// other than loopback needs one, or --allow-open.
#[derive(Args)]
pub struct Serve {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    plugins: PluginArgs,
    /// Address to listen on
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(long, value_name = "N", default_value_t = 8000)]
    port: u16,
    /// File with API keys, one a line; default: the variable MEGREZ_API_KEY
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Serve an address that other machines reach without any key
    #[arg(long)]
    allow_open: bool,
    /// The model's name in requests; default: the checkpoint's name
    #[arg(long, value_name = "NAME")]
    served_name: Option<String>,
    /// Most sequences that are written at a time
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    max_seqs: usize,
    /// Most requests that wait; further ones get status 429
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_one)]
    max_queue: usize,
    /// Most memory for keys and values, e.g. 4GiB; default: half of what is free once the model is loaded, 2GiB on CUDA
    #[arg(long, value_name = "SIZE")]
    kv_memory: Option<Size>,
    /// Most tokens of prompt and reply together; default: the model's own limit
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,
    /// Most prompt tokens that are read between two steps of writing
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = at_least_one)]
    prefill_budget: usize,
    /// Compute every prompt anew instead of reusing beginnings that were computed before
    #[arg(long)]
    no_prefix_reuse: bool,
    /// Longest body of a request
    #[arg(long, value_name = "SIZE", default_value = "4MiB")]
    max_body: Size,
    /// Seconds that running requests have to end after a signal
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    drain_timeout: u64,
    /// TOML file with the text that announces tools to the model; default: built in
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
}

impl Serve {
    pub fn run(self) -> Result<()> {
        let config = ServerConfig {
            host: self.host,
            port: self.port,
            keys: ApiKeys::new(keys(self.api_key_file.as_deref(), "MEGREZ_API_KEY")?)?,
            allow_open: self.allow_open,
            max_body_bytes: self.max_body.0,
            drain_timeout: Duration::from_secs(self.drain_timeout),
            ..ServerConfig::default()
        };
        config.validate().map_err(|e| Usage(e.to_string()))?;
        let prompts = self.prompts.as_deref().map_or_else(|| Ok(Prompts::default()), Prompts::read)?;
        let checkpoint = Checkpoint::open(&self.model.model)?;
        let name = self.served_name.clone().unwrap_or_else(|| checkpoint.name().to_owned());
        let frontend = Arc::new(MegrezFrontend::open(&checkpoint, &name, self.context, &prompts)?);

        // The thread waits for the port: there is no use in loading a model for a server that cannot listen.
        let (go, wait) = mpsc::channel::<()>();
        let queue = self.max_queue;
        let (failed, failure) = mpsc::channel::<anyhow::Error>();
        let (handle, thread) = spawn(queue, move |driver| -> Result<(), Infallible> {
            // What keeps the engine from starting ends the server like a stop, and is told once, at its end.
            if let Ok(()) = wait.recv()
                && let Err(e) = self.engine(driver)
            {
                let _ = failed.send(e);
            }
            Ok(())
        })?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("http")
            .enable_all()
            .build()
            .context("cannot start the server's threads")?;
        let served = runtime.block_on(serve(config, frontend, handle, go));
        // Encodings of requests whose clients have gone must not hold up the end.
        runtime.shutdown_background();
        let ended = thread.join();
        served?;
        ended?;
        failure.try_recv().map_or(Ok(()), Err)
    }

    /// Loads the model and answers requests; runs on the engine's thread.
    fn engine(&self, driver: Driver) -> Result<()> {
        let mut loaded = Loaded::open(&self.model, &self.plugins)?;
        let dims = loaded.megrez.decoder.dims().clone();
        let settings = TextSettings {
            kv_limit_bytes: self.kv_limit(&dims, &*loaded.cache),
            max_sequences: self.max_seqs,
            prefill_budget: self.prefill_budget,
            min_prefix: TextSettings::default().min_prefix.filter(|_| !self.no_prefix_reuse),
            context: self.context,
            ..TextSettings::default()
        };
        tracing::info!(?settings, variant = loaded.variant, "the model is loaded");
        let mut engine = TextEngine::new(&loaded.megrez.decoder, &mut *loaded.cache, settings)?;
        if let Some(hook) = &mut loaded.hook {
            engine = engine.with_hook(&mut **hook);
        }
        driver.run(&mut engine);
        Ok(())
    }

    /// Bytes for keys and values: never more than all sequences at full length can use.
    fn kv_limit(&self, dims: &ModelDims, cache: &dyn KvCache) -> usize {
        let context = self.context.unwrap_or(dims.context);
        // Twice, so that ended sequences can be kept for their prefixes.
        let useful = cache.forecast(dims, context).saturating_mul(self.max_seqs).saturating_mul(2);
        if let Some(Size(asked)) = self.kv_memory {
            return asked;
        }
        let share = match dims.device {
            Device::Cpu => free_memory().map(|free| free / 2),
            _ => None,
        };
        share.unwrap_or(TextSettings::default().kv_limit_bytes).min(useful)
    }
}

/// Listens, and answers until a signal or the engine's end.
async fn serve(
    config: ServerConfig,
    frontend: Arc<MegrezFrontend>,
    handle: Handle,
    go: mpsc::Sender<()>,
) -> Result<()> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let bound = Server::bind(config, frontend, handle.clone()).await;
    let server = match bound {
        Ok(server) => server,
        Err(e) => {
            drop(go);
            return Err(e.into());
        }
    };
    let (address, stopper) = (server.address(), server.stopper());
    let _ = go.send(());
    let mut phase = handle.watch();
    let watched = tokio::spawn(async move {
        let mut signals = 0;
        let mut told = false;
        loop {
            let now = phase.borrow_and_update().clone();
            match now {
                Phase::Ready if !told => {
                    told = true;
                    eprintln!("listening on http://{address}");
                }
                // Nothing can be answered any more; a supervisor may start the server anew.
                Phase::Dead(_) => stopper.drain(),
                _ => {}
            }
            tokio::select! {
                gone = phase.changed() => if gone.is_err() { return },
                _ = term.recv() => signals += 1,
                _ = int.recv() => signals += 1,
            }
            match signals {
                0 => {}
                1 => stopper.drain(),
                _ => stopper.stop(),
            }
        }
    });
    let served = server.run().await;
    watched.abort();
    Ok(served?)
}

/// Keys, one a line; lines that begin with `#` and empty ones are passed over.
fn keys(file: Option<&Path>, variable: &str) -> Result<Vec<String>> {
    let Some(path) = file else {
        return Ok(key::from_env(variable).into_iter().collect());
    };
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the API keys of {}", path.display()))?;
    let keys: Vec<String> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect();
    if keys.is_empty() {
        bail!("{} holds no API key: expected one a line", path.display());
    }
    Ok(keys)
}

/// Memory that the system can give without swapping, in bytes (`MemAvailable` of Linux).
fn free_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

fn at_least_one(s: &str) -> Result<usize, String> {
    match s.parse() {
        Ok(0) => Err("expected at least 1".into()),
        Ok(n) => Ok(n),
        Err(e) => Err(format!("{e}")),
    }
}

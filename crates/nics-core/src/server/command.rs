//! What the binaries that serve have in common: flags, keys, and the run from loading to the last signal.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use clap::Args;
use nics_base::cli::{Size, at_least_one, env_key};
use tch::Device;
use tokio::signal::unix::{SignalKind, signal};

use super::{
    ApiKeys, Driver, Frontend, Handle, Phase, ServeError, Server, ServerConfig, TextSettings, spawn,
};

/// The flags of a server. The variable in which the key is looked for is the binary's, which says so in its own help.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Address to listen on
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(long, value_name = "N", default_value_t = 8000)]
    pub port: u16,
    /// File with API keys, one a line; default: the variable that is named above
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Serve an address that other machines reach without any key
    #[arg(long)]
    pub allow_open: bool,
    /// The model's name in requests; default: the checkpoint's name
    #[arg(long, value_name = "NAME")]
    pub served_name: Option<String>,
    /// Most sequences that are written at a time
    #[arg(long, visible_alias = "max-batch", value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    pub max_seqs: usize,
    /// Most requests that wait; further ones get status 429
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_one)]
    pub max_queue: usize,
    /// Most memory for keys and values, e.g. 4GiB; default: half of what is free once the weights are loaded, 2GiB on CUDA
    #[arg(long, value_name = "SIZE")]
    pub kv_memory: Option<Size>,
    /// Most tokens of prompt and reply together; default: the model's own limit
    #[arg(long, value_name = "TOKENS")]
    pub context: Option<usize>,
    /// Longest body of a request
    #[arg(long, value_name = "SIZE", default_value = "4MiB")]
    pub max_body: Size,
    /// Seconds that running requests have to end after a signal
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub drain_timeout: u64,
}

impl ServeArgs {
    /// The server's settings; keys come from the file, else from the environment's `variable`.
    ///
    /// # Errors
    /// `ServeError::Config` about keys. The settings themselves are [validated](ServerConfig::validate) by whoever takes
    /// them.
    pub fn config(&self, variable: &str) -> Result<ServerConfig, ServeError> {
        Ok(ServerConfig {
            host: self.host,
            port: self.port,
            keys: ApiKeys::new(keys(self.api_key_file.as_deref(), variable)?)?,
            allow_open: self.allow_open,
            max_body_bytes: self.max_body.0,
            drain_timeout: Duration::from_secs(self.drain_timeout),
            ..ServerConfig::default()
        })
    }

    /// Bytes for keys and values on `device`: what the flag says, else a share of what is free, and not more than is
    /// `useful`. Asked for once the weights are loaded.
    pub fn kv_limit(&self, device: Device, useful: usize) -> usize {
        if let Some(Size(asked)) = self.kv_memory {
            return asked;
        }
        let share = match device {
            Device::Cpu => free_memory().map(|free| free / 2),
            _ => None,
        };
        share.unwrap_or(TextSettings::default().kv_limit_bytes).min(useful)
    }
}

/// Serves until SIGTERM or SIGINT: the first drains, the second ends at once. Says `listening on http://HOST:PORT` on
/// stderr once `engine`, on its own thread, has loaded its weights and [runs](Driver::run). The port is taken first: there
/// is no use in loading weights for a server that cannot listen.
///
/// # Errors
/// What keeps the server from serving, and the death of the engine. The inner result is the engine's own: what keeps it
/// from starting ends the server like a stop.
pub fn serve_until_signal<E: Send + 'static>(
    config: ServerConfig,
    queue: usize,
    frontend: Arc<dyn Frontend>,
    engine: impl FnOnce(Driver) -> Result<(), E> + Send + 'static,
) -> Result<Result<(), E>, ServeError> {
    let (go, wait) = mpsc::channel::<()>();
    let (failed, failure) = mpsc::channel::<E>();
    let (handle, thread) = spawn(queue, move |driver| -> Result<(), std::convert::Infallible> {
        if let Ok(()) = wait.recv()
            && let Err(e) = engine(driver)
        {
            let _ = failed.send(e);
        }
        Ok(())
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("http")
        .enable_all()
        .build()?;
    let served = runtime.block_on(serve(config, frontend, handle, go));
    // Encodings of requests whose clients have gone must not hold up the end.
    runtime.shutdown_background();
    let ended = thread.join();
    served?;
    ended?;
    Ok(failure.try_recv().map_or(Ok(()), Err))
}

/// Listens, and answers until a signal or the engine's end.
async fn serve(
    config: ServerConfig,
    frontend: Arc<dyn Frontend>,
    handle: Handle,
    go: mpsc::Sender<()>,
) -> Result<(), ServeError> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    // On an error `go` is dropped, which ends the engine's thread before it loads anything.
    let server = Server::bind(config, frontend, handle.clone()).await?;
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
    served
}

/// Keys, one a line; lines that begin with `#` and empty ones are passed over.
fn keys(file: Option<&Path>, variable: &str) -> Result<Vec<String>, ServeError> {
    let Some(path) = file else {
        return Ok(env_key(variable).into_iter().collect());
    };
    let text = std::fs::read_to_string(path)
        .map_err(|e| ServeError::Config(format!("cannot read the API keys of {}: {e}", path.display())))?;
    let keys: Vec<String> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect();
    if keys.is_empty() {
        let message = format!("{} holds no API key: expected one a line", path.display());
        return Err(ServeError::Config(message));
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

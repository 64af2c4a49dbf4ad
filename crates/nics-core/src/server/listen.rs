//! Listening: connections with their time limits, and the end of a server.
//!
//! The end comes in three steps. *Draining* (the first signal): connections are still answered, every new request for
//! text with 503, so that `/health` says what is going on; requests that were taken are finished. *Stopped* (no request
//! left, the drain timeout, or the second signal): the port is closed, what still runs fails with 503 or an event of its
//! stream. Then replies on their way have a moment to leave.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use super::config::ServerConfig;
use super::driver::{Death, Handle, Phase};
use super::engine::Frontend;
use super::patient::Patient;
use super::routes::{App, router};

/// Time for replies on their way once nothing runs any more.
const FLUSH: Duration = Duration::from_millis(800);
/// Pause after a connection could not be taken, e.g. for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Bytes of a connection's read buffer, which bounds the head of a request.
const READ_BUFFER: usize = 64 << 10;

/// What keeps a server from serving.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Others would reach the server without a key.
    #[error(
        "{host} is reachable from other machines and there is no API key: set one, listen on 127.0.0.1, or allow an open \
         server explicitly"
    )]
    Open {
        /// The address asked for.
        host: IpAddr,
    },
    /// A senseless setting.
    #[error("{0}")]
    Config(String),
    /// The address could not be listened on.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// The operating system's word.
        source: std::io::Error,
    },
    /// The engine's thread has died.
    #[error(transparent)]
    Engine(#[from] Death),
    /// No threads or no signal handlers for the server.
    #[error("the server could not be started: {0}")]
    Start(#[from] std::io::Error),
}

/// How far a server is asked to end; only ever goes up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    No,
    Drain,
    Now,
}

/// A server that listens and does not answer yet.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    app: Arc<App>,
    end: watch::Sender<End>,
}

impl Server {
    /// Listens. Connections wait until [`run`](Self::run).
    ///
    /// # Errors
    /// [`ServerConfig::validate`]'s, and `ServeError::Bind`.
    pub async fn bind(
        config: ServerConfig,
        frontend: Arc<dyn Frontend>,
        handle: Handle,
    ) -> Result<Self, ServeError> {
        config.validate()?;
        let asked = SocketAddr::new(config.host, config.port);
        let failed = |source| ServeError::Bind { address: asked, source };
        let listener = TcpListener::bind(asked).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let app = Arc::new(App::new(config, frontend, handle));
        Ok(Self { listener, address, app, end: watch::Sender::new(End::No) })
    }

    /// Where it listens; the port is the real one where the configuration says 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What ends it.
    pub fn stopper(&self) -> Stopper {
        Stopper { end: self.end.clone() }
    }

    /// Answers until the engine or a [`Stopper`] ends it.
    pub async fn run(self) -> Result<(), ServeError> {
        let Self { listener, app, end, .. } = self;
        let connections = Connections::new(app.clone());
        let deadline = accept(&listener, &app, &end, &connections).await;
        drop(listener);
        connections.close(deadline, &end).await;
        Ok(())
    }
}

/// Ends a server from anywhere.
#[derive(Debug, Clone)]
pub struct Stopper {
    end: watch::Sender<End>,
}

impl Stopper {
    /// As the first signal: finishes what was taken.
    pub fn drain(&self) {
        self.raise(End::Drain);
    }

    /// As the second signal: ends at once.
    pub fn stop(&self) {
        self.raise(End::Now);
    }

    fn raise(&self, to: End) {
        self.end.send_if_modified(|end| {
            let more = to > *end;
            *end = to.max(*end);
            more
        });
    }
}

/// A server that runs in the background of a runtime.
#[derive(Debug)]
pub struct Running {
    address: SocketAddr,
    stopper: Stopper,
    task: JoinHandle<Result<(), ServeError>>,
}

impl Running {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What ends it.
    pub fn stopper(&self) -> &Stopper {
        &self.stopper
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// What [`Server::run`] returns.
    pub async fn join(self) -> Result<(), ServeError> {
        self.task.await.unwrap_or_else(|e| Err(ServeError::Start(std::io::Error::other(e))))
    }
}

/// Starts a server in the background; signals are left alone.
///
/// # Errors
/// As [`Server::bind`].
pub async fn start(
    config: ServerConfig,
    frontend: Arc<dyn Frontend>,
    handle: Handle,
) -> Result<Running, ServeError> {
    let server = Server::bind(config, frontend, handle).await?;
    let (address, stopper) = (server.address(), server.stopper());
    Ok(Running { address, stopper, task: tokio::spawn(server.run()) })
}

/// Serves until SIGTERM or SIGINT: the first drains, the second ends at once. `bound` is told the address.
///
/// # Errors
/// [`ServeError`], all of it before the first request.
pub async fn serve(
    config: ServerConfig,
    frontend: Arc<dyn Frontend>,
    handle: Handle,
    bound: impl FnOnce(SocketAddr),
) -> Result<(), ServeError> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let server = Server::bind(config, frontend, handle).await?;
    bound(server.address());
    tracing::info!(address = %server.address(), "listening");
    let stopper = server.stopper();
    let signals = tokio::spawn(async move {
        for (what, end) in [("finishing what was taken", End::Drain), ("ending at once", End::Now)] {
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            tracing::info!("signal: {what}");
            stopper.raise(end);
        }
    });
    let served = server.run().await;
    signals.abort();
    served
}

/// [`serve`] for code without a runtime: makes one with `threads` threads (at least 1), which connections share.
///
/// # Errors
/// As [`serve`].
pub fn serve_blocking(
    config: ServerConfig,
    frontend: Arc<dyn Frontend>,
    handle: Handle,
    threads: usize,
    bound: impl FnOnce(SocketAddr),
) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads.max(1))
        .thread_name("http")
        .enable_all()
        .build()?;
    let served = runtime.block_on(serve(config, frontend, handle, bound));
    // Encodings of requests whose clients have gone must not hold up the end.
    runtime.shutdown_background();
    served
}

/// Takes connections until the server has stopped. Returns until when replies on their way may take.
async fn accept(
    listener: &TcpListener,
    app: &Arc<App>,
    end: &watch::Sender<End>,
    connections: &Connections,
) -> Instant {
    let mut asked = end.subscribe();
    let mut phase = app.handle.watch();
    let mut deadline: Option<Instant> = None;
    loop {
        let (wanted, now) = (*asked.borrow_and_update(), phase.borrow_and_update().clone());
        let dead = matches!(now, Phase::Dead(_));
        if wanted == End::Now || now == Phase::Stopped || (dead && wanted != End::No) {
            break;
        }
        if wanted == End::Drain && deadline.is_none() {
            app.handle.drain();
        }
        // The engine's owner may drain it as well.
        if (wanted == End::Drain || now == Phase::Draining) && deadline.is_none() {
            deadline = Some(Instant::now() + app.config.drain_timeout);
        }
        let timeout = deadline.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
        tokio::select! {
            () = connections.take(listener) => {}
            _ = asked.changed() => {}
            gone = phase.changed() => if gone.is_err() { break },
            () = tokio::time::sleep_until(timeout) => if deadline.is_some() { break },
        }
    }
    app.handle.stop();
    let soon = Instant::now() + FLUSH;
    // Nothing was cut short: slow readers have what is left of the drain's time.
    if *end.borrow() == End::Now { soon } else { deadline.map_or(soon, |d| d.max(soon)) }
}

/// The connections of a server.
struct Connections {
    app: Arc<App>,
    service: TowerToHyperService<axum::Router>,
    builder: http1::Builder,
    room: Arc<Semaphore>,
    tasks: std::sync::Mutex<JoinSet<()>>,
    closing: watch::Sender<bool>,
}

impl Connections {
    fn new(app: Arc<App>) -> Self {
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(app.config.header_timeout)
            .max_buf_size(READ_BUFFER);
        Self {
            service: TowerToHyperService::new(router(app.clone())),
            builder,
            room: Arc::new(Semaphore::new(app.config.max_connections.min(Semaphore::MAX_PERMITS))),
            tasks: std::sync::Mutex::default(),
            closing: watch::Sender::new(false),
            app,
        }
    }

    /// Takes one connection, once there is room. Cancel safe.
    async fn take(&self, listener: &TcpListener) {
        let Ok(room) = self.room.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!("a connection could not be taken: {error}");
                return tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        };
        let connection = self.serve(stream);
        let mut tasks = self.tasks();
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move {
            connection.await;
            drop(room);
        });
    }

    fn tasks(&self) -> std::sync::MutexGuard<'_, JoinSet<()>> {
        self.tasks.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn serve(&self, stream: TcpStream) -> impl Future<Output = ()> + Send + 'static {
        // Tokens are small and each of them is awaited.
        let _ = stream.set_nodelay(true);
        let io = TokioIo::new(Patient::new(stream, self.app.config.write_timeout));
        let connection = self.builder.serve_connection(io, self.service.clone());
        let mut closing = self.closing.subscribe();
        async move {
            tokio::pin!(connection);
            let closed = async { drop(closing.wait_for(|closing| *closing).await) };
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = closed => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                tracing::debug!("a connection ended: {error}");
            }
        }
    }

    /// Closes idle connections now and the others after their replies, by force after `deadline` or when asked to.
    async fn close(self, deadline: Instant, end: &watch::Sender<End>) {
        self.closing.send_replace(true);
        let mut tasks = std::mem::take(&mut *self.tasks());
        let mut asked = end.subscribe();
        let all = async { while tasks.join_next().await.is_some() {} };
        let cut = async {
            let now = async { drop(asked.wait_for(|end| *end == End::Now).await) };
            tokio::select! {
                () = tokio::time::sleep_until(deadline) => {}
                () = now => tokio::time::sleep(FLUSH).await,
            }
        };
        tokio::select! { () = all => {}, () = cut => {} }
        // Dropping the rest of the tasks closes their connections.
    }
}

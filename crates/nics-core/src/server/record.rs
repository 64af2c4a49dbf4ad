//! What is kept of a request for the log and for `/metrics`: numbers, never a text or a key.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::StatusCode;

use super::metrics::Metrics;
use super::reply::Usage;

/// Follows a request to the end of its reply; the last clone that goes writes the line of the log.
#[derive(Clone)]
pub(super) struct Record(Arc<Inner>);

struct Inner {
    id: String,
    route: String,
    start: Instant,
    metrics: Arc<Metrics>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// None until there is a reply: its client has gone before.
    status: Option<StatusCode>,
    /// Why a reply that had begun did not end well.
    broken: Option<&'static str>,
    usage: Usage,
    queued: Option<Duration>,
    first: Option<Duration>,
}

impl Record {
    pub fn new(id: String, route: String, metrics: Arc<Metrics>) -> Self {
        Self(Arc::new(Inner { id, route, start: Instant::now(), metrics, state: Mutex::default() }))
    }

    pub fn id(&self) -> &str {
        &self.0.id
    }

    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// Since the request's head was read.
    pub fn elapsed(&self) -> Duration {
        self.0.start.elapsed()
    }

    pub fn status(&self, status: StatusCode) {
        self.change(|s| s.status = Some(status));
    }

    pub fn broken(&self, why: &'static str) {
        self.change(|s| s.broken = Some(why));
    }

    pub fn usage(&self, usage: Usage) {
        self.change(|s| s.usage = usage);
    }

    /// The engine has taken it in hand, after this time.
    pub fn started(&self, queued: Duration) {
        self.change(|s| s.queued = s.queued.or(Some(queued)));
    }

    /// A token was written; the first one counts.
    pub fn first_token(&self) {
        let now = self.elapsed();
        let first = self.change(|s| s.first.replace(s.first.unwrap_or(now)).is_none());
        if first {
            self.metrics().first_token.observe(now);
        }
    }

    fn change<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.0.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let total = self.start.elapsed();
        // As other servers log a client that went before its reply.
        let status = state.status.map_or(499, |s| s.as_u16());
        self.metrics.request(&self.route, status, total);
        let ms = |t: Duration| t.as_secs_f64() * 1e3;
        tracing::info!(
            id = self.id,
            route = self.route,
            status,
            prompt_tokens = state.usage.prompt,
            completion_tokens = state.usage.completion,
            queue_ms = state.queued.map(ms),
            first_token_ms = state.first.map(ms),
            total_ms = ms(total),
            broken = state.broken,
            "request"
        );
    }
}

//! What crosses between connections and the engine thread, and what each can say about the other.

use std::sync::Arc;
use std::time::Duration;

use crate::generate::Finish;
use crate::server::engine::{Counter, EngineStats, JobId, Written};

/// Any error, as a thread hands it on.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What happens to a request's jobs.
#[derive(Debug)]
pub enum Update {
    /// The first token of a job is about to come; once, before any of its tokens.
    Started {
        /// Whose start it is.
        job: JobId,
        /// Prompt tokens that were not computed, since a kept prefix had them.
        cached_tokens: usize,
    },
    /// A token was written.
    Token(Written),
    /// The job has ended by itself; its last update.
    Finished {
        /// Whose end it is.
        job: JobId,
        /// Why.
        finish: Finish,
    },
    /// The job has failed; its last update.
    Failed {
        /// Whose end it is.
        job: JobId,
        /// What went wrong.
        failure: Failure,
    },
}

impl Update {
    /// The job that it is about.
    pub fn job(&self) -> JobId {
        match self {
            Self::Token(written) => written.job,
            Self::Started { job, .. } | Self::Finished { job, .. } | Self::Failed { job, .. } => *job,
        }
    }

    /// Whether no further update of the job follows.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Finished { .. } | Self::Failed { .. })
    }
}

/// Why a job failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Failure {
    /// The engine can never take it: the request is at fault (400).
    #[error("{0}")]
    Refused(Arc<str>),
    /// Its own computation failed; others go on (500).
    #[error("{0}")]
    Job(Arc<str>),
    /// A step failed for all jobs that ran; the next ones are answered (500).
    #[error("the engine failed: {0}")]
    Step(Arc<str>),
    /// The server was stopped before the job's end (503).
    #[error("the server is shutting down")]
    Stopped,
    /// The engine is gone and does not come back (503).
    #[error("the engine is gone: {0}")]
    Dead(Arc<str>),
}

/// Why a request was not queued.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Refusal {
    /// The queue is full (429).
    #[error("the server is busy: {queued} requests are waiting, which is all that may")]
    Busy {
        /// Requests that wait.
        queued: usize,
        /// When room may be expected, from how long requests take; 1 to 60 seconds.
        retry_after: Duration,
    },
    /// The server drains or was stopped (503).
    #[error("the server is shutting down")]
    Stopping,
    /// The engine is gone and does not come back (503).
    #[error("the engine is gone: {0}")]
    Dead(Arc<str>),
}

/// Where the engine thread stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// The model is being loaded; requests are queued.
    Loading,
    /// Requests are answered.
    Ready,
    /// No new request is taken; those that were taken are being finished.
    Draining,
    /// The thread has ended, or ends after the step that it is in.
    Stopped,
    /// The thread ended by an error or a panic, for this reason.
    Dead(Arc<str>),
}

/// Counts for `/metrics` and `/health`; sums since the start where the name says `total`.
#[derive(Debug, Clone, Default)]
pub struct Stats {
    /// Requests that wait, wholly or in part.
    pub queued: usize,
    /// The most that may wait.
    pub queue_limit: usize,
    /// Requests of which the engine holds a job.
    pub running: usize,
    /// The engine's own counts as of its last step.
    pub engine: EngineStats,
    /// The engine's further numbers as of its last step.
    pub counters: Vec<Counter>,
    /// Requests that were queued.
    pub accepted_total: u64,
    /// Requests refused because the queue was full.
    pub busy_total: u64,
    /// Jobs that ended by themselves.
    pub finished_total: u64,
    /// Jobs that failed.
    pub failed_total: u64,
    /// Jobs that were cancelled, in the queue or later.
    pub cancelled_total: u64,
    /// Time inside [`Engine::step`](crate::server::Engine::step).
    pub step_time_total: Duration,
}

/// How the engine thread ended, when not well.
#[derive(Debug, thiserror::Error)]
pub enum Death {
    /// What it ran returned this error.
    #[error("{0}")]
    Failed(#[source] BoxError),
    /// It panicked with this message.
    #[error("the engine thread panicked: {0}")]
    Panicked(String),
    /// The operating system gave no thread.
    #[error("the engine thread could not be started: {0}")]
    NoThread(#[source] std::io::Error),
}

//! The receiving end of one request.

use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::mpsc;

use super::{Failure, Phase, Shared, Update, cancel};
use crate::server::engine::JobId;

/// The updates of one request. Dropping it cancels the request.
pub struct Updates {
    shared: Arc<Shared>,
    /// Jobs that have not ended.
    open: Vec<JobId>,
    channel: mpsc::UnboundedReceiver<Update>,
}

impl Updates {
    pub(super) fn new(
        shared: Arc<Shared>,
        open: Vec<JobId>,
        channel: mpsc::UnboundedReceiver<Update>,
    ) -> Self {
        Self { shared, open, channel }
    }

    /// Jobs of which the last update has not been read.
    pub fn open(&self) -> &[JobId] {
        &self.open
    }

    /// The next update; `None` once every job has ended or was cancelled. Cancel safe.
    pub async fn recv(&mut self) -> Option<Update> {
        std::future::poll_fn(|cx| self.poll_recv(cx)).await
    }

    /// [`recv`](Self::recv) for code outside a runtime.
    pub fn blocking_recv(&mut self) -> Option<Update> {
        while !self.open.is_empty() {
            let update = self.channel.blocking_recv();
            if let Some(update) = self.take(update) {
                return Some(update);
            }
        }
        None
    }

    /// [`recv`](Self::recv) for streams.
    pub fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<Update>> {
        while !self.open.is_empty() {
            match self.channel.poll_recv(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(update) => {
                    if let Some(update) = self.take(update) {
                        return Poll::Ready(Some(update));
                    }
                }
            }
        }
        Poll::Ready(None)
    }

    /// Ends one job, e.g. because its text reached a stop string; no update of it follows. Others go on.
    pub fn cancel(&mut self, job: JobId) {
        if let Some(i) = self.open.iter().position(|&open| open == job) {
            self.open.remove(i);
            cancel(&self.shared, &[job]);
        }
    }

    /// What the channel gave: passed over when it is about a cancelled job.
    fn take(&mut self, update: Option<Update>) -> Option<Update> {
        let Some(update) = update else {
            // The other side is gone without a word about this job.
            let job = self.open.pop()?;
            let why = match &*self.shared.phase.borrow() {
                Phase::Dead(why) => Failure::Dead(why.clone()),
                _ => Failure::Stopped,
            };
            return Some(Update::Failed { job, failure: why });
        };
        let i = self.open.iter().position(|&open| open == update.job())?;
        if update.is_last() {
            self.open.remove(i);
        }
        Some(update)
    }
}

impl Drop for Updates {
    fn drop(&mut self) {
        if !self.open.is_empty() {
            cancel(&self.shared, &self.open);
        }
    }
}

impl std::fmt::Debug for Updates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Updates").field("open", &self.open).finish_non_exhaustive()
    }
}

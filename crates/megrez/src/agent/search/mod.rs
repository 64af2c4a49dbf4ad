//! Where the agent finds things: the [`SearchProvider`] trait and its two implementations.

mod address;
mod http;
mod index;
mod page;
mod visible;

use serde::Serialize;

pub use http::{HttpSearch, HttpSettings, Method};
pub use index::LocalIndex;
pub use page::{PageError, PageLimits};
pub use visible::visible_text;

/// A result of a search.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Hit {
    /// Its title; may be empty.
    pub title: String,
    /// Where it is: a URL, or the path of a file.
    pub url: String,
    /// The provider's own excerpt; may be empty.
    pub snippet: String,
    /// The text that a reader of it sees, or why there is none.
    #[serde(skip)]
    pub page: Result<String, PageError>,
}

/// Why a search has no results to give.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SearchError {
    /// The service did not answer in time.
    #[error("{service} did not answer within {seconds} s")]
    Timeout {
        /// The service.
        service: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The service could not be reached.
    #[error("{service} cannot be reached: {reason}")]
    Unreachable {
        /// The service.
        service: String,
        /// Why not.
        reason: String,
    },
    /// The service refused the request.
    #[error("{service} answered with status {status}{}", hint(*.status))]
    Status {
        /// The service.
        service: String,
        /// The status.
        status: u16,
    },
    /// The service's answer is not what the settings say.
    #[error("{service} answered with something else than the settings expect: {reason}")]
    BadAnswer {
        /// The service.
        service: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// What a status of a search service usually means.
fn hint(status: u16) -> &'static str {
    match status {
        300..=399 => ": it moved; give the address it moved to, since a key is not sent on",
        401 | 403 => ": the key is missing, wrong or used up",
        429 => ": too many requests; try again later",
        _ => "",
    }
}

/// Finds pages for a query.
///
/// A search takes a bounded time. One page that cannot be read is not the search's failure: its [`Hit::page`] says why.
pub trait SearchProvider: Send {
    /// The name of the service, for messages.
    fn name(&self) -> &str;

    /// At most `limit` results, the best first, their pages read.
    fn search(&self, query: &str, limit: usize) -> Result<Vec<Hit>, SearchError>;
}

impl SearchProvider for Box<dyn SearchProvider> {
    fn name(&self) -> &str {
        (**self).name()
    }

    fn search(&self, query: &str, limit: usize) -> Result<Vec<Hit>, SearchError> {
        (**self).search(query, limit)
    }
}

//! What can go wrong in a call.

use std::time::Duration;

use crate::Error;

/// What went wrong in a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// No reply within the time.
    Timeout,
    /// No connection, or one that broke.
    Unreachable(String),
    /// A status that says no.
    Refused {
        /// The status.
        status: u16,
        /// What the server says.
        message: String,
        /// When to come again, if it says so.
        retry_after: Option<Duration>,
    },
    /// A reply that makes no sense.
    Protocol(String),
}

impl Fault {
    /// Whether the same call may succeed.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Timeout | Self::Unreachable(_) | Self::Protocol(_) => true,
            Self::Refused { status, .. } => matches!(status, 408 | 425 | 429 | 500..),
        }
    }

    /// Whether one of several sequences may be to blame for the others' fate.
    pub(super) fn may_be_one(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Protocol(_))
    }

    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// The error of whoever made `calls` calls.
    pub(crate) fn error(self, url: &str, calls: usize, timeout: Duration) -> Error {
        let url = url.to_owned();
        match self {
            Self::Timeout => Error::RemoteTimeout { url, calls, seconds: timeout.as_secs_f64() },
            Self::Unreachable(reason) => Error::RemoteUnreachable { url, calls, reason },
            Self::Refused { status, message, .. } => Error::RemoteRefused { url, calls, status, message },
            Self::Protocol(reason) => Error::RemoteProtocol { url, calls, reason },
        }
    }
}

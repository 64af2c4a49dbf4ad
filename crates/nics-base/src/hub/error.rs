//! What can keep a file of a model or dataset from being there.

use std::io;
use std::path::{Path, PathBuf};

use crate::exit::TryAgain;

/// Why a model, a dataset or one of its files could not be had.
///
/// What may pass (a network that is down, a busy server or lock) has a [`TryAgain`] for its source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// Neither a folder nor a hub id.
    #[error(
        "cannot use `{arg}` as a model or dataset: {reason} (give a folder, or a hub id org/name[@revision])"
    )]
    BadArgument {
        /// What was given.
        arg: Box<str>,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// `HF_ENDPOINT` is no address.
    #[error("HF_ENDPOINT is `{endpoint}`; it must start with http:// or https://")]
    BadEndpoint {
        /// The value.
        endpoint: Box<str>,
    },
    /// A file name that leads out of the repository.
    #[error(
        "`{file}` is not the name of a file inside a model or dataset: it must be relative, without `..`"
    )]
    BadFileName {
        /// The name.
        file: Box<str>,
    },
    /// A local folder lacks the file.
    #[error("{} has no file {file}", folder.display())]
    NotInFolder {
        /// The folder.
        folder: Box<Path>,
        /// The file asked for.
        file: Box<str>,
    },
    /// The repository lacks the file.
    #[error("{id} at revision {revision} on {endpoint} has no file {file}")]
    NotInRepo {
        /// The repository.
        id: Box<str>,
        /// Branch, tag or commit.
        revision: Box<str>,
        /// The file asked for.
        file: Box<str>,
        /// The hub.
        endpoint: Box<str>,
    },
    /// The hub does not know the repository.
    #[error(
        "{endpoint} has no repository {id} that this user may see, and there is no folder of that name; \
         check the spelling, and HF_TOKEN if it is private"
    )]
    NoSuchRepo {
        /// The repository.
        id: Box<str>,
        /// The hub.
        endpoint: Box<str>,
    },
    /// The repository has no such revision.
    #[error("{id} on {endpoint} has no revision `{revision}`; give a branch, tag or commit after the @")]
    NoSuchRevision {
        /// The repository.
        id: Box<str>,
        /// The revision asked for.
        revision: Box<str>,
        /// The hub.
        endpoint: Box<str>,
    },
    /// 401 or 403.
    #[error("{endpoint} refuses {id} (HTTP status {status}): {mend}")]
    Denied {
        /// The repository.
        id: Box<str>,
        /// The hub.
        endpoint: Box<str>,
        /// 401 or 403.
        status: u16,
        /// What to do.
        mend: &'static str,
    },
    /// `HF_HUB_OFFLINE` is set and the file is not in the cache.
    #[error(
        "{file} of {id} at revision {revision} is not in the cache {} and HF_HUB_OFFLINE is set; \
         run once without it, or copy the repository into the cache",
        cache.display()
    )]
    Offline {
        /// The repository.
        id: Box<str>,
        /// Branch, tag or commit.
        revision: Box<str>,
        /// The file asked for.
        file: Box<str>,
        /// The cache folder.
        cache: Box<Path>,
        /// Whether other files of this revision are cached.
        revision_cached: bool,
    },
    /// No connection, or it broke.
    #[error(
        "cannot reach {endpoint} for {file} of {id}; check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use \
         what is in {}",
        cache.display()
    )]
    Unreachable {
        /// The hub.
        endpoint: Box<str>,
        /// The repository.
        id: Box<str>,
        /// The file asked for.
        file: Box<str>,
        /// The cache folder.
        cache: Box<Path>,
        /// What the connection said.
        #[source]
        reason: TryAgain,
    },
    /// Connected, but no answer in time.
    #[error(
        "{endpoint} did not answer in time for {file} of {id}; HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT set the \
         limits in seconds"
    )]
    Timeout {
        /// The hub.
        endpoint: Box<str>,
        /// The repository.
        id: Box<str>,
        /// The file asked for.
        file: Box<str>,
        /// Which wait was too long.
        #[source]
        reason: TryAgain,
    },
    /// An error status other than 401, 403 and 404.
    #[error("{endpoint} answered {file} of {id} with HTTP status {status}")]
    Status {
        /// The hub.
        endpoint: Box<str>,
        /// The repository.
        id: Box<str>,
        /// The file asked for.
        file: Box<str>,
        /// The status.
        status: u16,
        /// Set where the status may pass (429 and 5xx).
        #[source]
        passing: Option<TryAgain>,
    },
    /// An answer that no hub gives.
    #[error("{endpoint} answered {file} of {id} with something that is not a hub's answer: {reason}")]
    BadAnswer {
        /// The hub.
        endpoint: Box<str>,
        /// The repository.
        id: Box<str>,
        /// The file asked for.
        file: Box<str>,
        /// What is wrong with it.
        reason: String,
    },
    /// Another process is fetching the same file.
    #[error("another process is downloading {file} of {id} (lock {}); wait for it", lock.display())]
    Busy {
        /// The repository.
        id: Box<str>,
        /// The file asked for.
        file: Box<str>,
        /// The lock file.
        lock: Box<Path>,
        /// That it may pass.
        #[source]
        reason: TryAgain,
    },
    /// The operating system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

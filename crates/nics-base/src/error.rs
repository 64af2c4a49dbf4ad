//! The errors of this crate, one variant for each thing that a caller could act on differently.

use std::io;
use std::path::{Path, PathBuf};

use crate::exit::Exit;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with artefacts, logs, shards, rows and reports.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb: `read`, `write`, `rename`.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A line of a JSON Lines file is not what it should be.
    #[error("{}, line {line}: {reason}", path.display())]
    CorruptLine {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of settings is not what it should be.
    #[error("{}: {reason}", path.display())]
    Settings {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A value cannot be written as JSON.
    #[error("cannot write {what} as JSON")]
    Json {
        /// What the value is.
        what: String,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// Another process holds the file.
    #[error("{} is being written by another process; wait for it or stop it", .0.display())]
    Busy(PathBuf),
    /// A shard specification that makes no sense.
    #[error("shard {given:?}: {reason}")]
    BadShard {
        /// What was given.
        given: String,
        /// What is wrong with it, and what is expected.
        reason: String,
    },
    /// Shard files that do not make a whole.
    #[error("cannot merge: {0}")]
    Merge(String),
    /// A result row that a report could not place.
    #[error("result row of {method:?}, metric {metric:?}: {reason}")]
    BadRow {
        /// Its method.
        method: String,
        /// Its metric.
        metric: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A plot could not be drawn.
    #[error("cannot draw the plot of {what}: {reason}")]
    Plot {
        /// Which plot.
        what: String,
        /// Why not.
        reason: String,
    },
    /// SIGINT or SIGTERM asked to stop; what was finished is kept.
    #[error("interrupted; run the same command again to continue")]
    Interrupted,
}

impl Error {
    /// The exit code that a binary should end with.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Busy(_) => Exit::TryAgain,
            Self::BadShard { .. } => Exit::Usage,
            Self::Interrupted => Exit::Interrupted,
            _ => Exit::Error,
        }
    }
}

/// Names action and path of an I/O error.
pub(crate) trait AtPath<T> {
    fn at(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> AtPath<T> for std::result::Result<T, E> {
    fn at(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|e| Error::Io { action, path: path.to_owned(), source: e.into() })
    }
}

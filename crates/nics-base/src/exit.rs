//! Exit codes that mean the same in every binary, and errors that ask for one.
//!
//! Batch systems see nothing else of a process: a Kubernetes pod failure policy or a Slurm requeue script tells "try
//! again" from "do not" by these numbers.

use std::process::ExitCode;

/// How a process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// 0: done.
    Ok = 0,
    /// 1: failed, and would fail again.
    Error = 1,
    /// 2: the command line is wrong.
    Usage = 2,
    /// 75 (`EX_TEMPFAIL`): failed for a reason that may pass: a busy lock, a network that is down.
    TryAgain = 75,
    /// 130: stopped by SIGINT or SIGTERM; what was finished is kept.
    Interrupted = 130,
}

impl Exit {
    /// The number the operating system sees.
    pub const fn code(self) -> u8 {
        self as u8
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// An error for reasons that may pass; ends a binary with [`Exit::TryAgain`].
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TryAgain(pub String);

/// An error in what the user typed, found after the flags were parsed; ends a binary with [`Exit::Usage`].
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

//! `metrics.jsonl`: what a run reports, one JSON object a line, rows of steps and rows of evaluations.

use std::fs;
use std::path::Path;

use nics_base::jsonl::JsonlLog;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Result, TrainError};

/// The row of a step. Of two runs with equal settings all but `tokens_per_s` and `seconds` are equal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRow {
    /// Steps done.
    pub step: u64,
    /// Cost per target token, over all steps since the row before.
    pub loss: f64,
    /// Learning rate of this step.
    pub lr: f64,
    /// Global norm of this step's gradient before clipping.
    pub grad_norm: f64,
    /// Target tokens trained on since the first step.
    pub tokens: u64,
    /// Target tokens per second since the row before, or since this process began.
    pub tokens_per_s: f64,
    /// Seconds of training since the first step, over all processes of the run.
    pub seconds: f64,
}

/// The row of an evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalRow {
    /// Steps done.
    pub step: u64,
    /// What the caller's evaluation returned.
    pub eval: Map<String, Value>,
}

/// A row of the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum LogRow {
    /// Of a step.
    Step(StepRow),
    /// Of an evaluation.
    Eval(EvalRow),
}

impl LogRow {
    /// After how many steps the row was written.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(row) => row.step,
            Self::Eval(row) => row.step,
        }
    }
}

/// Removes the rows past `step` from the log and from `rows`, which are those in it: a resumed run writes them again.
///
/// The file is cut and not rewritten, so that the rows that stay keep every digit.
pub(super) fn cut_after(log: &JsonlLog<LogRow>, rows: &mut Vec<LogRow>, step: u64) -> Result<()> {
    let kept = rows.iter().take_while(|row| row.step() <= step).count();
    if kept == rows.len() {
        return Ok(());
    }
    rows.truncate(kept);
    cut_lines(log.path(), kept)
        .map_err(|source| TrainError::Core(crate::Error::Io { path: log.path().to_owned(), source }))
}

fn cut_lines(path: &Path, kept: usize) -> std::io::Result<()> {
    let bytes = fs::read(path)?;
    let mut end = 0;
    let mut records = 0;
    for line in bytes.split_inclusive(|&b| b == b'\n') {
        if !line.trim_ascii().is_empty() {
            records += 1;
        }
        if records > kept {
            break;
        }
        end += line.len();
    }
    fs::File::options().write(true).open(path)?.set_len(end as u64)
}

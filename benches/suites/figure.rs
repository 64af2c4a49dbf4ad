//! A measured case, as a suite writes it and `cargo xtask bench` reads it: one line of JSON.
//!
//! Both compile this file, so that there is one definition.

use serde::{Deserialize, Serialize};

/// The environment variable that names the file to which suites append their cases.
pub const OUT: &str = "NICS_BENCH_OUT";

/// One thing that was measured, with everybody who did it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Case {
    /// The suite, for example `decode`.
    pub suite: String,
    /// What was measured beside dtype and `x`, for example `batch 1`.
    pub name: String,
    /// Number format: `f32`, `bf16` or `f16`.
    pub dtype: String,
    /// Where on the horizontal axis.
    pub x: f64,
    /// What `x` is, with its unit.
    pub x_label: String,
    /// What one time is of, for example `step` or `token`.
    pub per: String,
    /// The shapes that were computed, for example `Qwen2.5-0.5B (random weights)`.
    pub model: String,
    /// Threads of each contender.
    pub threads: usize,
    /// Seed of weights and inputs.
    pub seed: u64,
    /// Bytes that have to be read from memory for it, where that is the limit.
    pub bytes: Option<u64>,
    /// What was computed on, for example `cuda: NVIDIA H100`, where that is not the processor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Bytes a second of that device's memory: the limit of a case that has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<f64>,
    /// The subject first, then its peers; times in rounds that belong together.
    pub runs: Vec<Run>,
    /// Peers that took no part.
    pub absent: Vec<Absent>,
}

/// One contender's times.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Its name.
    pub who: String,
    /// Seconds, one for each round.
    pub seconds: Vec<f64>,
    /// Relative error (L2) of what it computes, where contenders compute different things.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<f64>,
}

/// A peer that took no part, and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Absent {
    /// Its name.
    pub who: String,
    /// The reason.
    pub why: String,
}

impl Case {
    /// `decode/f32/batch 1/context (tokens) 2048`: what filters are held against.
    pub fn id(&self) -> String {
        id(&self.suite, &self.dtype, &self.name, &self.x_label, self.x)
    }
}

/// See [`Case::id`].
pub fn id(suite: &str, dtype: &str, name: &str, x_label: &str, x: f64) -> String {
    // `context (tokens)` is `context` in an id.
    let axis = x_label.split(" (").next().unwrap_or(x_label);
    format!("{suite}/{dtype}/{name}/{axis} {x}")
}

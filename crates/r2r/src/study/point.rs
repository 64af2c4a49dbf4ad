//! What one way of writing came to on the test problems of one seed.

use serde::{Deserialize, Serialize};

/// One way of writing at one setting, problem by problem.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The way, as results name it.
    pub variant: String,
    /// The share of validation rows or queries that its threshold was chosen for; `None` for a threshold chosen otherwise
    /// or none at all.
    pub rate: Option<f64>,
    /// The threshold.
    pub threshold: Option<f64>,
    /// Whether each problem was solved: `1` or `0`.
    pub right: String,
    /// Tokens that the large model gave (speculative decoding: its calls), of each problem.
    pub large: Vec<u32>,
    /// Tokens written, of each problem.
    pub tokens: Vec<u32>,
    /// Tokens that the large model read, all together.
    pub large_read: u64,
    /// Problems whose tokens are the large model's own greedy output; for speculative decoding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identical: Option<usize>,
    /// Seconds that the writing took.
    pub seconds: f64,
}

impl Point {
    /// What tells it from others of its seed.
    pub fn key(&self) -> (String, Option<u64>) {
        (self.variant.clone(), self.rate.map(f64::to_bits))
    }

    /// 1 for each problem that was solved.
    pub fn hits(&self) -> Vec<f64> {
        self.right.bytes().map(|b| f64::from(u8::from(b == b'1'))).collect()
    }

    /// Share of the problems that were solved.
    pub fn accuracy(&self) -> f64 {
        self.hits().iter().sum::<f64>() / self.right.len().max(1) as f64
    }

    /// The large model's share of all tokens.
    pub fn share(&self) -> f64 {
        let sum = |v: &[u32]| v.iter().map(|&n| u64::from(n)).sum::<u64>() as f64;
        sum(&self.large) / sum(&self.tokens).max(1.0)
    }
}

/// Marks as they are stored.
pub(super) fn marks(right: impl Iterator<Item = bool>) -> String {
    right.map(|r| if r { '1' } else { '0' }).collect()
}

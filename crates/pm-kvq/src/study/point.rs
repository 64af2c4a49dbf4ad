//! What one cache came to on the texts of one seed.

use serde::{Deserialize, Serialize};

use super::Weights;

/// One cache, text by text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The cache, as results name it.
    pub variant: String,
    /// The weights.
    pub weights: Weights,
    /// Tokens of each text that are right before the first wrong one, of 112.
    pub prefix: Vec<usize>,
    /// Tokens of each text that are right.
    pub tokens: Vec<usize>,
    /// Digits of each first line that were recalled, of 7.
    pub recalled: Vec<usize>,
    /// The most bytes of a text's cache, scales and zeros included.
    pub peak_bytes: usize,
    /// Bytes of a text's cache, averaged over the tokens written.
    pub mean_bytes: f64,
    /// Widths or budgets that were worked out for it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub about: String,
    /// Seconds that the writing took.
    pub seconds: f64,
}

impl Point {
    /// What tells it from others of its seed.
    pub fn key(&self) -> (&str, Weights) {
        (&self.variant, self.weights)
    }
}

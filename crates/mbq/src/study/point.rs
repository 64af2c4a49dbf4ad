//! What one method came to on the problems of one model.

use serde::{Deserialize, Serialize};

/// One method at one width under one condition, problem by problem.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The condition.
    pub condition: String,
    /// The width, e.g. `w2g32`; `float` is the model before quantization.
    pub quant: String,
    /// The method, as results name it.
    pub method: String,
    /// Divergence of the answer's tokens from the float model's, in nats, mean over the six of each problem.
    pub kl: Vec<f32>,
    /// Symbols of each answer that are right, of 6; each is asked for behind the right ones.
    pub right: Vec<u8>,
    /// What errors on the picture weigh beside those on answers, by layer, where the method measures it: of attention, and of
    /// the MLP.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ratios: Vec<[f64; 2]>,
    /// Seconds that quantization took, calibration among it.
    pub seconds: f64,
}

impl Point {
    /// What tells it from others of its model.
    pub fn key(&self) -> (&str, &str, &str) {
        (&self.condition, &self.quant, &self.method)
    }
}

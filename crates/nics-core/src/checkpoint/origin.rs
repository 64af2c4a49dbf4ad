//! What a file was made from.

use serde::{Deserialize, Serialize};

use super::Checkpoint;
use crate::Result;

/// The model that something was made from: what calibrations write into their files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Its name, for the reader's sake.
    pub model: String,
    /// Of the architecture fields of its config.json.
    pub arch_hash: String,
    /// Of its weights.
    pub weights_hash: String,
}

impl Origin {
    /// Of a checkpoint, whose weights are read once for their hash.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        Ok(Self {
            model: checkpoint.name().to_owned(),
            arch_hash: checkpoint.arch_hash(),
            weights_hash: checkpoint.weights_hash()?,
        })
    }
}

//! How many samples run together under a limit of memory.

use nics_core::models::ModelDims;

use crate::batch::CalibBatch;
use crate::{Error, Result};

/// Bytes that a calibration takes beside the model's weights and its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// However few samples run together: hidden states of all samples, one layer in float32 with its candidates, and the
    /// backward pass of one sample.
    pub fixed: u64,
    /// For each sample that runs at the same time.
    pub sample: u64,
    /// The backward pass of one sample, a part of `fixed`.
    backward: u64,
}

impl Needs {
    /// Of a decoder of these dimensions on a batch. An upper estimate: what libtorch frees between steps counts in full.
    pub fn of(dims: &ModelDims, batch: &CalibBatch, distort: bool, sensitivity: bool) -> Self {
        let n = |v: i64| v.max(0) as u64;
        let (h, i, l) = (n(dims.hidden), n(dims.intermediate), n(batch.positions()));
        let (heads, kv) = (n(dims.heads), n(dims.kv_heads));
        let (attended, keys) = (heads * n(dims.head_dim), kv * n(dims.head_dim));
        let paths = if distort { 2 } else { 1 };
        let states = 2 * paths * n(batch.samples()) * l * h * 4;
        let layer = 4 * (2 * h * attended + 2 * h * keys + 3 * h * i);
        let largest = 4 * (h * (attended + 2 * keys)).max(2 * h * i);
        let search = (1 + 2 * paths) * layer + 4 * largest;
        let one = 4 * l * (10 * h + 6 * i + 4 * attended + 4 * keys) + 4 * l * l * (1 + heads);
        let backward =
            if sensitivity { 4 * l * h * dims.layers as u64 + 3 * one + 12 * l * n(dims.vocab) } else { 0 };
        Self { fixed: states + search.max(backward), sample: paths * one, backward }
    }

    /// Of the sensitivity alone: hidden states of one sample in each layer, and the backward pass through one.
    pub fn of_sensitivity(dims: &ModelDims, batch: &CalibBatch) -> Self {
        let Self { sample, backward, .. } = Self::of(dims, batch, false, true);
        Self { fixed: backward, sample, backward }
    }

    /// The most samples, up to `all`, that may run together under a limit.
    ///
    /// # Errors
    /// [`Error::OutOfMemoryBudget`] when not even one does.
    pub fn fit(&self, limit: Option<u64>, all: u64) -> Result<u64> {
        let Some(limit) = limit else { return Ok(all.max(1)) };
        let needed = self.fixed + self.sample;
        if limit < needed {
            return Err(Error::OutOfMemoryBudget { limit, needed });
        }
        Ok(((limit - self.fixed) / self.sample.max(1)).clamp(1, all.max(1)))
    }
}

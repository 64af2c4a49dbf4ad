//! From a memory limit to sizes of batches and files.

use nics_core::models::ModelDims;

use super::LabelError;
use crate::Result;

/// What the process takes before any model is loaded: libtorch, its allocator and thread stacks, the tokenizer, a line or
/// two of each file.
const BASE: usize = 192 << 20;
/// Rows of a prompt that a model reads at once.
pub(super) const PROMPT_ROWS: usize = 1024;
/// Rows whose logits are in memory at once while the small model reads along.
const READ_ROWS: usize = 256;

/// How much memory a run may take, and how much of it the models hold.
#[derive(Debug, Clone, Copy, Default)]
pub struct Budget {
    /// Bytes of the whole process; `None` is no limit.
    pub limit: Option<usize>,
    /// Bytes of the models in memory.
    pub models: usize,
}

impl Budget {
    /// Bytes that are left for batches and rows, for what takes `least` at least.
    fn left(&self, least: usize, what: &str) -> Result<Option<usize>> {
        let Some(limit) = self.limit else { return Ok(None) };
        let fixed = BASE + self.models;
        if fixed + least > limit {
            let (limit, need) = (limit >> 20, (fixed + least).div_ceil(1 << 20));
            return Err(LabelError::MemoryLimit { limit, need, what: what.to_owned() }.into());
        }
        Ok(Some(limit - fixed))
    }

    /// How many of the `asked` sequences of up to `tokens` tokens can be written at once, beside sequences that hold `kept`
    /// tokens in all.
    pub fn sequences(&self, dims: &ModelDims, asked: usize, tokens: usize, kept: usize) -> Result<usize> {
        let cache = |tokens: usize| {
            let row = 2 * (dims.kv_heads * dims.head_dim) as usize * dims.kind.elt_size_in_bytes();
            // Storage grows by a quarter: the old one is there beside the new.
            dims.layers * row * (tokens + tokens / 4 + 64)
        };
        let one = cache(tokens) + 3 * 4 * dims.vocab as usize;
        let fixed = cache(kept) + call(dims, PROMPT_ROWS.min(tokens));
        let left = self.left(fixed + one, "one sequence")?;
        Ok(left.map_or(asked, |left| ((left - fixed) / one).clamp(1, asked)))
    }

    /// Tokens that sequences which are read and kept may have in all: half of what is left.
    pub fn kept_tokens(&self, dims: &ModelDims) -> Result<usize> {
        let row = dims.layers * 2 * (dims.kv_heads * dims.head_dim) as usize * dims.kind.elt_size_in_bytes();
        let left = self.left(0, "the model")?;
        Ok(left.map_or(usize::MAX, |left| left / 2 / (row + row / 4).max(1)))
    }

    /// Rows of a file of features, of the `asked` ones: three copies of a row of `row` bytes are in memory at the worst,
    /// beside what reading takes.
    pub fn rows(&self, dims: Option<&ModelDims>, asked: usize, row: usize) -> Result<usize> {
        let reading = dims.map_or(0, |d| call(d, READ_ROWS) + 3 * 4 * READ_ROWS * d.vocab as usize);
        let left = self.left(reading + 3 * row, "a file of one row")?;
        Ok(left.map_or(asked, |left| ((left - reading) / (3 * row)).clamp(1, asked)))
    }
}

/// What a call with so many rows takes beside its result: the widest intermediate results of one layer, in float32.
fn call(dims: &ModelDims, rows: usize) -> usize {
    let wide = dims.intermediate.max(dims.heads * dims.head_dim).max(dims.hidden) as usize;
    rows * 6 * wide * 4
}

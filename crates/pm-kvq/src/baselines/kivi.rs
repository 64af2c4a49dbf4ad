//! KIVI (arXiv 2402.02750): keys per channel over blocks of tokens, values per token.

use nics_core::models::ModelDims;
use tch::Tensor;

use super::cache::{Arrived, Method};
use super::format::{Format, HALF};
use super::rows::Rows;
use crate::quantize::{Mode, fake_quant};
use crate::{Error, Result};

/// Blocks of tokens are stored once they are full; the rows after the last full block are exact.
///
/// What a call brings attends exactly and is stored afterwards; a single row that fills a block is stored with it before it
/// attends. A block that is cut by a truncation keeps its stored rows as they read back and is stored again once it is
/// full.
#[derive(Debug)]
pub struct Kivi {
    bits: u32,
    tokens: usize,
    values: Format,
}

impl Kivi {
    /// Codes of `bits`; keys share a scale over blocks of `tokens` tokens, values over `channels` channels of a token. The
    /// paper's are 2, 128 and 128.
    ///
    /// # Errors
    /// No tokens in a block, or a width that no code has.
    pub fn new(bits: u32, tokens: usize, channels: i64) -> Result<Self> {
        if tokens == 0 {
            return Err(Error::Setting {
                field: "tokens of a block".into(),
                found: "0".into(),
                expected: "at least 1".into(),
            });
        }
        if !(1..=16).contains(&bits) {
            return Err(Error::Width(bits));
        }
        Ok(Self { bits, tokens, values: Format::Groups { bits, group: channels } })
    }

    /// Stores the full blocks that have an exact row.
    fn store(&self, new: &Arrived, rows: &mut Rows) -> Result<()> {
        let block = self.tokens;
        // The blocks before the first new row's are stored, or they would not be full.
        let from = new.first / block * block;
        let to = rows.len() / block * block;
        if from >= to {
            return Ok(());
        }
        let which: Vec<usize> = (from..to).collect();
        let (k, v) = rows.pick(&which)?;
        let (heads, _, d) = k.size3()?;
        let tokens = block as i64;
        // [heads, rows, d] -> [heads, blocks, d, tokens]
        let channels = k.f_reshape([heads, -1, tokens, d])?.f_transpose(2, 3)?;
        let k = fake_quant(&channels, self.bits, tokens, Mode::FloatZero)?.f_to_kind(k.kind())?;
        let k = k.f_transpose(2, 3)?.f_reshape([heads, -1, d])?;
        rows.store(&which, &k, &self.values.round_trip(&v)?)
    }
}

impl Method for Kivi {
    fn name(&self) -> String {
        format!("kivi:{},tokens={}", self.values.name(), self.tokens)
    }

    fn check(&self, dims: &ModelDims) -> Result<()> {
        self.values.check(dims.head_dim)
    }

    fn before(&self, new: &Arrived, rows: &mut Rows) -> Result<()> {
        if new.first > 0 && new.len == 1 { self.store(new, rows) } else { Ok(()) }
    }

    fn after(&self, new: &Arrived, rows: &mut Rows, _received: Option<&Tensor>) -> Result<()> {
        if new.first > 0 && new.len == 1 { Ok(()) } else { self.store(new, rows) }
    }

    fn exact(&self, tokens: usize) -> usize {
        tokens.min(self.tokens - 1)
    }

    fn bytes(&self, dims: &ModelDims, stored: usize, exact: usize) -> usize {
        let d = dims.head_dim as usize;
        let keys =
            (stored * d * self.bits as usize).div_ceil(8) + stored.div_ceil(self.tokens) * d * 2 * HALF;
        dims.kv_heads as usize * (keys + stored * self.values.row_bytes(d) + exact * 2 * d * HALF)
    }
}

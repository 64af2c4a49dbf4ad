//! The quantized caches of transformers: codes with a residual of exact rows, and 8-bit floats whose scale is frozen.

use nics_core::models::ModelDims;
use tch::Tensor;

use super::cache::{Arrived, Method};
use super::everyday::{fp8, fp8_scale};
use super::format::{Coders, Format, HALF};
use super::rows::Rows;
use crate::{Error, Result};

/// `QuantizedCache` with its quanto backend: the prompt is stored whole once it has attended; later rows are exact until the
/// residual is full, then the whole history is stored again from what it reads back as.
#[derive(Debug)]
pub struct Residual {
    coders: Coders,
    residual: usize,
}

impl Residual {
    /// Codes of `bits` in groups of `group` channels, with a residual of `residual` rows. Its defaults are 4, 64 and 128.
    ///
    /// # Errors
    /// No row in the residual.
    pub fn new(bits: u32, group: i64, residual: usize) -> Result<Self> {
        if residual == 0 {
            return Err(Error::Setting {
                field: "residual length".into(),
                found: "0".into(),
                expected: "at least 1".into(),
            });
        }
        Ok(Self { coders: Format::Groups { bits, group }.into(), residual })
    }
}

impl Method for Residual {
    fn name(&self) -> String {
        format!("transformers:{},residual={}", self.coders.name(), self.residual)
    }

    fn check(&self, dims: &ModelDims) -> Result<()> {
        self.coders.check(dims)
    }

    fn bytes(&self, dims: &ModelDims, stored: usize, exact: usize) -> usize {
        self.coders.bytes(dims, stored, exact)
    }

    fn after(&self, new: &Arrived, rows: &mut Rows, _received: Option<&Tensor>) -> Result<()> {
        let waiting = rows.len() - rows.stored() - new.len;
        // An empty residual takes a row whatever its length.
        if new.first == 0 || (waiting > 0 && waiting + 1 >= self.residual) {
            let all: Vec<usize> = (0..rows.len()).collect();
            return self.coders.store(rows, &all);
        }
        Ok(())
    }

    fn exact(&self, tokens: usize) -> usize {
        tokens.min(self.residual.max(2) - 1)
    }
}

/// 8-bit floats with one scale for keys and one for values, those of the sequence's first call: what comes later and is
/// larger reads back as NaN.
#[derive(Debug)]
pub struct FrozenFp8;

/// The state that a sequence keeps: the scales of keys and values, one number each.
const SCALES: [&str; 2] = ["k_scale", "v_scale"];

impl Method for FrozenFp8 {
    fn name(&self) -> String {
        "transformers:fp8".into()
    }

    fn stands_alone(&self) -> bool {
        true
    }

    fn check(&self, _dims: &ModelDims) -> Result<()> {
        Ok(())
    }

    fn before(&self, new: &Arrived, rows: &mut Rows) -> Result<()> {
        let which = new.rows();
        let (k, v) = rows.pick(&which)?;
        if new.first == 0 {
            for (name, t) in SCALES.into_iter().zip([&k, &v]) {
                let scale = fp8_scale(t)?;
                rows.set_state(name, scale);
            }
        }
        let scale = |name: &str| {
            rows.state(name).ok_or_else(|| Error::Input(format!("the sequence has lost its {name}")))
        };
        let (k, v) = (fp8(&k, scale(SCALES[0])?)?, fp8(&v, scale(SCALES[1])?)?);
        rows.store(&which, &k, &v)
    }

    fn bytes(&self, dims: &ModelDims, stored: usize, exact: usize) -> usize {
        (dims.kv_heads * dims.head_dim) as usize * 2 * (stored + exact * HALF)
    }

    fn state_bytes(&self, dims: &ModelDims) -> usize {
        SCALES.len() * dims.kind.elt_size_in_bytes()
    }
}

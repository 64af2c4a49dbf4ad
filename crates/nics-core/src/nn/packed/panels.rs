//! Products of many rows in bfloat16: weights become floats a panel of outputs at a time, which stays in the cache, and
//! libtorch multiplies by the processor's own products of bfloat16.

use nics_kernels::has_bf16_products;
use nics_kernels::packed::{Packed, Rounding, TILE};
use nics_kernels::pool;
use tch::{Kind, Tensor};

use crate::nn::memory::values_mut;
use crate::{Error, Result};

/// Rows from which on panels are ahead of the integer kernels.
const ROWS: usize = 256;
/// Bytes of a panel.
const PANEL: usize = 4 << 20;

/// Whether to go this way: with enough rows of a dtype that the processor multiplies itself, where x need not be rounded.
pub(super) fn pay(rows: usize, rounding: Rounding, kind: Kind) -> bool {
    rounding == Rounding::A16 && kind == Kind::BFloat16 && rows >= ROWS && has_bf16_products()
}

/// `x Wᵀ + b` for `x` `[rows, in]` on the CPU, `W` rounded to the dtype of `x`, bias `[out]`: `[rows, out]`. No more than
/// 4 MiB of dequantized weights are there at a time.
///
/// # Errors
/// [`Error::Input`]: an `x` of another width, or of a dtype that has no kernels.
pub fn by_panels(weight: &Packed, bias: Option<&Tensor>, x: &Tensor) -> Result<Tensor> {
    let (rows, input) = x.size2()?;
    if input as usize != weight.input() {
        return Err(Error::Input(format!("the layer takes {} channels, x has {input}", weight.input())));
    }
    let out = weight.out();
    let step = (PANEL / (weight.input() * x.kind().elt_size_in_bytes()) / TILE * TILE).max(TILE);
    let pool = pool::own();
    let mut y = x.f_new_empty([rows, out as i64], (x.kind(), x.device()))?;
    let panel = x.f_new_empty([step.min(out) as i64, input], (x.kind(), x.device()))?;
    for from in (0..out).step_by(step) {
        let (at, n) = (from as i64, step.min(out - from) as i64);
        let mut panel = panel.f_narrow(0, 0, n)?;
        let Some(to) = values_mut(&mut panel) else {
            return Err(Error::Input(format!("x is {:?}, expected a float on the CPU", x.kind())));
        };
        weight.dequantize_panel(&pool, from, to);
        let bias = bias.map(|b| b.f_narrow(0, at, n)).transpose()?;
        y.f_narrow(1, at, n)?.f_copy_(&x.f_linear(&panel, bias.as_ref())?)?;
    }
    // Nobody waits for a gradient: kernels have written into what autograd has not seen.
    y = y.f_detach()?;
    Ok(y)
}

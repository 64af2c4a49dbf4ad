//! Scales folded into weights: what stands before an operator is divided, its linear layers are multiplied.
//!
//! A norm's weight is divided by channel. A linear layer is divided by row, bias included; of a layer that is wider than the
//! scales only the last rows are. The model computes the same as before.

use tch::Tensor;

use crate::layer::{LayerWeights, Weights};
use crate::operators::{Operator, Previous};
use crate::{Error, Result};

/// `W · diag(s)`: `[out, in]` times `[in]`.
pub fn scaled_columns(weight: &Tensor, scales: &Tensor) -> Result<Tensor> {
    columns(weight, scales)?;
    Ok(weight.f_mul(scales)?)
}

fn columns(weight: &Tensor, scales: &Tensor) -> Result<()> {
    let (_, input) = weight.size2()?;
    if scales.size() == [input] {
        return Ok(());
    }
    Err(Error::Input(format!("scales of shape {:?} for a weight of {input} columns", scales.size())))
}

/// A norm's weight `[channels]` divided by scales.
pub fn divided_norm(weight: &Tensor, scales: &Tensor) -> Result<Tensor> {
    channels(weight, scales)?;
    Ok(weight.f_div(scales)?)
}

fn channels(weight: &Tensor, scales: &Tensor) -> Result<()> {
    if weight.size() == scales.size() {
        return Ok(());
    }
    Err(Error::Input(format!("scales of shape {:?} for a norm of shape {:?}", scales.size(), weight.size())))
}

/// The last rows of a linear layer, as many as there are scales, divided by them.
pub fn divided_rows(linear: &Weights, scales: &Tensor) -> Result<Weights> {
    let (before, n) = rows(linear, scales)?;
    let divided = |t: &Tensor, by: &Tensor| -> Result<Tensor> {
        let (kept, last) = (t.f_narrow(0, 0, before)?, t.f_narrow(0, before, n)?);
        Ok(Tensor::f_cat(&[kept, last.f_div(by)?], 0)?)
    };
    Ok(Weights {
        weight: divided(&linear.weight, &scales.f_unsqueeze(1)?)?,
        bias: linear.bias.as_ref().map(|b| divided(b, scales)).transpose()?,
    })
}

/// How many rows stay, and how many are divided.
fn rows(linear: &Weights, scales: &Tensor) -> Result<(i64, i64)> {
    let (rows, n) = (linear.weight.size()[0], scales.size1()?);
    if n > rows {
        return Err(Error::Input(format!("{n} scales for a linear layer of {rows} outputs")));
    }
    Ok((rows - n, n))
}

/// Whether the scales of one operator fit a layer's weights, which stay as they are.
///
/// # Errors
/// What [`fold`] would refuse.
pub fn fits(weights: &LayerWeights, op: &Operator, scales: &Tensor) -> Result<()> {
    match op.previous {
        Previous::Norm(norm) => channels(weights.norm(norm), scales)?,
        Previous::Linear(role) => _ = rows(weights.linear(role)?, scales)?,
    }
    op.linears.iter().try_for_each(|role| columns(&weights.linear(*role)?.weight, scales))
}

/// Folds the scales of one operator into a layer's weights.
pub fn fold(weights: &mut LayerWeights, op: &Operator, scales: &Tensor) -> Result<()> {
    match op.previous {
        Previous::Norm(norm) => *weights.norm_mut(norm) = divided_norm(weights.norm(norm), scales)?,
        Previous::Linear(role) => *weights.linear_mut(role)? = divided_rows(weights.linear(role)?, scales)?,
    }
    for role in op.linears {
        let linear = weights.linear_mut(*role)?;
        linear.weight = scaled_columns(&linear.weight, scales)?;
    }
    Ok(())
}

//! Key scales folded into a model's weights: `W_k ← W_k / Λ`, `b_k ← b_k / Λ`, `W_q ← W_q · Λ`, `b_q ← b_q · Λ`, row by
//! row. The model computes the same, its keys have no outliers, and decoding costs nothing more.
//!
//! It is impossible where queries and keys are normed between projection and attention (the norm would take the scale out
//! again) and where weights are packed: [`Scaled`](super::Scaled) applies the scales at run time there.

use nics_core::models::Model;
use tch::{Kind, Tensor};

use super::scales::Scales;
use super::search::layer_of;
use crate::quantize::finite;
use crate::{Error, Result};

/// What a parameter's rows are multiplied with.
enum Side {
    Keys,
    Queries,
}

/// The side and the layer of a parameter.
fn side(key: &str) -> Option<(Side, usize)> {
    let side = match key.rsplit('.').nth(1)? {
        "k_proj" => Side::Keys,
        "q_proj" => Side::Queries,
        _ => return None,
    };
    Some((side, layer_of(key)?))
}

/// Whether scales can be folded into a model's weights.
///
/// # Errors
/// Why not.
pub fn foldable(model: &mut dyn Model) -> Result<()> {
    let layers = model.dims().layers;
    let mut weights = vec![0; layers];
    let mut refused = None;
    model.visit_parameters(&mut |key, tensor| {
        let part = key.rsplit('.').nth(1).unwrap_or_default();
        if matches!(part, "q_norm" | "k_norm") {
            refused.get_or_insert_with(|| format!("{key} stands between projection and attention"));
        }
        if let Some((_, layer)) = side(key) {
            if key.ends_with(".weight") && layer < layers {
                weights[layer] += 1;
            }
            if !matches!(tensor.kind(), Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16) {
                refused.get_or_insert_with(|| format!("{key} is {:?}", tensor.kind()));
            }
        }
        Ok(())
    })?;
    if let Some(layer) = weights.iter().position(|n| *n != 2) {
        refused.get_or_insert_with(|| format!("layer {layer} has no separate weights of q_proj and k_proj"));
    }
    match refused {
        None => Ok(()),
        Some(why) => Err(Error::Input(format!(
            "key scales cannot be folded into this model ({why}): apply them at run time"
        ))),
    }
}

/// Folds scales into the weights of a model. On an error the model is as it was.
///
/// # Errors
/// Scales that do not fit, a model that cannot take them, or weights that would leave the range of their dtype.
pub fn fold(model: &mut dyn Model, scales: &Scales) -> Result<()> {
    scales.check(model.dims())?;
    foldable(model)?;
    let heads = model.dims().heads;
    // First all of them, then the exchange.
    let mut folded = Vec::new();
    visit(model, &mut |key, tensor, side, layer| {
        let (k, q) = scales.factors(layer, heads)?;
        let factor = match side {
            Side::Keys => k.f_reciprocal()?,
            Side::Queries => q,
        };
        let mut shape = vec![-1];
        shape.resize(tensor.dim(), 1);
        let factor = factor.f_reshape(&shape)?.f_to_device(tensor.device())?;
        if factor.size()[0] != tensor.size()[0] {
            return Err(Error::ScaleShape {
                layer,
                found: format!("for {} rows of {key}", factor.size()[0]),
                expected: format!("{} rows", tensor.size()[0]),
            });
        }
        let new = tensor.f_detach()?.f_to_kind(Kind::Float)?.f_mul(&factor)?.f_to_kind(tensor.kind())?;
        if !finite(&new)? {
            return Err(Error::Input(format!(
                "{key} times its scales leaves the range of {:?}: load the model as bfloat16 or float32",
                tensor.kind()
            )));
        }
        folded.push(new);
        Ok(())
    })?;
    let mut folded = folded.into_iter();
    visit(model, &mut |_, tensor, _, _| {
        if let Some(new) = folded.next() {
            *tensor = new;
        }
        Ok(())
    })
}

/// Hands every weight and bias of the query and key projections to `f`.
fn visit(
    model: &mut dyn Model,
    f: &mut dyn FnMut(&str, &mut Tensor, Side, usize) -> Result<()>,
) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    Ok(model.visit_parameters(&mut |key, tensor| match side(key) {
        Some((side, layer)) => Ok(f(key, tensor, side, layer)?),
        None => Ok(()),
    })?)
}

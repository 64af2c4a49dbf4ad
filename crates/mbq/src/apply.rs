//! Scales and rounding put into a model.

use nics_core::memory::trim;
use nics_core::models::{Decoder, Model};
use serde::Serialize;

use crate::fold::{fits, fold};
use crate::layer::{LayerWeights, Role, Weights};
use crate::operators::{Names, check_groups, operators};
use crate::quantize::{QTensor, QuantSpec};
use crate::search::OpScale;
use crate::{Error, Result};

/// What became of a model's linear layers: an evaluation that prints this cannot measure the float model by mistake.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Decoder layers whose linear layers were rounded.
    pub layers: usize,
    /// Linear layers that were rounded.
    pub linears: usize,
    /// Weights that were rounded.
    pub weights: u64,
    /// How, e.g. `w3g128`.
    pub spec: String,
}

/// Folds scales into a decoder, in float32 and cast once. What it computes stays the same.
///
/// # Errors
/// Scales that do not fit the model.
pub fn fold_scales(decoder: &mut Decoder, names: &Names, scales: &[Vec<OpScale>]) -> Result<()> {
    let kind = decoder.dims().kind;
    if scales.len() != decoder.layers.len() {
        return Err(Error::Input(format!(
            "scales of {} layers, the model has {}",
            scales.len(),
            decoder.layers.len()
        )));
    }
    // All of it is looked at before anything changes: on an error the model is as it was. Then one layer at a time, so that there
    // is no second model in float32.
    for (l, (layer, found)) in decoder.layers.iter_mut().zip(scales).enumerate() {
        let weights = LayerWeights::of(layer)?;
        let ops = operators(&weights)?;
        if ops.len() != found.len() {
            return Err(Error::Input(format!(
                "scales of {} operators in layer {l}, the model has {}",
                found.len(),
                ops.len()
            )));
        }
        for (op, scale) in ops.iter().zip(found) {
            if names.linears(l, op) != scale.linears {
                return Err(Error::Input(format!(
                    "scales of {}, expected those of {}",
                    scale.linears.join(", "),
                    names.linears(l, op).join(", ")
                )));
            }
            fits(&weights, op, &scale.scales)?;
        }
    }
    for (layer, found) in decoder.layers.iter_mut().zip(scales) {
        let mut weights = LayerWeights::of(layer)?;
        for (op, scale) in operators(&weights)?.iter().zip(found) {
            fold(&mut weights, op, &scale.scales)?;
        }
        weights.parts(kind)?.swap(layer)?;
        trim();
    }
    Ok(())
}

/// The integers of a layer's linear layers, in its order.
pub type LayerCodes = Vec<(Role, QTensor)>;

/// What rounding leaves beside the rounded model.
#[derive(Debug)]
pub struct Rounded {
    /// What was rounded.
    pub summary: Summary,
    /// The integers behind the weights, by layer.
    pub codes: Vec<LayerCodes>,
}

/// Rounds every linear layer inside the decoder's layers. Embeddings and head stay.
///
/// # Errors
/// Groups that do not divide a layer.
pub fn round(decoder: &mut Decoder, names: &Names, spec: &QuantSpec) -> Result<Rounded> {
    check_groups(decoder.dims(), names, spec)?;
    let kind = decoder.dims().kind;
    let mut codes = Vec::new();
    for layer in &mut decoder.layers {
        let mut weights = LayerWeights::of(layer)?.with_act_bits(spec.act_bits);
        let one = |(role, w): &(Role, Weights)| Ok((*role, spec.codes(&w.weight)?));
        let all: LayerCodes = weights.linears().iter().map(one).collect::<Result<_>>()?;
        put_codes(&mut weights, &all)?;
        codes.push(all);
        weights.parts(kind)?.swap(layer)?;
        trim();
    }
    Ok(Rounded { summary: summary(decoder, spec)?, codes })
}

/// Weights replaced with what their integers stand for.
pub(crate) fn put_codes(weights: &mut LayerWeights, codes: &LayerCodes) -> Result<()> {
    for (role, code) in codes {
        weights.linear_mut(*role)?.weight = code.dequantize()?;
    }
    Ok(())
}

/// A summary of a decoder whose layers are all rounded.
pub(crate) fn summary(decoder: &mut Decoder, spec: &QuantSpec) -> Result<Summary> {
    let layers = decoder.layers.len();
    let (mut linears, mut weights) = (0, 0);
    for layer in &mut decoder.layers {
        let all = LayerWeights::of(layer)?;
        linears += all.linears().len();
        weights += all.numel();
    }
    Ok(Summary { layers, linears, weights, spec: spec.to_string() })
}

//! SmoothQuant (Xiao et al., 2022): activations are made easier to round at the cost of weights, `s = a^α / w^(1−α)` with the
//! largest magnitudes `a` of each input channel and `w` of each weight column, folded into the two norms of each layer.

use nics_core::models::Decoder;
use nics_core::seam::SeqId;
use tch::{Kind, Tensor};

use crate::batch::{CalibBatch, Seats};
use crate::fold::fold;
use crate::layer::LayerWeights;
use crate::operators::{Names, Operator, Previous, Tap, operators};
use crate::{Error, Result, run};

/// The least magnitude of a column, and the least scale.
const LEAST: f64 = 1e-5;

/// Largest magnitudes of what goes into a layer's linear layers.
#[derive(Debug)]
pub struct Largest([Tensor; 4]);

impl Largest {
    /// Of an input, float32 `[channels]`.
    pub fn at(&self, tap: Tap) -> &Tensor {
        &self.0[tap as usize]
    }
}

/// Largest magnitudes over the samples of a batch, which run one by one and without their padding.
pub fn largest(decoder: &Decoder, batch: &CalibBatch) -> Result<Vec<Largest>> {
    let _no_grad = tch::no_grad_guard();
    let mut all: Vec<Option<Largest>> = (0..decoder.layers.len()).map(|_| None).collect();
    for sample in 0..batch.samples() {
        let here = batch.attention().f_get(sample)?.f_nonzero()?.f_squeeze_dim(1)?;
        let n = here.size()[0];
        if n == 0 {
            continue;
        }
        let seats = Seats::unpadded(decoder, SeqId(sample as u64), n, batch.embeds().device())?;
        let mut x = batch.embeds().f_get(sample)?.f_index_select(0, &here)?;
        x = x.f_to_kind(decoder.norm.weight.kind())?;
        for (layer, so_far) in decoder.layers.iter().zip(&mut all) {
            let taps = run::layer(layer, &seats, &x)?;
            let of = |tap: Tap| -> Result<Tensor> {
                let most = taps.input(tap).f_abs()?.f_amax(0i64, false)?.f_to_kind(Kind::Float)?;
                Ok(match so_far {
                    None => most,
                    Some(so_far) => most.f_maximum(so_far.at(tap))?,
                })
            };
            let [a, b, c, d] = Tap::ALL.map(of);
            *so_far = Some(Largest([a?, b?, c?, d?]));
            x = taps.output;
        }
    }
    let none = || Error::NoData("no sample has a position that is not padding".into());
    all.into_iter().map(|l| l.ok_or_else(none)).collect()
}

/// Scales of one operator from the largest magnitudes of its input.
pub fn smooth_scales(weights: &LayerWeights, op: &Operator, largest: &Tensor, alpha: f64) -> Result<Tensor> {
    let columns: Vec<Tensor> = op
        .linears
        .iter()
        .map(|r| Ok(weights.linear(*r)?.weight.f_abs()?.f_amax(0i64, false)?))
        .collect::<Result<_>>()?;
    let columns = Tensor::f_stack(&columns, 0)?.f_amax(0i64, false)?.f_clamp_min(LEAST)?;
    let a = largest.f_pow_tensor_scalar(alpha)?;
    Ok(a.f_div(&columns.f_pow_tensor_scalar(1.0 - alpha)?)?.f_clamp_min(LEAST)?)
}

/// Smooths a decoder. What it computes stays the same.
///
/// # Errors
/// An `alpha` outside 0 to 1, or magnitudes that are no numbers.
pub fn smooth(decoder: &mut Decoder, names: &Names, largest: &[Largest], alpha: f64) -> Result<()> {
    if !(0.0..=1.0).contains(&alpha) {
        return Err(Error::Setting {
            field: "alpha",
            found: alpha.to_string(),
            expected: "a number from 0 to 1",
        });
    }
    let kind = decoder.norm.weight.kind();
    for (l, (layer, largest)) in decoder.layers.iter_mut().zip(largest).enumerate() {
        let mut weights = LayerWeights::of(layer)?;
        let ops = operators(&weights)?;
        for op in ops.iter().filter(|op| matches!(op.previous, Previous::Norm(_))) {
            let scales = smooth_scales(&weights, op, largest.at(op.tap), alpha)?;
            if scales.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
                let name = names.linear(l, op.linears[0]);
                return Err(Error::Input(format!("the input of {name} has values that are not finite")));
            }
            fold(&mut weights, op, &scales)?;
        }
        weights.parts(kind)?.swap(layer)?;
    }
    Ok(())
}

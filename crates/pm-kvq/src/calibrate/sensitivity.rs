//! First-order sensitivity of the loss to the width of a layer's cache (the paper's section on block-wise allocation).
//!
//! For each sample the loss is its own mean next-token cross-entropy. With keys `K` after rotation and values `V` of layer
//! `i`, `s_K[b][i] = mean |(Q_b(K) − K) ⊙ ∂L/∂K|` over the samples, likewise for values.

use std::collections::BTreeMap;

use nics_core::models::Model;
use nics_core::train::masked_cross_entropy;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::record::{run, tensor};
use super::samples::{Samples, stretch};
use crate::quantize::finite;
use crate::quantize::{Mode, fake_quant};
use crate::{Bits, Error, Result};

/// Widths that are measured, in bits.
pub const WIDTHS: [u32; 5] = [16, 8, 4, 2, 1];

/// Which layer's gradient an error is weighed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GradOrder {
    /// Its own.
    #[default]
    Aligned,
    /// That of the layer at the same place from the other end: the reference implementation's, by mistake.
    Mirrored,
}

/// One number a layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KeysAndValues {
    /// Of the keys.
    pub k: Vec<f64>,
    /// Of the values.
    pub v: Vec<f64>,
}

/// The sensitivity of every layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sensitivity {
    /// Channels that share a scale.
    pub group: i64,
    /// Tokens of a sample.
    pub seq_len: usize,
    /// The length that positions were stretched to.
    pub effective_len: usize,
    /// Samples.
    pub samples: usize,
    /// Which gradients.
    pub grad_order: GradOrder,
    /// By width, in bits.
    pub bits: BTreeMap<u32, KeysAndValues>,
}

impl Sensitivity {
    /// Of keys and values together, for the widths that caches store.
    pub fn totals(&self) -> BTreeMap<Bits, Vec<f64>> {
        let total = |both: &KeysAndValues| both.k.iter().zip(&both.v).map(|(k, v)| k + v).collect();
        self.bits.iter().filter_map(|(bits, both)| Some((Bits::try_from(*bits).ok()?, total(both)))).collect()
    }

    /// Layers.
    pub fn layers(&self) -> usize {
        self.bits.values().next().map_or(0, |both| both.k.len())
    }

    /// Whether it says something about each of `layers` layers.
    ///
    /// # Errors
    /// What is missing or no number.
    pub fn check(&self, layers: usize) -> Result<()> {
        if self.bits.is_empty() {
            return Err(Error::Input("the sensitivity has no width".into()));
        }
        for (bits, both) in &self.bits {
            for (name, values) in [("k", &both.k), ("v", &both.v)] {
                if values.len() != layers {
                    return Err(Error::Input(format!(
                        "the sensitivity of {name} at {bits} bits has {} layers, the model has {layers}",
                        values.len()
                    )));
                }
                if values.iter().any(|s| !s.is_finite() || *s < 0.0) {
                    return Err(Error::Input(format!(
                        "the sensitivity of {name} at {bits} bits has values that are no positive numbers"
                    )));
                }
            }
        }
        Ok(())
    }
}

/// What is measured on one sample.
#[derive(Debug)]
pub(super) struct Measured {
    /// Float64 `[widths, layers]` in the order of [`WIDTHS`].
    pub k: Tensor,
    /// Likewise.
    pub v: Tensor,
    /// Rotated keys of each layer, `[tokens, kv_heads, head_dim]`.
    pub keys: Vec<Tensor>,
}

/// One sample, its positions `step` apart.
pub(super) fn measure(
    model: &dyn Model,
    ids: &[u32],
    step: usize,
    group: i64,
    order: GradOrder,
) -> Result<Measured> {
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    let gradients = tch::with_grad(|| -> Result<Vec<Tensor>> {
        let ids = tensor(model, ids)?;
        let mut embeds = model.embed(&ids)?.f_detach()?;
        embeds = embeds.f_set_requires_grad(true)?;
        let hidden = run(model, &embeds, step, |handed| {
            keys.push(handed.k.shallow_clone());
            values.push(handed.v.shallow_clone());
            Ok(())
        })?;
        let last = ids.size1()? - 1;
        let logits = model.logits(&hidden.f_narrow(0, 0, last)?)?;
        let loss =
            masked_cross_entropy(&logits, &ids.f_narrow(0, 1, last)?).map_err(nics_core::Error::from)?;
        let loss = loss.sum.f_div_scalar(loss.tokens)?;
        let inputs: Vec<&Tensor> = keys.iter().chain(&values).collect();
        Ok(Tensor::f_run_backward(&[loss], &inputs, false, false)?)
    })?;
    let _no_grad = tch::no_grad_guard();
    let layers = keys.len();
    let sums = |tensors: &[Tensor], gradients: &[Tensor]| -> Result<Tensor> {
        let mut all = Vec::with_capacity(WIDTHS.len() * layers);
        for bits in WIDTHS {
            for (i, x) in tensors.iter().enumerate() {
                let gradient = match order {
                    GradOrder::Aligned => &gradients[i],
                    GradOrder::Mirrored => &gradients[layers - 1 - i],
                };
                let error = fake_quant(x, bits, group, Mode::FloatZero)?.f_sub(x)?;
                let weighed = error.f_to_kind(Kind::Float)?.f_mul(&gradient.f_to_kind(Kind::Float)?)?;
                let mean = weighed.f_abs()?.f_mean(Kind::Double)?.f_double_value(&[])?;
                if !mean.is_finite() {
                    return Err(Error::NonFiniteInput { layer: i });
                }
                all.push(mean);
            }
        }
        Ok(Tensor::f_from_slice(&all)?.f_reshape([WIDTHS.len() as i64, layers as i64])?)
    };
    let keys: Vec<Tensor> = keys.iter().map(Tensor::f_detach).collect::<Result<_, _>>()?;
    let values: Vec<Tensor> = values.iter().map(Tensor::f_detach).collect::<Result<_, _>>()?;
    for (layer, t) in keys.iter().enumerate() {
        if !finite(t)? {
            return Err(Error::NonFiniteInput { layer });
        }
    }
    let (k, v) = (sums(&keys, &gradients[..layers])?, sums(&values, &gradients[layers..])?);
    Ok(Measured { k, v, keys })
}

/// Means by width from sums over samples, float64 `[widths, layers]`.
pub(super) fn by_width(k: &Tensor, v: &Tensor, samples: usize) -> Result<BTreeMap<u32, KeysAndValues>> {
    let mean = |sums: &Tensor, at: i64| -> Result<Vec<f64>> {
        Ok(Vec::try_from(sums.f_get(at)?.f_div_scalar(samples as f64)?)?)
    };
    let one = |(at, bits): (usize, &u32)| {
        Ok((*bits, KeysAndValues { k: mean(k, at as i64)?, v: mean(v, at as i64)? }))
    };
    WIDTHS.iter().enumerate().map(one).collect()
}

/// The sensitivity of every layer over some samples. `effective_len`: the length that positions are stretched to.
///
/// # Errors
/// Layers with a window, groups that do not divide a head, values that are not finite, an effective length that is no
/// multiple of the samples'.
pub fn sensitivity(
    model: &dyn Model,
    samples: &Samples,
    effective_len: Option<usize>,
    group: i64,
    grad_order: GradOrder,
) -> Result<Sensitivity> {
    let seq_len = samples.seq_len();
    let step = stretch(seq_len, effective_len)?;
    let mut sums: Option<(Tensor, Tensor)> = None;
    for ids in samples.ids() {
        let one = measure(model, ids, step, group, grad_order)?;
        sums = Some(match sums {
            None => (one.k, one.v),
            Some((k, v)) => (k.f_add(&one.k)?, v.f_add(&one.v)?),
        });
    }
    let Some((k, v)) = sums else { return Err(Error::EmptyCalibration("there is none".into())) };
    let bits = by_width(&k, &v, samples.len())?;
    Ok(Sensitivity {
        group,
        seq_len,
        effective_len: seq_len * step,
        samples: samples.len(),
        grad_order,
        bits,
    })
}

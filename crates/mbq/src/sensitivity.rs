//! How much the training loss reacts to each modality.
//!
//! For each sample the causal cross-entropy of its answers is differentiated. With `G` the gradient at the output of a
//! layer's attention or MLP, a modality's sensitivity is the mean of `|G|` over its positions and channels, averaged over the
//! samples that have such positions; answers count as a modality of their own. An error on modality `m` then weighs
//! `r = V_m / V_answer`, and at least the median of `r` over the layers: in the last layer vision cannot reach the loss at
//! all, so that `r` is 0 there.
//!
//! Only activations are differentiated, no weight is, and of activations only the two branch outputs and the input of each
//! layer.

use nics_core::models::{Decoder, Model};
use nics_core::train::masked_cross_entropy;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::batch::{CalibBatch, Seating, Seats};
use crate::loss::{Balance, Part};
use crate::run;
use crate::search::Weighing;
use crate::{Error, Result};

/// Name of the answers among the modalities.
pub const ANSWER: &str = "answer";

/// Mean absolute gradients of one modality, by layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Gradients {
    /// The modality; the answers' is called `answer`.
    pub modality: String,
    /// At the output of attention.
    pub attention: Vec<f64>,
    /// At the output of the MLP.
    pub mlp: Vec<f64>,
    /// Samples that have such positions.
    pub samples: usize,
}

/// The sensitivity of a model on some samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sensitivity {
    /// Answers first, then the modalities of the batch.
    pub modalities: Vec<Gradients>,
    /// Samples without a single answer, which were left out.
    pub without_answer: usize,
}

/// Weights of the modalities besides answers, by layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ratios {
    /// The modality.
    pub modality: String,
    /// For errors at the output of attention.
    pub attention: Vec<f64>,
    /// For errors at the output of the MLP.
    pub mlp: Vec<f64>,
}

/// What one sample adds: for each modality its presence and its mean absolute gradients, float64
/// `[modalities, 1 + 2·layers]`, attention before MLP; `None` when the sample has no answer.
pub(crate) fn measure(
    decoder: &Decoder,
    batch: &CalibBatch,
    seating: &Seating,
    sample: i64,
) -> Result<Option<Tensor>> {
    let labels = batch.labels().f_get(sample)?;
    let positions = batch.positions();
    let shifted = labels.f_narrow(0, 1, positions - 1)?;
    let answers = batch.answers()?.f_get(sample)?;
    if answers.f_narrow(0, 1, positions - 1)?.f_any()?.f_int64_value(&[])? == 0 {
        return Ok(None);
    }
    let seats = seating.seats(sample, sample + 1)?;
    let gradients = gradients(decoder, batch, &seats, sample, &shifted)?;
    let mut masks = vec![answers];
    for m in batch.modalities() {
        masks.push(m.mask.f_get(sample)?);
    }
    let mut all = Vec::new();
    for mask in &masks {
        let rows = mask.f_nonzero()?.f_squeeze_dim(1)?;
        let here = rows.size()[0] > 0;
        all.push(f64::from(u8::from(here)));
        for (n, g) in gradients.iter().enumerate() {
            let g = g.f_to_kind(Kind::Float)?.f_abs()?.f_index_select(0, &rows)?;
            let mean = if here { g.f_mean(Kind::Float)?.f_double_value(&[])? } else { 0.0 };
            if !mean.is_finite() {
                let layers = decoder.layers.len();
                return Err(Error::NonFinite {
                    layer: n % layers,
                    tensor: "the gradient of a branch".into(),
                    sample: sample as usize,
                });
            }
            all.push(mean);
        }
    }
    Ok(Some(Tensor::f_from_slice(&all)?.f_view([masks.len() as i64, -1])?))
}

/// Gradients of a sample's loss at the output of each layer's attention, then at those of the MLPs, `[positions, hidden]`.
///
/// Layers are run again one by one on the way back, so that one graph is held at a time.
fn gradients(
    decoder: &Decoder,
    batch: &CalibBatch,
    seats: &Seats,
    sample: i64,
    labels: &Tensor,
) -> Result<Vec<Tensor>> {
    let mut x = batch.embeds().f_get(sample)?.f_to_kind(decoder.dims().kind)?;
    let mut inputs = Vec::with_capacity(decoder.layers.len());
    {
        let _no_grad = tch::no_grad_guard();
        for layer in &decoder.layers {
            let output = run::layer(layer, seats, &x)?.output;
            inputs.push(std::mem::replace(&mut x, output));
        }
    }
    tch::with_grad(|| -> Result<Vec<Tensor>> {
        let leaf = |x: &Tensor| x.f_detach()?.f_set_requires_grad(true);
        let last = leaf(&x)?;
        let hidden = decoder.norm.forward(&last)?.f_narrow(0, 0, labels.size()[0])?;
        let loss = masked_cross_entropy(&decoder.logits(&hidden)?, labels).map_err(nics_core::Error::from)?;
        let loss = loss.sum.f_div_scalar(loss.tokens)?;
        let mut gradient = only(Tensor::f_run_backward(&[loss], &[&last], false, false)?)?;
        let (mut attention, mut mlp) = (Vec::new(), Vec::new());
        for (layer, x) in decoder.layers.iter().zip(&inputs).rev() {
            let x = leaf(x)?;
            let taps = run::layer(layer, seats, &x)?;
            let through = taps.output.f_mul(&gradient)?.f_sum(taps.output.kind())?;
            let mut all =
                Tensor::f_run_backward(&[through], &[&taps.attention, &taps.mlp, &x], false, false)?;
            gradient = only(all.split_off(2))?;
            mlp.extend(all.pop());
            attention.extend(all.pop());
        }
        attention.reverse();
        mlp.reverse();
        attention.append(&mut mlp);
        Ok(attention)
    })
}

fn only(mut gradients: Vec<Tensor>) -> Result<Tensor> {
    gradients.pop().ok_or_else(|| Error::Input("libtorch gave no gradient".into()))
}

impl Sensitivity {
    /// From the sums of [`measure`] over `counted` samples that have answers.
    pub(crate) fn from_sums(batch: &CalibBatch, sums: Option<&Tensor>, counted: usize) -> Result<Self> {
        let samples = batch.samples() as usize;
        let Some(sums) = sums.filter(|_| counted > 0) else {
            return Err(Error::AllLabelsIgnored { samples });
        };
        let names = std::iter::once(ANSWER).chain(batch.modalities().iter().map(|m| m.name.as_str()));
        let mut modalities = Vec::new();
        for (n, name) in names.enumerate() {
            let row = Vec::<f64>::try_from(sums.f_get(n as i64)?)?;
            let (present, values) = (row[0], &row[1..]);
            let layers = values.len() / 2;
            let mean = |of: &[f64]| of.iter().map(|v| v / present.max(1.0)).collect();
            modalities.push(Gradients {
                modality: name.to_owned(),
                attention: mean(&values[..layers]),
                mlp: mean(&values[layers..]),
                samples: present as usize,
            });
        }
        Ok(Self { modalities, without_answer: samples - counted })
    }

    /// The weight of each modality in each layer: `max(r, median of r over the layers)`. A modality that no sample has is
    /// left out.
    ///
    /// # Errors
    /// Answers that the loss does not react to at all.
    pub fn ratios(&self) -> Result<Vec<Ratios>> {
        let floored = |r: Vec<f64>| {
            let floor = median(&r);
            r.into_iter().map(|r| r.max(floor)).collect()
        };
        let lifted = |r: Ratios| Ratios { attention: floored(r.attention), mlp: floored(r.mlp), ..r };
        Ok(self.measured()?.into_iter().map(lifted).collect())
    }

    /// `r` of each modality in each layer as it was measured, below the median too.
    ///
    /// # Errors
    /// Answers that the loss does not react to at all.
    pub fn measured(&self) -> Result<Vec<Ratios>> {
        let Some((answer, others)) = self.modalities.split_first() else {
            return Err(Error::Input("a sensitivity without modalities".into()));
        };
        let of = |v: &[f64], c: &[f64]| -> Result<Vec<f64>> {
            let mut ratios = Vec::with_capacity(v.len());
            for (layer, (v, c)) in v.iter().zip(c).enumerate() {
                let r = v / c;
                if !r.is_finite() {
                    return Err(Error::Input(format!(
                        "layer {layer}: the loss does not react to answers ({c}), so that nothing can be weighed against \
                         them; load the model as float32 or bfloat16"
                    )));
                }
                ratios.push(r);
            }
            Ok(ratios)
        };
        others
            .iter()
            .filter(|m| m.samples > 0)
            .map(|m| {
                Ok(Ratios {
                    modality: m.modality.clone(),
                    attention: of(&m.attention, &answer.attention)?,
                    mlp: of(&m.mlp, &answer.mlp)?,
                })
            })
            .collect()
    }
}

/// The middle value; the mean of both when there are two; 0 of nothing.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    match n {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// The sensitivity of a model on a batch, sample by sample.
///
/// # Errors
/// [`Error::AllLabelsIgnored`], gradients that are no numbers, or what libtorch refuses.
pub fn sensitivity(decoder: &Decoder, batch: &CalibBatch) -> Result<Sensitivity> {
    let seating = Seating::of(decoder, batch)?;
    let (mut sums, mut counted) = (None, 0);
    for sample in 0..batch.samples() {
        if let Some(one) = measure(decoder, batch, &seating, sample)? {
            counted += 1;
            add(&mut sums, one)?;
        }
    }
    Sensitivity::from_sums(batch, sums.as_ref(), counted)
}

/// Adds to a sum that may not have begun.
pub(crate) fn add(sums: &mut Option<Tensor>, one: Tensor) -> Result<()> {
    *sums = Some(match sums.take() {
        None => one,
        Some(so_far) => so_far.f_add(&one)?,
    });
    Ok(())
}

/// What weighs the errors of one layer: answers 1, the other modalities by their ratios.
pub fn weighing(batch: &CalibBatch, ratios: &[Ratios], layer: usize) -> Result<Weighing> {
    let balance = |of: &dyn Fn(&Ratios) -> f64| -> Result<Balance> {
        let mut parts = vec![Part { mask: batch.answers()?, weight: 1.0 }];
        for r in ratios {
            let m = batch.modalities().iter().find(|m| m.name == r.modality);
            let m = m.ok_or_else(|| Error::EmptyModality(r.modality.clone()))?;
            parts.push(Part { mask: m.mask.shallow_clone(), weight: of(r) });
        }
        Balance::of(parts)
    };
    Ok(Weighing { attention: balance(&|r| r.attention[layer])?, mlp: balance(&|r| r.mlp[layer])? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_lifts_what_is_below_it() {
        let one = |modality: &str, values: Vec<f64>| Gradients {
            modality: modality.into(),
            attention: values.clone(),
            mlp: values,
            samples: 1,
        };
        let s = Sensitivity {
            modalities: vec![one("answer", vec![2.0, 2.0, 2.0]), one("vision", vec![1.0, 0.5, 0.0])],
            without_answer: 0,
        };
        assert_eq!(s.ratios().unwrap()[0].attention, [0.5, 0.25, 0.25]);
        assert!((median(&[1.0, 4.0, 2.0, 3.0]) - 2.5).abs() < 1e-12);
    }
}

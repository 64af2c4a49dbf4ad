//! The search for each layer's exponent α: which key scales disturb the layer's attention least once keys and values are
//! stored at its width.
//!
//! Layers are judged on the inputs that the model itself gives them, so one pass over the samples serves all layers and
//! exponents. The loss of an exponent is the mean squared error of the attention's output behind the output projection,
//! summed over the samples, whose positions are stretched; no sink, no window.

use nics_core::models::{Model, ModelDims};
use tch::{Kind, Tensor};

use super::record::watch;
use super::samples::{Samples, stretch};
use super::scales::{Scales, channels, lambda};
use crate::quantize::{Mode, fake_quant};
use crate::{Bits, Error, Result};

/// Exponents that are tried, in this order; 0 is not among them.
pub const ALPHAS: usize = 20;

/// The `n`-th exponent, `1 − n/20`.
pub fn alpha(n: usize) -> f64 {
    1.0 - n as f64 / ALPHAS as f64
}

/// Output projections, one a layer, `[hidden, heads · head_dim]`.
#[derive(Debug)]
pub struct Outputs(Vec<Tensor>);

impl Outputs {
    /// Those of a model.
    ///
    /// # Errors
    /// A layer without one.
    pub fn of(model: &mut dyn Model) -> Result<Self> {
        let layers = model.dims().layers;
        let mut found: Vec<Option<Tensor>> = (0..layers).map(|_| None).collect();
        model.visit_projections(&mut |path, projection| {
            if path.ends_with(".o_proj")
                && let Some(slot) = layer_of(path).and_then(|l| found.get_mut(l))
            {
                *slot = Some(projection.dense()?.f_detach()?.f_to_kind(Kind::Float)?);
            }
            Ok(())
        })?;
        let missing = |l: usize| Error::Input(format!("layer {l} has no output projection `o_proj`"));
        found
            .into_iter()
            .enumerate()
            .map(|(l, t)| t.ok_or_else(|| missing(l)))
            .collect::<Result<_>>()
            .map(Self)
    }
}

/// The layer in a path, e.g. 3 of `model.layers.3.self_attn.o_proj`.
pub(super) fn layer_of(path: &str) -> Option<usize> {
    let (_, rest) = path.split_once("layers.")?;
    rest.split('.').next()?.parse().ok()
}

/// What the search looks at.
#[derive(Debug)]
pub struct Search<'a> {
    /// Largest keys of each layer.
    pub max_keys: &'a [Tensor],
    /// Widths of keys and values of each layer.
    pub widths: &'a [Bits],
    /// Channels that share a scale.
    pub group: i64,
    /// The length that positions are stretched to, as for the largest keys.
    pub effective_len: Option<usize>,
}

/// The exponents found.
#[derive(Debug)]
pub struct Found {
    /// The scales.
    pub scales: Scales,
    /// α of each layer.
    pub alphas: Vec<f64>,
    /// Loss of each exponent, by layer.
    pub losses: Vec<Vec<f64>>,
}

impl Search<'_> {
    /// # Errors
    /// What does not fit the model.
    pub(super) fn check(&self, dims: &ModelDims) -> Result<()> {
        for (what, found) in [("largest keys", self.max_keys.len()), ("widths", self.widths.len())] {
            if found != dims.layers {
                return Err(Error::Input(format!("{what} of {found} layers, the model has {}", dims.layers)));
            }
        }
        for (layer, m) in self.max_keys.iter().enumerate() {
            let expected = [dims.kv_heads, dims.head_dim / 2];
            if m.size() != expected {
                let (found, expected) = (format!("{:?}", m.size()), format!("{expected:?}"));
                return Err(Error::ScaleShape { layer, found, expected });
            }
        }
        Ok(())
    }

    /// Losses on one sample, float64 `[layers, ALPHAS]`.
    pub(super) fn losses(&self, model: &dyn Model, outputs: &Outputs, ids: &[u32]) -> Result<Tensor> {
        let heads = model.dims().heads;
        // A cache may be sent to another thread, references to tensors may not: it gets handles of its own.
        let own = |tensors: &[Tensor]| tensors.iter().map(Tensor::shallow_clone).collect::<Vec<_>>();
        let (outputs, max_keys) = (own(&outputs.0), own(self.max_keys));
        let (widths, group) = (self.widths, self.group);
        let step = stretch(ids.len(), self.effective_len)?;
        let mut all = Vec::with_capacity(self.widths.len() * ALPHAS);
        let into = &mut all;
        watch(model, ids, step, move |handed| {
            let layer = handed.site.layer;
            let bits = widths[layer].get();
            let quantized = |t: &Tensor| -> Result<Tensor> {
                Ok(fake_quant(t, bits, group, Mode::FloatZero)?.f_to_kind(t.kind())?)
            };
            let target = handed.attend(handed.q, handed.k, handed.v)?;
            let v = quantized(handed.v)?;
            let output = outputs[layer].f_transpose(0, 1)?;
            for n in 0..ALPHAS {
                let scale = channels(&lambda(&max_keys[layer], alpha(n))?)?;
                let repeated = scale.f_repeat_interleave_self_int(heads / scale.size()[0], 0, None)?;
                let kind = handed.q.kind();
                let k = quantized(&handed.k.f_div(&scale)?.f_to_kind(kind)?)?;
                let q = handed.q.f_mul(&repeated)?.f_to_kind(kind)?;
                // The projection is linear: the error of its result is the projected error.
                let error = handed.attend(&q, &k, &v)?.f_sub(&target)?.f_to_kind(Kind::Float)?;
                let error = error.f_reshape([-1, output.size()[0]])?.f_matmul(&output)?;
                let loss = error.f_square()?.f_mean(Kind::Float)?.f_double_value(&[])?;
                if !loss.is_finite() {
                    return Err(Error::NonFiniteInput { layer });
                }
                into.push(loss);
            }
            Ok(())
        })?;
        Ok(Tensor::f_from_slice(&all)?.f_reshape([-1, ALPHAS as i64])?)
    }

    /// The first smallest loss of each layer, from losses summed over the samples.
    pub(super) fn choose(&self, losses: &Tensor) -> Result<Found> {
        let losses: Vec<Vec<f64>> =
            (0..losses.size2()?.0).map(|l| Ok(Vec::try_from(losses.f_get(l)?)?)).collect::<Result<_>>()?;
        let best =
            |of: &Vec<f64>| alpha((0..of.len()).fold(0, |best, n| if of[n] < of[best] { n } else { best }));
        let alphas: Vec<f64> = losses.iter().map(best).collect();
        Ok(Found { scales: Scales::of(self.max_keys, &alphas)?, alphas, losses })
    }

    /// Searches over some samples.
    ///
    /// # Errors
    /// Keys or widths that do not fit the model, layers with a window, values that are not finite.
    pub fn run(&self, model: &mut dyn Model, samples: &Samples) -> Result<Found> {
        self.check(model.dims())?;
        let outputs = Outputs::of(model)?;
        let mut sum: Option<Tensor> = None;
        for ids in samples.ids() {
            let one = self.losses(model, &outputs, ids)?;
            sum = Some(match sum {
                None => one,
                Some(sum) => sum.f_add(&one)?,
            });
        }
        let sum = sum.ok_or_else(|| Error::EmptyCalibration("there is none".into()))?;
        self.choose(&sum)
    }
}

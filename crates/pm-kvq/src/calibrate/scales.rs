//! Key scales: `λ = clamp(m^α, 1e-4, 1e4)` for each head and rotary pair. Keys are divided by it and queries multiplied, so
//! that attention stays what it was while outliers of the keys move into the queries.

use nics_core::models::ModelDims;
use tch::{Kind, Tensor};

use crate::quantize::finite;
use crate::{Error, Result};

/// The smallest and the largest scale.
pub const RANGE: (f64, f64) = (1e-4, 1e4);

/// The scales of every layer.
#[derive(Debug)]
pub struct Scales {
    layers: Vec<Tensor>,
}

/// `λ` of one layer from its largest keys `[kv_heads, head_dim / 2]`, float32.
pub(super) fn lambda(largest: &Tensor, alpha: f64) -> Result<Tensor> {
    Ok(largest.f_to_kind(Kind::Float)?.f_pow_tensor_scalar(alpha)?.f_clamp(RANGE.0, RANGE.1)?)
}

/// `Λ`, the scale of every channel: `[kv_heads, head_dim / 2]` to `[kv_heads, head_dim]`.
pub(super) fn channels(lambda: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_cat(&[lambda, lambda], -1)?)
}

impl Scales {
    /// Scales of each layer, `[kv_heads, head_dim / 2]`.
    ///
    /// # Errors
    /// [`Error::ScaleShape`]: layers of several shapes, or scales that are not positive numbers within [`RANGE`].
    pub fn new(layers: &[Tensor]) -> Result<Self> {
        let Some(first) = layers.first().map(Tensor::size) else {
            return Err(Error::Input("key scales of no layer".into()));
        };
        let (least, most) = RANGE;
        for (layer, scale) in layers.iter().enumerate() {
            let refused = |found: String| Error::ScaleShape {
                layer,
                found,
                expected: format!("float [kv_heads, head_dim / 2], each from {least} to {most}"),
            };
            if scale.dim() != 2
                || scale.size() != first
                || !matches!(scale.kind(), Kind::Float | Kind::Double)
            {
                return Err(refused(format!("{:?} {:?}", scale.kind(), scale.size())));
            }
            if !finite(scale)? {
                return Err(refused("not finite".into()));
            }
            let (low, high) = (scale.f_min()?.f_double_value(&[])?, scale.f_max()?.f_double_value(&[])?);
            // Float32 does not hold the ends of the range exactly.
            if low < least * 0.999 || high > most * 1.001 {
                return Err(refused(format!("from {low} to {high}")));
            }
        }
        let layers = layers.iter().map(|t| t.f_to_kind(Kind::Float)).collect::<Result<_, _>>()?;
        Ok(Self { layers })
    }

    /// `max_keys^α`, clamped, with one α a layer.
    ///
    /// # Errors
    /// Another number of exponents than of layers, or what [`Scales::new`] refuses.
    pub fn of(max_keys: &[Tensor], alphas: &[f64]) -> Result<Self> {
        if max_keys.len() != alphas.len() {
            let (keys, exponents) = (max_keys.len(), alphas.len());
            return Err(Error::Input(format!("{exponents} exponents for the largest keys of {keys} layers")));
        }
        let layers = max_keys.iter().zip(alphas).map(|(m, alpha)| lambda(m, *alpha));
        Self::new(&layers.collect::<Result<Vec<_>>>()?)
    }

    /// `λ` of each layer, float32 `[kv_heads, head_dim / 2]`.
    pub fn layers(&self) -> &[Tensor] {
        &self.layers
    }

    /// Whether they fit a model.
    ///
    /// # Errors
    /// [`Error::ScaleShape`].
    pub fn check(&self, dims: &ModelDims) -> Result<()> {
        let expected = [dims.kv_heads, dims.head_dim / 2];
        if let Some(layer) = self.layers.iter().position(|t| t.size() != expected) {
            let found = format!("{:?}", self.layers[layer].size());
            return Err(Error::ScaleShape { layer, found, expected: format!("{expected:?}") });
        }
        if self.layers.len() != dims.layers {
            return Err(Error::ScaleShape {
                layer: self.layers.len().min(dims.layers),
                found: format!("there for {} layers", self.layers.len()),
                expected: format!("{} layers", dims.layers),
            });
        }
        Ok(())
    }

    /// What keys of a layer are divided by, `[kv_heads, head_dim]`, and queries are multiplied with, `[heads, head_dim]`;
    /// float32.
    pub(super) fn factors(&self, layer: usize, heads: i64) -> Result<(Tensor, Tensor)> {
        let k = channels(&self.layers[layer])?;
        let q = k.f_repeat_interleave_self_int(heads / k.size()[0], 0, None)?;
        Ok((k, q))
    }
}

//! Root-mean-square normalisation.

use tch::{Kind, Tensor};

use super::memory::{values, values_mut};
use crate::Result;
use crate::checkpoint::TensorPath;

/// Root-mean-square normalisation (Zhang & Sennrich, 2019): `y = x / rms(x) * weight`.
///
/// Statistics are taken in float32 whatever the dtype of `x`, and the product with `weight` in the dtype of `x`, as
/// the reference models do.
#[derive(Debug)]
pub struct RmsNorm {
    /// Scale per channel, `[hidden]`.
    pub weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// Reads `weight` under `at`, e.g. `model.layers.0.input_layernorm`.
    pub fn load(at: &TensorPath, hidden: i64, eps: f64) -> Result<Self> {
        Ok(Self { weight: at.tensor("weight", &[hidden])?, eps })
    }

    /// # Shapes
    /// `x`: `[.., hidden]`, result: the same.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if let (Some(xs), Some(weight)) = (values(x), values(&self.weight))
            && xs.kind() == weight.kind()
            && x.size().last() == self.weight.size().first()
        {
            let mut y = x.f_new_empty(x.size(), (x.kind(), x.device()))?;
            if let Some(ys) = values_mut(&mut y) {
                nics_kernels::norm::rms_norm(xs, weight, self.eps as f32, ys);
                return Ok(y);
            }
        }
        let x32 = x.f_to_kind(Kind::Float)?;
        let mean_square = x32.f_square()?.f_mean_dim(-1i64, true, Kind::Float)?;
        let y = x32.f_mul(&mean_square.f_add_scalar(self.eps)?.f_rsqrt()?)?;
        Ok(self.weight.f_mul(&y.f_to_kind(x.kind())?)?)
    }
}

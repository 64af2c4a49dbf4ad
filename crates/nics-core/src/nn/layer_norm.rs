//! Layer normalisation.

use tch::Tensor;

use super::RmsNorm;
use crate::Result;
use crate::checkpoint::TensorPath;

/// Layer normalisation (Ba et al., 2016): `y = (x - mean) / deviation * weight + bias`.
#[derive(Debug)]
pub struct LayerNorm {
    /// Scale per channel, `[hidden]`.
    pub weight: Tensor,
    /// `[hidden]`.
    pub bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Reads `weight` and `bias` under `at`, e.g. `vision_model.encoder.layers.0.layer_norm1`.
    pub fn load(at: &TensorPath, hidden: i64, eps: f64) -> Result<Self> {
        Ok(Self { weight: at.tensor("weight", &[hidden])?, bias: at.tensor("bias", &[hidden])?, eps })
    }

    /// # Shapes
    /// `x`: `[.., hidden]`, result: the same.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), self.eps, false)?)
    }

    /// The stored tensors by their name below the norm's path.
    pub fn parameters(&mut self) -> [(&'static str, &mut Tensor); 2] {
        [("weight", &mut self.weight), ("bias", &mut self.bias)]
    }
}

/// Either norm, where a configuration chooses.
#[derive(Debug)]
pub enum Norm {
    /// With mean and bias.
    Layer(LayerNorm),
    /// Without.
    Rms(RmsNorm),
}

impl Norm {
    /// Reads a layer norm, or a root-mean-square one where `rms` says so.
    pub fn load(at: &TensorPath, hidden: i64, eps: f64, rms: bool) -> Result<Self> {
        Ok(if rms {
            Self::Rms(RmsNorm::load(at, hidden, eps)?)
        } else {
            Self::Layer(LayerNorm::load(at, hidden, eps)?)
        })
    }

    /// # Shapes
    /// `x`: `[.., hidden]`, result: the same.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Layer(norm) => norm.forward(x),
            Self::Rms(norm) => norm.forward(x),
        }
    }

    /// The stored tensors by their name below the norm's path.
    pub fn parameters(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        match self {
            Self::Layer(norm) => norm.parameters().into(),
            Self::Rms(norm) => vec![("weight", &mut norm.weight)],
        }
    }
}

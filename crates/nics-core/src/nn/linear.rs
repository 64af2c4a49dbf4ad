//! The dense linear layer: the default [`Projection`].

use tch::Tensor;

use crate::Result;
use crate::checkpoint::TensorPath;
use crate::seam::Projection;

/// `y = x Wᵀ + b`.
#[derive(Debug)]
pub struct Linear {
    /// `[out, in]`.
    weight: Tensor,
    /// `[out]`.
    bias: Option<Tensor>,
}

impl Linear {
    /// Reads `weight` and, when `bias` is set, `bias` under `at`, e.g. `model.layers.0.self_attn.q_proj`.
    pub fn load(at: &TensorPath, input: i64, output: i64, bias: bool) -> Result<Self> {
        let weight = at.tensor("weight", &[output, input])?;
        let bias = if bias { Some(at.tensor("bias", &[output])?) } else { None };
        Ok(Self { weight, bias })
    }

    /// A layer over tensors that are already there: `weight` `[out, in]`, `bias` `[out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }
}

impl Projection for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_linear(&self.weight, self.bias.as_ref())?)
    }

    fn dense(&self) -> Result<Tensor> {
        Ok(self.weight.shallow_clone())
    }

    fn bias(&self) -> Option<Tensor> {
        self.bias.as_ref().map(Tensor::shallow_clone)
    }

    fn parameters(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        let mut all = vec![("weight", &mut self.weight)];
        all.extend(self.bias.as_mut().map(|b| ("bias", b)));
        all
    }
}

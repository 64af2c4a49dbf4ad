//! Activations by the names that configurations give them.

use tch::Tensor;

use crate::{Error, Result};

/// An activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x Φ(x)`.
    Gelu,
    /// Its approximation by a hyperbolic tangent.
    GeluTanh,
    /// `x σ(1.702 x)`.
    QuickGelu,
    /// `x σ(x)`.
    Silu,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    /// The activation of a name as transformers' `ACT2FN` has it; `field` is where it was read.
    ///
    /// # Errors
    /// `Error::Config` for a name that is not known.
    pub fn parse(field: &str, name: &str) -> Result<Self> {
        Ok(match name {
            "gelu" => Self::Gelu,
            "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Self::GeluTanh,
            "quick_gelu" => Self::QuickGelu,
            "silu" | "swish" => Self::Silu,
            "relu" => Self::Relu,
            other => {
                return Err(Error::Config(format!(
                    "`{field}` is `{other}`, known are gelu, gelu_pytorch_tanh, gelu_new, gelu_fast, quick_gelu, silu \
                     and relu"
                )));
            }
        })
    }

    /// Each value of `x` through the activation.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Gelu => x.f_gelu("none")?,
            Self::GeluTanh => x.f_gelu("tanh")?,
            Self::QuickGelu => x.f_mul(&x.f_mul_scalar(1.702)?.f_sigmoid()?)?,
            Self::Silu => x.f_silu()?,
            Self::Relu => x.f_relu()?,
        })
    }
}

//! The linear layers and norms of a router.
//!
//! At batch 1 a router is as fast as its weights can be read, so they may be stored in bf16 or int8; sums, biases and
//! norms are in float32 whatever the storage.

use nics_core::checkpoint::TensorPath;
use nics_core::nn::memory::{self, values, values_mut};
use nics_kernels::gemv::{MAX_ROWS, Product, gemv};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::int8;
use crate::Result;

/// How a router keeps the matrices of its linear layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Storage {
    /// float32, as trained.
    #[default]
    F32,
    /// bfloat16: half the bytes.
    Bf16,
    /// 8-bit integers with a scale for each output: a quarter of the bytes.
    Int8,
}

#[derive(Debug)]
enum Weight {
    /// `[out, in]`, float32 or bfloat16.
    Plain(Tensor),
    /// `values` int8 `[out, in]`, `scale` float32 `[out]`: weight = values * scale.
    Int8 { values: Tensor, scale: Tensor },
}

/// `y = x Wᵀ + b`.
#[derive(Debug)]
pub struct Dense {
    weight: Weight,
    /// `[out]`, float32.
    bias: Tensor,
}

impl Dense {
    /// Reads `weight` and `bias` under `at`.
    pub fn load(at: &TensorPath, input: i64, output: i64, storage: Storage) -> Result<Self> {
        let weight = at.tensor("weight", &[output, input])?;
        let bias = at.tensor("bias", &[output])?;
        let weight = match storage {
            Storage::F32 => Weight::Plain(weight),
            Storage::Bf16 => Weight::Plain(in_huge_pages(&weight, Kind::BFloat16)?),
            Storage::Int8 => {
                let (values, scale) = int8::quantize(&weight)?;
                Weight::Int8 { values: in_huge_pages(&values, Kind::Int8)?, scale }
            }
        };
        Ok(Self { weight, bias })
    }

    /// # Shapes
    /// `x`: float32 `[rows, in]`, result: float32 `[rows, out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(y) = self.few_rows(x)? {
            return Ok(y);
        }
        let weight = self.dense()?;
        Ok(x.f_linear(&weight, Some(&self.bias))?)
    }

    /// The weight in float32, `[out, in]`; the layer's own tensor where that is how it is kept.
    pub fn dense(&self) -> Result<Tensor> {
        Ok(match &self.weight {
            Weight::Plain(weight) => weight.f_to_kind(Kind::Float)?,
            Weight::Int8 { values, scale } => values.f_to_kind(Kind::Float)?.f_mul(&scale.f_unsqueeze(1)?)?,
        })
    }

    /// The bias, `[out]`.
    pub fn bias(&self) -> Tensor {
        self.bias.shallow_clone()
    }

    /// Bytes of the weight.
    pub fn bytes(&self) -> usize {
        let of = |t: &Tensor| t.numel() * t.kind().elt_size_in_bytes();
        of(&self.bias)
            + match &self.weight {
                Weight::Plain(weight) => of(weight),
                Weight::Int8 { values, scale } => of(values) + of(scale),
            }
    }

    /// A few rows on the CPU: each weight is read once for all of them. `None` when that is not a case for a kernel.
    fn few_rows(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let (rows, input) = x.size2()?;
        if !(1..=MAX_ROWS as i64).contains(&rows) || x.device() != Device::Cpu {
            return Ok(None);
        }
        let x = if x.is_contiguous() { x.shallow_clone() } else { x.f_contiguous()? };
        let (Some(xs), Some(bias)) = (values(&x), values(&self.bias)) else { return Ok(None) };
        let mut y = x.f_new_empty([rows, self.bias.size()[0]], (Kind::Float, Device::Cpu))?;
        let pool = nics_kernels::pool::own();
        match &self.weight {
            Weight::Plain(weight) => {
                let (Some(weight), Some(y)) = (values(weight), values_mut(&mut y)) else { return Ok(None) };
                gemv(&pool, xs, rows as usize, &mut [Product { weight, bias: Some(bias), y }]);
            }
            Weight::Int8 { values, scale } => {
                int8::product(&pool, &x, values, scale, &self.bias, &mut y, input as usize)?;
            }
        }
        Ok(Some(y))
    }
}

/// A copy in huge pages: weights are read in every step.
fn in_huge_pages(weight: &Tensor, kind: Kind) -> Result<Tensor> {
    let own = memory::in_huge_pages(weight, kind, weight.device())?;
    memory::settle_in_huge_pages(&own);
    Ok(own)
}

/// Layer norm with scale and shift, eps 1e-5.
#[derive(Debug)]
pub struct LayerNorm {
    /// `[width]`.
    pub weight: Tensor,
    /// `[width]`.
    pub bias: Tensor,
}

impl LayerNorm {
    /// Reads `weight` and `bias` under `at`.
    pub fn load(at: &TensorPath, width: i64) -> Result<Self> {
        Ok(Self { weight: at.tensor("weight", &[width])?, bias: at.tensor("bias", &[width])? })
    }

    /// # Shapes
    /// `x`: `[.., width]`, result: the same.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), 1e-5, false)?)
    }
}

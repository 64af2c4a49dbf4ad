//! The dense linear layer: the default [`Projection`].

use nics_kernels::gemv::{MAX_ROWS, Product, gemv};
use tch::Tensor;

use super::memory::{values, values_mut};
use crate::Result;
use crate::checkpoint::TensorPath;
use crate::seam::{Projection, one_by_one};

/// `y = x Wᵀ + b`.
///
/// Up to [`MAX_ROWS`] rows on the CPU go through [`nics_kernels::gemv`], which reads each weight once at the speed of the
/// memory; more rows, other devices and differentiation through libtorch.
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

/// The linear layer at `at`: what the checkpoint's [source of projections](crate::seam::ProjectionSource) makes of it, else
/// [`Linear::load`].
pub fn projection(at: &TensorPath, input: i64, output: i64, bias: bool) -> Result<Box<dyn Projection>> {
    if let Some(source) = at.projections()
        && let Some(made) = source.load(at, input, output, bias)?
    {
        return Ok(made);
    }
    Ok(Box::new(Linear::load(at, input, output, bias)?))
}

/// Several layers over one `x` of a few rows, in one go; `None` when that is not a case for the kernel.
fn few_rows(layers: &[&Linear], x: &Tensor) -> Result<Option<Vec<Tensor>>> {
    let Some(xs) = values(x) else { return Ok(None) };
    let mut shape = x.size();
    let Some(&input) = shape.last() else { return Ok(None) };
    let rows = if input > 0 { xs.len() / input as usize } else { 0 };
    let fits = |l: &&Linear| {
        l.weight.kind() == x.kind()
            && l.weight.size2().is_ok_and(|(_, i)| i == input)
            && values(&l.weight).is_some()
    };
    if !(1..=MAX_ROWS).contains(&rows) || !layers.iter().all(fits) {
        return Ok(None);
    }
    let mut ys = Vec::with_capacity(layers.len());
    for layer in layers {
        let last = shape.len() - 1;
        shape[last] = layer.weight.size()[0];
        ys.push(x.f_new_empty(&shape, (x.kind(), x.device()))?);
    }
    let mut products = Vec::with_capacity(layers.len());
    for (layer, y) in layers.iter().zip(&mut ys) {
        let bias = match &layer.bias {
            None => None,
            Some(bias) => match values(bias) {
                Some(bias) => Some(bias),
                None => return Ok(None),
            },
        };
        let (Some(weight), Some(y)) = (values(&layer.weight), values_mut(y)) else { return Ok(None) };
        products.push(Product { weight, bias, y });
    }
    gemv(&nics_kernels::pool::own(), xs, rows, &mut products);
    Ok(Some(ys))
}

impl Projection for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match few_rows(&[self], x)?.and_then(|mut ys| ys.pop()) {
            Some(y) => Ok(y),
            None => Ok(x.f_linear(&self.weight, self.bias.as_ref())?),
        }
    }

    fn forward_many(&self, others: &[&dyn Projection], x: &Tensor) -> Result<Vec<Tensor>> {
        let layers: Option<Vec<&Linear>> =
            std::iter::once(Some(self)).chain(others.iter().map(|o| o.as_linear())).collect();
        if let Some(layers) = layers
            && let Some(ys) = few_rows(&layers, x)?
        {
            return Ok(ys);
        }
        one_by_one(self, others, x)
    }

    fn as_linear(&self) -> Option<&Linear> {
        Some(self)
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

//! AdamW (Loshchilov & Hutter, 2019) over named parameters, number for number as `torch.optim.AdamW` updates them.

use std::collections::HashSet;

use tch::{Kind, Tensor};

use super::{Result, TrainError};

/// The optimiser's settings; the learning rate comes with every step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the running means of gradient and squared gradient.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of parameters with two or more axes.
    pub weight_decay: f64,
}

/// What the optimiser remembers of one parameter.
#[derive(Debug)]
pub struct Moments {
    /// Running mean of the gradient, of the parameter's shape.
    pub m: Tensor,
    /// Running mean of the squared gradient, of the parameter's shape.
    pub v: Tensor,
    /// Updates that this parameter had: one without gradient in a step is left alone, and so is its count.
    pub updates: u64,
}

/// AdamW with decay on matrices alone: vectors (norm scales, biases) are left undecayed.
///
/// ```text
/// m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
/// w <- w (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
/// ```
#[derive(Debug)]
pub struct AdamW {
    names: Vec<String>,
    params: Vec<Tensor>,
    moments: Vec<Moments>,
    options: AdamWOptions,
}

impl AdamW {
    /// Takes the parameters that are to be trained; the tensors share their storage with the model's.
    ///
    /// # Errors
    /// [`TrainError::Input`] when there is none, a name occurs twice, one tensor has two names (hand tied weights over
    /// once), or a parameter is not a float32 leaf that requires gradients.
    pub fn new(params: Vec<(String, Tensor)>, options: AdamWOptions) -> Result<Self> {
        if params.is_empty() {
            return Err(TrainError::Input("there are no parameters to train".into()));
        }
        let (mut names, mut storages) = (HashSet::new(), HashSet::new());
        for (name, p) in &params {
            let refuse = |what: String| Err(TrainError::Input(format!("parameter {name} {what}")));
            if !names.insert(name.as_str()) {
                return refuse("occurs twice".into());
            }
            if p.numel() > 0 && !storages.insert(p.data_ptr()) {
                return refuse("shares its storage with another: hand tied weights over once".into());
            }
            if p.f_kind()? != Kind::Float {
                return refuse(format!("is {:?}; training works in float32, load the model so", p.f_kind()?));
            }
            if !p.requires_grad() || !p.is_leaf() {
                return refuse("is not a leaf that requires gradients".into());
            }
        }
        let moments = params
            .iter()
            .map(|(_, p)| {
                let p = p.f_detach()?;
                Ok(Moments { m: p.f_zeros_like()?, v: p.f_zeros_like()?, updates: 0 })
            })
            .collect::<Result<_>>()?;
        let (names, params) = params.into_iter().unzip();
        Ok(Self { names, params, moments, options })
    }

    /// The parameters' names, in the order in which they were handed over.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The parameters, in the order of [`names`](Self::names).
    pub fn params(&self) -> &[Tensor] {
        &self.params
    }

    /// What is remembered of each parameter, in the order of [`names`](Self::names).
    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// The moments, to be restored: copied into, or a resumed run would not go on where it stopped.
    pub fn moments_mut(&mut self) -> &mut [Moments] {
        &mut self.moments
    }

    /// One update in place. `grads` are in the order of [`names`](Self::names); a parameter without gradient is left
    /// alone, decay included.
    pub fn step(&mut self, grads: &[Option<Tensor>], lr: f64) -> Result<()> {
        if grads.len() != self.params.len() {
            let (have, want) = (grads.len(), self.params.len());
            return Err(TrainError::Input(format!("{have} gradients for {want} parameters")));
        }
        let _guard = tch::no_grad_guard();
        for ((param, moments), grad) in self.params.iter_mut().zip(&mut self.moments).zip(grads) {
            if let Some(grad) = grad {
                update(param, moments, grad, lr, self.options)?;
            }
        }
        Ok(())
    }
}

/// The order of operations is torch's, so that results agree to rounding.
fn update(param: &mut Tensor, at: &mut Moments, grad: &Tensor, lr: f64, options: AdamWOptions) -> Result<()> {
    let AdamWOptions { betas: [beta1, beta2], eps, weight_decay } = options;
    at.updates += 1;
    let [bias1, bias2] = [beta1, beta2].map(|beta| 1.0 - beta.powi(at.updates.min(i32::MAX as u64) as i32));

    if weight_decay != 0.0 && param.dim() >= 2 {
        let _ = param.f_mul_scalar_(1.0 - lr * weight_decay)?;
    }
    let _ = at.m.f_lerp_(grad, 1.0 - beta1)?;
    let _ = at.v.f_mul_scalar_(beta2)?.f_addcmul_(&grad.f_mul_scalar(1.0 - beta2)?, grad)?;
    let mut denominator = at.v.f_sqrt()?;
    let _ = denominator.f_div_scalar_(bias2.sqrt())?.f_add_scalar_(eps)?;
    let _ = param.f_addcdiv_(&at.m.f_mul_scalar(-lr / bias1)?, &denominator)?;
    Ok(())
}

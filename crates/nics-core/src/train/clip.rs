//! Clipping by global norm, as `torch.nn.utils.clip_grad_norm_` does it.

use tch::Tensor;

use super::Result;

/// The 2-norm of all gradients taken together, 0 when there are none. `None` is a parameter without gradient.
pub fn global_norm(grads: &[Option<Tensor>]) -> Result<f64> {
    let norms = grads.iter().flatten().map(Tensor::f_norm).collect::<Result<Vec<_>, _>>()?;
    if norms.is_empty() {
        return Ok(0.0);
    }
    Ok(Tensor::f_stack(&norms, 0)?.f_norm()?.f_double_value(&[])?)
}

/// What to multiply gradients of global norm `norm` by so that it becomes at most `max_norm`; 0 is no limit.
pub fn clip_coefficient(norm: f64, max_norm: f64) -> f64 {
    if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 }
}

//! The caches that the core brings: [`DenseCache`], the default, and the differentiable [`NoCache`].

mod attention;
mod dense;
mod none;

pub use attention::{attend_even, attend_one, probabilities};
pub use dense::DenseCache;
pub use none::NoCache;

use tch::Tensor;

use crate::seam::Site;
use crate::{Error, Result};

/// Checks what a layer handed over and gives `(rows, heads, kv_heads, head_dim)`.
///
/// # Errors
/// `Error::Input` that names the shapes, when they do not fit each other or the site.
pub fn check_qkv(at: &Site, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(i64, i64, i64, i64)> {
    let refused = || {
        Error::Input(format!(
            "layer {}: attention over {} rows was handed q {:?}, k {:?}, v {:?}; expected q [rows, heads, head_dim] \
             and k, v [rows, kv_heads, head_dim] with kv_heads a divisor of heads",
            at.layer,
            at.rows.len(),
            q.size(),
            k.size(),
            v.size()
        ))
    };
    let (Ok((rows, heads, d)), Ok((k_rows, kv_heads, k_d))) = (q.size3(), k.size3()) else {
        return Err(refused());
    };
    let fits = rows == at.rows.len() as i64
        && k_rows == rows
        && k_d == d
        && v.size() == k.size()
        && kv_heads > 0
        && heads % kv_heads == 0;
    if fits { Ok((rows, heads, kv_heads, d)) } else { Err(refused()) }
}

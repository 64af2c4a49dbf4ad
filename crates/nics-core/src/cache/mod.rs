//! The caches that the core brings: [`DenseCache`], the default, and the differentiable [`NoCache`]; and the rows of
//! tensors that caches of other crates keep too, [`KeptRows`].

mod attention;
mod decode;
mod dense;
mod none;
mod rows;

pub use attention::{attend_even, attend_one, probabilities};
pub use dense::DenseCache;
pub use none::NoCache;
pub use rows::KeptRows;

use tch::{Kind, Tensor};

use crate::seam::{Mask, Site};
use crate::{Error, Result};

/// Checks what a layer handed over and gives `(rows, heads, kv_heads, head_dim)`.
///
/// # Errors
/// `Error::Input` that names the shapes, when they do not fit each other or the site, or are of several dtypes.
pub fn check_qkv(at: &Site, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(i64, i64, i64, i64)> {
    let refused = || {
        Error::Input(format!(
            "layer {}: attention over {} rows was handed q {:?} {:?}, k {:?} {:?}, v {:?} {:?} and a rope of {:?}; \
             expected q [rows, heads, head_dim] and k, v [rows, kv_heads, head_dim] of one floating dtype, with kv_heads \
             a divisor of heads, and rope [rows, head_dim]",
            at.layer,
            at.rows.len(),
            q.size(),
            q.kind(),
            k.size(),
            k.kind(),
            v.size(),
            v.kind(),
            at.rope.cos.size()
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
        && heads > 0
        && heads % kv_heads == 0
        && matches!(q.kind(), Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16)
        && (k.kind(), v.kind()) == (q.kind(), q.kind())
        && at.rope.cos.size() == [rows, d]
        && at.rope.sin.size() == [rows, d];
    if !fits {
        return Err(refused());
    }
    if let Mask::Additive(mask) = at.mask
        && mask.dim() != 4
    {
        return Err(Error::Input(format!(
            "an additive mask is [seqs, heads, rows per sequence, kept] or broadcasts to it, found {:?}",
            mask.size()
        )));
    }
    Ok((rows, heads, kv_heads, d))
}

//! Scaled dot-product attention over dense keys and values, grouped queries, causal or windowed.

use tch::{Kind, Tensor};

use crate::seam::Mask;
use crate::{Error, Result};

/// Attention of one sequence's new rows over all its kept keys.
///
/// # Shapes
/// `q`: `[rows, heads, d]` rotated; `k`, `v`: `[kv_heads, kept, d]` rotated, the new rows last. Result:
/// `[rows, heads, d]`. `q_positions` and `k_positions` ascend; a window is measured in them.
pub fn attend_one(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    q_positions: &[i64],
    k_positions: &[i64],
    mask: Mask,
    scale: f64,
) -> Result<Tensor> {
    let (rows, heads, d) = q.size3()?;
    let (kv_heads, kept, _) = k.size3()?;
    let group = heads / kv_heads;
    if rows == 1 {
        // One row sees a suffix of the keys, so the group's queries can stand as rows of one head: every key is read
        // once for its whole group.
        let from = match mask {
            Mask::Window(w) => first_inside(k_positions, q_positions[0], w),
            Mask::Causal | Mask::Full => 0,
            Mask::Additive(_) => return Err(additive_refused()),
        } as i64;
        let (k, v) = (k.f_narrow(1, from, kept - from)?, v.f_narrow(1, from, kept - from)?);
        let q = q.f_view([1, kv_heads, group, d])?;
        let out = sdpa(&q, &k.f_unsqueeze(0)?, &v.f_unsqueeze(0)?, None, false, scale)?;
        return Ok(out.f_reshape([1, heads, d])?);
    }
    let visible = match mask {
        Mask::Full => None,
        Mask::Causal if rows == kept => None,
        Mask::Causal => Some(visible(q_positions, k_positions, None)?.f_to_device(q.device())?),
        Mask::Window(w) => Some(visible(q_positions, k_positions, Some(w))?.f_to_device(q.device())?),
        Mask::Additive(_) => return Err(additive_refused()),
    };
    let causal = visible.is_none() && matches!(mask, Mask::Causal);
    let q = q.f_transpose(0, 1)?.f_unsqueeze(0)?; // [1, heads, rows, d]
    let (k, v) = (spread(&k.f_unsqueeze(0)?, group)?, spread(&v.f_unsqueeze(0)?, group)?);
    let out = sdpa(&q, &k, &v, visible.as_ref(), causal, scale)?;
    Ok(out.f_squeeze_dim(0)?.f_transpose(0, 1)?)
}

/// Attention of sequences of one length without a cache; differentiable.
///
/// # Shapes
/// `q`: `[seqs, heads, rows, d]` rotated; `k`, `v`: `[seqs, kv_heads, rows, d]` rotated; `positions`: those of all
/// rows, sequence after sequence. Result: `[seqs, heads, rows, d]`.
pub fn attend_even(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    positions: &[i64],
    mask: Mask,
    scale: f64,
) -> Result<Tensor> {
    let (seqs, heads, rows, _) = q.size4()?;
    let group = heads / k.size4()?.1;
    let (k, v) = (spread(k, group)?, spread(v, group)?);
    match mask {
        Mask::Full => sdpa(q, &k, &v, None, false, scale),
        Mask::Causal => sdpa(q, &k, &v, None, true, scale),
        Mask::Additive(m) => sdpa(q, &k, &v, Some(&m.f_to_kind(q.kind())?), false, scale),
        Mask::Window(w) => {
            let each: Vec<Tensor> = positions
                .chunks(rows.max(1) as usize)
                .map(|p| visible(p, p, Some(w)))
                .collect::<Result<_>>()?;
            let m = Tensor::f_stack(&each, 0)?.f_view([seqs, 1, rows, rows])?.f_to_device(q.device())?;
            sdpa(q, &k, &v, Some(&m), false, scale)
        }
    }
}

/// Attention probabilities of the last `last` rows of one sequence, float32 `[heads, last, kept]`; shapes and masks as
/// in [`attend_one`], the additive mask of that sequence included (broadcastable to `[1, heads, rows, kept]`).
#[allow(clippy::too_many_arguments)]
pub fn probabilities(
    q: &Tensor,
    k: &Tensor,
    q_positions: &[i64],
    k_positions: &[i64],
    mask: Mask,
    scale: f64,
    last: usize,
) -> Result<Tensor> {
    let (rows, heads, _) = q.size3()?;
    let last = last.min(rows as usize) as i64;
    let group = heads / k.size3()?.0;
    let q = q.f_narrow(0, rows - last, last)?.f_transpose(0, 1)?.f_to_kind(Kind::Float)?; // [heads, last, d]
    let k = spread(&k.f_unsqueeze(0)?, group)?.f_squeeze_dim(0)?.f_to_kind(Kind::Float)?;
    let mut scores = q.f_matmul(&k.f_transpose(1, 2)?)?.f_mul_scalar(scale)?;
    let q_positions = &q_positions[(rows - last) as usize..];
    let window = match mask {
        Mask::Full => None,
        Mask::Causal => Some(None),
        Mask::Window(w) => Some(Some(w)),
        Mask::Additive(m) => {
            let m = m.f_to_kind(Kind::Float)?;
            let m = if m.size()[2] > 1 { m.f_narrow(2, rows - last, last)? } else { m };
            scores = scores.f_add(&m.f_squeeze_dim(0)?)?;
            None
        }
    };
    if let Some(window) = window {
        let hidden = visible(q_positions, k_positions, window)?.f_logical_not()?.f_to_device(q.device())?;
        scores = scores.f_masked_fill(&hidden, f64::NEG_INFINITY)?;
    }
    Ok(scores.f_softmax(-1, Kind::Float)?)
}

fn additive_refused() -> Error {
    Error::input("an additive mask goes with uncached calls only: use NoCache")
}

fn sdpa(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    causal: bool,
    scale: f64,
) -> Result<Tensor> {
    Ok(Tensor::f_scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale, false)?)
}

/// Repeats each key/value head for its group: `[b, kv_heads, t, d] -> [b, kv_heads * group, t, d]`.
fn spread(x: &Tensor, group: i64) -> Result<Tensor> {
    if group == 1 {
        return Ok(x.shallow_clone());
    }
    let (b, kv_heads, t, d) = x.size4()?;
    Ok(x.f_unsqueeze(2)?.f_expand([b, kv_heads, group, t, d], false)?.f_reshape([
        b,
        kv_heads * group,
        t,
        d,
    ])?)
}

/// First key that a window of `w` ending at `position` still holds.
pub(super) fn first_inside(k_positions: &[i64], position: i64, w: usize) -> usize {
    k_positions.partition_point(|&p| p <= position - w as i64)
}

/// Which keys each row sees, bool `[rows, kept]`. The new rows are the last of the kept ones.
fn visible(q_positions: &[i64], k_positions: &[i64], window: Option<usize>) -> Result<Tensor> {
    let (rows, kept) = (q_positions.len(), k_positions.len());
    let mut seen = vec![false; rows * kept];
    for (i, &position) in q_positions.iter().enumerate() {
        let own = kept - rows + i;
        let from = window.map_or(0, |w| first_inside(k_positions, position, w));
        seen[i * kept + from..=i * kept + own].fill(true);
    }
    Ok(Tensor::f_from_slice(&seen)?.f_view([rows as i64, kept as i64])?)
}

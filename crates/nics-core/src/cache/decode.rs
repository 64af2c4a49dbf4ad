//! The dense cache's way for one new row a sequence on the CPU: rotate, write and attend in one pass
//! ([`nics_kernels::attention`]), instead of a dozen calls of libtorch for each sequence.

use nics_kernels::attention::{Heads, Kept, attend};
use nics_kernels::rotary::rotate;
use nics_kernels::{Element, Values, ValuesMut, pool};
use tch::Tensor;

use super::attention::first_inside;
use crate::Result;
use crate::nn::memory::{floats, values, values_mut};
use crate::seam::{Mask, Site};

/// What one sequence keeps in a layer.
pub struct Stored<'a> {
    /// Keys (rotated), `[kv_heads, capacity, head_dim]`, with room for one row behind the kept ones.
    pub keys: &'a mut Tensor,
    /// Values, of the same shape.
    pub values: &'a mut Tensor,
    /// Positions of the kept rows, ascending.
    pub positions: &'a [i64],
}

/// Whether the call is one row a sequence that kernels can attend.
pub fn fits(at: &Site, q: &Tensor, k: &Tensor, v: &Tensor) -> bool {
    at.rows.even() == Some(1)
        && at.want_scores.is_none()
        && !matches!(at.mask, Mask::Additive(_))
        && [q, k, v].into_iter().all(|t| values(t).is_some())
        && [&at.rope.cos, &at.rope.sin].into_iter().all(|t| floats(t).is_some())
}

/// Writes each sequence's new key (rotated) and value behind the kept ones and attends; `None` when the storage is not
/// for kernels. Shapes have been checked; `stored` goes with the rows of `q` (`[rows, heads, head_dim]`).
pub fn attend_rows(
    at: &Site,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    stored: &mut [Stored],
) -> Result<Option<Tensor>> {
    let (_, queries, d) = q.size3()?;
    let (_, kv_heads, _) = k.size3()?;
    let heads = Heads { queries: queries as usize, keys: kv_heads as usize, dim: d as usize };
    let dim = heads.dim;
    let (Some(qs), Some(ks), Some(vs)) = (values(q), values(k), values(v)) else { return Ok(None) };
    let (Some(cos), Some(sin)) = (floats(&at.rope.cos), floats(&at.rope.sin)) else { return Ok(None) };

    let mut rotated = vec![0f32; qs.len()];
    let mut key = vec![0f32; heads.keys * dim];
    for (i, sequence) in stored.iter_mut().enumerate() {
        let (cos, sin) = (&cos[i * dim..][..dim], &sin[i * dim..][..dim]);
        let (from, len) = (i * heads.queries * dim, heads.queries * dim);
        nics_kernels::each_kind!(&qs, Values, qs => rotate(&qs[from..from + len], cos, sin, at.scale as f32, &mut rotated[from..from + len]));
        let (from, len) = (i * heads.keys * dim, heads.keys * dim);
        nics_kernels::each_kind!(&ks, Values, ks => rotate(&ks[from..from + len], cos, sin, 1.0, &mut key));
        let (row, capacity) = (sequence.positions.len(), sequence.keys.size()[1] as usize);
        let (Some(keys), Some(own_values)) = (values_mut(sequence.keys), values_mut(sequence.values)) else {
            return Ok(None);
        };
        match (keys, own_values, &vs) {
            (ValuesMut::F32(k), ValuesMut::F32(v), Values::F32(new)) => {
                put(k, v, &key, &new[from..from + len], row, capacity, dim);
            }
            (ValuesMut::Bf16(k), ValuesMut::Bf16(v), Values::Bf16(new)) => {
                put(k, v, &key, &new[from..from + len], row, capacity, dim);
            }
            (ValuesMut::F16(k), ValuesMut::F16(v), Values::F16(new)) => {
                put(k, v, &key, &new[from..from + len], row, capacity, dim);
            }
            _ => return Ok(None),
        }
    }
    let mut kept = Vec::with_capacity(stored.len());
    for (sequence, position) in stored.iter().zip(at.rows.positions()) {
        let from = match at.mask {
            Mask::Window(w) => first_inside(sequence.positions, *position, w),
            _ => 0,
        };
        let capacity = sequence.keys.size()[1] as usize;
        let (Some(keys), Some(values)) = (values(sequence.keys), values(sequence.values)) else {
            return Ok(None);
        };
        kept.push(Kept { keys, values, capacity, from, to: sequence.positions.len() + 1 });
    }
    let mut out = q.f_new_empty(q.size(), (q.kind(), q.device()))?;
    let Some(outs) = values_mut(&mut out) else { return Ok(None) };
    attend(&pool::own(), heads, &rotated, &kept, outs);
    Ok(Some(out))
}

/// Writes a key and a value (`[heads, dim]`) as row `row` of `[heads, capacity, dim]`.
fn put<T: Element>(
    keys: &mut [T],
    values: &mut [T],
    key: &[f32],
    value: &[T],
    row: usize,
    capacity: usize,
    dim: usize,
) {
    for (head, (key, value)) in key.chunks_exact(dim).zip(value.chunks_exact(dim)).enumerate() {
        let at = (head * capacity + row) * dim;
        keys[at..at + dim].iter_mut().zip(key).for_each(|(to, from)| *to = T::from_f32(*from));
        values[at..at + dim].copy_from_slice(value);
    }
}

//! The dense cache's way for a few new rows of each sequence on the CPU: rotate, write and attend in one pass
//! ([`nics_kernels::attention`]), instead of a dozen calls of libtorch for each sequence. A row's result is the same bit for bit
//! whatever other rows come with it.

use nics_kernels::attention::{Heads, Kept, attend};
use nics_kernels::rotary::rotate;
use nics_kernels::{Element, Values, ValuesMut, pool};
use tch::Tensor;

use super::attention::first_inside;
use crate::Result;
use crate::nn::memory::{floats, values, values_mut};
use crate::seam::{Mask, Site};

/// The most rows of a sequence in a call: each of them reads all keys again, from a cache.
const FEW: usize = 16;

/// What one sequence keeps in a layer.
pub struct Stored<'a> {
    /// Keys (rotated), `[kv_heads, capacity, head_dim]`, with room for the new rows behind the kept ones.
    pub keys: &'a mut Tensor,
    /// Values, of the same shape.
    pub values: &'a mut Tensor,
    /// Positions of the kept rows, ascending.
    pub positions: &'a [i64],
}

/// Whether the call is a few rows of each sequence that kernels can attend.
pub fn fits(at: &Site, q: &Tensor, k: &Tensor, v: &Tensor) -> bool {
    at.rows.lens().iter().all(|&n| (1..=FEW).contains(&n))
        && at.want_scores.is_none()
        && !matches!(at.mask, Mask::Additive(_))
        && [q, k, v].into_iter().all(|t| values(t).is_some())
        && [&at.rope.cos, &at.rope.sin].into_iter().all(|t| floats(t).is_some())
}

/// Writes each sequence's new keys (rotated) and values behind the kept ones and attends; `None` when the storage is not
/// for kernels. Shapes have been checked; `stored` goes with the sequences of `at`.
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
    for (sequence, (_, first, positions)) in stored.iter_mut().zip(at.rows.iter()) {
        let (kept, capacity) = (sequence.positions.len(), sequence.keys.size()[1] as usize);
        let (Some(mut keys), Some(mut own_values)) = (values_mut(sequence.keys), values_mut(sequence.values))
        else {
            return Ok(None);
        };
        for j in 0..positions.len() {
            let (i, row) = (first + j, kept + j);
            let (cos, sin) = (&cos[i * dim..][..dim], &sin[i * dim..][..dim]);
            let (from, len) = (i * heads.queries * dim, heads.queries * dim);
            nics_kernels::each_kind!(&qs, Values, qs => rotate(&qs[from..from + len], cos, sin, at.scale as f32, &mut rotated[from..from + len]));
            let (from, len) = (i * heads.keys * dim, heads.keys * dim);
            nics_kernels::each_kind!(&ks, Values, ks => rotate(&ks[from..from + len], cos, sin, 1.0, &mut key));
            match (&mut keys, &mut own_values, &vs) {
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
    }
    let mut kept = Vec::with_capacity(at.rows.len());
    for (sequence, (_, _, positions)) in stored.iter().zip(at.rows.iter()) {
        let (before, capacity) = (sequence.positions.len(), sequence.keys.size()[1] as usize);
        let (Some(keys), Some(values)) = (values(sequence.keys), values(sequence.values)) else {
            return Ok(None);
        };
        for (j, &position) in positions.iter().enumerate() {
            let from = match at.mask {
                // Positions ascend, so what is outside among the new rows adds to what is outside among the kept ones.
                Mask::Window(w) => {
                    first_inside(sequence.positions, position, w) + first_inside(positions, position, w)
                }
                _ => 0,
            };
            let to = before + if matches!(at.mask, Mask::Full) { positions.len() } else { j + 1 };
            kept.push(Kept { keys, values, capacity, from, to });
        }
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

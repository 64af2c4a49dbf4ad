//! Attention over what a sequence stores and the rows that it has just got, which are seen as they are.

use nics_core::cache::{attend_one, probabilities};
use nics_core::nn::memory::{floats, values, values_mut};
use nics_core::seam::{Mask, Site};
use nics_kernels::rotary::rotate;
use nics_kernels::{Kind as Format, Values, ValuesMut, each_kind, pool};
use tch::{Device, Kind, Tensor};

use super::positions::Positions;
use super::store::{Layout, NewRows, Pools, Store};
use crate::kernel::{self, Heads, Page, Rows};
use crate::ledger::Ledger;
use crate::{Error, Result};

/// Up to so many rows of a sequence go through the kernel, each over all pages; more are attended by libtorch over a
/// dequantized copy.
pub const FEW: usize = 8;

/// The new rows of a call in float32: what is stored of them, whatever way they are attended.
pub struct Incoming {
    /// Rotated, `[rows, kv_heads, head_dim]`.
    keys: Vec<f32>,
    /// `[rows, kv_heads, head_dim]`.
    values: Vec<f32>,
    /// Values of a row.
    row: usize,
}

impl Incoming {
    /// Rotates the keys and looks whether the format can hold the rows.
    ///
    /// # Errors
    /// Keys or values that are not finite, or too large for the format of exact rows.
    pub fn of(at: &Site, k: &Tensor, v: &Tensor, exact: Format) -> Result<Self> {
        let (_, kv_heads, d) = k.size3()?;
        let keys = rotated(at, k)?;
        let values = widened(v)?;
        let largest = |rows: &[f32]| rows.iter().fold(0f32, |most, x| most.max(x.abs()));
        let most = largest(&keys).max(largest(&values));
        // `max` passes NaN over. What is larger could not be subtracted from its opposite.
        let finite = [&keys, &values].into_iter().all(|rows| rows.iter().all(|x| x.is_finite()));
        if !finite || most > f32::MAX / 4.0 {
            return Err(Error::NonFiniteInput { layer: at.layer });
        }
        if exact == Format::F16 && most > 65504.0 {
            return Err(Error::Input(format!(
                "layer {}: a key or value of {most} does not fit half precision; take exact=bf16",
                at.layer
            )));
        }
        Ok(Self { keys, values, row: (kv_heads * d) as usize })
    }

    /// Those of one sequence.
    pub fn rows(&self, from: usize, len: usize) -> NewRows<'_> {
        let range = from * self.row..(from + len) * self.row;
        NewRows { keys: &self.keys[range.clone()], values: &self.values[range] }
    }
}

/// One sequence of a call.
pub struct Part<'a, 'b> {
    /// What it stores.
    pub store: &'a Store,
    /// Before the call.
    pub ledger: &'a Ledger,
    /// Before the call.
    pub positions: &'a Positions,
    /// Its first row in the call.
    pub from: usize,
    /// Positions of its rows.
    pub new: &'b [i64],
}

/// A call, and where its sequences' rows are stored.
pub struct Call<'a> {
    /// Layer, rotary rows, mask.
    pub at: &'a Site<'a>,
    /// Queries, not rotated, `[rows, heads, head_dim]`.
    pub q: &'a Tensor,
    /// Keys, not rotated, `[rows, kv_heads, head_dim]`.
    pub k: &'a Tensor,
    /// Values, of the shape of the keys.
    pub v: &'a Tensor,
    /// The new rows.
    pub incoming: &'a Incoming,
    /// The cache's memory.
    pub pools: &'a Pools,
    /// How it is laid out.
    pub layout: &'a Layout,
}

impl Call<'_> {
    /// `[rows, heads, head_dim]`, and when asked for, the probabilities of each sequence's last rows.
    pub fn attend(&self, parts: &[Part]) -> Result<(Tensor, Option<Vec<Tensor>>)> {
        let few = |part: &Part| part.new.len() <= FEW && self.at.want_scores.is_none();
        if parts.iter().all(few) {
            return Ok((self.by_kernel(parts)?, None));
        }
        let (q, k) = (self.at.rope.apply(self.q)?, self.at.rope.apply(self.k)?);
        let mut outs = Vec::with_capacity(parts.len());
        let mut scores = self.at.want_scores.map(|_| Vec::new());
        for part in parts {
            if few(part) {
                outs.push(self.by_kernel(std::slice::from_ref(part))?);
            } else {
                outs.push(self.by_copy(part, &q, &k, scores.as_mut())?);
            }
        }
        let out = if outs.len() == 1 { outs.remove(0) } else { Tensor::f_cat(&outs, 0)? };
        Ok((out, scores))
    }

    /// Reads codes where they lie.
    fn by_kernel(&self, parts: &[Part]) -> Result<Tensor> {
        let (_, queries, d) = self.q.size3()?;
        let shape = self.layout.shape;
        let heads = Heads { queries: queries as usize, keys: shape.kv_heads, dim: shape.head_dim };
        let (Some(first), Some(last)) = (parts.first(), parts.last()) else {
            return Ok(self.q.f_narrow(0, 0, 0)?);
        };
        let rows = last.from + last.new.len() - first.from;
        let q = rotated(self.at, self.q)?;
        let q = &q[first.from * heads.queries * heads.dim..][..rows * heads.queries * heads.dim];
        let new: Vec<[Vec<f32>; 2]> = parts.iter().map(|part| self.by_head(part)).collect();
        let mut pages: Vec<Vec<Page>> = Vec::with_capacity(rows);
        for (part, [keys, values]) in parts.iter().zip(&new) {
            let n = part.new.len();
            let stored: Vec<Vec<Page>> = (0..heads.keys)
                .map(|head| {
                    let views = |i| part.store.views(self.pools, self.layout, part.ledger, i, head);
                    views(0).zip(views(1)).map(|(keys, values)| Page { keys, values }).collect()
                })
                .collect();
            for row in 0..n {
                let seen = if matches!(self.at.mask, Mask::Full) { n } else { row + 1 };
                let own = stored.iter().enumerate().flat_map(|(head, stored)| {
                    let of_head = |rows| {
                        Rows::Exact(Values::F32(&slice_of(rows, head, n, heads.dim)[..seen * heads.dim]))
                    };
                    let new = Page { keys: of_head(keys), values: of_head(values) };
                    stored.iter().copied().chain([new])
                });
                pages.push(own.collect());
            }
        }
        let pages: Vec<&[Page]> = pages.iter().map(Vec::as_slice).collect();
        let kind = match self.q.kind() {
            kind @ (Kind::BFloat16 | Kind::Half) => kind,
            _ => Kind::Float,
        };
        let mut out = Tensor::f_empty([rows as i64, queries, d], (kind, Device::Cpu))?;
        if let Some(out) = values_mut(&mut out) {
            kernel::attend(&pool::own(), heads, Values::F32(q), self.at.scale as f32, &pages, out);
        }
        Ok(out.f_to_device(self.q.device())?.f_to_kind(self.q.kind())?)
    }

    /// New keys and values of a sequence, `[kv_heads, rows, head_dim]` each.
    fn by_head(&self, part: &Part) -> [Vec<f32>; 2] {
        let (kv_heads, d, n) = (self.layout.shape.kv_heads, self.layout.shape.head_dim, part.new.len());
        let new = self.incoming.rows(part.from, n);
        [new.keys, new.values].map(|from| {
            let rows = (0..kv_heads).flat_map(|head| (0..n).map(move |row| row * kv_heads + head));
            rows.flat_map(|at| from[at * d..(at + 1) * d].iter().copied()).collect()
        })
    }

    /// Attends over a dequantized copy.
    fn by_copy(
        &self,
        part: &Part,
        q: &Tensor,
        k: &Tensor,
        scores: Option<&mut Vec<Tensor>>,
    ) -> Result<Tensor> {
        let own = |t: &Tensor| t.f_narrow(0, part.from as i64, part.new.len() as i64);
        let (q, k, v) = (own(q)?, own(k)?.f_transpose(0, 1)?, own(self.v)?.f_transpose(0, 1)?);
        let positions = [part.positions.to_vec(), part.new.to_vec()].concat();
        let (k, v) = if part.ledger.tokens() == 0 {
            (k, v)
        } else {
            let [past_k, past_v] = past(part.store, self.pools, self.layout, part.ledger, q.kind())?;
            let joined = |past: Tensor, new: &Tensor| -> Result<Tensor> {
                Ok(Tensor::f_cat(&[&past.f_to_device(new.device())?.f_to_kind(new.kind())?, new], 1)?)
            };
            (joined(past_k, &k)?, joined(past_v, &v)?)
        };
        let Site { mask, scale, .. } = *self.at;
        if let (Some(all), Some(last)) = (scores, self.at.want_scores) {
            all.push(probabilities(&q, &k, part.new, &positions, mask, scale, last)?);
        }
        Ok(attend_one(&q, &k, &v, part.new, &positions, mask, scale)?)
    }
}

/// What is stored, dequantized, `[kv_heads, tokens, head_dim]` each; float32 when `kind` is no format of the kernels.
pub fn past(
    store: &Store,
    pools: &Pools,
    layout: &Layout,
    ledger: &Ledger,
    kind: Kind,
) -> Result<[Tensor; 2]> {
    let kind = if matches!(kind, Kind::BFloat16 | Kind::Half) { kind } else { Kind::Float };
    let shape = [layout.shape.kv_heads as i64, ledger.tokens() as i64, layout.shape.head_dim as i64];
    let new = || Tensor::f_empty(shape, (kind, Device::Cpu));
    let (mut keys, mut values) = (new()?, new()?);
    if ledger.tokens() > 0 {
        match (values_mut(&mut keys), values_mut(&mut values)) {
            (Some(ValuesMut::F32(k)), Some(ValuesMut::F32(v))) => store.read(pools, layout, ledger, [k, v]),
            (Some(ValuesMut::Bf16(k)), Some(ValuesMut::Bf16(v))) => store.read(pools, layout, ledger, [k, v]),
            (Some(ValuesMut::F16(k)), Some(ValuesMut::F16(v))) => store.read(pools, layout, ledger, [k, v]),
            _ => return Err(Error::Input(format!("a copy in {kind:?} cannot be written"))),
        }
    }
    Ok([keys, values])
}

fn slice_of(rows: &[f32], head: usize, n: usize, d: usize) -> &[f32] {
    &rows[head * n * d..(head + 1) * n * d]
}

/// Queries or keys, rotated, in float32.
fn rotated(at: &Site, x: &Tensor) -> Result<Vec<f32>> {
    let (rows, heads, d) = x.size3()?;
    let (heads, d) = (heads as usize, d as usize);
    let mut out = vec![0.0; rows as usize * heads * d];
    let (cos, sin) = (widened(&at.rope.cos)?, widened(&at.rope.sin)?);
    let copy;
    let x = if let Some(x) = values(x) {
        x
    } else {
        copy = widened(x)?;
        Values::F32(&copy)
    };
    each_kind!(x, Values, x => {
        let angles = cos.chunks_exact(d).zip(sin.chunks_exact(d));
        for ((x, y), (cos, sin)) in x.chunks_exact(heads * d).zip(out.chunks_exact_mut(heads * d)).zip(angles) {
            rotate(x, cos, sin, 1.0, y);
        }
    });
    Ok(out)
}

/// The values of a tensor, wherever it is, in float32.
fn widened(t: &Tensor) -> Result<Vec<f32>> {
    let mut out = vec![0.0; t.numel()];
    if let Some(own) = floats(t) {
        out.copy_from_slice(own);
    } else if let Some(own) = values(t) {
        own.widen(&mut out);
    } else {
        let t = t.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?;
        t.f_copy_data(&mut out, t.numel())?;
    }
    Ok(out)
}

//! RotateKV (arXiv 2501.16383): keys before rotation are rotated over all heads and their channels ordered, values rotated
//! per head; tokens with the largest activations stay exact.

use nics_core::models::{Model, ModelDims};
use tch::{Kind, Tensor};

use super::cache::{Arrived, Method};
use super::format::{Coder, Coders, Format};
use super::hadamard::Hadamard;
use super::rows::Rows;
use crate::calibrate::Samples;
use crate::calibrate::record::watch;
use crate::{Error, Result};

/// Rows are stored before they attend.
#[derive(Debug)]
pub struct RotateKv {
    format: Format,
    group: i64,
    coders: Coders,
    rotation: Hadamard,
    /// For each layer the channel that stands at each place, and the place of each channel; none keeps the order.
    orders: Vec<(Tensor, Tensor)>,
    pivots: usize,
}

impl RotateKv {
    /// Codes of `bits` in groups of `group` channels for a model of these dimensions. `pivots`: so many largest activations
    /// of the input of a sequence's first call (the paper: 20) keep their tokens exact. `orders`: for each layer the order of
    /// the rotated key channels ([`channel_orders`]), int64 `[kv_heads · head_dim]`; empty keeps them as they are.
    ///
    /// # Errors
    /// Groups that do not fit, a width for which no rotation is known, or orders that are no permutations.
    pub fn new(dims: &ModelDims, bits: u32, group: i64, pivots: usize, orders: &[Tensor]) -> Result<Self> {
        let channels = dims.kv_heads * dims.head_dim;
        let format = Format::Groups { bits, group };
        format.check(channels)?;
        let v = Coder::rotated(format, dims.head_dim)?;
        if !orders.is_empty() && orders.len() != dims.layers {
            return Err(Error::Input(format!("{} channel orders for {} layers", orders.len(), dims.layers)));
        }
        let orders = orders.iter().enumerate().map(|(l, order)| {
            let places = order.f_argsort(-1, false)?;
            let all = Tensor::f_arange(channels, (Kind::Int64, order.device()))?;
            if order.kind() != Kind::Int64 || order.size() != [channels] || order.f_sort(0, false)?.0 != all {
                return Err(Error::Input(format!(
                    "layer {l}: the channel order is no permutation of {channels}"
                )));
            }
            Ok((order.f_to_device(dims.device)?, places.f_to_device(dims.device)?))
        });
        Ok(Self {
            format,
            group,
            coders: Coders { k: format.into(), v },
            rotation: Hadamard::new(channels)?,
            orders: orders.collect::<Result<_>>()?,
            pivots,
        })
    }

    /// Numbers of the new rows that stay exact.
    fn exact_rows(&self, new: &Arrived) -> Result<Vec<usize>> {
        if new.first > 0 || new.len == 1 || self.pivots == 0 {
            return Ok(Vec::new());
        }
        let hidden = new.input.size2()?.1;
        let magnitudes = new.input.f_abs()?.f_reshape([-1])?;
        let k = (self.pivots as i64).min(magnitudes.numel() as i64);
        let rows = magnitudes.f_topk(k, 0, true, false)?.1.f_div_scalar_mode(hidden, "floor")?;
        Ok(Vec::<i64>::try_from(rows)?.into_iter().map(|r| r as usize).collect())
    }

    /// What keys before rotary rotation, `[rows, kv_heads, d]`, read back as.
    fn keys(&self, layer: usize, k: &Tensor) -> Result<Tensor> {
        let flat = self.rotation.rotate(&k.f_reshape([-1, self.rotation.order()])?)?;
        let back = match self.orders.get(layer) {
            None => self.format.round_trip(&flat)?,
            Some((order, places)) => {
                self.format.round_trip(&flat.f_index_select(1, order)?)?.f_index_select(1, places)?
            }
        };
        Ok(self.rotation.unrotate(&back)?.f_reshape(k.size())?)
    }
}

/// The order of each layer's rotated key channels: ascending means over all tokens of some samples, of keys before rotary
/// rotation; int64 `[kv_heads · head_dim]`.
///
/// # Errors
/// A width for which no rotation is known; layers with a window.
pub fn channel_orders(model: &dyn Model, samples: &Samples) -> Result<Vec<Tensor>> {
    let channels = model.dims().kv_heads * model.dims().head_dim;
    let mut sums: Vec<Tensor> = Vec::new();
    for ids in samples.ids() {
        let rotation = Hadamard::new(channels)?;
        let into = &mut sums;
        watch(model, ids, 1, move |handed| {
            let k = handed.unrotated_k.f_to_kind(Kind::Float)?.f_reshape([-1, channels])?;
            let sum = rotation.rotate(&k)?.f_sum_dim_intlist([0].as_slice(), false, Kind::Double)?;
            match into.get_mut(handed.site.layer) {
                Some(total) => *total = total.f_add(&sum)?,
                None => into.push(sum),
            }
            Ok(())
        })?;
    }
    sums.iter().map(|sum| Ok(sum.f_argsort_stable(true, 0, false)?)).collect()
}

impl Method for RotateKv {
    fn name(&self) -> String {
        let order = if self.orders.is_empty() { "" } else { ",ordered" };
        format!("rotatekv:{},pivots={}{order}", self.format.name(), self.pivots)
    }

    fn check(&self, dims: &ModelDims) -> Result<()> {
        let channels = dims.kv_heads * dims.head_dim;
        if self.rotation.order() != channels || !(self.orders.is_empty() || self.orders.len() == dims.layers)
        {
            return Err(Error::Input("RotateKV was made for a model of other dimensions".into()));
        }
        self.coders.v.check(dims.head_dim)?;
        if channels % self.group == 0 { Ok(()) } else { self.format.check(channels) }
    }

    fn before(&self, new: &Arrived, rows: &mut Rows) -> Result<()> {
        let exact = self.exact_rows(new)?;
        let which: Vec<usize> =
            new.rows().into_iter().filter(|r| !exact.contains(&(r - new.first))).collect();
        if which.is_empty() {
            return Ok(());
        }
        let (_, v) = rows.pick(&which)?;
        let keys = new.rope.apply(&self.keys(new.layer, new.k)?)?.f_transpose(0, 1)?; // [kv_heads, rows, d]
        let index: Vec<i64> = which.iter().map(|r| (r - new.first) as i64).collect();
        let keys = keys.f_index_select(1, &Tensor::f_from_slice(&index)?.f_to_device(keys.device())?)?;
        rows.store(&which, &keys, &self.coders.v.round_trip(&v)?)
    }

    fn exact(&self, tokens: usize) -> usize {
        tokens.min(self.pivots)
    }

    fn bytes(&self, dims: &ModelDims, stored: usize, exact: usize) -> usize {
        self.coders.bytes(dims, stored, exact)
    }
}

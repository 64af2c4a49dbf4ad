//! GPTQ (Frantar et al., 2022): columns are rounded one after the other, and what is left of each error is made up for by the
//! columns to come, as the second derivatives of the layer's squared error have it.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::quantize::QTensor;
use crate::{Error, Result};

/// How columns are gone through.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct GptqConfig {
    /// Bits of a weight.
    pub bits: u8,
    /// Weights that share a scale; −1 for a whole row.
    pub group: i64,
    /// Whether ranges are symmetric about zero.
    pub sym: bool,
    /// Columns with a large diagonal first.
    pub act_order: bool,
    /// Scales from the original weights, before any column is rounded; needed with `act_order` and groups.
    pub static_groups: bool,
    /// Columns that are rounded before the rest is brought up to date.
    pub block: i64,
    /// What is added to the diagonal, as a share of its mean.
    pub damp: f64,
}

impl GptqConfig {
    /// The published settings.
    pub fn new(bits: u8, group: i64) -> Self {
        Self { bits, group, sym: false, act_order: false, static_groups: false, block: 128, damp: 0.01 }
    }
}

/// `2/n ΣXXᵀ` of a layer's inputs, where `n` counts sequences.
#[derive(Debug)]
pub struct Hessian {
    sum: Tensor,
    samples: f64,
}

impl Hessian {
    /// Of a layer with so many inputs.
    pub fn new(input: i64, device: Device) -> Result<Self> {
        Ok(Self { sum: Tensor::f_zeros([input, input], (Kind::Float, device))?, samples: 0.0 })
    }

    /// Adds `samples` sequences with rows `x`, `[rows, in]`.
    pub fn add(&mut self, x: &Tensor, samples: f64) -> Result<()> {
        let all = self.samples + samples;
        let x = x.f_to_kind(Kind::Float)?.f_mul_scalar((2.0 / all).sqrt())?;
        let kept = self.sum.f_mul_scalar(self.samples / all)?;
        self.sum = kept.f_add(&x.f_transpose(0, 1)?.f_matmul(&x)?)?;
        self.samples = all;
        Ok(())
    }

    /// `[in, in]`.
    pub fn matrix(&self) -> &Tensor {
        &self.sum
    }
}

/// Scale and zero point of some columns, `[out, 1]` each. Ranges hold zero.
struct Grid {
    scale: Tensor,
    zero: Tensor,
    most: f64,
}

impl Grid {
    fn of(w: &Tensor, config: &GptqConfig) -> Result<Self> {
        let most = f64::from((1u32 << config.bits) - 1);
        let mut low = w.f_amin(1i64, true)?.f_clamp_max(0.0)?;
        let mut high = w.f_amax(1i64, true)?.f_clamp_min(0.0)?;
        if config.sym {
            high = high.f_maximum(&low.f_neg()?)?;
            low = high.f_neg()?.f_where_self(&low.f_lt(0.0)?, &low)?;
        }
        // A row of zeros gets a range all the same.
        let none = low.f_eq(0.0)?.f_logical_and(&high.f_eq(0.0)?)?;
        (low, high) = (low.f_masked_fill(&none, -1.0)?, high.f_masked_fill(&none, 1.0)?);
        let scale = high.f_sub(&low)?.f_div_scalar(most)?;
        let zero = if config.sym {
            scale.f_full_like(f64::midpoint(most, 1.0))?
        } else {
            low.f_neg()?.f_div(&scale)?.f_round()?
        };
        Ok(Self { scale, zero, most })
    }

    /// The integers of a column `[out, 1]`, and what they stand for.
    fn round(&self, w: &Tensor) -> Result<(Tensor, Tensor)> {
        let q = w.f_div(&self.scale)?.f_round()?.f_add(&self.zero)?.f_clamp(0.0, self.most)?;
        let back = q.f_sub(&self.zero)?.f_mul(&self.scale)?;
        Ok((q, back))
    }
}

/// A weight `[out, in]` rounded against the second derivatives `[in, in]` of its inputs.
///
/// # Errors
/// Groups that do not divide the weight, ordered columns with groups that are not static, derivatives that are not positive
/// definite even with damping.
pub fn gptq(weight: &Tensor, hessian: &Tensor, config: &GptqConfig) -> Result<QTensor> {
    let (_, input) = weight.size2()?;
    let group = if config.group == -1 { input } else { config.group };
    if group <= 0 || input % group != 0 {
        return Err(Error::GroupDoesNotDivide { name: "a weight".into(), group, input });
    }
    let grouped = group < input;
    if config.act_order && grouped && !config.static_groups {
        return Err(Error::Setting {
            field: "static_groups",
            found: "false".into(),
            expected: "true together with act_order and groups, whose columns would be torn apart otherwise",
        });
    }
    if hessian.size() != [input, input] {
        return Err(Error::Input(format!(
            "second derivatives of shape {:?} for a weight of {input} columns",
            hessian.size()
        )));
    }
    let mut w = weight.f_to_kind(Kind::Float)?;
    let diagonal = hessian.f_diagonal(0, 0, 1)?;
    // An input that is always zero: its weight does not matter and must not disturb the inverse.
    let dead = diagonal.f_eq(0.0)?;
    let mut h = hessian.f_add(&dead.f_to_kind(Kind::Float)?.f_diag(0)?)?;
    w = w.f_masked_fill(&dead.f_unsqueeze(0)?, 0.0)?;
    let whole = Grid::of(&w, config)?;
    let grids: Vec<Grid> = if grouped && config.static_groups {
        (0..input / group)
            .map(|g| Grid::of(&w.f_narrow(1, g * group, group)?, config))
            .collect::<Result<_>>()?
    } else {
        Vec::new()
    };
    let order = if config.act_order { Some(h.f_diagonal(0, 0, 1)?.f_argsort(0, true)?) } else { None };
    if let Some(order) = &order {
        w = w.f_index_select(1, order)?;
        h = h.f_index_select(0, order)?.f_index_select(1, order)?;
    }
    let columns: Vec<i64> = match &order {
        Some(order) => Vec::try_from(order)?,
        None => (0..input).collect(),
    };
    let inverse = upper_inverse(&h, config.damp)?;

    let mut integers = Vec::with_capacity(input as usize);
    let mut own: Vec<Grid> = Vec::new();
    let mut from = 0;
    while from < input {
        let to = (from + config.block.max(1)).min(input);
        let mut block = w.f_narrow(1, from, to - from)?;
        let mut errors = Vec::with_capacity((to - from) as usize);
        let local = inverse.f_narrow(0, from, to - from)?.f_narrow(1, from, to - from)?;
        for i in 0..to - from {
            let at = from + i;
            let grid = if !grouped {
                &whole
            } else if config.static_groups {
                &grids[(columns[at as usize] / group) as usize]
            } else {
                if at % group == 0 {
                    own.push(Grid::of(&w.f_narrow(1, at, group)?, config)?);
                }
                &own[own.len() - 1]
            };
            let column = block.f_narrow(1, i, 1)?;
            let (q, back) = grid.round(&column)?;
            let error = column.f_sub(&back)?.f_div(&local.f_get(i)?.f_get(i)?)?;
            let row = local.f_narrow(0, i, 1)?.f_narrow(1, i, to - from - i)?;
            let rest = block.f_narrow(1, i, to - from - i)?.f_sub(&error.f_matmul(&row)?)?;
            block = Tensor::f_cat(&[block.f_narrow(1, 0, i)?, rest], 1)?;
            integers.push(q);
            errors.push(error);
        }
        if to < input {
            let errors = Tensor::f_cat(&errors, 1)?;
            let beyond = inverse.f_narrow(0, from, to - from)?.f_narrow(1, to, input - to)?;
            let rest = w.f_narrow(1, to, input - to)?.f_sub(&errors.f_matmul(&beyond)?)?;
            w = Tensor::f_cat(&[w.f_narrow(1, 0, to)?, rest], 1)?;
        }
        from = to;
    }
    let mut q = Tensor::f_cat(&integers, 1)?;
    if let Some(order) = &order {
        q = q.f_index_select(1, &order.f_argsort(0, false)?)?;
    }
    let used: Vec<&Grid> = match (grouped, config.static_groups) {
        (false, _) => vec![&whole],
        (true, true) => grids.iter().collect(),
        (true, false) => own.iter().collect(),
    };
    let join = |of: &dyn Fn(&Grid) -> Tensor| -> Result<Tensor> {
        Ok(Tensor::f_cat(&used.iter().map(|g| of(g)).collect::<Vec<_>>(), 1)?)
    };
    Ok(QTensor {
        q: q.f_to_kind(Kind::Uint8)?,
        scale: join(&|g| g.scale.shallow_clone())?,
        zero: join(&|g| g.zero.shallow_clone())?.f_to_kind(Kind::Uint8)?,
    })
}

/// The upper Cholesky factor of the inverse of a damped matrix.
fn upper_inverse(h: &Tensor, damp: f64) -> Result<Tensor> {
    let mean = h.f_diagonal(0, 0, 1)?.f_mean(Kind::Float)?.f_double_value(&[])?;
    let n = h.size()[0];
    let damping = Tensor::f_eye(n, (Kind::Float, h.device()))?.f_mul_scalar(damp * mean)?;
    let not_definite = |e: tch::TchError| {
        Error::Input(format!(
            "the second derivatives of a layer's inputs are not positive definite ({}); give more samples, or raise the \
             damping from {damp}",
            e.to_string().lines().next().unwrap_or_default()
        ))
    };
    let lower = h.f_add(&damping)?.f_linalg_cholesky(false).map_err(not_definite)?;
    let inverse = lower.f_cholesky_inverse(false)?;
    inverse.f_linalg_cholesky(true).map_err(not_definite)
}

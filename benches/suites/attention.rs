//! Attention of one new row over kept keys and values, at 14 query heads over 2 key/value heads of 64: our kernel, and
//! libtorch's scaled dot-product attention on the same memory.
//!
//! Nothing is rotated or appended on either side. As in `gemv`, a turn goes through more memory than caches hold.

use anyhow::{Context, Result, bail};
use nics_core::device::dtype_name;
use nics_core::nn::memory::{floats as slice, values, values_mut};
use nics_kernels::attention::{Heads, Kept, attend};
use nics_kernels::pool;
use tch::{Kind, Tensor};

use crate::figure::{Case, id};
use crate::memory::{WORKING_SET, random};
use crate::peers::libtorch::floats;
use crate::race::{Contender, race, tell, timed};
use crate::settings::{SEED, Settings};

const SUITE: &str = "attention";
const AXIS: &str = "context (tokens)";
const HEADS: Heads = Heads { queries: 14, keys: 2, dim: 64 };

fn name(batch: i64) -> String {
    format!("batch {batch}")
}

/// Runs the suite.
pub fn run(settings: &Settings) -> Result<()> {
    let contexts: &[i64] = settings.pick(&[128, 2048, 8192], &[2048], &[20]);
    let batches: &[i64] = settings.pick(&[1, 16], &[1, 16], &[1, 3]);
    for kind in [Kind::Float, Kind::BFloat16] {
        for &context in contexts {
            for &batch in batches {
                if settings.wants(&id(SUITE, &dtype_name(kind), &name(batch), AXIS, context as f64)) {
                    tell(settings, &measure(settings, kind, context, batch)?)?;
                }
            }
        }
    }
    Ok(())
}

fn measure(settings: &Settings, kind: Kind, context: i64, batch: i64) -> Result<Case> {
    let (queries, keys, dim) = (HEADS.queries as i64, HEADS.keys as i64, HEADS.dim as i64);
    let bytes = (2 * batch * keys * context * dim) as usize * kind.elt_size_in_bytes();
    // A few keys a call are quickly read: thousands of copies would take long for their calls alone.
    let copies = settings.pick(WORKING_SET, WORKING_SET, 0).div_ceil(bytes).clamp(1, 8192) as i64;
    let all_keys = random(&[copies, batch, keys, context, dim], kind, SEED)?;
    let all_values = random(&[copies, batch, keys, context, dim], kind, SEED + 1)?;
    let layers = (0..copies)
        .map(|i| Ok((all_keys.f_select(0, i)?, all_values.f_select(0, i)?)))
        .collect::<Result<Vec<(Tensor, Tensor)>>>()?;
    let q = random(&[1, batch, queries, 1, dim], kind, SEED + 2)?.f_squeeze_dim(0)?;
    // Our kernel takes scaled queries in float32, which rotation leaves behind.
    let scaled = q.f_to_kind(Kind::Float)?.f_mul_scalar((dim as f64).powf(-0.5))?;
    let scaled = slice(&scaled).context("the queries are no plain memory")?;

    let sequences: Vec<Vec<(Tensor, Tensor)>> = layers
        .iter()
        .map(|(k, v)| (0..batch).map(|s| Ok((k.f_select(0, s)?, v.f_select(0, s)?))).collect())
        .collect::<Result<_>>()?;
    let ours = |layer: &[(Tensor, Tensor)]| -> Result<Tensor> {
        let kept = layer.iter().map(|(k, v)| {
            let (keys, values) = (values(k)?, values(v)?);
            Some(Kept { keys, values, capacity: context as usize, from: 0, to: context as usize })
        });
        let kept: Vec<Kept> = kept.collect::<Option<_>>().context("the keys are no plain memory")?;
        let mut out = q.f_empty_like()?;
        let written = values_mut(&mut out).context("the result is no plain memory")?;
        attend(&pool::own(), HEADS, scaled, &kept, written);
        Ok(out)
    };
    let plain = |(k, v): &(Tensor, Tensor)| -> Result<Tensor> {
        let none: Option<&Tensor> = None;
        Ok(Tensor::f_scaled_dot_product_attention(&q, k, v, none, 0.0, false, None, true)?)
    };

    let (expected, found) = (floats(&ours(&sequences[0])?)?, floats(&plain(&layers[0])?)?);
    let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
    let allowed = largest * if kind == Kind::Float { 1e-3 } else { 2e-2 };
    if found.len() != expected.len() || found.iter().zip(&expected).any(|(a, b)| (a - b).abs() > allowed) {
        bail!("libtorch attends to something else");
    }
    let mut contenders = [
        Contender::new("ours", || {
            timed(copies as f64, || sequences.iter().try_for_each(|l| ours(l).map(drop)))
        }),
        Contender::new("libtorch", || {
            timed(copies as f64, || layers.iter().try_for_each(|l| plain(l).map(drop)))
        }),
    ];
    let runs = race(&mut contenders, &settings.short_budget())?;
    Ok(Case {
        suite: SUITE.into(),
        name: name(batch),
        dtype: dtype_name(kind),
        x: context as f64,
        x_label: AXIS.into(),
        per: "call".into(),
        model: format!("{queries} query heads over {keys} of {dim}"),
        threads: settings.threads,
        seed: SEED,
        // Fewer copies than fill the memory may come from a cache.
        bytes: (copies as usize * bytes >= WORKING_SET / 2).then_some(bytes as u64),
        device: None,
        bandwidth: None,
        runs,
        absent: Vec::new(),
    })
}

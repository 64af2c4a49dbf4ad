//! libtorch alone: Qwen2 and Qwen3 as one would write them with tch in an afternoon, with the operations that libtorch has
//! for them.
//!
//! It shares our weights' memory, huge pages included. Keys and values go into storage that was set aside beforehand, so
//! that nothing is copied as they grow.

use std::collections::HashMap;
use std::time::Instant;

use anyhow::{Context, Result};
use nics_core::models::DecoderConfig;
use tch::{Device, Kind, Tensor};

use super::{Past, Peer};

/// The model.
pub struct Libtorch {
    config: DecoderConfig,
    embed_tokens: Tensor,
    norm: Tensor,
    head: Tensor,
    layers: Vec<Layer>,
    batch: i64,
    position: i64,
    logits: Tensor,
}

struct Layer {
    input_norm: Tensor,
    post_norm: Tensor,
    /// Weight and bias of q, k, v, o, gate, up, down.
    projections: [(Tensor, Option<Tensor>); 7],
    /// Norms of the heads of q and k, which Qwen3 has.
    head_norms: Option<[Tensor; 2]>,
    /// `[batch, kv_heads, room, head_dim]`.
    keys: Tensor,
    values: Tensor,
}

const PROJECTIONS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

impl Libtorch {
    /// Over these parameters, by their checkpoint keys; a head of its own where there is one.
    pub fn new(config: DecoderConfig, weights: Vec<(String, Tensor)>) -> Result<Self> {
        let mut weights: HashMap<String, Tensor> = weights.into_iter().collect();
        let mut take = |name: String| weights.remove(&name).with_context(|| format!("no weight {name}"));
        let layers = (0..config.layers)
            .map(|l| -> Result<Layer> {
                let at = format!("model.layers.{l}");
                let projections = PROJECTIONS.map(|p| -> Result<_> {
                    let weight = take(format!("{at}.{p}.weight"))?;
                    Ok((weight, take(format!("{at}.{p}.bias")).ok()))
                });
                let [q, k, v, o, gate, up, down] = projections;
                let [q_norm, k_norm] =
                    ["q_norm", "k_norm"].map(|n| take(format!("{at}.self_attn.{n}.weight")));
                Ok(Layer {
                    input_norm: take(format!("{at}.input_layernorm.weight"))?,
                    post_norm: take(format!("{at}.post_attention_layernorm.weight"))?,
                    projections: [q?, k?, v?, o?, gate?, up?, down?],
                    head_norms: q_norm.ok().zip(k_norm.ok()).map(|(q, k)| [q, k]),
                    keys: Tensor::new(),
                    values: Tensor::new(),
                })
            })
            .collect::<Result<_>>()?;
        let embed_tokens = take("model.embed_tokens.weight".into())?;
        Ok(Self {
            head: take("lm_head.weight".into()).unwrap_or_else(|_| embed_tokens.shallow_clone()),
            embed_tokens,
            norm: take("model.norm.weight".into())?,
            layers,
            config,
            batch: 0,
            position: 0,
            logits: Tensor::new(),
        })
    }

    fn forward(&mut self, ids: &[i64]) -> Result<Tensor> {
        let c = &self.config;
        let (b, n, at) = (self.batch, ids.len() as i64 / self.batch, self.position);
        let (heads, kv_heads, d) = (c.heads, c.kv_heads, c.head_dim);
        let ids = Tensor::f_from_slice(ids)?.f_view([b, n])?;
        let mut x = Tensor::f_embedding(&self.embed_tokens, &ids, -1, false, false)?; // [b, n, hidden]
        let kind = x.kind();
        let exponents = Tensor::f_arange_start_step(0, d, 2, (Kind::Float, Device::Cpu))?.f_div_scalar(d)?;
        let inv_freq = exponents.f_mul_scalar(-c.rope.theta.ln())?.f_exp()?;
        let angles = Tensor::f_arange_start(at, at + n, (Kind::Float, Device::Cpu))?.f_outer(&inv_freq)?;
        let angles = Tensor::f_cat(&[&angles, &angles], -1)?; // [n, d]
        let (cos, sin) = (angles.f_cos()?.f_to_kind(kind)?, angles.f_sin()?.f_to_kind(kind)?);
        let rotate = |x: &Tensor| -> Result<Tensor> {
            let halves = x.f_chunk(2, -1)?;
            let turned = Tensor::f_cat(&[&halves[1].f_neg()?, &halves[0]], -1)?;
            Ok(x.f_mul(&cos)?.f_add(&turned.f_mul(&sin)?)?)
        };
        let norm = |x: &Tensor, weight: &Tensor| x.f_rms_norm([c.hidden], Some(weight), c.norm_eps);
        // Several rows behind others see all of those and the older ones among themselves.
        let mask = (n > 1 && at > 0)
            .then(|| Tensor::f_ones([n, at + n], (Kind::Bool, Device::Cpu))?.f_tril(at))
            .transpose()?;
        for layer in &mut self.layers {
            let linear = |i: usize, x: &Tensor| {
                let (weight, bias) = &layer.projections[i];
                x.f_linear(weight, bias.as_ref())
            };
            let h = norm(&x, &layer.input_norm)?;
            let split = |x: Tensor, heads| x.f_view([b, n, heads, d])?.f_transpose(1, 2);
            let (mut q, mut k) = (split(linear(0, &h)?, heads)?, split(linear(1, &h)?, kv_heads)?);
            if let Some([q_norm, k_norm]) = &layer.head_norms {
                q = q.f_rms_norm([d], Some(q_norm), c.norm_eps)?;
                k = k.f_rms_norm([d], Some(k_norm), c.norm_eps)?;
            }
            let v = split(linear(2, &h)?, kv_heads)?;
            layer.keys.f_narrow(2, at, n)?.f_copy_(&rotate(&k)?)?;
            layer.values.f_narrow(2, at, n)?.f_copy_(&v)?;
            let (keys, values) = (layer.keys.f_narrow(2, 0, at + n)?, layer.values.f_narrow(2, 0, at + n)?);
            let attended = Tensor::f_scaled_dot_product_attention(
                &rotate(&q)?,
                &keys,
                &values,
                mask.as_ref(),
                0.0,
                n > 1 && mask.is_none(),
                None,
                true,
            )?;
            let attended = attended.f_transpose(1, 2)?.f_reshape([b, n, heads * d])?;
            x = x.f_add(&linear(3, &attended)?)?;
            let h = norm(&x, &layer.post_norm)?;
            let gated = linear(4, &h)?.f_silu()?.f_mul(&linear(5, &h)?)?;
            x = x.f_add(&linear(6, &gated)?)?;
        }
        let last = norm(&x.f_select(1, n - 1)?, &self.norm)?;
        self.position += n;
        let none: Option<&Tensor> = None;
        Ok(last.f_linear(&self.head, none)?)
    }
}

impl Peer for Libtorch {
    fn name(&self) -> &'static str {
        "libtorch"
    }

    fn begin(&mut self, batch: usize, past: &Past, room: usize) -> Result<()> {
        let c = &self.config;
        let rows = past.ids.len() as i64;
        let size = [batch as i64, c.kv_heads, rows + room as i64, c.head_dim];
        let fresh = || Tensor::f_zeros(size, (self.embed_tokens.kind(), Device::Cpu));
        for (l, layer) in self.layers.iter_mut().enumerate() {
            (layer.keys, layer.values) = (fresh()?, fresh()?);
            if let Some((k, v)) = past.kept.get(l) {
                layer.keys.f_narrow(2, 0, rows)?.f_copy_(k)?; // One past for every sequence.
                layer.values.f_narrow(2, 0, rows)?.f_copy_(v)?;
            }
        }
        (self.batch, self.position) = (batch as i64, rows);
        Ok(())
    }

    fn call(&mut self, ids: &[i64]) -> Result<f64> {
        let start = Instant::now();
        self.logits = self.forward(ids)?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        floats(&self.logits)
    }
}

/// All values in float32, row-major.
pub fn floats(t: &Tensor) -> Result<Vec<f32>> {
    Ok(Vec::try_from(t.f_to_kind(Kind::Float)?.f_contiguous()?.f_view([-1])?)?)
}

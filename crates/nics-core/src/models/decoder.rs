//! The decoder of the Llama line: embeddings, layers of attention and gated MLP, final norm, head.
//!
//! Reads top to bottom beside transformers' `modeling_llama.py`: [`Attention`] is `LlamaAttention`, [`Mlp`] is
//! `LlamaMLP`, [`DecoderLayer`], [`Decoder`] is `LlamaForCausalLM` with its `LlamaModel`. Two things differ. Rows of all
//! sequences are concatenated (`[rows, hidden]`, see [`Ragged`]) instead of padded. And a layer rotates nothing: it hands
//! unrotated queries and keys with the rotary rows to the [`KvCache`], whose default, [`crate::cache::DenseCache`],
//! rotates them first ([`crate::nn::Rope::apply`]).

mod config;

use nics_kernels::gate::silu_mul;
use nics_kernels::gemv::MAX_ROWS;
use nics_kernels::pool;
use tch::{Device, Tensor};

pub(super) use config::refuse_quantized;
pub use config::{DecoderConfig, Family, Names, RawConfig};

use super::{Batch, Input, Model, ModelDims, Output, ProjectionVisitor, visit_linears};
use crate::checkpoint::TensorPath;
use crate::device::OneThread;
use crate::nn::memory::{values, values_mut};
use crate::nn::{Linear, RmsNorm, Rope, Rotary, projection};
use crate::seam::{KvCache, LayerHook, Mask, Point, Projection, Ragged, Rows, Site};
use crate::{Error, Result};

/// The projections to queries, keys and values.
pub enum Qkv {
    /// One for each.
    Apart {
        /// `[heads * head_dim, hidden]`.
        q_proj: Box<dyn Projection>,
        /// `[kv_heads * head_dim, hidden]`.
        k_proj: Box<dyn Projection>,
        /// `[kv_heads * head_dim, hidden]`.
        v_proj: Box<dyn Projection>,
    },
    /// One for all, `[kv_heads * (heads / kv_heads + 2) * head_dim, hidden]`; see [`Names::wqkv`].
    Fused(Box<dyn Projection>),
}

/// Grouped-query self-attention.
pub struct Attention {
    /// To queries, keys and values.
    pub qkv_proj: Qkv,
    /// `[hidden, heads * head_dim]`.
    pub o_proj: Box<dyn Projection>,
    /// Norm over each head of the queries (Qwen3).
    pub q_norm: Option<RmsNorm>,
    /// Norm over each head of the keys (Qwen3).
    pub k_norm: Option<RmsNorm>,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
}

impl Attention {
    fn load(at: &TensorPath, c: &DecoderConfig) -> Result<Self> {
        let linear = |name: &str, input, output, bias| projection(&at.at(name), input, output, bias);
        let norm = |name: &str| -> Result<Option<RmsNorm>> {
            if !c.family.qk_norm {
                return Ok(None);
            }
            Ok(Some(RmsNorm::load(&at.at(name), c.head_dim, c.norm_eps)?))
        };
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let (names, bias) = (c.family.names, c.family.qkv_bias);
        Ok(Self {
            qkv_proj: match names.wqkv {
                Some(name) => Qkv::Fused(linear(name, c.hidden, q + 2 * kv, bias)?),
                None => Qkv::Apart {
                    q_proj: linear("q_proj", c.hidden, q, bias)?,
                    k_proj: linear("k_proj", c.hidden, kv, bias)?,
                    v_proj: linear("v_proj", c.hidden, kv, bias)?,
                },
            },
            o_proj: linear(names.o_proj, q, c.hidden, c.family.o_bias)?,
            q_norm: norm("q_norm")?,
            k_norm: norm("k_norm")?,
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
        })
    }

    /// Unrotated queries `[rows, heads, d]`, keys and values `[rows, kv_heads, d]` of normed rows `[rows, hidden]`.
    pub fn qkv(&self, x: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let rows = x.size2()?.0;
        let (mut q, mut k, v) = match &self.qkv_proj {
            Qkv::Apart { q_proj, k_proj, v_proj } => {
                let mut qkv = q_proj.forward_many(&[&**k_proj, &**v_proj], x)?.into_iter();
                let mut next = |heads: i64| -> Result<Tensor> {
                    let t = qkv
                        .next()
                        .ok_or_else(|| Error::input("forward_many gave fewer results than projections"))?;
                    Ok(t.f_view([rows, heads, self.head_dim])?)
                };
                (next(self.heads)?, next(self.kv_heads)?, next(self.kv_heads)?)
            }
            Qkv::Fused(wqkv) => {
                let group = self.heads / self.kv_heads;
                // [rows, kv_heads, group of queries + key + value, d]
                let qkv = wqkv.forward(x)?.f_view([rows, self.kv_heads, group + 2, self.head_dim])?;
                let q = qkv.f_narrow(2, 0, group)?.f_reshape([rows, self.heads, self.head_dim])?;
                (q, qkv.f_select(2, group)?.f_contiguous()?, qkv.f_select(2, group + 1)?.f_contiguous()?)
            }
        };
        if let (Some(q_norm), Some(k_norm)) = (&self.q_norm, &self.k_norm) {
            (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
        }
        Ok((q, k, v))
    }

    /// Attention over normed rows `x` (`[rows, hidden]`), with the output projection. The cache rotates and keeps.
    pub fn forward(&self, x: &Tensor, at: &Site, cache: &mut dyn KvCache) -> Result<crate::seam::Attended> {
        let (q, k, v) = self.qkv(x)?;
        let mut attended = cache.attend(at, &q, &k, &v)?;
        let out = attended.out.f_reshape([-1, self.heads * self.head_dim])?; // [rows, heads, d] -> [rows, heads * d]
        attended.out = self.o_proj.forward(&out)?;
        Ok(attended)
    }
}

/// `down(silu(gate(x)) * up(x))`.
pub struct Mlp {
    /// `[intermediate, hidden]`.
    pub gate_proj: Box<dyn Projection>,
    /// `[intermediate, hidden]`.
    pub up_proj: Box<dyn Projection>,
    /// `[hidden, intermediate]`.
    pub down_proj: Box<dyn Projection>,
}

impl Mlp {
    fn load(at: &TensorPath, c: &DecoderConfig) -> Result<Self> {
        let linear = |name: &str, input, output| projection(&at.at(name), input, output, c.family.mlp_bias);
        let [gate, up, down] = c.family.names.gate_up_down;
        Ok(Self {
            gate_proj: linear(gate, c.hidden, c.intermediate)?,
            up_proj: linear(up, c.hidden, c.intermediate)?,
            down_proj: linear(down, c.intermediate, c.hidden)?,
        })
    }

    /// `x`: `[rows, hidden]`, result: the same.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let both = self.gate_proj.forward_many(&[&*self.up_proj], x)?;
        let [gate, up] = both.as_slice() else {
            return Err(Error::input("forward_many gave another number of results than projections"));
        };
        self.down_proj.forward(&gated(gate, up)?)
    }
}

/// `silu(gate) * up`.
fn gated(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if few(gate)
        && let (Some(gates), Some(ups)) = (values(gate), values(up))
        && gates.kind() == ups.kind()
        && gates.len() == ups.len()
    {
        let mut y = gate.f_new_empty(gate.size(), (gate.kind(), gate.device()))?;
        if let Some(ys) = values_mut(&mut y) {
            silu_mul(&pool::own(), gates, ups, ys);
            return Ok(y);
        }
    }
    Ok(gate.f_silu()?.f_mul(up)?)
}

/// Whether rows `[rows, ..]` on the CPU are few enough for our own kernels.
fn few(x: &Tensor) -> bool {
    x.device() == Device::Cpu && x.size().first().is_some_and(|&rows| rows <= MAX_ROWS as i64)
}

/// One layer: attention and MLP, each behind a norm and added to the residual.
pub struct DecoderLayer {
    /// Before attention.
    pub input_layernorm: RmsNorm,
    /// Attention.
    pub self_attn: Attention,
    /// Before the MLP.
    pub post_attention_layernorm: RmsNorm,
    /// MLP.
    pub mlp: Mlp,
    /// Sliding window, in tokens.
    pub window: Option<usize>,
}

impl DecoderLayer {
    fn load(at: &TensorPath, c: &DecoderConfig, layer: usize) -> Result<Self> {
        let names = c.family.names;
        let [before_attention, before_mlp] = names.norms;
        Ok(Self {
            input_layernorm: RmsNorm::load(&at.at(before_attention), c.hidden, c.norm_eps)?,
            self_attn: Attention::load(&at.at(names.self_attn), c)?,
            post_attention_layernorm: RmsNorm::load(&at.at(before_mlp), c.hidden, c.norm_eps)?,
            mlp: Mlp::load(&at.at(names.mlp), c)?,
            window: c.family.windows[layer],
        })
    }
}

/// A decoder with its head (`LlamaForCausalLM`).
pub struct Decoder {
    /// `model.embed_tokens.weight`, `[vocab, hidden]`.
    pub embed_tokens: Tensor,
    /// `model.layers`.
    pub layers: Vec<DecoderLayer>,
    /// `model.norm`.
    pub norm: RmsNorm,
    /// `lm_head`; over the embedding table when tied.
    pub lm_head: Box<dyn Projection>,
    rotary: Rotary,
    config: DecoderConfig,
    dims: ModelDims,
}

impl Decoder {
    /// Reads all weights under `at` (the checkpoint's root, or `llm` in an omni checkpoint).
    pub fn load(config: DecoderConfig, at: &TensorPath) -> Result<Self> {
        let c = &config;
        let at = &at.because(format!(
            "config.json (hidden_size {}, intermediate_size {}, num_hidden_layers {}, num_attention_heads {}, \
             num_key_value_heads {}, head_dim {}, vocab_size {})",
            c.hidden, c.intermediate, c.layers, c.heads, c.kv_heads, c.head_dim, c.vocab
        ));
        let model = at.at("model");
        let names = c.family.names;
        let embed_tokens = model.at(names.embed_tokens).tensor("weight", &[c.vocab, c.hidden])?;
        let lm_head: Box<dyn Projection> = if c.tied {
            Box::new(Linear::new(embed_tokens.shallow_clone(), None))
        } else {
            projection(&at.at(names.lm_head), c.hidden, c.vocab, false)?
        };
        let layers = (0..c.layers)
            .map(|l| DecoderLayer::load(&model.at("layers").at(l), c, l))
            .collect::<Result<Vec<_>>>()?;
        let norm = RmsNorm::load(&model.at("norm"), c.hidden, c.norm_eps)?;
        let dims = c.dims(at.kind(), at.device());
        let rotary = Rotary::new(c.rope.clone(), at.device());
        Ok(Self { embed_tokens, layers, norm, lm_head, rotary, config, dims })
    }

    /// The configuration that it was built from.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Rotary rows of some positions.
    pub fn rope(&self, rows: &Ragged) -> Result<Rope> {
        self.rotary.rows(rows)
    }

    /// Factor on `q·k`.
    pub fn scale(&self) -> f64 {
        (self.config.head_dim as f64).powf(-0.5)
    }

    fn embedded(&self, batch: &Batch) -> Result<Tensor> {
        let rows = batch.rows.len() as i64;
        match batch.input {
            Input::Ids(ids) if ids.size() == [rows] => self.embed(ids),
            Input::Embeds(x) if x.size() == [rows, self.config.hidden] => Ok(x.f_to_kind(self.dims.kind)?),
            Input::Ids(x) | Input::Embeds(x) => Err(Error::Input(format!(
                "the batch has {rows} rows but its input is of shape {:?} (hidden is {})",
                x.size(),
                self.config.hidden
            ))),
        }
    }
}

impl Model for Decoder {
    fn dims(&self) -> &ModelDims {
        &self.dims
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        if ids.numel() > 0 {
            let (low, high) = (ids.f_min()?.f_int64_value(&[])?, ids.f_max()?.f_int64_value(&[])?);
            if low < 0 || high >= self.config.vocab {
                let found = if low < 0 { low } else { high };
                return Err(Error::Input(format!(
                    "token id {found} is outside the vocabulary of {}",
                    self.config.vocab
                )));
            }
        }
        Ok(Tensor::f_embedding(&self.embed_tokens, ids, -1, false, false)?)
    }

    fn forward(
        &self,
        batch: &Batch,
        cache: &mut dyn KvCache,
        mut hook: Option<&mut dyn LayerHook>,
    ) -> Result<Output> {
        if batch.rows.is_empty() {
            return Err(Error::input("a call without a single row: is the prompt empty?"));
        }
        let mut x = self.embedded(batch)?;
        let _between_kernels = OneThread::when(few(&x));
        let mut rows = batch.rows.clone();
        let mut rope = self.rotary.rows(&rows)?;
        let mut layer_inputs = Vec::new();
        let mut exhausted = Vec::new();
        if let Some(hook) = hook.as_deref_mut() {
            reduce(hook, Point::Embeddings, &mut x, &mut rows, &mut rope, None)?;
        }
        for (l, layer) in self.layers.iter().enumerate() {
            if batch.layer_inputs {
                layer_inputs.push(x.shallow_clone());
            }
            let site = Site {
                layer: l,
                rows: &rows,
                rope: &rope,
                input: &x,
                mask: batch.mask.unwrap_or(layer.window.map_or(Mask::Causal, Mask::Window)),
                want_scores: hook.as_ref().and_then(|h| h.wants_scores(l)),
                scale: self.scale(),
            };
            let attended = layer.self_attn.forward(&layer.input_layernorm.forward(&x)?, &site, cache)?;
            exhausted.extend(attended.exhausted);
            x = x.f_add(&attended.out)?;
            if let Some(hook) = hook.as_deref_mut() {
                let scores = attended.scores.as_deref();
                reduce(hook, Point::AfterAttention(l), &mut x, &mut rows, &mut rope, scores)?;
            }
            x = x.f_add(&layer.mlp.forward(&layer.post_attention_layernorm.forward(&x)?)?)?;
        }
        exhausted.sort_unstable();
        exhausted.dedup();
        Ok(Output { hidden: self.norm.forward(&x)?, rows, layer_inputs, exhausted })
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.lm_head.forward(hidden)
    }

    fn visit_projections(&mut self, f: &mut ProjectionVisitor) -> Result<()> {
        let names = self.config.family.names;
        for (l, layer) in self.layers.iter_mut().enumerate() {
            for (name, projection) in layer.projections(names) {
                f(&format!("model.layers.{l}.{name}"), projection)?;
            }
        }
        f(names.lm_head, &mut self.lm_head)
    }

    fn visit_parameters(&mut self, f: &mut dyn FnMut(&str, &mut Tensor) -> Result<()>) -> Result<()> {
        let names = self.config.family.names;
        let [before_attention, before_mlp] = names.norms;
        f(&format!("model.{}.weight", names.embed_tokens), &mut self.embed_tokens)?;
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let at = format!("model.layers.{l}");
            f(&format!("{at}.{before_attention}.weight"), &mut layer.input_layernorm.weight)?;
            f(&format!("{at}.{before_mlp}.weight"), &mut layer.post_attention_layernorm.weight)?;
            if let (Some(q), Some(k)) = (&mut layer.self_attn.q_norm, &mut layer.self_attn.k_norm) {
                f(&format!("{at}.{}.q_norm.weight", names.self_attn), &mut q.weight)?;
                f(&format!("{at}.{}.k_norm.weight", names.self_attn), &mut k.weight)?;
            }
            visit_linears(&at, layer.projections(names), f)?;
        }
        f("model.norm.weight", &mut self.norm.weight)?;
        if !self.config.tied {
            for (parameter, tensor) in self.lm_head.parameters() {
                f(&format!("{}.{parameter}", names.lm_head), tensor)?;
            }
        }
        Ok(())
    }
}

impl DecoderLayer {
    /// The projections by their names below the layer.
    fn projections(&mut self, names: &Names) -> Vec<(String, &mut Box<dyn Projection>)> {
        let (a, m) = (&mut self.self_attn, &mut self.mlp);
        let mut attention = match &mut a.qkv_proj {
            Qkv::Apart { q_proj, k_proj, v_proj } => {
                vec![("q_proj", q_proj), ("k_proj", k_proj), ("v_proj", v_proj)]
            }
            Qkv::Fused(wqkv) => vec![(names.wqkv.unwrap_or("wqkv"), wqkv)],
        };
        attention.push((names.o_proj, &mut a.o_proj));
        let [gate, up, down] = names.gate_up_down;
        let mlp = [(gate, &mut m.gate_proj), (up, &mut m.up_proj), (down, &mut m.down_proj)];
        let named = |part: &'static str| move |(name, p)| (format!("{part}.{name}"), p);
        attention
            .into_iter()
            .map(named(names.self_attn))
            .chain(mlp.into_iter().map(named(names.mlp)))
            .collect()
    }
}

/// Lets a hook shorten the batch: rows, their positions and their rotary rows go together.
fn reduce(
    hook: &mut dyn LayerHook,
    point: Point,
    x: &mut Tensor,
    rows: &mut Ragged,
    rope: &mut Rope,
    scores: Option<&[Tensor]>,
) -> Result<()> {
    let Some(reduced) = hook.at(point, &Rows { x, ragged: rows }, scores)? else { return Ok(()) };
    let refused = |why: String| Error::Input(format!("the layer hook at {point:?} {why}"));
    if reduced.kept.len() != rows.seqs().len() {
        return Err(refused(format!("names {} sequences of {}", reduced.kept.len(), rows.seqs().len())));
    }
    let (mut kept_rows, mut next) = (Vec::new(), Vec::new());
    for ((s, from, positions), kept) in rows.iter().zip(&reduced.kept) {
        if kept.windows(2).any(|w| w[0] >= w[1]) || kept.last().is_some_and(|&last| last >= positions.len()) {
            return Err(refused(format!("keeps rows of sequence {} out of order or range", s.0)));
        }
        kept_rows.extend(kept.iter().map(|&i| (from + i) as i64));
        next.push((s, kept.iter().map(|&i| positions[i]).collect()));
    }
    if reduced.x.size() != [kept_rows.len() as i64, x.size()[1]] {
        return Err(refused(format!("gives back {:?} for {} kept rows", reduced.x.size(), kept_rows.len())));
    }
    if kept_rows.is_empty() {
        return Err(refused("keeps no row at all".into()));
    }
    *rope = rope.select(&Tensor::f_from_slice(&kept_rows)?.f_to_device(x.device())?)?;
    let planes = rows.planes().map(|all| kept_rows.iter().map(|&row| all[row as usize]).collect());
    *rows = Ragged::new(next);
    if let Some(planes) = planes {
        *rows = std::mem::take(rows).with_planes(planes)?;
    }
    *x = reduced.x;
    Ok(())
}

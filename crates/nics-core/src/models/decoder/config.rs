//! What a decoder is built from, and the fields of config.json that say it.

use serde::Deserialize;
use serde_json::{Map, Value};
use tch::{Device, Kind};

use crate::models::ModelDims;
use crate::nn::RopeConfig;
use crate::{Error, Result};

/// What a decoder is built from.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Width of the residual stream.
    pub hidden: i64,
    /// Width of the MLP.
    pub intermediate: i64,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: i64,
    /// Key/value heads; divides `heads`.
    pub kv_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Rows of the embedding table.
    pub vocab: i64,
    /// `max_position_embeddings`, in tokens.
    pub context: usize,
    /// Added to the mean square in every norm.
    pub norm_eps: f64,
    /// Rotary embeddings.
    pub rope: RopeConfig,
    /// Whether the head is the embedding table.
    pub tied: bool,
    /// In what the family's layer differs.
    pub family: Family,
}

impl DecoderConfig {
    /// The dimensions of a model of it.
    pub fn dims(&self, kind: Kind, device: Device) -> ModelDims {
        ModelDims {
            layers: self.layers,
            hidden: self.hidden,
            intermediate: self.intermediate,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            vocab: self.vocab,
            context: self.context,
            kind,
            device,
        }
    }
}

/// In what the layers of the families differ.
#[allow(clippy::struct_excessive_bools)] // Each is a field of a configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Family {
    /// Biases on q, k, v.
    pub qkv_bias: bool,
    /// Bias on o.
    pub o_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// RMS norm over each head of queries and keys.
    pub qk_norm: bool,
    /// Sliding window of each layer, in tokens.
    pub windows: Vec<Option<usize>>,
    /// What the checkpoint calls the parts.
    pub names: &'static Names,
}

/// What a family's checkpoints call the parts of the decoder.
#[derive(Debug, PartialEq)]
pub struct Names {
    /// The embedding table, under `model`.
    pub embed_tokens: &'static str,
    /// Attention, in a layer.
    pub self_attn: &'static str,
    /// Queries, keys and values in one projection, in attention: each key/value head's group of query heads, then its key,
    /// then its value. `None` where `q_proj`, `k_proj` and `v_proj` stand apart.
    pub wqkv: Option<&'static str>,
    /// The output projection, in attention.
    pub o_proj: &'static str,
    /// The MLP, in a layer.
    pub mlp: &'static str,
    /// Gate, up and down projections, in the MLP.
    pub gate_up_down: [&'static str; 3],
    /// The norms before attention and before the MLP, in a layer.
    pub norms: [&'static str; 2],
    /// The head, beside `model`.
    pub lm_head: &'static str,
}

impl Names {
    /// The names of transformers' Llama, which most families share.
    pub const LLAMA: Self = Self {
        embed_tokens: "embed_tokens",
        self_attn: "self_attn",
        wqkv: None,
        o_proj: "o_proj",
        mlp: "mlp",
        gate_up_down: ["gate_proj", "up_proj", "down_proj"],
        norms: ["input_layernorm", "post_attention_layernorm"],
        lm_head: "lm_head",
    };
}

/// The fields of config.json that the families share, under transformers' names and with its defaults.
#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs, clippy::struct_excessive_bools)]
pub struct RawConfig {
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_hidden_layers: usize,
    pub num_attention_heads: i64,
    pub num_key_value_heads: Option<i64>,
    pub head_dim: Option<i64>,
    pub vocab_size: i64,
    #[serde(default = "default_context")]
    pub max_position_embeddings: usize,
    #[serde(default = "default_eps")]
    pub rms_norm_eps: f64,
    #[serde(default = "default_theta")]
    pub rope_theta: f64,
    #[serde(alias = "rope_parameters")]
    pub rope_scaling: Option<Value>,
    #[serde(default)]
    pub tie_word_embeddings: bool,
    #[serde(default)]
    pub attention_bias: bool,
    #[serde(default)]
    pub mlp_bias: bool,
    #[serde(default = "default_act")]
    pub hidden_act: String,
    pub sliding_window: Option<usize>,
    #[serde(default)]
    pub use_sliding_window: bool,
    #[serde(default = "default_window_layers")]
    pub max_window_layers: usize,
    pub layer_types: Option<Vec<String>>,
}

fn default_context() -> usize {
    2048
}
fn default_eps() -> f64 {
    1e-6
}
fn default_theta() -> f64 {
    10_000.0
}
fn default_act() -> String {
    "silu".into()
}
fn default_window_layers() -> usize {
    28
}

/// Refuses a configuration whose weights are quantized.
pub(in crate::models) fn refuse_quantized(json: &Map<String, Value>) -> Result<()> {
    let Some(method) = json.get("quantization_config").filter(|q| !q.is_null()) else { return Ok(()) };
    let method = method.get("quant_method").and_then(Value::as_str).unwrap_or("of an unnamed method");
    Err(Error::Config(format!(
        "the weights are quantized ({method}); this loader reads bf16, f16 and f32 weights: use the original \
         checkpoint"
    )))
}

/// More layers than any model has.
const MAX_LAYERS: usize = 1 << 16;

impl RawConfig {
    /// Reads and checks the shared fields.
    pub fn parse(json: &Map<String, Value>) -> Result<Self> {
        refuse_quantized(json)?;
        let mut json = json.clone();
        // transformers 5 writes `rope_parameters`; a null beside it must not count as a second value.
        if json.get("rope_parameters").is_some_and(|v| !v.is_null()) {
            json.remove("rope_scaling");
        } else {
            json.remove("rope_parameters");
        }
        let raw: Self = serde_path_to_error::deserialize(Value::Object(json)).map_err(|e| {
            // A missing field is named by the reason, a wrong one by its path.
            let (path, reason) = (e.path().to_string(), e.inner());
            Error::Config(if path == "." { reason.to_string() } else { format!("`{path}`: {reason}") })
        })?;
        let sizes = [
            ("hidden_size", raw.hidden_size),
            ("intermediate_size", raw.intermediate_size),
            ("num_hidden_layers", raw.num_hidden_layers as i64),
            ("num_attention_heads", raw.num_attention_heads),
            ("num_key_value_heads", raw.num_key_value_heads.unwrap_or(raw.num_attention_heads)),
            ("vocab_size", raw.vocab_size),
            ("max_position_embeddings", raw.max_position_embeddings as i64),
        ];
        if let Some((name, found)) = sizes.into_iter().find(|(_, v)| !(1..=1 << 40).contains(v)) {
            return Err(Error::Config(format!("`{name}` is {found}, expected a positive number")));
        }
        // Tables of the layers are made before their first tensor is missed.
        if raw.num_hidden_layers > MAX_LAYERS {
            let found = raw.num_hidden_layers;
            return Err(Error::Config(format!(
                "`num_hidden_layers` is {found}, expected at most {MAX_LAYERS}"
            )));
        }
        if raw.hidden_act != "silu" {
            return Err(Error::Config(format!("`hidden_act` is `{}`, only `silu` is known", raw.hidden_act)));
        }
        Ok(raw)
    }

    /// Window of each layer: `layer_types` where given, else every layer from `max_window_layers` on; none at all
    /// without `use_sliding_window` (transformers' `Qwen2Config`).
    pub fn windows(&self) -> Result<Vec<Option<usize>>> {
        let window = self.sliding_window.filter(|_| self.use_sliding_window);
        if window == Some(0) {
            return Err(Error::Config("`sliding_window` is 0, expected a positive number".into()));
        }
        let Some(types) = &self.layer_types else {
            return Ok((0..self.num_hidden_layers)
                .map(|i| window.filter(|_| i >= self.max_window_layers))
                .collect());
        };
        if types.len() != self.num_hidden_layers {
            return Err(Error::Config(format!(
                "`layer_types` names {} layers, `num_hidden_layers` is {}",
                types.len(),
                self.num_hidden_layers
            )));
        }
        types
            .iter()
            .map(|t| match t.as_str() {
                "full_attention" => Ok(None),
                "sliding_attention" if window.is_some() => Ok(window),
                "sliding_attention" => Err(Error::Config(
                    "`layer_types` asks for sliding attention but `sliding_window` or `use_sliding_window` is not set"
                        .into(),
                )),
                other => Err(Error::Config(format!(
                    "`layer_types` has `{other}`, known are full_attention and sliding_attention"
                ))),
            })
            .collect()
    }

    /// The decoder of a family.
    pub fn decoder(&self, family: Family) -> Result<DecoderConfig> {
        let (heads, kv_heads) =
            (self.num_attention_heads, self.num_key_value_heads.unwrap_or(self.num_attention_heads));
        if heads % kv_heads != 0 {
            return Err(Error::Config(format!(
                "`num_attention_heads` {heads} is not a multiple of `num_key_value_heads` {kv_heads}"
            )));
        }
        if self.head_dim.is_none() && self.hidden_size % heads != 0 {
            return Err(Error::Config(format!(
                "`hidden_size` {} is not a multiple of `num_attention_heads` {heads} and `head_dim` is not given",
                self.hidden_size
            )));
        }
        let head_dim = self.head_dim.unwrap_or(self.hidden_size / heads);
        let rope = RopeConfig::parse(
            self.rope_theta,
            head_dim,
            self.max_position_embeddings,
            self.rope_scaling.as_ref(),
        )?;
        Ok(DecoderConfig {
            hidden: self.hidden_size,
            intermediate: self.intermediate_size,
            layers: self.num_hidden_layers,
            heads,
            kv_heads,
            head_dim,
            vocab: self.vocab_size,
            context: self.max_position_embeddings,
            norm_eps: self.rms_norm_eps,
            rope,
            tied: self.tie_word_embeddings,
            family,
        })
    }
}

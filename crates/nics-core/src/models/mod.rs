//! Model families. One family is one file to be read beside transformers' `modeling_<family>.py`.
//!
//! The decoders of Llama, Qwen2 and Qwen3 are one stack of layers, in [`decoder`]; [`llama`], [`qwen2`] and [`qwen3`]
//! read their configuration and say in what their layer differs, as does [`internlm2`]. A checkpoint's key is the path
//! through the structs: `model.layers.3.self_attn.q_proj.weight` is `decoder.layers[3].self_attn.q_proj`.
//!
//! Models that see are a decoder with a tower and a projector in front ([`multimodal`]): [`llava`] on [`clip`],
//! [`llava_onevision`] on [`siglip`], [`qwen2_vl`], [`qwen2_5_vl`], [`internvl2`].

pub mod clip;
pub mod decoder;
pub mod intern_vit;
pub mod internlm2;
pub mod internvl2;
pub mod llama;
pub mod llava;
pub mod llava_onevision;
pub mod multimodal;
pub mod qwen2;
pub mod qwen2_5_vl;
pub mod qwen2_vl;
pub mod qwen3;
pub mod qwen_vit;
mod read;
mod shape;
pub mod siglip;
pub mod vit;

use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

pub use decoder::{Decoder, DecoderConfig};
pub use multimodal::{
    Embedded, Positions, RotaryPositions, VLM_ARCHITECTURES, Vision, Vlm, load_vlm, load_vlm_at,
    vlm_architecture,
};
pub use read::{NewTokens, read, read_last};
pub use shape::{PRESETS, Preset, Shape, shape};

use crate::checkpoint::{Checkpoint, Dtype, TensorPath};
use crate::seam::{KvCache, LayerHook, Mask, Projection, Ragged};
use crate::{Error, Result};

/// Dimensions that caches, hooks and servers need to know of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelDims {
    /// Layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: i64,
    /// Width of the MLP.
    pub intermediate: i64,
    /// Query heads.
    pub heads: i64,
    /// Key/value heads.
    pub kv_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Rows of the embedding table.
    pub vocab: i64,
    /// The most positions that the checkpoint claims, in tokens.
    pub context: usize,
    /// Dtype of the weights.
    pub kind: Kind,
    /// Where the weights are.
    pub device: Device,
}

/// What goes into a call.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// Token ids, int64 `[rows]`.
    Ids(&'a Tensor),
    /// Embeddings, `[rows, hidden]`.
    Embeds(&'a Tensor),
}

/// One call of a model: the new rows of some sequences.
#[derive(Debug)]
pub struct Batch<'a> {
    /// Whose rows, at which positions.
    pub rows: Ragged,
    /// The rows.
    pub input: Input<'a>,
    /// In place of the causal mask (and of a layer's window).
    pub mask: Option<Mask<'a>>,
    /// Whether to give back every layer's input.
    pub layer_inputs: bool,
}

impl<'a> Batch<'a> {
    /// A causal call.
    pub fn new(rows: Ragged, input: Input<'a>) -> Self {
        Self { rows, input, mask: None, layer_inputs: false }
    }
}

/// What a call gives back.
#[derive(Debug)]
pub struct Output {
    /// Hidden states after the final norm, `[rows, hidden]`; [`Model::logits`] takes them.
    pub hidden: Tensor,
    /// Whose they are: fewer than went in when a hook shortened the batch.
    pub rows: Ragged,
    /// Input of each layer, `[rows, hidden]`, when asked for.
    pub layer_inputs: Vec<Tensor>,
    /// Sequences whose budget in the cache is now full.
    pub exhausted: Vec<crate::seam::SeqId>,
}

/// Sees a linear layer with its path and may replace it.
pub type ProjectionVisitor<'a> = dyn FnMut(&str, &mut Box<dyn Projection>) -> Result<()> + 'a;

/// A language model, as generation, training and methods see it.
pub trait Model: Send {
    /// Its dimensions.
    fn dims(&self) -> &ModelDims;

    /// Token embeddings: int64 `[rows]` to `[rows, hidden]`.
    fn embed(&self, ids: &Tensor) -> Result<Tensor>;

    /// Runs the rows through all layers and the final norm.
    fn forward(
        &self,
        batch: &Batch,
        cache: &mut dyn KvCache,
        hook: Option<&mut dyn LayerHook>,
    ) -> Result<Output>;

    /// `[.., hidden]` after the final norm to `[.., vocab]`.
    fn logits(&self, hidden: &Tensor) -> Result<Tensor>;

    /// Hands every linear layer, with its path, to `f`, which may replace it.
    fn visit_projections(&mut self, f: &mut ProjectionVisitor) -> Result<()>;

    /// Hands every parameter, with its checkpoint key, to `f`, which may replace it. A tied head is not visited.
    fn visit_parameters(&mut self, f: &mut dyn FnMut(&str, &mut Tensor) -> Result<()>) -> Result<()>;
}

/// Hands parameters to `f`, with their keys below `at`.
fn visit_below<'t>(
    at: &str,
    parameters: impl IntoIterator<Item = (&'static str, &'t mut Tensor)>,
    f: &mut dyn FnMut(&str, &mut Tensor) -> Result<()>,
) -> Result<()> {
    parameters.into_iter().try_for_each(|(parameter, tensor)| f(&format!("{at}.{parameter}"), tensor))
}

/// Hands the parameters of linear layers to `f`, with their keys below `at`.
fn visit_linears<'p, N: std::fmt::Display>(
    at: &str,
    linears: impl IntoIterator<Item = (N, &'p mut Box<dyn Projection>)>,
    f: &mut dyn FnMut(&str, &mut Tensor) -> Result<()>,
) -> Result<()> {
    let mut linears = linears.into_iter();
    linears.try_for_each(|(name, linear)| visit_below(&format!("{at}.{name}"), linear.parameters(), f))
}

/// Whether a linear layer of this path is in one of a decoder's layers: the head is not.
pub fn in_a_layer(path: &str) -> bool {
    path.contains(".layers.")
}

/// The dtype that a config.json names: bfloat16, float16, else float32.
pub fn named_kind(json: &Map<String, Value>) -> Kind {
    match json.get("torch_dtype").or_else(|| json.get("dtype")).and_then(Value::as_str) {
        Some("bfloat16") => Kind::BFloat16,
        Some("float16") => Kind::Half,
        _ => Kind::Float,
    }
}

/// A decoder of this configuration with weights drawn from `seed`: where no checkpoint is at hand and speed is measured,
/// which does not depend on the values.
pub fn random(config: DecoderConfig, device: Device, kind: Kind, seed: u64) -> Result<Decoder> {
    // Small weights keep hidden states finite in every dtype, whatever the depth.
    load_at(config, &TensorPath::random(seed, 0.02, device, kind))
}

/// How many parameters a model has, a tied head aside; weights that are packed count as well.
pub fn parameters(model: &mut dyn Model) -> Result<usize> {
    let mut parameters = 0;
    model.visit_projections(&mut |_, projection| {
        parameters += projection.as_packed().map_or(0, |p| p.weight().out() * p.weight().input());
        Ok(())
    })?;
    model.visit_parameters(&mut |_, tensor| {
        parameters += tensor.numel();
        Ok(())
    })?;
    Ok(parameters)
}

/// Architectures that this crate reads, as `architectures[0]` of config.json names them.
pub const ARCHITECTURES: [&str; 4] =
    ["InternLM2ForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"];

/// The configuration of a decoder, from the contents of a config.json.
///
/// # Errors
/// `Error::UnsupportedArchitecture` for a family that is not one of [`ARCHITECTURES`], `Error::Config` for a field that
/// is missing or senseless.
pub fn config(json: &Map<String, Value>) -> Result<DecoderConfig> {
    let architecture = json
        .get("architectures")
        .and_then(|a| a.get(0))
        .and_then(Value::as_str)
        .ok_or_else(|| Error::Config("`architectures` is missing or empty".into()))?;
    match architecture {
        "InternLM2ForCausalLM" => internlm2::config(json),
        "LlamaForCausalLM" => llama::config(json),
        "Qwen2ForCausalLM" => qwen2::config(json),
        "Qwen3ForCausalLM" => qwen3::config(json),
        other => {
            Err(Error::UnsupportedArchitecture { found: other.to_owned(), known: ARCHITECTURES.join(", ") })
        }
    }
}

/// The configuration of a decoder that is a part of another model and says its `model_type` alone. Absent fields are
/// transformers' defaults, since its files leave them out.
fn config_of_type(model_type: &str, json: &Map<String, Value>) -> Result<DecoderConfig> {
    type Read = fn(&Map<String, Value>) -> Result<DecoderConfig>;
    let (read, defaults): (Read, Value) = match model_type {
        "llama" => (
            llama::config,
            serde_json::json!({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                "num_attention_heads": 32, "vocab_size": 32000}),
        ),
        "qwen2" | "qwen2_vl" | "qwen2_vl_text" | "qwen2_5_vl" | "qwen2_5_vl_text" => {
            (qwen2::config, serde_json::json!({"max_position_embeddings": 32768}))
        }
        "qwen3" => (qwen3::config, serde_json::json!({})),
        "internlm2" => (internlm2::config, serde_json::json!({})),
        other => {
            let known = "internlm2, llama, qwen2, qwen2_vl, qwen2_5_vl, qwen3".to_owned();
            return Err(Error::UnsupportedArchitecture { found: other.to_owned(), known });
        }
    };
    let mut full = json.clone();
    for (name, value) in defaults.as_object().into_iter().flatten() {
        full.entry(name.as_str()).or_insert_with(|| value.clone());
    }
    read(&full)
}

/// The dtype in which most of a checkpoint's values are stored: bfloat16, float16 or float32 (float64 counts as that, integers
/// and what is [packed](Checkpoint::is_in_projection) do not count).
pub fn stored_kind(checkpoint: &Checkpoint) -> Kind {
    kind_of(checkpoint, |name| !checkpoint.is_in_projection(name))
}

/// As [`stored_kind`], of the tensors whose names `counts` says to count.
pub fn kind_of(checkpoint: &Checkpoint, counts: impl Fn(&str) -> bool) -> Kind {
    let mut values = [(Kind::BFloat16, 0), (Kind::Half, 0), (Kind::Float, 0)];
    for name in checkpoint.names().filter(|name| counts(name)) {
        let of = match checkpoint.dtype(name) {
            Some(Dtype::BF16) => 0,
            Some(Dtype::F16) => 1,
            Some(Dtype::F32 | Dtype::F64) => 2,
            _ => continue,
        };
        values[of].1 += checkpoint.shape(name).map_or(0, |s| s.iter().product::<usize>());
    }
    values.into_iter().max_by_key(|(_, n)| *n).map_or(Kind::Float, |(kind, _)| kind)
}

/// Loads a decoder: any checkpoint whose architecture is one of [`ARCHITECTURES`].
pub fn load(checkpoint: &Checkpoint, device: Device, kind: Kind) -> Result<Decoder> {
    let config =
        config(checkpoint.config_json()).map_err(|e| e.in_file(&checkpoint.dir().join("config.json")))?;
    load_at(config, &checkpoint.loading(device, kind))
}

/// Loads a decoder of which the configuration is known from under `root` (e.g. `llm` of an omni checkpoint), and warns
/// of tensors there that no layer asked for.
pub fn load_at(config: DecoderConfig, root: &TensorPath) -> Result<Decoder> {
    let decoder = Decoder::load(config, root)?;
    report_unread(root);
    Ok(decoder)
}

/// Warns of tensors that no layer asked for.
fn report_unread(root: &TensorPath) {
    let unread = root.unread();
    if let Some(first) = unread.first() {
        tracing::warn!("{} tensors of the checkpoint are not used, {first} among them", unread.len());
    }
}

//! InternLM2 (Cai et al., 2024), beside its `modeling_internlm2.py`.
//!
//! Differs from Llama in names, and in one projection `wqkv` to queries, keys and values: the rows of each key/value head's
//! group of query heads, then those of its key, then those of its value.

use serde_json::{Map, Value};

use super::decoder::{DecoderConfig, Family, Names, RawConfig};
use crate::Result;

/// What InternLM2's checkpoints call the parts.
pub const NAMES: Names = Names {
    embed_tokens: "tok_embeddings",
    self_attn: "attention",
    wqkv: Some("wqkv"),
    o_proj: "wo",
    mlp: "feed_forward",
    gate_up_down: ["w1", "w3", "w2"],
    norms: ["attention_norm", "ffn_norm"],
    lm_head: "output",
};

/// Reads an InternLM2 config.json.
pub fn config(json: &Map<String, Value>) -> Result<DecoderConfig> {
    let raw = RawConfig::parse(json)?;
    let bias = json.get("bias").and_then(Value::as_bool).unwrap_or(false);
    raw.decoder(Family {
        qkv_bias: bias,
        o_bias: bias,
        mlp_bias: false,
        qk_norm: false,
        windows: vec![None; raw.num_hidden_layers],
        names: &NAMES,
    })
}

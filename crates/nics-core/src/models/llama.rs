//! Llama (Touvron et al., 2023; Grattafiori et al., 2024), beside transformers' `modeling_llama.py`.
//!
//! The plain stack of [`super::decoder`]: no biases unless `attention_bias` or `mlp_bias` ask for them, no norm on
//! queries and keys, no window.

use serde_json::{Map, Value};

use super::decoder::{DecoderConfig, Family, Names, RawConfig};
use crate::Result;

/// Reads a Llama config.json.
pub fn config(json: &Map<String, Value>) -> Result<DecoderConfig> {
    let raw = RawConfig::parse(json)?;
    raw.decoder(Family {
        qkv_bias: raw.attention_bias,
        o_bias: raw.attention_bias,
        mlp_bias: raw.mlp_bias,
        qk_norm: false,
        windows: vec![None; raw.num_hidden_layers],
        names: &Names::LLAMA,
    })
}

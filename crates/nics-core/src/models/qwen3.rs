//! Qwen3 (Yang et al., 2025), beside transformers' `modeling_qwen3.py`.
//!
//! Differs from Llama in an RMS norm over each head of the queries and keys (`q_norm`, `k_norm`), a `head_dim` of its
//! own (128 unless the configuration says otherwise), and the window of Qwen2.

use serde_json::{Map, Value};

use super::decoder::{DecoderConfig, Family, Names, RawConfig};
use crate::Result;

/// Reads a Qwen3 config.json.
pub fn config(json: &Map<String, Value>) -> Result<DecoderConfig> {
    let mut raw = RawConfig::parse(json)?;
    raw.head_dim.get_or_insert(128);
    raw.decoder(Family {
        qkv_bias: raw.attention_bias,
        o_bias: raw.attention_bias,
        mlp_bias: false,
        qk_norm: true,
        windows: raw.windows()?,
        names: &Names::LLAMA,
    })
}

//! Qwen2 and Qwen2.5 (Yang et al., 2024), beside transformers' `modeling_qwen2.py`.
//!
//! Differs from Llama in biases on q, k and v, and in a sliding window on the upper layers where `use_sliding_window`
//! asks for one ([`super::decoder::RawConfig::windows`]).

use serde_json::{Map, Value};

use super::decoder::{DecoderConfig, Family, Names, RawConfig};
use crate::Result;

/// Reads a Qwen2 config.json.
pub fn config(json: &Map<String, Value>) -> Result<DecoderConfig> {
    let raw = RawConfig::parse(json)?;
    raw.decoder(Family {
        qkv_bias: true,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        windows: raw.windows()?,
        names: &Names::LLAMA,
    })
}

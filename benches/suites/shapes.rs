//! The shapes that are measured, inputs for them, and what must be read for a step.

use anyhow::{Context, Result};
use nics_core::models::{self, Decoder, DecoderConfig, Model, ModelDims};
use serde_json::Value;

use crate::settings::{Settings, Size};

/// A model's config.json with a name for people.
pub struct Shape {
    /// The name.
    pub name: &'static str,
    /// The configuration, as transformers writes it.
    pub json: Value,
}

impl Shape {
    /// Qwen2.5-0.5B with the fields that peers ask for beside the sizes; a tiny model of the same family in miniature.
    pub fn of(settings: &Settings) -> Result<Self> {
        let preset =
            models::PRESETS.iter().find(|p| p.name == "qwen2.5-0.5b").context("there is no such preset")?;
        let mut json = preset.json();
        let mut set = |field: &str, value: Value| json.insert(field.to_owned(), value);
        for (field, value) in
            [("sliding_window", 32_768), ("max_window_layers", 24), ("bos_token_id", 0), ("eos_token_id", 0)]
        {
            set(field, value.into());
        }
        set("attention_dropout", 0.0.into());
        set("initializer_range", 0.02.into());
        set("use_cache", true.into());
        if settings.size != Size::Miniature {
            return Ok(Self { name: "Qwen2.5-0.5B (random weights)", json: json.into() });
        }
        for (field, value) in [
            ("hidden_size", 64),
            ("intermediate_size", 96),
            ("num_hidden_layers", 2),
            ("num_attention_heads", 4),
            ("head_dim", 16),
            ("vocab_size", 320),
            ("max_position_embeddings", 512),
        ] {
            set(field, value.into());
        }
        Ok(Self { name: "tiny (random weights)", json: json.into() })
    }

    /// The decoder's configuration.
    pub fn config(&self) -> Result<DecoderConfig> {
        Ok(models::config(self.json.as_object().context("the configuration is no object")?)?)
    }
}

/// `n` token ids that depend on `salt` alone.
pub fn ids(vocab: i64, n: usize, salt: u64) -> Vec<i64> {
    let mut state = salt.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        // xorshift64: any order does.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % vocab as u64) as i64
    };
    (0..n).map(|_| next()).collect()
}

/// Bytes of all parameters.
pub fn parameter_bytes(model: &mut Decoder) -> Result<u64> {
    let mut bytes = 0;
    model.visit_parameters(&mut |_, t| {
        bytes += (t.numel() * t.kind().elt_size_in_bytes()) as u64;
        Ok(())
    })?;
    Ok(bytes)
}

/// Bytes of the keys and values of `rows` rows in all layers.
pub fn kept_bytes(dims: &ModelDims, rows: usize) -> u64 {
    let row = 2 * dims.layers * (dims.kv_heads * dims.head_dim) as usize * dims.kind.elt_size_in_bytes();
    (row * rows) as u64
}

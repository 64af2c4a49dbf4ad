//! Models of real shapes with random weights, where no checkpoint is at hand: speed does not depend on the values.

use nics_core::models::{self, DecoderConfig};
use nics_core::{Error, Result};
use serde_json::{Map, Value};
use tch::Kind;

/// Shapes that are known by name: the fields of the published config.json.
pub const PRESETS: [(&str, &str); 2] = [
    (
        "megrez-3b",
        r#"{
            "architectures": ["LlamaForCausalLM"], "hidden_size": 2560, "intermediate_size": 7168,
            "num_hidden_layers": 32, "num_attention_heads": 40, "num_key_value_heads": 10, "vocab_size": 122880,
            "rms_norm_eps": 1e-5, "rope_theta": 5000000.0, "max_position_embeddings": 32768,
            "tie_word_embeddings": false, "hidden_act": "silu", "torch_dtype": "bfloat16"
        }"#,
    ),
    (
        "qwen2.5-0.5b",
        r#"{
            "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
            "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
            "tie_word_embeddings": true, "hidden_act": "silu", "use_sliding_window": false,
            "torch_dtype": "bfloat16"
        }"#,
    ),
];

/// The configuration of a preset or of a config.json, and the dtype that it names.
///
/// # Errors
/// A name that is neither, a file that cannot be read, or what is wrong with the configuration.
pub fn shape(source: &str) -> Result<(DecoderConfig, Kind)> {
    let path = std::path::Path::new(source);
    let (text, file) = match PRESETS.iter().find(|(name, _)| *name == source) {
        Some((_, text)) => ((*text).to_owned(), None),
        None => match std::fs::read_to_string(path) {
            Ok(text) => (text, Some(path)),
            Err(e) => {
                let known: Vec<&str> = PRESETS.iter().map(|(name, _)| *name).collect();
                return Err(Error::Input(format!(
                    "{source}: {e}; expected a config.json or one of {}",
                    known.join(", ")
                )));
            }
        },
    };
    let read = || {
        let json: Map<String, Value> =
            serde_json::from_str(&text).map_err(|e| Error::Config(e.to_string()))?;
        Ok((models::config(&json)?, models::named_kind(&json)))
    };
    read().map_err(|e: Error| match file {
        Some(path) => e.in_file(path),
        None => e,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_have_the_published_sizes() {
        for (name, parameters, kv) in [("megrez-3b", 2.92e9, 40_960), ("qwen2.5-0.5b", 0.494e9, 6_144)] {
            let (c, kind) = shape(name).unwrap();
            let q = c.hidden * c.heads * c.head_dim;
            let kv_rows = c.kv_heads * c.head_dim;
            let layer = 2 * q + 2 * c.hidden * kv_rows + 3 * c.hidden * c.intermediate;
            let tables = c.vocab * c.hidden * if c.tied { 1 } else { 2 };
            let total = (layer * c.layers as i64 + tables) as f64;
            assert!((total / parameters - 1.0).abs() < 0.01, "{name}: {total:e}");
            assert_eq!(c.layers as i64 * kv_rows * 2, kv, "{name}: values a token keeps");
            assert_eq!(kind, Kind::BFloat16);
        }
        let e = shape("gpt-7").unwrap_err().to_string();
        assert!(e.contains("gpt-7") && e.contains("megrez-3b, qwen2.5-0.5b"), "{e}");
    }
}

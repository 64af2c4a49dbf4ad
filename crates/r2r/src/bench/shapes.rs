//! Models of real shapes with random weights, where no checkpoint is at hand: speed does not depend on the values.

use nics_core::models::{self, DecoderConfig};
use serde_json::{Map, Value, json};
use tch::Kind;

use crate::{Error, Result};

/// The fields in which the pairs of the paper differ: name, family, hidden, layers, heads, heads of keys, intermediate,
/// vocabulary, rotary base, epsilon, tied.
type Fields = (&'static str, &'static str, i64, i64, i64, i64, i64, i64, f64, f64, bool);

/// Shapes that are known by name, as their config.json has them.
pub const PRESETS: [Fields; 7] = [
    ("r1-1.5b", "Qwen2", 1536, 28, 12, 2, 8960, 151_936, 1e4, 1e-6, false),
    ("r1-32b", "Qwen2", 5120, 64, 40, 8, 27_648, 152_064, 1e6, 1e-5, false),
    ("qwen3-0.6b", "Qwen3", 1024, 28, 16, 8, 3072, 151_936, 1e6, 1e-6, true),
    ("qwen3-1.7b", "Qwen3", 2048, 28, 16, 8, 6144, 151_936, 1e6, 1e-6, true),
    ("qwen3-4b", "Qwen3", 2560, 36, 32, 8, 9728, 151_936, 1e6, 1e-6, true),
    ("qwen3-8b", "Qwen3", 4096, 36, 32, 8, 12_288, 151_936, 1e6, 1e-6, false),
    ("qwen3-32b", "Qwen3", 5120, 64, 64, 8, 25_600, 151_936, 1e6, 1e-6, false),
];

/// A shape, and what to call it.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Its name, with the number of layers where they are not all there.
    pub name: String,
    /// The configuration.
    pub config: DecoderConfig,
    /// The dtype in which it is published.
    pub kind: Kind,
}

/// The shape of a preset or of a config.json; with `layers`, its first so many layers alone.
///
/// # Errors
/// A name that is neither, a configuration that is not read here, no layer or more than there are.
pub fn shape(source: &str, layers: Option<usize>) -> Result<Shape> {
    let mut json = match PRESETS.iter().find(|p| p.0 == source) {
        Some(fields) => preset(fields),
        None => from_file(source)?,
    };
    let all = json.get("num_hidden_layers").and_then(Value::as_u64).unwrap_or(0);
    let mut name = source.to_owned();
    if let Some(layers) = layers {
        if layers == 0 || layers as u64 > all {
            return Err(Error::setting(
                "the number of layers",
                layers,
                format!("1 to {all}, as {source} has"),
            ));
        }
        json.insert("num_hidden_layers".into(), json!(layers));
        if let Some(types) = json.get_mut("layer_types").and_then(Value::as_array_mut) {
            types.truncate(layers);
        }
        name = format!("{source}, {layers} of {all} layers");
    }
    let kind = models::named_kind(&json);
    Ok(Shape { name, config: models::config(&json)?, kind })
}

fn preset(
    &(_, family, hidden, layers, heads, kv, intermediate, vocab, theta, eps, tied): &Fields,
) -> Map<String, Value> {
    let json = json!({
        "architectures": [format!("{family}ForCausalLM")], "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 128, "intermediate_size": intermediate,
        "vocab_size": vocab, "rope_theta": theta, "rms_norm_eps": eps, "tie_word_embeddings": tied,
        "max_position_embeddings": 40_960, "hidden_act": "silu", "use_sliding_window": false,
        "torch_dtype": "bfloat16",
    });
    json.as_object().cloned().unwrap_or_default()
}

fn from_file(source: &str) -> Result<Map<String, Value>> {
    let known = || PRESETS.map(|p| p.0).join(", ");
    let path = std::path::Path::new(source);
    let path = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    let text = std::fs::read_to_string(&path).map_err(|e| {
        Error::Input(format!("{source}: {e}; expected a config.json, its folder, or one of {}", known()))
    })?;
    serde_json::from_str(&text).map_err(|e| Error::Damaged { path, reason: e.to_string() })
}

/// Parameters of a shape.
#[cfg(test)]
fn parameters(c: &DecoderConfig) -> f64 {
    let layer = 2 * c.hidden * (c.heads + c.kv_heads) * c.head_dim + 3 * c.hidden * c.intermediate;
    let tables = c.vocab * c.hidden * if c.tied { 1 } else { 2 };
    (layer * c.layers as i64 + tables) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_have_the_published_sizes() {
        let published = [1.78e9, 32.8e9, 0.596e9, 1.72e9, 4.02e9, 8.19e9, 32.8e9];
        for (preset, size) in PRESETS.iter().zip(published) {
            let shape = shape(preset.0, None).unwrap();
            let found = parameters(&shape.config);
            assert!((found / size - 1.0).abs() < 0.01, "{}: {found:e}", preset.0);
            assert_eq!(shape.kind, Kind::BFloat16);
        }
    }

    #[test]
    fn a_slice_has_the_first_layers_and_says_so() {
        let slice = shape("qwen3-8b", Some(4)).unwrap();
        assert_eq!((slice.config.layers, slice.name.as_str()), (4, "qwen3-8b, 4 of 36 layers"));
        for layers in [0, 37] {
            let refused = shape("qwen3-8b", Some(layers)).unwrap_err().to_string();
            assert!(refused.contains("1 to 36"), "{refused}");
        }
        let unknown = shape("qwen3-9b", None).unwrap_err().to_string();
        assert!(unknown.contains("qwen3-9b") && unknown.contains("qwen3-8b"), "{unknown}");
    }
}

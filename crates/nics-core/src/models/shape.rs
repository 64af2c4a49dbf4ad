//! Models of published shapes with random weights, where no checkpoint is at hand: speed does not depend on the values.

use std::path::Path;

use serde_json::{Map, Value, json};
use tch::Kind;

use super::{DecoderConfig, config, named_kind};
use crate::{Error, Result};

/// What a preset is made of: the fields of config.json in which published models differ.
#[derive(Debug)]
pub struct Preset {
    /// The name, as people write it.
    pub name: &'static str,
    family: &'static str,
    hidden: i64,
    layers: i64,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
    intermediate: i64,
    vocab: i64,
    rope_theta: f64,
    norm_eps: f64,
    tied: bool,
    context: i64,
}

/// Llama, Qwen2 and Qwen3 at the sizes of their publications; the language models of vision-language models too.
pub const PRESETS: [Preset; 10] = [
    preset("megrez-3b", "Llama", [2560, 32, 40, 10, 64, 7168, 122_880], 5e6, 1e-5, false, 32_768),
    preset("qwen2.5-0.5b", "Qwen2", [896, 24, 14, 2, 64, 4864, 151_936], 1e6, 1e-6, true, 32_768),
    preset("qwen2-7b", "Qwen2", [3584, 28, 28, 4, 128, 18_944, 152_064], 1e6, 1e-6, false, 32_768),
    preset("r1-1.5b", "Qwen2", [1536, 28, 12, 2, 128, 8960, 151_936], 1e4, 1e-6, false, 40_960),
    preset("r1-32b", "Qwen2", [5120, 64, 40, 8, 128, 27_648, 152_064], 1e6, 1e-5, false, 40_960),
    preset("qwen3-0.6b", "Qwen3", [1024, 28, 16, 8, 128, 3072, 151_936], 1e6, 1e-6, true, 40_960),
    preset("qwen3-1.7b", "Qwen3", [2048, 28, 16, 8, 128, 6144, 151_936], 1e6, 1e-6, true, 40_960),
    preset("qwen3-4b", "Qwen3", [2560, 36, 32, 8, 128, 9728, 151_936], 1e6, 1e-6, true, 40_960),
    preset("qwen3-8b", "Qwen3", [4096, 36, 32, 8, 128, 12_288, 151_936], 1e6, 1e-6, false, 40_960),
    preset("qwen3-32b", "Qwen3", [5120, 64, 64, 8, 128, 25_600, 151_936], 1e6, 1e-6, false, 40_960),
];

/// `sizes`: hidden, layers, heads, heads of keys, width of a head, intermediate, vocabulary.
const fn preset(
    name: &'static str,
    family: &'static str,
    sizes: [i64; 7],
    rope_theta: f64,
    norm_eps: f64,
    tied: bool,
    context: i64,
) -> Preset {
    let [hidden, layers, heads, kv_heads, head_dim, intermediate, vocab] = sizes;
    Preset {
        name,
        family,
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        intermediate,
        vocab,
        rope_theta,
        norm_eps,
        tied,
        context,
    }
}

impl Preset {
    /// As its config.json has it.
    pub fn json(&self) -> Map<String, Value> {
        let json = json!({
            "architectures": [format!("{}ForCausalLM", self.family)], "model_type": self.family.to_lowercase(),
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "intermediate_size": self.intermediate,
            "vocab_size": self.vocab, "rope_theta": self.rope_theta, "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied, "max_position_embeddings": self.context, "hidden_act": "silu",
            "use_sliding_window": false, "torch_dtype": "bfloat16",
        });
        match json {
            Value::Object(json) => json,
            _ => Map::new(),
        }
    }
}

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

/// The shape of a preset, of a config.json or of a folder with one; with `layers`, its first so many layers alone.
///
/// # Errors
/// A name that is none of these, a configuration that is not read here, no layer or more than there are.
pub fn shape(source: &str, layers: Option<usize>) -> Result<Shape> {
    let path = Path::new(source);
    let path = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    let known = PRESETS.iter().find(|p| p.name == source);
    let in_file = |e: Error| if known.is_some() { e } else { e.in_file(&path) };
    let mut json = match known {
        Some(preset) => preset.json(),
        None => from_file(source, &path)?,
    };
    let all = json.get("num_hidden_layers").and_then(Value::as_u64).unwrap_or(0);
    let mut name = source.to_owned();
    if let Some(layers) = layers {
        if layers == 0 || layers as u64 > all {
            return Err(Error::Input(format!(
                "{layers} layers are asked for, expected 1 to {all}, as {source} has"
            )));
        }
        json.insert("num_hidden_layers".into(), json!(layers));
        if let Some(types) = json.get_mut("layer_types").and_then(Value::as_array_mut) {
            types.truncate(layers);
        }
        name = format!("{source}, {layers} of {all} layers");
    }
    let kind = named_kind(&json);
    Ok(Shape { name, config: config(&json).map_err(in_file)?, kind })
}

fn from_file(source: &str, path: &Path) -> Result<Map<String, Value>> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        let known: Vec<&str> = PRESETS.iter().map(|p| p.name).collect();
        let known = known.join(", ");
        Error::Input(format!("{source}: {e}; expected a config.json, its folder, or one of {known}"))
    })?;
    let mut json: Map<String, Value> =
        serde_json::from_str(&text).map_err(|e| Error::Config(e.to_string()).in_file(path))?;
    // Sizes alone are asked for, however the weights of the one who has them are kept.
    json.shift_remove("quantization_config");
    Ok(json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_have_the_published_sizes() {
        let published = [2.92e9, 0.494e9, 7.62e9, 1.78e9, 32.8e9, 0.596e9, 1.72e9, 4.02e9, 8.19e9, 32.8e9];
        for (preset, size) in PRESETS.iter().zip(published) {
            let shape = shape(preset.name, None).unwrap();
            let c = &shape.config;
            let layer = 2 * c.hidden * (c.heads + c.kv_heads) * c.head_dim + 3 * c.hidden * c.intermediate;
            let tables = c.vocab * c.hidden * if c.tied { 1 } else { 2 };
            let found = (layer * c.layers as i64 + tables) as f64;
            assert!((found / size - 1.0).abs() < 0.01, "{}: {found:e}", preset.name);
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

    #[test]
    fn a_file_of_another_kind_is_named() {
        let folder = tempfile::tempdir().unwrap();
        for text in ["{", r#"{"architectures": ["GPT2LMHeadModel"]}"#] {
            std::fs::write(folder.path().join("config.json"), text).unwrap();
            let refused = shape(folder.path().to_str().unwrap(), None).unwrap_err().to_string();
            assert!(refused.contains("config.json"), "{refused}");
        }
    }
}

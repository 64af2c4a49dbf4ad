//! A quantized model written as a checkpoint that engines load.
//!
//! Tensors of the original checkpoint are taken over as they are, but for the decoder's linear layers and for what scales were
//! folded into. Nothing of the tower or the projector is quantized, and the configuration says so.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use nics_core::checkpoint::{Checkpoint, DEFAULT_SHARD_BYTES, Origin, save};
use nics_core::models::stored_kind;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::apply::Rounded;
use crate::language::Language;
use crate::layout::{Packed, ZeroPoints, Zeros, awq, compressed, gptq, packed};
use crate::operators::Names;
use crate::quantize::{QTensor, QuantSpec};
use crate::stored::PackedConfig;
use crate::{Error, Result};

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Rounded, but in the model's dtype: everything loads it, nothing is saved.
    Dense,
    /// Our own, 2 to 8 bits, with or without rounded activations: docs/mbq-format.md.
    Packed,
    /// AutoAWQ's GEMM layout, 4 bits.
    Awq,
    /// GPTQ's layout in its second form, 2, 3, 4 and 8 bits.
    Gptq,
    /// compressed-tensors' `pack-quantized` format, 4 and 8 bits.
    Compressed,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dense => "dense",
            Self::Packed => "packed",
            Self::Awq => "autoawq",
            Self::Gptq => "gptq",
            Self::Compressed => "compressed-tensors",
        })
    }
}

impl FromStr for Layout {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let all = [Self::Dense, Self::Packed, Self::Awq, Self::Gptq, Self::Compressed];
        all.into_iter().find(|l| l.to_string() == s).ok_or_else(|| {
            let found = s.to_owned();
            let expected = "dense, packed, autoawq, gptq or compressed-tensors";
            Error::Setting { field: "layout", found, expected }
        })
    }
}

/// What a layout leaves open.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Details {
    /// The dtype of scales; our own layout chooses it by their range.
    pub scale: Kind,
    /// GPTQ's zero points.
    pub zeros: Zeros,
    /// compressed-tensors' zero points.
    pub zero_points: ZeroPoints,
    /// Whether scales are those of another file, to be kept to the bit.
    pub exact: bool,
    /// The dtype of dense weights.
    pub dense: Kind,
}

impl Layout {
    /// Whether a layout holds what a specification makes: asked before anything long begins.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check(self, spec: &QuantSpec) -> Result<()> {
        let wrong = |expected| Err(Error::Setting { field: "layout", found: self.to_string(), expected });
        match self {
            Self::Dense | Self::Packed => Ok(()),
            _ if spec.act_bits.is_some() => wrong("packed or dense, since activations are rounded too"),
            Self::Awq if spec.bits != 4 => wrong("packed, gptq or dense, since autoawq holds 4 bits alone"),
            Self::Gptq if !matches!(spec.bits, 2 | 3 | 4 | 8) => {
                wrong("packed or dense, since gptq holds 2, 3, 4 and 8 bits")
            }
            Self::Compressed if !matches!(spec.bits, 4 | 8) => {
                wrong("packed, gptq or dense, since compressed-tensors packs 4 and 8 bits")
            }
            _ => Ok(()),
        }
    }

    /// What the layout leaves open, for layers that were computed here.
    fn details(self, dense: Kind) -> Details {
        Details {
            scale: if self == Self::Compressed { dense } else { Kind::Half },
            zeros: Zeros::Exact,
            zero_points: ZeroPoints::Packed,
            exact: false,
            dense,
        }
    }

    /// The tensors of a layer, by their names below its own.
    pub(crate) fn parts(self, q: &QTensor, bits: u8, details: Details) -> Result<Packed> {
        match self {
            Self::Dense => Ok(vec![("weight", q.dequantize()?.f_to_kind(details.dense)?)]),
            Self::Packed => packed(q, bits, details.exact),
            Self::Awq => awq(q, details.scale),
            Self::Gptq => gptq(q, bits, details.zeros, details.scale),
            Self::Compressed => compressed(q, bits, details.zero_points, details.scale),
        }
    }

    /// `quantization_config` of config.json, but for our own layout.
    pub(crate) fn config(self, bits: u8, group: i64, untouched: &[String]) -> Option<Value> {
        match self {
            Self::Dense | Self::Packed => None,
            Self::Awq => Some(json!({
                "quant_method": "awq", "bits": bits, "group_size": group, "zero_point": true,
                "version": "gemm", "modules_to_not_convert": untouched,
            })),
            Self::Gptq => Some(json!({
                "quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": bits,
                "group_size": group, "desc_act": false, "sym": false,
                "modules_to_not_convert": untouched,
            })),
            Self::Compressed => Some(json!({
                "quant_method": "compressed-tensors", "format": "pack-quantized",
                "quantization_status": "compressed", "kv_cache_scheme": null,
                "config_groups": {"group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": bits, "type": "int", "symmetric": false, "dynamic": false,
                        "strategy": if group == -1 { "channel" } else { "group" },
                        "group_size": if group == -1 { Value::Null } else { json!(group) },
                    },
                    "input_activations": null, "output_activations": null,
                }},
                "ignore": untouched,
            })),
        }
    }
}

/// Files that go with the weights.
const COMPANIONS: [&str; 13] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
];

/// What a model was made from, and how.
#[derive(Debug, Clone)]
pub struct Made {
    /// The method, e.g. `mbq`.
    pub method: String,
    /// The model.
    pub source: Origin,
}

/// Writes a quantized model into a folder that does not exist yet.
///
/// # Errors
/// A layout that does not hold the model, or a folder that is there.
#[allow(clippy::too_many_arguments)]
pub fn export(
    model: &mut Language,
    names: &Names,
    rounded: &Rounded,
    spec: &QuantSpec,
    made: &Made,
    checkpoint: &Checkpoint,
    layout: Layout,
    dir: &Path,
) -> Result<()> {
    layout.check(spec)?;
    refuse_existing(dir)?;
    if checkpoint.is_quantized() {
        return Err(Error::Input("the checkpoint is quantized already".into()));
    }
    if let Some(name) =
        model.quantized(names).iter().find(|n| checkpoint.shape(&format!("{n}.weight")).is_none())
    {
        return Err(Error::Input(format!(
            "the checkpoint has no {name}.weight: its names are not those of the model's family, so that nothing can be \
             written in their place"
        )));
    }
    let mut changed: HashMap<String, Tensor> = HashMap::new();
    model.model_mut().visit_parameters(&mut |key, t| {
        changed.insert(key.to_owned(), t.shallow_clone());
        Ok(())
    })?;
    let mut layers: Layers = Vec::new();
    if layout != Layout::Dense {
        let details = layout.details(stored_kind(checkpoint));
        for (l, codes) in rounded.codes.iter().enumerate() {
            for (role, code) in codes {
                layers.push((names.linear(l, *role), layout.parts(code, spec.bits, details)?));
            }
        }
    }
    let root = checkpoint.root(Device::Cpu, Kind::Float);
    let mut rest = Vec::new();
    for name in checkpoint.names().filter(|n| !is_weight_of(n, &layers)) {
        let stored = root.stored(name)?;
        // In the dtype of the checkpoint, whatever the model was loaded as.
        let t = match changed.get(name) {
            Some(t) if t.size() == stored.size() => t.f_to_device(Device::Cpu)?.f_to_kind(stored.kind())?,
            _ => stored,
        };
        rest.push((name.to_owned(), t));
    }
    let untouched = model.untouched(names)?;
    let group = if spec.act_bits.is_some() { -1 } else { spec.group };
    let quantization = if layout == Layout::Packed {
        let mut config =
            PackedConfig::new(spec.bits, group, spec.act_bits, &made.method, made.source.clone());
        config.modules_to_not_convert = untouched;
        Some(config.over(&layers)?)
    } else {
        layout.config(spec.bits, group, &untouched)
    };
    write(dir, checkpoint, rest, layers, quantization)
}

/// Quantized layers: their names and their tensors.
pub(crate) type Layers = Vec<(String, Packed)>;

fn is_weight_of(name: &str, layers: &Layers) -> bool {
    name.strip_suffix(".weight").is_some_and(|layer| layers.iter().any(|(l, _)| l == layer))
}

/// Refuses a folder that is there.
pub(crate) fn refuse_existing(dir: &Path) -> Result<()> {
    if dir.symlink_metadata().is_err() {
        return Ok(());
    }
    let reason = "it is there already; choose a folder that does not exist".into();
    Err(Error::Artefact { path: dir.to_owned(), reason })
}

/// Writes quantized layers and the rest of a checkpoint, with the files that go with it.
pub(crate) fn write(
    dir: &Path,
    checkpoint: &Checkpoint,
    rest: Vec<(String, Tensor)>,
    layers: Layers,
    quantization: Option<Value>,
) -> Result<()> {
    let packed = layers
        .into_iter()
        .flat_map(|(name, parts)| parts.into_iter().map(move |(part, t)| (format!("{name}.{part}"), t)));
    let mut config = checkpoint.config_json().clone();
    config.shift_remove("quantization_config");
    for part in ["text_config", "llm_config"] {
        if let Some(part) = config.get_mut(part).and_then(Value::as_object_mut) {
            part.shift_remove("quantization_config");
        }
    }
    if let Some(quantization) = quantization {
        config.insert("quantization_config".into(), quantization);
    }
    save(dir, rest.into_iter().chain(packed), &Value::Object(config), DEFAULT_SHARD_BYTES)?;
    for name in COMPANIONS {
        if let Some(from) = checkpoint.try_file(name)? {
            let to = dir.join(name);
            std::fs::copy(&from, &to).map_err(|source| nics_base::Error::Io {
                action: "write",
                path: to.clone(),
                source,
            })?;
        }
    }
    Ok(())
}

//! A quantized model written as a checkpoint that engines load.
//!
//! Tensors of the original checkpoint are taken over as they are, but for the decoder's linear layers and for what scales were
//! folded into. Nothing of the tower or the projector is quantized, and the configuration says so.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use nics_core::checkpoint::{Checkpoint, DEFAULT_SHARD_BYTES, save};
use nics_core::models::stored_kind;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::apply::Rounded;
use crate::language::Language;
use crate::layout::{Zeros, awq, compressed, gptq};
use crate::operators::Names;
use crate::quantize::QuantSpec;
use crate::{Error, Result};

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Rounded, but in the model's dtype: everything loads it, nothing is saved.
    Dense,
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
            Self::Awq => "autoawq",
            Self::Gptq => "gptq",
            Self::Compressed => "compressed-tensors",
        })
    }
}

impl FromStr for Layout {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let all = [Self::Dense, Self::Awq, Self::Gptq, Self::Compressed];
        all.into_iter().find(|l| l.to_string() == s).ok_or_else(|| {
            let found = s.to_owned();
            Error::Setting { field: "layout", found, expected: "dense, autoawq, gptq or compressed-tensors" }
        })
    }
}

impl Layout {
    /// Whether a layout holds what a specification makes: asked before anything long begins.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check(self, spec: &QuantSpec) -> Result<()> {
        let wrong = |expected| Err(Error::Setting { field: "layout", found: self.to_string(), expected });
        match self {
            Self::Dense => Ok(()),
            _ if spec.act_bits.is_some() => wrong("dense, since activations are rounded too"),
            Self::Awq if spec.bits != 4 => wrong("gptq or dense, since autoawq holds 4 bits alone"),
            Self::Gptq if !matches!(spec.bits, 2 | 3 | 4 | 8) => {
                wrong("dense, since gptq holds 2, 3, 4 and 8 bits")
            }
            Self::Compressed if !matches!(spec.bits, 4 | 8) => {
                wrong("gptq or dense, since compressed-tensors packs 4 and 8 bits")
            }
            _ => Ok(()),
        }
    }

    /// `quantization_config` of config.json.
    fn config(self, spec: &QuantSpec, untouched: &[String]) -> Option<Value> {
        match self {
            Self::Dense => None,
            Self::Awq => Some(json!({
                "quant_method": "awq", "bits": spec.bits, "group_size": spec.group, "zero_point": true,
                "version": "gemm", "modules_to_not_convert": untouched,
            })),
            Self::Gptq => Some(json!({
                "quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": spec.bits,
                "group_size": spec.group, "desc_act": false, "sym": false,
                "modules_to_not_convert": untouched,
            })),
            Self::Compressed => Some(json!({
                "quant_method": "compressed-tensors", "format": "pack-quantized",
                "quantization_status": "compressed", "kv_cache_scheme": null,
                "config_groups": {"group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": spec.bits, "type": "int", "symmetric": false, "dynamic": false,
                        "strategy": if spec.group == -1 { "channel" } else { "group" },
                        "group_size": if spec.group == -1 { Value::Null } else { json!(spec.group) },
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

/// Writes a quantized model into a folder that does not exist yet.
///
/// # Errors
/// A layout that does not hold the model, or a folder that is there.
pub fn export(
    model: &mut Language,
    names: &Names,
    rounded: &Rounded,
    spec: &QuantSpec,
    checkpoint: &Checkpoint,
    layout: Layout,
    dir: &Path,
) -> Result<()> {
    layout.check(spec)?;
    if dir.symlink_metadata().is_ok() {
        let reason = "it is there already; choose a folder that does not exist".into();
        return Err(Error::Artefact { path: dir.to_owned(), reason });
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
    let mut packed: Vec<(String, Tensor)> = Vec::new();
    let mut gone = HashSet::new();
    if layout != Layout::Dense {
        for (l, codes) in rounded.codes.iter().enumerate() {
            for (role, code) in codes {
                let name = names.linear(l, *role);
                let parts = match layout {
                    Layout::Awq => awq(code)?,
                    Layout::Compressed => compressed(code, spec.bits, stored_kind(checkpoint))?,
                    Layout::Gptq | Layout::Dense => gptq(code, spec.bits, Zeros::Exact)?,
                };
                packed.extend(parts.into_iter().map(|(part, t)| (format!("{name}.{part}"), t)));
                gone.insert(format!("{name}.weight"));
            }
        }
    }
    let root = checkpoint.root(Device::Cpu, Kind::Float);
    let mut tensors = Vec::new();
    for name in checkpoint.names().filter(|n| !gone.contains(*n)) {
        let stored = root.stored(name)?;
        // In the dtype of the checkpoint, whatever the model was loaded as.
        let t = match changed.get(name) {
            Some(t) if t.size() == stored.size() => t.f_to_device(Device::Cpu)?.f_to_kind(stored.kind())?,
            _ => stored,
        };
        tensors.push((name.to_owned(), t));
    }
    tensors.append(&mut packed);
    let untouched = model.untouched(names)?;
    let mut config = Value::Object(checkpoint.config_json().clone());
    if let Some(quantization) = layout.config(spec, &untouched) {
        config["quantization_config"] = quantization;
    }
    save(dir, tensors, &config, DEFAULT_SHARD_BYTES)?;
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

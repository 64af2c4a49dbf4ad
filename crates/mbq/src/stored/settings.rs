//! `quantization_config` of config.json, as each tool writes it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use nics_core::checkpoint::{Checkpoint, Origin};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

use super::{Form, Stored};
use crate::layout::{Packed, Zeros};
use crate::{Error, Result};

/// The version of our own format that is written and read.
const FORMAT: u64 = 1;

/// `quantization_config` of our own format; docs/mbq-format.md describes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PackedConfig {
    /// `mbq`.
    pub quant_method: String,
    /// `packed`.
    pub format: String,
    /// Version of the format.
    pub format_version: u64,
    /// Bits of a weight, 2 to 8.
    pub bits: u8,
    /// Inputs that share a scale and a zero point; −1 for all of a row.
    pub group_size: i64,
    /// Bits that inputs are rounded to by token; null when they are not rounded.
    pub act_bits: Option<u8>,
    /// How the integers were found, e.g. `mbq` or `gptq`.
    pub method: String,
    /// The model that they were made from.
    pub source: Origin,
    /// Hash over the quantized tensors.
    pub tensors_hash: String,
    /// Linear layers that are stored as they were.
    pub modules_to_not_convert: Vec<String>,
    /// Of layers that were another tool's: what it takes to write its files again, to the byte.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub imported: Option<Imported>,
}

/// How another tool had stored the layers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Imported {
    /// Its `quantization_config`.
    pub config: Value,
    /// The dtype of its scales: `float16`, `bfloat16` or `float32`.
    pub scale_dtype: String,
    /// Whether its zero points are int8 of their own (compressed-tensors before 0.13).
    #[serde(default)]
    pub signed_zeros: bool,
}

impl PackedConfig {
    /// The name of the method.
    pub const METHOD: &'static str = "mbq";
    /// The name of the format.
    pub const NAME: &'static str = "packed";

    /// The settings of this release's version of the format.
    pub fn new(bits: u8, group_size: i64, act_bits: Option<u8>, method: &str, source: Origin) -> Self {
        Self {
            quant_method: Self::METHOD.into(),
            format: Self::NAME.into(),
            format_version: FORMAT,
            bits,
            group_size,
            act_bits,
            method: method.to_owned(),
            source,
            tensors_hash: String::new(),
            modules_to_not_convert: Vec::new(),
            imported: None,
        }
    }

    /// These settings for some layers, with their hash, as JSON.
    pub(crate) fn over(mut self, layers: &[(String, Packed)]) -> Result<Value> {
        let hashes = layers.iter().map(|(name, parts)| {
            let parts: Vec<&Tensor> = parts.iter().map(|(_, t)| t).collect();
            Ok((name.clone(), layer_hash(&parts)?))
        });
        self.tensors_hash = tensors_hash(hashes.collect::<Result<_>>()?);
        serde_json::to_value(&self).map_err(|e| Error::Input(format!("`quantization_config`: {e}")))
    }
}

/// Hash over the bytes of a layer's `qweight`, `scales` and `zeros`, one behind the other.
pub(super) fn layer_hash(parts: &[&Tensor]) -> Result<String> {
    let mut bytes = Vec::new();
    for t in parts {
        let t = t.f_contiguous()?;
        let from = bytes.len();
        bytes.resize(from + t.numel() * t.kind().elt_size_in_bytes(), 0);
        t.f_copy_data_u8(&mut bytes[from..], t.numel())?;
    }
    Ok(nics_base::hash::bytes(bytes))
}

/// Hash over lines `NAME HASH` of all layers, in the order of their names.
pub(super) fn tensors_hash(layers: BTreeMap<String, String>) -> String {
    let lines: Vec<String> = layers.into_iter().map(|(name, hash)| format!("{name} {hash}\n")).collect();
    nics_base::hash::bytes(lines.concat())
}

/// Reads the settings; the layers are the caller's to find.
pub(super) fn read(config: &Value, checkpoint: &Checkpoint) -> Result<Stored> {
    let s = Settings { config, path: checkpoint.dir().join("config.json") };
    let mut stored = Stored {
        form: Form::Packed,
        bits: 0,
        group: 0,
        act_bits: None,
        ignored: None,
        untouched: Vec::new(),
        config: config.clone(),
        layers: BTreeSet::new(),
        dir: checkpoint.dir().to_owned(),
    };
    match config["quant_method"].as_str() {
        Some("mbq") => s.packed(&mut stored, checkpoint)?,
        Some("awq") => s.awq(&mut stored)?,
        Some("gptq") => s.gptq(&mut stored)?,
        Some("compressed-tensors") => s.compressed(&mut stored)?,
        _ => return Err(s.refuse("quant_method", "mbq, awq, gptq or compressed-tensors")),
    }
    Ok(stored)
}

struct Settings<'a> {
    config: &'a Value,
    path: PathBuf,
}

impl Settings<'_> {
    fn wrong(&self, field: &str, found: &Value, expected: &str) -> Error {
        Error::Quantization {
            path: self.path.clone(),
            field: field.to_owned(),
            found: found.to_string(),
            expected: expected.to_owned(),
        }
    }

    fn refuse(&self, field: &str, expected: &str) -> Error {
        self.wrong(field, &self.config[field], expected)
    }

    fn bits(&self, field: &str, value: &Value, allowed: &[u64], expected: &str) -> Result<u8> {
        let bits = value.as_u64().filter(|b| allowed.contains(b));
        bits.map(|b| b as u8).ok_or_else(|| self.wrong(field, value, expected))
    }

    fn group(&self, field: &str, value: &Value) -> Result<i64> {
        let group = value.as_i64().filter(|g| *g == -1 || *g > 0);
        group.ok_or_else(|| self.wrong(field, value, "a number of inputs, or -1 for all of a row"))
    }

    fn names(&self, field: &str) -> Vec<String> {
        let list = self.config[field].as_array().into_iter().flatten();
        list.filter_map(Value::as_str).map(str::to_owned).collect()
    }

    fn packed(&self, stored: &mut Stored, checkpoint: &Checkpoint) -> Result<()> {
        if self.config["format"] != PackedConfig::NAME {
            return Err(self.refuse("format", "packed"));
        }
        if self.config["format_version"] != FORMAT {
            return Err(self.refuse("format_version", "1, which this release reads"));
        }
        let config = PackedConfig::deserialize(self.config).map_err(|e| Error::Artefact {
            path: self.path.clone(),
            reason: format!("`quantization_config`: {e}"),
        })?;
        stored.bits = self.bits("bits", &self.config["bits"], &[2, 3, 4, 5, 6, 7, 8], "2 to 8")?;
        stored.group = self.group("group_size", &self.config["group_size"])?;
        if config.act_bits.is_some_and(|b| !(2..=8).contains(&b)) {
            return Err(self.refuse("act_bits", "2 to 8, or null"));
        }
        if config.source.arch_hash != checkpoint.arch_hash() {
            return Err(Error::Artefact {
                path: self.path.clone(),
                reason: "its architecture is not the one that was quantized: config.json was changed since"
                    .into(),
            });
        }
        stored.act_bits = config.act_bits;
        stored.untouched = config.modules_to_not_convert;
        Ok(())
    }

    fn awq(&self, stored: &mut Stored) -> Result<()> {
        let version = self.config["version"].as_str().unwrap_or("gemm").to_lowercase();
        if version != "gemm" {
            return Err(self.refuse("version", "gemm"));
        }
        if self.config["zero_point"] == false {
            return Err(self.refuse("zero_point", "true"));
        }
        stored.form = Form::Awq;
        stored.bits = self.bits("bits", &self.config["bits"], &[4], "4")?;
        stored.group = self.group("group_size", &self.config["group_size"])?;
        stored.untouched = self.names("modules_to_not_convert");
        Ok(())
    }

    fn gptq(&self, stored: &mut Stored) -> Result<()> {
        let format = &self.config["checkpoint_format"];
        let zeros = match format.as_str() {
            None if format.is_null() => Zeros::LessOne,
            Some("gptq") => Zeros::LessOne,
            Some("gptq_v2") => Zeros::Exact,
            _ => return Err(self.refuse("checkpoint_format", "gptq or gptq_v2")),
        };
        stored.form = Form::Gptq(zeros);
        stored.bits = self.bits("bits", &self.config["bits"], &[2, 3, 4, 8], "2, 3, 4 or 8")?;
        stored.group = self.group("group_size", &self.config["group_size"])?;
        stored.untouched = self.names("modules_to_not_convert");
        if self.config["dynamic"].as_object().is_some_and(|d| !d.is_empty()) {
            return Err(self.refuse("dynamic", "none: layers of several widths are not read"));
        }
        Ok(())
    }

    fn compressed(&self, stored: &mut Stored) -> Result<()> {
        let packed = |format: &Value| format.is_null() || format == "pack-quantized";
        if !packed(&self.config["format"]) {
            return Err(self.refuse("format", "pack-quantized"));
        }
        let groups = self.config["config_groups"].as_object();
        let mut groups = groups.into_iter().flat_map(|groups| groups.values());
        let Some(first) = groups.next() else {
            return Err(self.refuse("config_groups", "one group at least"));
        };
        if let Some(other) = groups.find(|g| g["weights"] != first["weights"]) {
            let expected = "the weights of the first group: layers of several widths are not read";
            return Err(self.wrong("config_groups", &other["weights"], expected));
        }
        if !packed(&first["format"]) {
            return Err(self.wrong("config_groups.format", &first["format"], "pack-quantized"));
        }
        let weights = &first["weights"];
        if !(weights["type"].is_null() || weights["type"] == "int") {
            return Err(self.wrong("weights.type", &weights["type"], "int"));
        }
        stored.bits = self.bits("weights.num_bits", &weights["num_bits"], &[4, 8], "4 or 8")?;
        stored.form = Form::Compressed { symmetric: weights["symmetric"].as_bool().unwrap_or(true) };
        stored.group = match weights["strategy"].as_str() {
            Some("channel") => -1,
            Some("group") => self.group("weights.group_size", &weights["group_size"])?,
            None if weights["group_size"].is_i64() => {
                self.group("weights.group_size", &weights["group_size"])?
            }
            _ => return Err(self.wrong("weights.strategy", &weights["strategy"], "group or channel")),
        };
        stored.untouched = self.names("ignore");
        let inputs = &first["input_activations"];
        if !inputs.is_null() {
            let followed = inputs["num_bits"] == 8
                && (inputs["type"].is_null() || inputs["type"] == "int")
                && inputs["dynamic"] == true
                && inputs["strategy"] == "token"
                && inputs["symmetric"].as_bool().unwrap_or(true);
            if followed {
                stored.act_bits = Some(8);
            } else {
                stored.ignored = Some(format!(
                    "config.json asks for activations {inputs}; they are taken as they are, since only symmetric integers of 8 \
                     bits with a scale for each token are rounded here"
                ));
            }
        }
        Ok(())
    }
}

//! The files of a calibration: JSON that a person can read, and safetensors where there are tensors.
//!
//! | file | what is in it |
//! |---|---|
//! | `sensitivity.json` | [`Sensitivity`] |
//! | `allocation.json` | the width of each layer ([`Widths`]) |
//! | `max_keys.safetensors` | `layers.{i}.max_key`, float32 `[kv_heads, head_dim / 2]` |
//! | `rep_scales.safetensors` | `layers.{i}.rep_scale`, float32 `[kv_heads, head_dim / 2]` |
//!
//! Each names the version of its format and the model that it was made from ([`Origin`]); the safetensors files do so in a
//! note of their metadata. Another architecture is an error, other weights are a warning. Each appears whole or not at all.

use std::path::{Path, PathBuf};

use nics_base::artefact::write_atomic;
pub use nics_core::checkpoint::Origin;
use nics_core::checkpoint::{TensorPath, note, save_file};
use nics_core::models::ModelDims;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Kind, Tensor};

use super::max_keys::{MaxKeys, MaxMode};
use super::scales::Scales;
use super::sensitivity::Sensitivity;
use crate::allocate::Allocation;
use crate::quantize::finite;
use crate::{Bits, Error, Result};

/// File of the sensitivity.
pub const SENSITIVITY: &str = "sensitivity.json";
/// File of the widths.
pub const ALLOCATION: &str = "allocation.json";
/// File of the largest keys.
pub const MAX_KEYS: &str = "max_keys.safetensors";
/// File of the key scales.
pub const REP_SCALES: &str = "rep_scales.safetensors";

/// Version of the formats.
const FORMAT: u32 = 1;
/// The note in the metadata of safetensors files.
const NOTE: &str = "calibration";
/// Longest JSON file that is read.
const MAX_JSON: u64 = 64 << 20;

/// Whether what the file at `path` says can be used with `model`; other weights are a warning.
fn check(origin: &Origin, path: &Path, model: &Origin) -> Result<()> {
    if origin.arch_hash != model.arch_hash {
        return Err(Error::ModelHashMismatch {
            path: path.to_owned(),
            artefact: short(&origin.arch_hash),
            model: short(&model.arch_hash),
        });
    }
    if origin.weights_hash != model.weights_hash {
        tracing::warn!(
            "{} was calibrated on {}, whose weights differ from those of {}",
            path.display(),
            origin.model,
            model.model
        );
    }
    Ok(())
}

fn short(hash: &str) -> String {
    hash.chars().take(16).collect()
}

/// What is written: the contents' fields behind those that every file has.
#[derive(Debug, Serialize)]
struct Filed<'a, T> {
    format_version: u32,
    #[serde(flatten)]
    origin: &'a Origin,
    #[serde(flatten)]
    contents: &'a T,
}

impl<'a, T> Filed<'a, T> {
    fn new(origin: &'a Origin, contents: &'a T) -> Self {
        Self { format_version: FORMAT, origin, contents }
    }
}

/// What every file has.
#[derive(Debug, Deserialize)]
struct Head {
    format_version: u32,
    #[serde(flatten)]
    origin: Origin,
}

/// The contents of what [`Filed`] wrote, for a model, where it is known.
fn opened<T: DeserializeOwned>(path: &Path, json: &[u8], model: Option<&Origin>) -> Result<T> {
    let all: Value = serde_json::from_slice(json).map_err(|e| wrong(path, e))?;
    let head = Head::deserialize(&all).map_err(|e| wrong(path, e))?;
    if head.format_version != FORMAT {
        let reason = format!("format version {}, this release reads {FORMAT}", head.format_version);
        return Err(wrong(path, reason));
    }
    if let Some(model) = model {
        check(&head.origin, path, model)?;
    }
    serde_json::from_value(all).map_err(|e| wrong(path, e))
}

fn wrong(path: &Path, reason: impl std::fmt::Display) -> Error {
    Error::Artefact { path: path.to_owned(), reason: reason.to_string() }
}

fn to_json<T: Serialize>(path: &Path, value: &T, pretty: bool) -> Result<String> {
    let json = if pretty { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) };
    json.map_err(|e| wrong(path, e))
}

fn write_json<T: Serialize>(path: &Path, origin: &Origin, contents: &T) -> Result<()> {
    let json = to_json(path, &Filed::new(origin, contents), true)?;
    Ok(write_atomic(path, json + "\n")?)
}

fn read_json<T: DeserializeOwned>(path: &Path, model: &Origin) -> Result<T> {
    let io = |source| nics_base::Error::Io { action: "read", path: path.to_owned(), source };
    let len = std::fs::metadata(path).map_err(io)?.len();
    if len > MAX_JSON {
        return Err(wrong(path, format!("{len} bytes, expected at most {MAX_JSON}")));
    }
    let text = std::fs::read(path).map_err(io)?;
    opened(path, &text, Some(model))
}

/// Writes a sensitivity.
pub fn write_sensitivity(path: &Path, origin: &Origin, sensitivity: &Sensitivity) -> Result<()> {
    sensitivity.check(sensitivity.layers())?;
    write_json(path, origin, sensitivity)
}

/// Reads a sensitivity for a model of `layers` layers.
///
/// # Errors
/// A file that is damaged, of another architecture, or of another number of layers.
pub fn read_sensitivity(path: &Path, model: &Origin, layers: usize) -> Result<Sensitivity> {
    let sensitivity: Sensitivity = read_json(path, model)?;
    sensitivity.check(layers).map_err(|e| wrong(path, e))?;
    Ok(sensitivity)
}

/// The widths of the layers, and what they were chosen from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Widths {
    /// The choice.
    #[serde(flatten)]
    pub allocation: Allocation,
    /// Widths that there were to choose from.
    pub choices: Vec<Bits>,
    /// The budget of all layers, in bytes.
    pub budget: u64,
    /// Tokens that the budget is for.
    pub max_len: usize,
}

/// Writes an allocation.
pub fn write_allocation(path: &Path, origin: &Origin, widths: &Widths) -> Result<()> {
    write_json(path, origin, widths)
}

/// Reads an allocation for a model of `layers` layers.
///
/// # Errors
/// A file that is damaged, of another architecture, or of another number of layers.
pub fn read_allocation(path: &Path, model: &Origin, layers: usize) -> Result<Widths> {
    let widths: Widths = read_json(path, model)?;
    for (what, found) in
        [("widths", widths.allocation.widths.len()), ("bytes", widths.allocation.bytes.len())]
    {
        if found != layers {
            return Err(wrong(path, format!("{what} of {found} layers, the model has {layers}")));
        }
    }
    if widths.allocation.bytes.iter().any(|b| !b.is_finite() || *b <= 0.0) {
        return Err(wrong(path, "bytes that are no positive numbers"));
    }
    Ok(widths)
}

/// How the largest keys were taken.
#[derive(Debug, Serialize, Deserialize)]
struct MaxKeysNote {
    mode: MaxMode,
    seq_len: usize,
    effective_len: usize,
    samples: usize,
}

/// Writes the largest keys.
pub fn write_max_keys(path: &Path, origin: &Origin, max_keys: &MaxKeys) -> Result<()> {
    let about = MaxKeysNote {
        mode: max_keys.mode,
        seq_len: max_keys.seq_len,
        effective_len: max_keys.effective_len,
        samples: max_keys.samples,
    };
    write_layers(path, origin, &about, "max_key", &max_keys.layers)
}

/// Reads the largest keys for a model.
///
/// # Errors
/// A file that is damaged or of another architecture, tensors of another shape, values that are negative or no numbers.
pub fn read_max_keys(path: &Path, model: &Origin, dims: &ModelDims) -> Result<MaxKeys> {
    let (layers, about): (_, MaxKeysNote) = read_layers(path, Some(model), "max_key", dims)?;
    for (l, t) in layers.iter().enumerate() {
        if t.f_min()?.f_double_value(&[])? < 0.0 {
            return Err(wrong(path, format!("layers.{l}.max_key has a negative value")));
        }
    }
    let MaxKeysNote { mode, seq_len, effective_len, samples } = about;
    Ok(MaxKeys { layers, mode, seq_len, effective_len, samples })
}

/// How key scales were found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScalesNote {
    /// α of each layer.
    pub alphas: Vec<f64>,
    /// Widths that they were searched at; empty when they were not searched.
    pub bits: Vec<Bits>,
    /// Samples.
    pub samples: usize,
}

/// Writes key scales.
pub fn write_scales(path: &Path, origin: &Origin, scales: &Scales, about: &ScalesNote) -> Result<()> {
    write_layers(path, origin, about, "rep_scale", scales.layers())
}

/// Reads key scales for a model.
///
/// # Errors
/// A file that is damaged or of another architecture, scales of another shape or out of range.
pub fn read_scales(path: &Path, model: &Origin, dims: &ModelDims) -> Result<(Scales, ScalesNote)> {
    let (layers, about) = read_layers(path, Some(model), "rep_scale", dims)?;
    let scales = Scales::new(&layers).map_err(|e| wrong(path, e))?;
    Ok((scales, about))
}

/// Reads key scales for a model of which no more than its dimensions is known.
///
/// # Errors
/// A file that is damaged, scales of another shape or out of range.
pub fn read_scales_of_any(path: &Path, dims: &ModelDims) -> Result<Scales> {
    let (layers, _) = read_layers::<ScalesNote>(path, None, "rep_scale", dims)?;
    Scales::new(&layers).map_err(|e| wrong(path, e))
}

fn write_layers<T: Serialize>(
    path: &Path,
    origin: &Origin,
    about: &T,
    name: &str,
    layers: &[Tensor],
) -> Result<()> {
    let json = to_json(path, &Filed::new(origin, about), false)?;
    let tensors = layers.iter().enumerate().map(|(l, t)| (format!("layers.{l}.{name}"), t.shallow_clone()));
    Ok(save_file(path, tensors, &[(NOTE, &json)]).map_err(nics_core::Error::from)?)
}

fn read_layers<T: DeserializeOwned>(
    path: &Path,
    model: Option<&Origin>,
    name: &str,
    dims: &ModelDims,
) -> Result<(Vec<Tensor>, T)> {
    let json = note(path, NOTE).map_err(nics_core::Error::from)?;
    let json = json.ok_or_else(|| wrong(path, "its metadata does not say what it was calibrated on"))?;
    let about = opened(path, json.as_bytes(), model)?;
    let in_file = |e| nics_core::Error::from(e).in_file(path);
    let file = TensorPath::from_file(path).map_err(in_file)?;
    let shape = [dims.kv_heads, dims.head_dim / 2];
    let mut layers = Vec::with_capacity(dims.layers);
    for l in 0..dims.layers {
        let t = file.tensor_as(&format!("layers.{l}.{name}"), &shape, Kind::Float).map_err(in_file)?;
        if !finite(&t)? {
            return Err(wrong(path, format!("layers.{l}.{name} has values that are not finite")));
        }
        layers.push(t);
    }
    match file.unread().first() {
        None => Ok((layers, about)),
        Some(other) => Err(wrong(path, format!("{other} belongs to no layer of this model"))),
    }
}

/// The files of a calibration in a folder.
#[derive(Debug, Clone)]
pub struct Files(PathBuf);

impl Files {
    /// Those of `dir`.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self(dir.into())
    }

    /// The path of one of them.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

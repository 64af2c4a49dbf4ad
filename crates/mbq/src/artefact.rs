//! The files of a calibration: `scales.safetensors`, with a tensor `<previous>|<linear>,<linear>…` for each operator, and
//! `scales.json`, which a person can read: the model, the data and the settings that they are from, and how each was found.
//!
//! Scales say something about the weights that they were searched on alone, so that another model is an error. Of
//! [imported](crate::official) ones, `scales.json` names the file in place of settings and data, which that does not tell.

use std::path::Path;

use nics_base::artefact::write_atomic;
pub use nics_core::checkpoint::Origin;
use nics_core::checkpoint::{TensorPath, save_file};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::calibrate::CalibConfig;
use crate::official;
use crate::operators::Names;
use crate::quantize::QuantSpec;
use crate::search::OpScale;
use crate::sensitivity::{Ratios, Sensitivity};
use crate::{Error, Result};

/// The tensors.
pub const SCALES: &str = "scales.safetensors";
/// What a person reads.
pub const REPORT: &str = "scales.json";

/// Version of the formats.
const FORMAT: u32 = 1;
/// Longest JSON file that is read.
const MAX_JSON: u64 = 256 << 20;

/// The scales of a model and how they were found.
#[derive(Debug)]
pub struct Scales {
    /// How the checkpoint names its layers.
    pub names: Names,
    /// The settings; of imported scales the specification alone is known.
    pub config: CalibConfig,
    /// By layer and operator.
    pub layers: Vec<Vec<OpScale>>,
    /// What the ratios are from; absent when errors were not balanced by it.
    pub sensitivity: Option<Sensitivity>,
    /// What errors on each modality weighed, besides answers; none when every position counted alike.
    pub ratios: Vec<Ratios>,
    /// A hash of the data; empty for imported scales.
    pub data_hash: String,
    /// The file that they are from, when they were not searched here.
    pub imported: Option<Imported>,
}

/// A file that scales were imported from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Imported {
    /// Its name.
    pub file: String,
    /// Its hash.
    pub hash: String,
}

/// An operator in `scales.json`.
#[derive(Debug, Serialize, Deserialize)]
struct OpNote {
    previous: String,
    linears: Vec<String>,
    exponent: Option<f64>,
    margin: Option<f64>,
    losses: Vec<f64>,
}

impl OpNote {
    fn key(&self) -> String {
        format!("{}|{}", self.previous, self.linears.join(","))
    }
}

/// `scales.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Report {
    format_version: u32,
    #[serde(flatten)]
    origin: Origin,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    data_hash: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    config_hash: Option<String>,
    /// Of `scales.safetensors`, so that the two files are known to belong together.
    scales_hash: String,
    names: Names,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    config: Option<CalibConfig>,
    /// Of imported scales, in place of `config`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    quant: Option<QuantSpec>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    imported: Option<Imported>,
    sensitivity: Option<Sensitivity>,
    ratios: Vec<Ratios>,
    layers: Vec<Vec<OpNote>>,
}

fn wrong(path: &Path, reason: impl std::fmt::Display) -> Error {
    Error::Artefact { path: path.to_owned(), reason: reason.to_string() }
}

/// Refuses what is not as expected.
fn same(path: &Path, what: &'static str, found: &str, expected: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let short = |s: &str| s.chars().take(16).collect();
    Err(Error::ScaleModelMismatch {
        path: path.to_owned(),
        what,
        found: short(found),
        expected: short(expected),
    })
}

impl Scales {
    /// Writes both files into a folder. Equal scales give equal bytes.
    pub fn write(&self, dir: &Path, origin: &Origin) -> Result<()> {
        let notes: Vec<Vec<OpNote>> = self.layers.iter().map(|l| l.iter().map(note).collect()).collect();
        let tensors = self.layers.iter().zip(&notes).flat_map(|(ops, notes)| {
            ops.iter().zip(notes).map(|(op, note)| (note.key(), op.scales.shallow_clone()))
        });
        let path = dir.join(SCALES);
        save_file(&path, tensors, &[])?;
        let searched = self.imported.is_none();
        let report = Report {
            format_version: FORMAT,
            origin: origin.clone(),
            data_hash: searched.then(|| self.data_hash.clone()),
            config_hash: searched.then(|| nics_base::hash::value(&self.config)).transpose()?,
            scales_hash: nics_base::hash::file(&path)?,
            names: self.names.clone(),
            config: searched.then_some(self.config),
            quant: (!searched).then_some(self.config.search.spec),
            imported: self.imported.clone(),
            sensitivity: self.sensitivity.clone(),
            ratios: self.ratios.clone(),
            layers: notes,
        };
        let path = dir.join(REPORT);
        let json = serde_json::to_string_pretty(&report).map_err(|e| wrong(&path, e))?;
        Ok(write_atomic(&path, json + "\n")?)
    }

    /// Reads the scales of a folder for a model. The statistics that they were made from are not kept in the files.
    ///
    /// # Errors
    /// [`Error::ScaleModelMismatch`] for scales of another model; files that are damaged or do not belong together.
    pub fn read(dir: &Path, origin: &Origin) -> Result<Self> {
        if dir.is_file() {
            let reason = "it is a file, expected the folder that `mbq calibrate` writes; `mbq import` makes one of a .pt file";
            return Err(wrong(dir, reason));
        }
        let (path, tensors) = (dir.join(REPORT), dir.join(SCALES));
        let io = |source| nics_base::Error::Io { action: "read", path: path.clone(), source };
        let len = std::fs::metadata(&path).map_err(io)?.len();
        if len > MAX_JSON {
            return Err(wrong(&path, format!("{len} bytes, expected at most {MAX_JSON}")));
        }
        let json = std::fs::read(&path).map_err(io)?;
        let report: Report = serde_json::from_slice(&json).map_err(|e| wrong(&path, e))?;
        if report.format_version != FORMAT {
            let reason = format!("format version {}, this release reads {FORMAT}", report.format_version);
            return Err(wrong(&path, reason));
        }
        same(&path, "model's architecture", &report.origin.arch_hash, &origin.arch_hash)?;
        same(&path, "model's weights", &report.origin.weights_hash, &origin.weights_hash)?;
        same(&path, "scales.safetensors", &report.scales_hash, &nics_base::hash::file(&tensors)?)?;
        let config = match (report.config, report.quant, &report.imported) {
            (Some(config), None, None) => config,
            (None, Some(spec), Some(_)) => official::config(spec),
            _ => return Err(wrong(&path, "it has to have either `config`, or `quant` and `imported`")),
        };
        let file = TensorPath::from_file(&tensors)?;
        let mut layers = Vec::with_capacity(report.layers.len());
        for notes in report.layers {
            let mut ops = Vec::with_capacity(notes.len());
            for note in notes {
                let scales = file.stored(&note.key())?;
                let usable = scales.kind() == Kind::Float
                    && scales.dim() == 1
                    && scales.f_isfinite()?.f_logical_and(&scales.f_gt(0.0)?)?.f_all()?.f_int64_value(&[])?
                        != 0;
                if !usable {
                    return Err(wrong(&tensors, format!("{} are no positive float32 numbers", note.key())));
                }
                if report.imported.is_none() && (note.exponent.is_none() || note.margin.is_none()) {
                    return Err(wrong(&path, format!("{} has no exponent or no margin", note.key())));
                }
                ops.push(OpScale {
                    previous: note.previous,
                    linears: note.linears,
                    exponent: note.exponent.unwrap_or(f64::NAN),
                    scales,
                    statistic: Tensor::new(),
                    losses: note.losses,
                    margin: note.margin.unwrap_or(f64::NAN),
                });
            }
            layers.push(ops);
        }
        Ok(Self {
            names: report.names,
            config,
            layers,
            sensitivity: report.sensitivity,
            ratios: report.ratios,
            data_hash: report.data_hash.unwrap_or_default(),
            imported: report.imported,
        })
    }
}

/// JSON has no other way to say that there is none.
fn number(x: f64) -> Option<f64> {
    x.is_finite().then_some(x)
}

fn note(op: &OpScale) -> OpNote {
    OpNote {
        previous: op.previous.clone(),
        linears: op.linears.clone(),
        exponent: number(op.exponent),
        margin: number(op.margin),
        losses: op.losses.clone(),
    }
}

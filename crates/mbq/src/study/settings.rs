//! The settings of a study, in TOML.

use std::path::Path;

use nics_base::settings;
use nics_datasets::symbol_grid::Nuisance;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::nano::checked;
use crate::quantize::QuantSpec;

/// The settings of a study.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Study {
    /// Widths, e.g. `w3g32` and `w4a8`.
    pub quant: Vec<String>,
    /// What is measured.
    pub evaluation: EvaluationSettings,
    /// What is calibrated on.
    pub calibration: CalibrationSettings,
    /// Under which conditions; names are one of a kind.
    pub condition: Vec<Condition>,
}

/// What is measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluationSettings {
    /// Problems of the test split.
    pub samples: usize,
    /// Seed of the problems; the model's is added.
    pub seed: u64,
}

/// What is calibrated on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationSettings {
    /// Problems of the train split.
    pub samples: usize,
    /// Seed of the problems; the model's is added.
    pub seed: u64,
}

/// A model as it was trained, or with other weights that compute the same; and the pictures that it sees.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Condition {
    /// As results name it.
    pub name: String,
    /// Input channels of the linear layers are multiplied by `exp(n)`, `n` normal with this deviation, and divided again by
    /// what stands before them. 0 leaves the weights alone.
    #[serde(default)]
    pub log_std: f64,
    /// What is in pictures beside symbols.
    pub nuisance: Nuisance,
}

impl Study {
    /// Reads settings.
    ///
    /// # Errors
    /// A file that cannot be read, and what is wrong in it.
    pub fn read(path: &Path) -> Result<Self> {
        Ok(settings::read(path, Self::parse)?)
    }

    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let study: Self = settings::parse(text)?;
        if study.quant.is_empty() {
            return Err("quant is empty, expected at least one width".into());
        }
        study.specs().map_err(|e| format!("quant: {e}"))?;
        for (name, found) in [
            ("evaluation.samples", study.evaluation.samples),
            ("calibration.samples", study.calibration.samples),
        ] {
            if found == 0 {
                return Err(format!("{name} is 0, expected at least 1"));
            }
        }
        if study.condition.is_empty() {
            return Err("condition is empty, expected at least one".into());
        }
        for (i, condition) in study.condition.iter().enumerate() {
            let Condition { name, log_std, nuisance } = condition;
            if study.condition[..i].iter().any(|other| other.name == *name) {
                return Err(format!("two conditions are called {name:?}"));
            }
            if !(0.0..=5.0).contains(log_std) {
                return Err(format!("condition {name:?}: log_std is {log_std}, expected 0 to 5"));
            }
            checked(nuisance).map_err(|e| format!("condition {name:?}: {e}"))?;
        }
        Ok(study)
    }

    /// The widths.
    pub(super) fn specs(&self) -> Result<Vec<QuantSpec>> {
        self.quant.iter().map(|q| q.parse()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_study_of_this_crate_is_sound_and_mistakes_are_named() {
        let text = include_str!("../../recipes/study.toml");
        Study::parse(text).unwrap();
        for (from, to, why) in [
            ("samples = 512", "samples = 0", "evaluation.samples"),
            ("samples = 32", "samples = 0", "calibration.samples"),
            ("\"w2g32\"", "\"w9g32\"", "quant: bits is 9"),
            ("log_std = 0.5", "log_std = -1.0", "log_std is -1"),
            ("pixels = 6", "pixels = 60", "nuisance.pixels is 60"),
            ("[calibration]", "[calibrations]", "calibrations"),
        ] {
            assert!(text.contains(from), "{from}");
            let error = Study::parse(&text.replacen(from, to, 1)).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}

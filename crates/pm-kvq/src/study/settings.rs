//! The settings of a study, in TOML.

use std::path::Path;

use nics_base::settings;
use nics_datasets::adding_ring::TOKENS;
use serde::{Deserialize, Serialize};

use crate::Result;

/// The settings of a study.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Study {
    /// What is measured.
    pub evaluation: EvaluationSettings,
    /// What is calibrated on.
    pub calibration: CalibrationSettings,
    /// What caches share.
    pub cache: CacheSettings,
    /// The outliers of the second part.
    pub outliers: OutlierSettings,
}

/// What is measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluationSettings {
    /// Texts of the test split.
    pub sequences: usize,
    /// Seed of the texts; the model's is added.
    pub seed: u64,
}

/// What is calibrated on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationSettings {
    /// Texts of the train split.
    pub samples: usize,
    /// Seed of the texts; the model's is added.
    pub seed: u64,
    /// The first so many tokens of each.
    pub tokens: usize,
    /// Positions are stretched by so much.
    pub stretch: usize,
}

/// What caches share.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheSettings {
    /// Channels that share a scale.
    pub group: usize,
    /// Exact tokens at the beginning.
    pub sink: usize,
    /// Tokens of the window, and of a block of KIVI's keys.
    pub window: usize,
}

/// Outliers of the keys.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutlierSettings {
    /// The rotary pair of every head.
    pub pair: usize,
    /// How much larger its keys are, and smaller its queries.
    pub factor: f64,
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
        for (name, found) in [
            ("evaluation.sequences", study.evaluation.sequences),
            ("calibration.samples", study.calibration.samples),
            ("calibration.stretch", study.calibration.stretch),
            ("cache.group", study.cache.group),
            ("cache.window", study.cache.window),
        ] {
            if found == 0 {
                return Err(format!("{name} is 0, expected at least 1"));
            }
        }
        let tokens = study.calibration.tokens;
        if !(2..=TOKENS).contains(&tokens) {
            return Err(format!("calibration.tokens is {tokens}, expected 2 to the {TOKENS} of a text"));
        }
        let factor = study.outliers.factor;
        if !(1e-3..=1e3).contains(&factor) {
            return Err(format!("outliers.factor is {factor}, expected 0.001 to 1000"));
        }
        Ok(study)
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
            ("sequences = ", "sequences = 0 # ", "evaluation.sequences"),
            ("window = 8", "window = 0", "cache.window"),
            ("tokens = 30", "tokens = 1", "calibration.tokens"),
            ("factor = 10.0", "factor = 0.0", "outliers.factor"),
            ("sink", "sinks", "sinks"),
        ] {
            assert!(text.contains(from), "{from}");
            let error = Study::parse(&text.replacen(from, to, 1)).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}

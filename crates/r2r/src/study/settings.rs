//! The settings of a study, in TOML.

use std::path::Path;

use nics_base::settings;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::baselines::query::QueryTraining;

/// The settings of a study.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Study {
    /// Label data.
    pub labels: LabelSettings,
    /// Routers of queries.
    pub query: QuerySettings,
    /// What is measured.
    pub evaluation: EvaluationSettings,
}

/// Label data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LabelSettings {
    /// Problems of the train split.
    pub train: usize,
    /// Problems of the validation split.
    pub validation: usize,
    /// Seed of the problems; the pair's is added.
    pub seed: u64,
}

/// Routers of queries.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuerySettings {
    /// Problems of the train split that both models answer.
    pub train: usize,
    /// Problems of the validation split on which thresholds are chosen.
    pub validation: usize,
    /// Dimensions of the matrix factorisation.
    pub dimensions: i64,
    /// Width of the MLP head.
    pub hidden: i64,
    /// The optimiser; the pair's seed is added to its own.
    pub training: QueryTraining,
}

/// What is measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluationSettings {
    /// Problems of the test split.
    pub problems: usize,
    /// Seed of the problems; the pair's is added.
    pub seed: u64,
    /// Shares of the validation rows that go to the large model: the sweep of the router, entropy and chance.
    pub rates: Vec<f64>,
    /// The sweep of the other policies.
    pub coarse_rates: Vec<f64>,
    /// Lengths of drafts in speculative decoding.
    pub drafts: Vec<usize>,
    /// Sequences written at once.
    pub batch: usize,
    /// Temperature of the rows that sample.
    pub temperature: f64,
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
        let counts = [
            ("labels.train", study.labels.train),
            ("labels.validation", study.labels.validation),
            ("query.train", study.query.train),
            ("query.validation", study.query.validation),
            ("evaluation.problems", study.evaluation.problems),
            ("evaluation.batch", study.evaluation.batch),
        ];
        if let Some((name, _)) = counts.iter().find(|(_, n)| *n == 0) {
            return Err(format!("{name} is 0, expected at least 1"));
        }
        if study.evaluation.drafts.contains(&0) {
            return Err("evaluation.drafts has a 0, expected lengths of at least 1".into());
        }
        for (name, rates) in
            [("rates", &study.evaluation.rates), ("coarse_rates", &study.evaluation.coarse_rates)]
        {
            let rising = rates.windows(2).all(|w| w[0] < w[1]);
            if rates.is_empty() || !rising || rates.iter().any(|r| !(*r > 0.0 && *r < 1.0)) {
                return Err(format!(
                    "evaluation.{name} is {rates:?}, expected rising numbers between 0 and 1"
                ));
            }
        }
        let temperature = study.evaluation.temperature;
        if !(temperature > 0.0 && temperature <= 100.0) {
            return Err(format!("evaluation.temperature is {temperature}, expected above 0, at most 100"));
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
            ("problems = 1000", "problems = 0", "evaluation.problems"),
            ("rates = [0.05", "rates = [0.5", "rising"),
            ("temperature = 0.6", "temperature = 0", "temperature"),
            ("drafts = [2", "drafts = [0", "drafts"),
            ("drafts", "draft", "draft"),
        ] {
            assert!(text.contains(from), "{from}");
            let error = Study::parse(&text.replacen(from, to, 1)).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}

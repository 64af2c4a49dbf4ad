//! What pairs are trained: a recipe in TOML.

use std::collections::BTreeMap;
use std::path::Path;

use nics_base::settings;
use nics_core::train::{TrainConfig, check_model, check_seeds};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::RingTask;
use crate::Result;

/// A model's part in a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Writes.
    Small,
    /// A baseline by itself: about as many parameters as run for a token of the pair.
    Middle,
    /// Is asked.
    Large,
}

impl Role {
    /// The name of its folder.
    pub fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Middle => "middle",
            Self::Large => "large",
        }
    }
}

/// How one model is made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelRecipe {
    /// Fields of a Qwen3 config.json; vocabulary and token ids are filled in.
    pub config: Map<String, Value>,
    /// Problems of a batch.
    pub batch: usize,
    /// Deviation of the embedding's initial weights; other matrices begin at `1 / sqrt(in)`.
    pub embedding_std: f64,
    /// The optimiser and its schedule; the seed is that of the pair.
    #[serde(default)]
    pub train: TrainConfig,
}

/// The pairs of a task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The task is arithmetic modulo this.
    pub modulus: u32,
    /// A pair for each.
    pub seeds: Vec<u64>,
    /// Validation problems that are solved while training.
    #[serde(default = "default_validation")]
    pub validation: usize,
    /// The models.
    pub models: BTreeMap<Role, ModelRecipe>,
}

fn default_validation() -> usize {
    200
}

impl Recipe {
    /// Reads a recipe.
    ///
    /// # Errors
    /// A file that cannot be read, and what is wrong in it.
    pub fn read(path: &Path) -> Result<Self> {
        Ok(settings::read(path, Self::parse)?)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let recipe: Self = settings::parse(text)?;
        RingTask::new(recipe.modulus).map_err(|e| e.to_string())?;
        check_seeds(&recipe.seeds)?;
        if recipe.models.is_empty() {
            return Err("models is empty, expected small, middle or large".into());
        }
        for (role, model) in &recipe.models {
            let under = format!("models.{}.", role.name());
            check_model(&under, model.batch, model.embedding_std, &model.train)?;
        }
        Ok(recipe)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r"
        modulus = 19
        seeds = [0, 1]
        [models.small]
        config = { hidden_size = 8 }
        batch = 4
        embedding_std = 0.5
        train = { steps = 10, warmup = 1 }
    ";

    #[test]
    fn a_recipe_is_read_strictly() {
        assert_eq!(Recipe::parse(GOOD).unwrap().models[&Role::Small].train.steps, 10);
        for (from, to, why) in [
            ("modulus = 19", "modulus = 1", "modulus is 1"),
            ("[0, 1]", "[1, 1]", "different numbers"),
            ("[0, 1]", "[]", "different numbers"),
            ("batch = 4", "batch = 0", "models.small.batch"),
            ("batch = 4", "batches = 4", "batches"),
            ("0.5", "-0.5", "embedding_std"),
            ("steps = 10", "steps = 0", "steps"),
            ("models.small", "models.tiny", "tiny"),
        ] {
            let error = Recipe::parse(&GOOD.replace(from, to)).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}

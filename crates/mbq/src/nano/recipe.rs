//! What models are trained: a recipe in TOML.

use std::path::Path;

use nics_base::settings;
use nics_core::train::{TrainConfig, check_model, check_seeds};
use nics_datasets::symbol_grid::{HALF, Nuisance};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Result;

/// The models of a recipe: one a seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// A model for each.
    pub seeds: Vec<u64>,
    /// Problems of a batch.
    pub batch: usize,
    /// Deviation of the initial weights of embeddings; other matrices begin at `1 / sqrt(in)`.
    pub embedding_std: f64,
    /// Beginnings of the names of parameters that stay as they are drawn, e.g. `vision_tower.`
    pub frozen: Vec<String>,
    /// Validation problems that are answered while training.
    pub validation: usize,
    /// What is in pictures beside symbols: each in turn.
    pub nuisance: Vec<Nuisance>,
    /// Fields of a Llama config.json; vocabulary and token ids are filled in.
    pub text_config: Map<String, Value>,
    /// Fields of SigLIP's `vision_config`; sizes of picture and patch are filled in.
    pub vision_config: Map<String, Value>,
    /// The optimiser and its schedule; the seed is that of the model.
    pub train: TrainConfig,
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
        check_seeds(&recipe.seeds)?;
        check_model("", recipe.batch, recipe.embedding_std, &recipe.train)?;
        if recipe.nuisance.is_empty() {
            return Err("nuisance is empty, expected at least one (pixels = 0 for none)".into());
        }
        recipe.nuisance.iter().try_for_each(checked)?;
        Ok(recipe)
    }

    /// What is in picture number `index`.
    pub(super) fn nuisance_of(&self, index: u64) -> Nuisance {
        self.nuisance[(index % self.nuisance.len() as u64) as usize]
    }
}

/// Refuses a nuisance that does not fit a cell.
pub(crate) fn checked(nuisance: &Nuisance) -> Result<(), String> {
    if nuisance.pixels > HALF {
        return Err(format!("nuisance.pixels is {}, expected at most {HALF}", nuisance.pixels));
    }
    if !(nuisance.std.is_finite() && nuisance.std >= 0.0) {
        return Err(format!("nuisance.std is {}, expected a number from 0 on", nuisance.std));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recipe_of_this_crate_is_sound_and_mistakes_are_named() {
        let text = include_str!("../../recipes/nano.toml");
        let recipe = Recipe::parse(text).unwrap();
        assert!(recipe.seeds.len() >= 8);
        for (from, to, why) in [
            ("seeds = [", "seeds = [1, ", "different numbers"),
            ("batch = ", "batch = 0 # ", "batch is 0"),
            ("embedding_std = ", "embedding_std = 0.0 # ", "embedding_std is 0"),
            ("pixels = ", "pixels = 33 # ", "nuisance.pixels is 33"),
            ("std = 3.0", "std = -1.0", "nuisance.std is -1"),
            ("steps = ", "steps = 0 # ", "steps"),
            ("batch = ", "batches = ", "batches"),
        ] {
            assert!(text.contains(from), "{from}");
            let error = Recipe::parse(&text.replacen(from, to, 1)).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}

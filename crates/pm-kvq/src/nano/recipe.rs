//! What models are trained: a recipe in TOML.

use std::path::Path;

use nics_base::settings;
use nics_core::train::{TrainConfig, check_model, check_seeds};
use nics_datasets::adding_ring::LINES;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Result;

/// The models of a recipe: one a seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// A model for each.
    pub seeds: Vec<u64>,
    /// Texts of a batch.
    pub batch: usize,
    /// Lines of a text that repeat its first one; short texts have room for fewer.
    pub recalls: usize,
    /// Lines of the texts that training begins with.
    pub short_lines: usize,
    /// The share of the steps that has short texts.
    pub short_share: f64,
    /// Deviation of the embedding's initial weights; other matrices begin at `1 / sqrt(in)`.
    pub embedding_std: f64,
    /// Validation texts that are written while training.
    pub validation: usize,
    /// Fields of a Llama config.json; vocabulary and token ids are filled in.
    pub config: Map<String, Value>,
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
        if recipe.recalls >= LINES {
            return Err(format!("recalls is {}, expected less than {LINES}", recipe.recalls));
        }
        if !(2..=LINES).contains(&recipe.short_lines) {
            return Err(format!("short_lines is {}, expected 2 to {LINES}", recipe.short_lines));
        }
        if !(0.0..=1.0).contains(&recipe.short_share) {
            return Err(format!("short_share is {}, expected 0 to 1", recipe.short_share));
        }
        Ok(recipe)
    }

    /// The lines of text `index` that repeat the first: evenly apart, beginning elsewhere in every text.
    pub(super) fn places(&self, index: u64, lines: usize) -> Vec<usize> {
        let places = lines - 1;
        let recalls = self.recalls.min(places);
        (0..recalls).map(|i| 1 + (index as usize + i * places / recalls) % places).collect()
    }

    /// Lines of the texts of a step, counted from 0.
    pub(super) fn lines_at(&self, step: u64) -> usize {
        if (step as f64) < self.short_share * self.train.steps as f64 { self.short_lines } else { LINES }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recipe_of_this_crate_is_sound_and_mistakes_are_named() {
        let text = include_str!("../../recipes/nano.toml");
        let recipe = Recipe::parse(text).unwrap();
        assert_eq!(
            (recipe.lines_at(0), recipe.lines_at(recipe.train.steps - 1)),
            (recipe.short_lines, LINES)
        );
        // Every line is recalled equally often.
        let mut counts = [0; LINES];
        for index in 0..14 {
            recipe.places(index, LINES).into_iter().for_each(|place| counts[place] += 1);
        }
        assert_eq!((counts[0], &counts[1..]), (0, &[recipe.recalls; LINES - 1][..]));
        for (from, to, why) in [
            ("seeds = [0, 1, 2]", "seeds = [1, 1]", "different numbers"),
            ("batch = ", "batch = 0 # ", "batch is 0"),
            ("recalls = ", "recalls = 15 # ", "recalls is 15"),
            ("short_lines = ", "short_lines = 1 # ", "short_lines is 1"),
            ("short_share = ", "short_share = 2.0 # ", "short_share is 2"),
            ("embedding_std = ", "embedding_std = 0.0 # ", "embedding_std is 0"),
            ("steps = ", "steps = 0 # ", "steps"),
            ("batch = ", "batches = ", "batches"),
        ] {
            assert!(text.contains(from), "{from}");
            let error = Recipe::parse(&text.replacen(from, to, 1)).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}

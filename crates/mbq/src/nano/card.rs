//! The card of a nano model: what it is, how it was made, what it can do.

use nics_core::train::{Stored, share};
use nics_datasets::symbol_grid::{Nuisance, SIDE};

use super::Recipe;
use crate::Result;

/// What a card tells beside what every card does.
pub(super) struct Card<'a> {
    pub seed: u64,
    pub recipe: &'a Recipe,
    /// Answers of the test split without a mistake, and symbols that are right, by what is in the pictures beside symbols.
    pub right: Vec<(Nuisance, [u64; 2])>,
    pub problems: u64,
    pub test_seed: u64,
}

impl Card<'_> {
    /// The card in Markdown.
    pub(super) fn render(&self, stored: &Stored) -> Result<String> {
        let Self { seed, problems, test_seed, .. } = self;
        let about = "A nano model in LLaVA layout that reads a row or a column of a picture of 6 by 6 noisy symbols. It shows \
                     what quantization does to a model that sees; it is no general model.";
        let trained_on =
            format!("symbol-grid, train split, seed {seed}; the splits are disjoint by grid and question");
        let figure = |(nuisance, [exact, tokens]): &(Nuisance, [u64; 2])| {
            let (pixels, std) = (nuisance.pixels, nuisance.std);
            format!(
                "test split (seed {test_seed}), nuisance in {pixels} pixels of deviation {std}: answers without a mistake {}, \
                 symbols {}",
                share(*exact, *problems),
                share(*tokens, problems * SIDE as u64)
            )
        };
        let figures: Vec<String> = self.right.iter().map(figure).collect();
        let title = format!("Symbol grid, seed {seed}");
        let command = "`mbq train` with the recipe below";
        Ok(stored.card([&title, about], &trained_on, &figures, command, self.recipe)?)
    }
}

//! The card of a nano model: what it is, how it was made, what it can do.

use nics_core::train::{Stored, share};

use super::Recipe;
use crate::Result;

/// What a card tells beside what every card does.
pub(super) struct Card<'a> {
    pub seed: u64,
    pub recipe: &'a Recipe,
    /// Texts of the test split that it writes without a mistake, and last lines that it recalls.
    pub right: [u64; 2],
    pub problems: u64,
    pub test_seed: u64,
}

impl Card<'_> {
    /// The card in Markdown.
    pub(super) fn render(&self, stored: &Stored) -> Result<String> {
        let Self { seed, recipe, right, problems, test_seed } = self;
        let about = "A nano model in Llama layout that writes lines of digits, each made from the one before it, and recalls \
                     the first one where it is asked to. It shows what caches do to long texts; it is no general model.";
        let trained_on =
            format!("adding-ring, train split, seed {seed}; the splits are disjoint by first line");
        let [whole, recalled] = right.map(|right| share(right, *problems));
        let figures = [
            format!("whole texts without a mistake, test split (seed {test_seed}), greedy: {whole}"),
            format!("first lines recalled behind the 14 lines that it wrote: {recalled}"),
        ];
        let title = format!("Adding ring, seed {seed}");
        let command = "`pm-kvq train` with the recipe below";
        Ok(stored.card([&title, about], &trained_on, &figures, command, recipe)?)
    }
}

//! The card of a nano model: what it is, how it was made, what it can do.

use std::fmt::Write;

use nics_base::ci::wilson;
use nics_core::train::Summary;
use nics_datasets::symbol_grid::{Nuisance, SIDE};

use super::Recipe;
use crate::{Error, Result};

/// What a card tells.
pub(super) struct Card<'a> {
    pub seed: u64,
    pub recipe: &'a Recipe,
    pub summary: &'a Summary,
    pub parameters: usize,
    pub weights_hash: &'a str,
    /// Answers of the test split without a mistake, and symbols that are right, by what is in the pictures beside symbols.
    pub right: Vec<(Nuisance, [u64; 2])>,
    pub problems: u64,
    pub test_seed: u64,
}

impl Card<'_> {
    /// The card in Markdown.
    pub(super) fn render(&self) -> Result<String> {
        let Self { seed, parameters, weights_hash, problems, test_seed, summary, .. } = self;
        let mut card = format!(
            "---\nlicense: apache-2.0\n---\n\n# Symbol grid, seed {seed}\n\n\
             A nano model in LLaVA layout that reads a row or a column of a picture of 6 by 6 noisy symbols. It shows what \
             quantization does to a model that sees; it is no general model.\n\n"
        );
        let share = |right: u64, of: u64| {
            let [low, high] = wilson(right, of).map(|v| 100.0 * v);
            format!("{right} of {of} (95 % interval {low:.1} to {high:.1} %)")
        };
        let mut lines = vec![
            format!("- parameters: {parameters}, stored in bfloat16, trained and measured in float32"),
            format!(
                "- trained on: symbol-grid, train split, seed {seed}; the splits are disjoint by grid and question"
            ),
            format!("- training: {} steps, {} target tokens", summary.steps, summary.tokens),
        ];
        for (nuisance, [exact, tokens]) in &self.right {
            let (pixels, std) = (nuisance.pixels, nuisance.std);
            lines.push(format!(
                "- test split (seed {test_seed}), nuisance in {pixels} pixels of deviation {std}: answers without a mistake \
                 {}, symbols {}",
                share(*exact, *problems),
                share(*tokens, problems * SIDE as u64)
            ));
        }
        lines.push(format!("- hash of the weights: `{weights_hash}`"));
        lines.push("- command: `mbq train` with the recipe below".into());
        for line in lines {
            let _ = writeln!(card, "{line}");
        }
        let recipe = toml::to_string(self.recipe).map_err(|e| Error::Input(e.to_string()))?;
        let _ = write!(card, "\n```toml\n{}\n```\n", recipe.trim_end());
        Ok(card)
    }
}

//! The card of a nano model: what it is, how it was made, what it can do.

use std::fmt::Write;

use nics_base::ci::wilson;
use nics_core::train::Summary;

use super::Recipe;
use crate::{Error, Result};

/// What a card tells.
pub(super) struct Card<'a> {
    pub seed: u64,
    pub recipe: &'a Recipe,
    pub summary: &'a Summary,
    pub parameters: usize,
    pub weights_hash: &'a str,
    /// Texts of the test split that it writes without a mistake, and last lines that it recalls.
    pub right: [u64; 2],
    pub problems: u64,
    pub test_seed: u64,
}

impl Card<'_> {
    /// The card in Markdown.
    pub(super) fn render(&self) -> Result<String> {
        let Self { seed, parameters, weights_hash, right, problems, test_seed, summary, .. } = self;
        let mut card = format!(
            "---\nlicense: apache-2.0\n---\n\n# Adding ring, seed {seed}\n\n\
             A nano model in Llama layout that writes lines of digits, each made from the one before it, and recalls the \
             first one where it is asked to. It shows what caches do to long texts; it is no general model.\n\n"
        );
        let share = |right: u64| {
            let [low, high] = wilson(right, *problems).map(|v| 100.0 * v);
            format!("{right} of {problems} (95 % interval {low:.1} to {high:.1} %)")
        };
        for line in [
            format!("- parameters: {parameters}, stored in bfloat16, trained and measured in float32"),
            format!(
                "- trained on: adding-ring, train split, seed {seed}; the splits are disjoint by first line"
            ),
            format!("- training: {} steps, {} target tokens", summary.steps, summary.tokens),
            format!(
                "- whole texts without a mistake, test split (seed {test_seed}), greedy: {}",
                share(right[0])
            ),
            format!("- first lines recalled behind the 14 lines that it wrote: {}", share(right[1])),
            format!("- hash of the weights: `{weights_hash}`"),
            "- command: `pm-kvq train` with the recipe below".into(),
        ] {
            let _ = writeln!(card, "{line}");
        }
        let recipe = toml::to_string(self.recipe).map_err(|e| Error::Input(e.to_string()))?;
        let _ = write!(card, "\n```toml\n{}\n```\n", recipe.trim_end());
        Ok(card)
    }
}

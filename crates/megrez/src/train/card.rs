//! The card of a trained checkpoint: what it is, how it was made, what it can do.

use std::fmt::Write;

use nics_base::ci::wilson;
use nics_base::settings;
use nics_core::train::Summary;
use nics_core::{Error, Result};

use super::recipe::{Recipe, Source, Start};

/// Word problems on which a finished checkpoint is measured.
pub(super) const TEST_PROBLEMS: usize = 1000;

/// What a card tells.
pub(super) struct Card<'a> {
    /// Name of the checkpoint: its folder.
    pub name: &'a str,
    /// How it was trained.
    pub recipe: &'a Recipe,
    /// What the training came to.
    pub summary: &'a Summary,
    /// Parameters.
    pub parameters: usize,
    /// Hash of the weights.
    pub weights_hash: &'a str,
    /// Share of the test split's problems that are solved.
    pub accuracy: Option<f64>,
}

impl Card<'_> {
    /// The card in Markdown.
    pub(super) fn render(&self) -> Result<String> {
        let Self { name, recipe, summary, parameters, weights_hash, accuracy } = self;
        let mut card = format!("---\nlicense: apache-2.0\nlanguage: [zh, en]\n---\n\n# {name}\n\n");
        let data = match &recipe.data.source {
            Source::WordProblems { seed } => format!(
                "the project's word problems (Chinese and English, worked steps), train split, seed {seed}; the splits \
                 are disjoint by computation"
            ),
            Source::Conversations { file } => format!("the conversations of {}", file.display()),
        };
        let start = match &recipe.model {
            Start::Scratch { seed, vocab_size, .. } => format!(
                "A nano model in Megrez layout, trained from scratch (seed {seed}) with a vocabulary of {vocab_size} of \
                 its own. It shows what the crate does; it is no general model."
            ),
            Start::From { checkpoint, .. } => format!("Fine-tuned from {checkpoint}."),
        };
        let lines = [
            start,
            String::new(),
            format!("- parameters: {parameters}"),
            format!("- trained on: {data}"),
            format!(
                "- training: {} steps, {} target tokens, {:.0} s",
                summary.steps, summary.tokens, summary.seconds
            ),
            format!("- hash of the weights: `{weights_hash}`"),
            "- command: `megrez train` with the recipe below".into(),
        ];
        for line in lines {
            card += &line;
            card.push('\n');
        }
        if let Some(accuracy) = accuracy {
            let right = (accuracy * TEST_PROBLEMS as f64).round();
            let [low, high] = wilson(right as u64, TEST_PROBLEMS as u64);
            let _ = writeln!(
                card,
                "- accuracy: {right:.0} of {TEST_PROBLEMS} problems of the test split (seed {}) exact, greedy \
                 (95 % interval {:.1} to {:.1} %)",
                recipe.eval.seed,
                100.0 * low,
                100.0 * high
            );
        }
        let text = settings::text(recipe).map_err(Error::Input)?;
        let _ = write!(card, "\n```toml\n{}\n```\n", text.trim_end());
        Ok(card)
    }
}

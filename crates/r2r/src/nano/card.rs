//! The card of a nano model: what it is, how it was made, what it can do.

use std::fmt::Write;

use nics_base::ci::wilson;
use nics_core::train::Summary;

use super::{ModelRecipe, RingTask, Role};
use crate::{Error, Result};

/// What a card tells.
pub(super) struct Card<'a> {
    pub task: &'a RingTask,
    pub role: Role,
    pub seed: u64,
    pub model: &'a ModelRecipe,
    pub summary: &'a Summary,
    pub parameters: usize,
    pub weights_hash: &'a str,
    /// Problems of the test split that it solves by itself.
    pub right: u64,
    pub problems: u64,
    pub test_seed: u64,
}

impl Card<'_> {
    /// The card in Markdown.
    pub(super) fn render(&self) -> Result<String> {
        let Self { role, seed, parameters, weights_hash, right, problems, test_seed, summary, .. } = self;
        let modulus = self.task.ring().modulus();
        let part = match role {
            Role::Small => "the small model, which writes and is routed",
            Role::Middle => "a model by itself, to be held against the pair",
            Role::Large => "the large model, which is asked",
        };
        let [low, high] = wilson(*right, *problems).map(|v| 100.0 * v);
        let mut card = format!(
            "---\nlicense: apache-2.0\n---\n\n# Arithmetic modulo {modulus}, pair of seed {seed}: {}\n\n\
             A nano model in Qwen3 layout: {part}. It shows what the crate does; it is no general model.\n\n",
            role.name()
        );
        for line in [
            format!("- parameters: {parameters}, stored in bfloat16, trained and measured in float32"),
            format!(
                "- trained on: {}, train split, seed {seed}; the splits are disjoint by computation",
                self.task.ring().name()
            ),
            format!("- training: {} steps, {} target tokens", summary.steps, summary.tokens),
            format!(
                "- accuracy: {right} of {problems} problems of the test split (seed {test_seed}), greedy (95 % interval \
                 {low:.1} to {high:.1} %)"
            ),
            format!("- hash of the weights: `{weights_hash}`"),
            "- command: `r2r pair train` with the model of the recipe below".into(),
        ] {
            let _ = writeln!(card, "{line}");
        }
        let recipe = toml::to_string(self.model).map_err(|e| Error::Input(e.to_string()))?;
        let _ = write!(card, "\n```toml\n{}\n```\n", recipe.trim_end());
        Ok(card)
    }
}

//! The card of a nano model: what it is, how it was made, what it can do.

use nics_base::ci::wilson;
use nics_core::train::Stored;

use super::{ModelRecipe, RingTask, Role};
use crate::Result;

/// What a card tells beside what every card does.
pub(super) struct Card<'a> {
    pub task: &'a RingTask,
    pub role: Role,
    pub seed: u64,
    pub model: &'a ModelRecipe,
    /// Problems of the test split that it solves by itself.
    pub right: u64,
    pub problems: u64,
    pub test_seed: u64,
}

impl Card<'_> {
    /// The card in Markdown.
    pub(super) fn render(&self, stored: &Stored) -> Result<String> {
        let Self { task, role, seed, model, right, problems, test_seed } = self;
        let part = match role {
            Role::Small => "the small model, which writes and is routed",
            Role::Middle => "a model by itself, to be held against the pair",
            Role::Large => "the large model, which is asked",
        };
        let modulus = task.ring().modulus();
        let title = format!("Arithmetic modulo {modulus}, pair of seed {seed}: {}", role.name());
        let about = format!(
            "A nano model in Qwen3 layout: {part}. It shows what the crate does; it is no general model."
        );
        let name = task.ring().name();
        let trained_on = format!("{name}, train split, seed {seed}; the splits are disjoint by computation");
        let [low, high] = wilson(*right, *problems).map(|v| 100.0 * v);
        let accuracy = format!(
            "accuracy: {right} of {problems} problems of the test split (seed {test_seed}), greedy (95 % interval {low:.1} to \
             {high:.1} %)"
        );
        let command = "`r2r pair train` with the model of the recipe below";
        Ok(stored.card([&title, &about], &trained_on, &[accuracy], command, model)?)
    }
}

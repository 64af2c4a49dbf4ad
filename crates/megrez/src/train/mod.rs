//! Training: a new small Megrez, or more training of an existing one, from a recipe to a checkpoint.

mod card;
mod data;
mod recipe;
mod start;

pub use data::{Batches, Conversations, word_problem};
pub use recipe::{Data, Evaluation, Recipe, Source, Start};

use std::path::Path;

use nics_base::interrupt::Interrupt;
use nics_core::Result;
use nics_core::cache::DenseCache;
use nics_core::generate::{Generator, Request, collect};
use nics_core::train::{Hooks, Progress, Summary, Trainer};
use nics_datasets::word_problems::Split;
use serde_json::{Map, json};
use tch::Device;

use crate::eval::extract::last_number;
use crate::eval::{Gold, Selection, Task, word_problem_items};
use crate::model::Megrez;

/// The most tokens of a solution of a word problem.
pub const SOLUTION_TOKENS: usize = 96;

/// Runs `recipe` and writes the checkpoint to `out` (replacing what is there in one move). State and log live in `state`
/// until then; a run that was interrupted or killed goes on from there and ends with the same weights.
///
/// # Errors
/// What is wrong with recipe, data or a base checkpoint; a `state` of another recipe; an interrupt.
pub fn train(
    recipe: &Recipe,
    state: &Path,
    out: &Path,
    device: Device,
    interrupt: &Interrupt,
    progress: &mut dyn FnMut(Progress),
) -> Result<Summary> {
    let (mut megrez, layout) = start::start(recipe, state, device)?;
    let parameters = start::trainable(&mut megrez.decoder, &recipe.model)?;
    let identity = json!({ "data": recipe.data, "model": recipe.model, "eval": recipe.eval });
    let mut trainer = Trainer::new(parameters, recipe.train.clone(), &identity, state)?;

    let conversations = Conversations::open(&recipe.data.source, recipe.train.seed)?;
    let mut batches = Batches::new(&megrez.prompter, conversations, recipe.data.clone())?;
    let mut evaluate = |step: u64| {
        let mut row = Map::new();
        if recipe.eval.problems > 0 {
            let accuracy = solved(&megrez, Split::Validation, recipe.eval.problems, recipe.eval.seed)?;
            tracing::info!("step {step}: {:.1} % of the validation problems", 100.0 * accuracy);
            row.insert("validation_accuracy".into(), json!(accuracy));
        }
        Ok(row)
    };
    let hooks =
        Hooks { interrupt: interrupt.clone(), progress: Some(progress), evaluate: Some(&mut evaluate) };
    let summary = trainer.run(&mut |micro| Ok(batches.loss(&megrez.decoder, micro)?), hooks)?;
    drop(batches);
    start::write(&mut megrez, &layout, recipe, &summary, out)?;
    Ok(summary)
}

/// Share of the first `n` word problems of a split that are solved, greedily.
pub fn solved(megrez: &Megrez, split: Split, n: usize, seed: u64) -> Result<f64> {
    let selection = Selection {
        task: Task::WordProblems,
        data: None,
        limit: Some(n),
        subjects: Vec::new(),
        shots: 0,
        seed,
    };
    let items = word_problem_items(split, &selection);
    let requests = items
        .iter()
        .map(|i| {
            Ok(Request::greedy(megrez.prompter.encode(&i.messages, true)?, SOLUTION_TOKENS, &megrez.eos))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut cache = DenseCache::new();
    let replies = collect(&mut Generator::new(&megrez.decoder, &mut cache), requests, 64)?;
    let mut right = 0;
    for (item, reply) in items.iter().zip(replies) {
        let found = last_number(&megrez.prompter.tokenizer.decode(&reply, true)?);
        right += usize::from(matches!(&item.gold, Gold::Number(gold) if found.as_ref() == Some(gold)));
    }
    Ok(right as f64 / items.len().max(1) as f64)
}

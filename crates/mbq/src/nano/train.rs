//! Training of the models of a recipe.

use nics_core::models::{Model, Vlm};
use nics_core::train::{
    Loss, Micro, Named, Progress, Stored, Task, TrainConfig, Workshop, masked_cross_entropy, vlm_from_scratch,
};
use nics_core::vision::Processor;
use nics_datasets::symbol_grid::{Nuisance, SIDE, problem};
use nics_datasets::word_problems::Split;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::card::Card;
use super::sheet::logits;
use super::{ANSWER, Recipe, Sheet, files};
use crate::{Error, Result};

/// Problems of the test split on which a finished model is measured; their seed is kept for that.
const CARD_PROBLEMS: usize = 500;
/// Seed of the problems of a card: no study draws from it.
const CARD_SEED: u64 = 1_000_000;
/// Problems that are answered together.
const TOGETHER: usize = 128;

/// Hears how a run goes: seed, progress.
pub type Report<'a> = &'a mut dyn FnMut(u64, Progress);

/// Trains every model that is not there yet: `seed-N`. State and logs lie beside until a model is written; a run that was
/// interrupted or killed goes on from there to the same weights.
///
/// # Errors
/// What is wrong with the model's fields; a state of another recipe; an interrupt.
pub fn train(recipe: &Recipe, workshop: &Workshop, report: Report) -> Result<()> {
    for &seed in &recipe.seeds {
        // A model's own recipe: other seeds do not change it.
        let recipe = Recipe { seeds: vec![seed], ..recipe.clone() };
        let one = One { processor: files::processor(&files::config(&recipe))?, recipe, seed };
        workshop.train(format!("seed-{seed}"), &one, &mut |p| report(seed, p))?;
    }
    Ok(())
}

struct One {
    recipe: Recipe,
    seed: u64,
    processor: Processor,
}

impl Task for One {
    type Model = Vlm;
    type Error = Error;

    fn identity(&self) -> Value {
        json!({ "task": "symbol-grid", "recipe": self.recipe })
    }

    fn settings(&self) -> TrainConfig {
        TrainConfig { seed: self.seed, ..self.recipe.train.clone() }
    }

    fn config(&self) -> Value {
        files::config(&self.recipe)
    }

    fn files(&self) -> Vec<(&'static str, Value)> {
        vec![
            ("preprocessor_config.json", files::preprocessor_config()),
            ("tokenizer.json", files::tokenizer()),
            ("tokenizer_config.json", files::tokenizer_config()),
            ("generation_config.json", files::generation_config()),
        ]
    }

    fn start(&self, config: &Value, device: Device) -> nics_core::Result<(Vlm, Named)> {
        let Recipe { embedding_std, frozen, .. } = &self.recipe;
        vlm_from_scratch(config, *embedding_std, frozen, self.seed, device)
    }

    /// The cost of a batch: of the answers and their ends.
    fn loss(&self, model: &Vlm, micro: Micro) -> Result<Loss> {
        let batch = self.recipe.batch as u64;
        let problems: Vec<_> = (0..batch)
            .map(|i| micro.index * batch + i)
            .map(|index| (problem(Split::Train, micro.seed, index), self.recipe.nuisance_of(index)))
            .collect();
        let sheet = Sheet::new(&self.processor, &problems)?;
        let places = ANSWER.start..ANSWER.end + 1;
        let labels = sheet.ids()?.f_narrow(1, places.start as i64, places.len() as i64)?;
        let labels = labels.f_to_device(model.dims().device)?.f_flatten(0, 1)?;
        let logits = logits(model, &sheet.embed(model)?, places)?.f_flatten(0, 1)?;
        Ok(masked_cross_entropy(&logits, &labels).map_err(nics_core::Error::from)?)
    }

    fn evaluate(&self, model: &Vlm) -> Result<Map<String, Value>> {
        let mut row = Map::new();
        for nuisance in self.recipe.nuisance.iter().filter(|_| self.recipe.validation > 0) {
            let of = (Split::Validation, self.seed, self.recipe.validation);
            let [exact, tokens] = self.right(model, of, *nuisance)?;
            let share = |n: u64, of: usize| n as f64 / of as f64;
            let name = format!("{} pixels of deviation {}", nuisance.pixels, nuisance.std);
            let all = self.recipe.validation;
            tracing::info!(
                "nuisance of {name}: {exact} of {all} answers right, {tokens} of {} tokens",
                all * SIDE
            );
            row.insert(name, json!({ "exact": share(exact, all), "tokens": share(tokens, all * SIDE) }));
        }
        Ok(row)
    }

    fn card(&self, model: &Vlm, stored: &Stored) -> Result<String> {
        let mut right = Vec::new();
        for nuisance in &self.recipe.nuisance {
            let of = (Split::Test, CARD_SEED, CARD_PROBLEMS);
            right.push((*nuisance, self.right(model, of, *nuisance)?));
        }
        let (recipe, problems) = (&self.recipe, CARD_PROBLEMS as u64);
        Card { seed: self.seed, recipe, right, problems, test_seed: CARD_SEED }.render(stored)
    }
}

impl One {
    /// Answers without a mistake and symbols that are right, of the first problems of a split under a seed. Every symbol is
    /// asked for behind the right ones, so that an answer is without a mistake exactly where a greedy one is.
    fn right(&self, model: &Vlm, of: (Split, u64, usize), nuisance: Nuisance) -> Result<[u64; 2]> {
        let _no_grad = tch::no_grad_guard();
        let (split, seed, n) = of;
        let mut right = [0; 2];
        for from in (0..n).step_by(TOGETHER) {
            let problems: Vec<_> = (from..(from + TOGETHER).min(n))
                .map(|index| (problem(split, seed, index as u64), nuisance))
                .collect();
            let sheet = Sheet::new(&self.processor, &problems)?;
            let said = logits(model, &sheet.embed(model)?, ANSWER)?.f_argmax(-1, false)?;
            let expected = sheet.ids()?.f_narrow(1, ANSWER.start as i64, SIDE as i64)?;
            let same = said.f_eq_tensor(&expected.f_to_device(said.device())?)?;
            let count = |t: Tensor| -> Result<u64> { Ok(t.f_sum(Kind::Int64)?.f_int64_value(&[])? as u64) };
            right[0] += count(same.f_all_dim(1, false)?)?;
            right[1] += count(same)?;
        }
        Ok(right)
    }
}

//! Training of the models of a recipe.

use std::path::Path;

use nics_core::cache::{DenseCache, NoCache};
use nics_core::generate::{Generator, Request, collect};
use nics_core::models::{Batch, Decoder, Input, Model};
use nics_core::seam::{Ragged, SeqId};
use nics_core::train::{
    IGNORED, Loss, Micro, Named, Progress, Stored, Task, TrainConfig, Workshop, from_scratch,
    masked_cross_entropy,
};
use nics_datasets::word_problems::Split;
use serde_json::{Map, Value, json};
use tch::{Device, Tensor};

use super::card::Card;
use super::{ModelRecipe, RESPONSE_TOKENS, Recipe, RingTask, Role, files};
use crate::{Error, Result};

/// Problems of the test split on which a finished model is measured; its seed is kept for that.
const CARD_PROBLEMS: usize = 1000;
/// Seed of the problems of a card: no study draws from it.
const CARD_SEED: u64 = 1_000_000;
/// Sequences written at once.
const BATCH: usize = 250;

/// Hears how a run goes: pair, model, progress.
pub type Report<'a> = &'a mut dyn FnMut(u64, Role, Progress);

/// Trains every model of every pair that is not there yet: `seed-N/small` and so on. State and logs lie beside until a
/// model is written; a run that was interrupted or killed goes on from there to the same weights.
///
/// # Errors
/// What is wrong with a model's fields; a state of another recipe; an interrupt.
pub fn train(recipe: &Recipe, workshop: &Workshop, report: Report) -> Result<()> {
    let task = RingTask::new(recipe.modulus)?;
    for &seed in &recipe.seeds {
        for (&role, model) in &recipe.models {
            let one = One { task: &task, model, role, seed, validation: recipe.validation };
            let folder = Path::new(&format!("seed-{seed}")).join(role.name());
            workshop.train(folder, &one, &mut |p| report(seed, role, p))?;
        }
    }
    Ok(())
}

struct One<'a> {
    task: &'a RingTask,
    model: &'a ModelRecipe,
    role: Role,
    seed: u64,
    validation: usize,
}

impl Task for One<'_> {
    type Model = Decoder;
    type Error = Error;

    fn identity(&self) -> Value {
        let Self { task, model, role, seed, validation } = self;
        json!({ "modulus": task.ring().modulus(), "seed": seed, "role": role, "model": model, "validation": validation })
    }

    fn settings(&self) -> TrainConfig {
        TrainConfig { seed: self.seed, ..self.model.train.clone() }
    }

    fn config(&self) -> Value {
        files::config(self.task, &self.model.config)
    }

    fn files(&self) -> Vec<(&'static str, Value)> {
        vec![
            ("tokenizer.json", files::tokenizer(self.task)),
            ("tokenizer_config.json", files::tokenizer_config(self.task)),
            ("generation_config.json", files::generation_config(self.task)),
        ]
    }

    fn start(&self, config: &Value, device: Device) -> nics_core::Result<(Decoder, Named)> {
        from_scratch(config, self.model.embedding_std, self.seed, device)
    }

    /// The cost of a batch of problems: of their responses alone.
    fn loss(&self, model: &Decoder, micro: Micro) -> Result<Loss> {
        let (mut texts, mut starts) = (Vec::new(), Vec::new());
        let first = micro.index * self.model.batch as u64;
        for index in first..first + self.model.batch as u64 {
            let problem = self.task.ring().problem(Split::Train, micro.seed, index);
            starts.push(self.task.encode(&problem.prompt())?.len());
            texts.push(self.task.encode(&problem.text())?);
        }
        let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
        let (mut ids, mut labels) = (Vec::new(), Vec::new());
        for (text, &start) in texts.iter().zip(&starts) {
            // Causal attention never lets a row see the padding behind it, and padding has no target.
            let row = |i: usize| text.get(i).map(|&id| i64::from(id));
            ids.extend((0..longest).map(|i| row(i).unwrap_or(0)));
            labels.extend((1..=longest).map(|i| row(i).filter(|_| i >= start).unwrap_or(IGNORED)));
        }
        let device = model.dims().device;
        let rows: Vec<_> = (0..texts.len()).map(|i| (SeqId(i as u64), 0, longest)).collect();
        let ids = Tensor::f_from_slice(&ids)?.f_to_device(device)?;
        let batch = Batch::new(Ragged::contiguous(&rows), Input::Ids(&ids));
        let out = model.forward(&batch, &mut NoCache::new(), None)?;
        let labels = Tensor::f_from_slice(&labels)?.f_to_device(device)?;
        Ok(masked_cross_entropy(&model.logits(&out.hidden)?, &labels)?)
    }

    fn evaluate(&self, model: &Decoder) -> Result<Map<String, Value>> {
        let mut row = Map::new();
        if self.validation > 0 {
            let accuracy = accuracy(model, self.task, Split::Validation, self.seed, self.validation)?;
            tracing::info!("{}: {:.1} % of the validation problems", self.role.name(), 100.0 * accuracy);
            row.insert("validation_accuracy".into(), json!(accuracy));
        }
        Ok(row)
    }

    fn card(&self, model: &Decoder, stored: &Stored) -> Result<String> {
        let Self { task, model: recipe, role, seed, .. } = *self;
        let accuracy = accuracy(model, task, Split::Test, CARD_SEED, CARD_PROBLEMS)?;
        let right = (accuracy * CARD_PROBLEMS as f64).round() as u64;
        let problems = CARD_PROBLEMS as u64;
        Card { task, role, seed, model: recipe, right, problems, test_seed: CARD_SEED }.render(stored)
    }
}

/// Share of the first `n` problems of a split that a model solves by itself, greedily.
pub fn accuracy(model: &dyn Model, task: &RingTask, split: Split, seed: u64, n: usize) -> Result<f64> {
    let problems: Vec<_> = task.ring().problems(split, seed, n).collect();
    let requests = problems
        .iter()
        .map(|p| Ok(Request::greedy(task.encode(&p.prompt())?, RESPONSE_TOKENS, &[task.eos()])))
        .collect::<Result<Vec<_>>>()?;
    let mut cache = DenseCache::new();
    let replies = collect(&mut Generator::new(model, &mut cache), requests, BATCH)?;
    let right = problems.iter().zip(&replies).filter(|(p, reply)| task.is_right(p, reply)).count();
    Ok(right as f64 / n.max(1) as f64)
}

//! Training of the models of a recipe.

use std::path::Path;

use nics_base::artefact::{AtomicDir, write_atomic};
use nics_base::interrupt::Interrupt;
use nics_core::cache::{DenseCache, NoCache};
use nics_core::checkpoint::Checkpoint;
use nics_core::generate::{Generator, Request, collect};
use nics_core::models::{Batch, Decoder, Input, Model};
use nics_core::seam::{Ragged, SeqId};
use nics_core::train::{
    Hooks, IGNORED, Loss, Micro, Progress, Summary, Trainer, from_scratch, is_stored, masked_cross_entropy,
    store,
};
use nics_datasets::word_problems::Split;
use serde_json::{Map, Value, json};
use tch::{Device, Tensor};

use super::card::Card;
use super::{ModelRecipe, RESPONSE_TOKENS, Recipe, RingTask, Role, files};
use crate::Result;

/// Problems of the test split on which a finished model is measured; its seed is kept for that.
const CARD_PROBLEMS: usize = 1000;
/// Seed of the problems of a card: no study draws from it.
const CARD_SEED: u64 = 1_000_000;
/// Sequences written at once.
const BATCH: usize = 250;

/// Hears how a run goes: pair, model, progress.
pub type Report<'a> = &'a mut dyn FnMut(u64, Role, Progress);

/// Trains every model of every pair that is not in `out` yet: `out/seed-N/small` and so on. State and logs lie in
/// `state` until a model is written; a run that was interrupted or killed goes on from there to the same weights.
///
/// # Errors
/// What is wrong with a model's fields; a `state` of another recipe; an interrupt.
pub fn train(
    recipe: &Recipe,
    state: &Path,
    out: &Path,
    device: Device,
    interrupt: &Interrupt,
    report: Report,
) -> Result<()> {
    let task = RingTask::new(recipe.modulus)?;
    for &seed in &recipe.seeds {
        for (&role, model) in &recipe.models {
            let pair = format!("seed-{seed}");
            let folder = out.join(&pair).join(role.name());
            let identity = json!({ "modulus": recipe.modulus, "seed": seed, "role": role, "model": model,
                "validation": recipe.validation });
            if is_stored(&folder, &identity)? {
                continue;
            }
            let one = One { task: &task, model, role, seed, validation: recipe.validation, identity };
            let state = state.join(&pair).join(role.name());
            one.train(&state, &folder, device, interrupt, &mut |p| report(seed, role, p))?;
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
    identity: Value,
}

impl One<'_> {
    fn train(
        &self,
        state: &Path,
        out: &Path,
        device: Device,
        interrupt: &Interrupt,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<()> {
        let config = files::config(self.task, &self.model.config);
        let (mut decoder, parameters) = from_scratch(&config, self.model.embedding_std, self.seed, device)?;
        let train = nics_core::train::TrainConfig { seed: self.seed, ..self.model.train.clone() };
        let mut trainer = Trainer::new(parameters, train, &self.identity, state)?;
        let mut evaluate = |_: u64| {
            let mut row = Map::new();
            if self.validation > 0 {
                let accuracy = accuracy(&decoder, self.task, Split::Validation, self.seed, self.validation);
                let accuracy = accuracy.map_err(|e| nics_core::train::TrainError::Caller(e.into()))?;
                tracing::info!("{}: {:.1} % of the validation problems", self.role.name(), 100.0 * accuracy);
                row.insert("validation_accuracy".into(), json!(accuracy));
            }
            Ok(row)
        };
        let hooks =
            Hooks { interrupt: interrupt.clone(), progress: Some(progress), evaluate: Some(&mut evaluate) };
        let mut loss = |micro: Micro| {
            self.loss(&decoder, micro).map_err(|e| nics_core::train::TrainError::Caller(e.into()))
        };
        let summary = trainer.run(&mut loss, hooks)?;
        self.write(&mut decoder, &config, &summary, out)
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

    fn write(&self, decoder: &mut Decoder, config: &Value, summary: &Summary, out: &Path) -> Result<()> {
        let dir = AtomicDir::create(out)?;
        let files = [
            ("tokenizer.json", files::tokenizer(self.task)),
            ("tokenizer_config.json", files::tokenizer_config(self.task)),
            ("generation_config.json", files::generation_config(self.task)),
        ];
        let parameters = store(decoder, dir.path(), config, &files, &self.identity, summary)?;
        let accuracy = accuracy(decoder, self.task, Split::Test, CARD_SEED, CARD_PROBLEMS)?;
        let card = Card {
            task: self.task,
            role: self.role,
            seed: self.seed,
            model: self.model,
            summary,
            parameters,
            weights_hash: &Checkpoint::open_dir(dir.path())?.weights_hash()?,
            right: (accuracy * CARD_PROBLEMS as f64).round() as u64,
            problems: CARD_PROBLEMS as u64,
            test_seed: CARD_SEED,
        };
        write_atomic(dir.path().join("README.md"), card.render()?)?;
        Ok(dir.commit()?)
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

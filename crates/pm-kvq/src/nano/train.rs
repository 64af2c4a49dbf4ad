//! Training of the models of a recipe.

use std::path::Path;
use std::sync::Arc;

use nics_base::artefact::{AtomicDir, write_atomic};
use nics_base::interrupt::Interrupt;
use nics_core::cache::{DenseCache, NoCache};
use nics_core::checkpoint::{Checkpoint, DEFAULT_SHARD_BYTES, TensorPath, save};
use nics_core::models::{self, Batch, Decoder, Input, Model};
use nics_core::seam::{Ragged, SeqId};
use nics_core::train::{
    Hooks, IGNORED, Loss, Micro, Progress, Summary, TrainConfig, TrainError, Trainer, masked_cross_entropy,
};
use nics_datasets::adding_ring::{
    AddingRing, DIGITS, LINE_TOKENS, RECALL_ID, TOKENS, Task, problem, problems,
};
use nics_datasets::word_problems::Split;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::card::Card;
use super::{Recipe, files, write};
use crate::{Error, Result};

/// Texts of the test split on which a finished model is measured; their seed is kept for that.
const CARD_PROBLEMS: usize = 500;
/// Seed of the texts of a card: no study draws from it.
const CARD_SEED: u64 = 1_000_000;

/// Hears how a run goes: seed, progress.
pub type Report<'a> = &'a mut dyn FnMut(u64, Progress);

/// Trains every model that is not in `out` yet: `out/seed-N`. State and logs lie in `state` until a model is written; a run
/// that was interrupted or killed goes on from there to the same weights.
///
/// # Errors
/// What is wrong with the model's fields; a `state` of another recipe; an interrupt.
pub fn train(
    recipe: &Recipe,
    state: &Path,
    out: &Path,
    device: Device,
    interrupt: &Interrupt,
    report: Report,
) -> Result<()> {
    for &seed in &recipe.seeds {
        let name = format!("seed-{seed}");
        // A model's own recipe: other seeds do not change it.
        let recipe = Recipe { seeds: vec![seed], ..recipe.clone() };
        let identity = json!({ "task": "adding-ring", "recipe": recipe });
        let folder = out.join(&name);
        if is_done(&folder, &identity)? {
            continue;
        }
        let one = One { recipe: &recipe, seed, identity };
        one.train(&state.join(&name), &folder, device, interrupt, &mut |p| report(seed, p))?;
    }
    Ok(())
}

/// Whether a folder holds the model of this recipe.
fn is_done(folder: &Path, identity: &Value) -> Result<bool> {
    let path = folder.join("training.json");
    let Ok(text) = std::fs::read_to_string(&path) else { return Ok(false) };
    let wrong = |e: serde_json::Error| Error::Artefact { path: path.clone(), reason: e.to_string() };
    let known: Value = serde_json::from_str(&text).map_err(wrong)?;
    // As it comes back from a file: numbers may lose their last bit on the way.
    let expected: Value = serde_json::from_str(&identity.to_string()).map_err(wrong)?;
    Ok(known["identity"] == expected)
}

struct One<'a> {
    recipe: &'a Recipe,
    seed: u64,
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
        let config = files::config(&self.recipe.config);
        let Value::Object(fields) = &config else { return Err(Error::Input("config is no object".into())) };
        let decoder_config = models::config(fields)?;
        let layers = decoder_config.layers;
        let mut decoder = Decoder::load(decoder_config, &self.initial(layers, device))?;
        let mut parameters = Vec::new();
        decoder.visit_parameters(&mut |name, tensor| {
            *tensor = tensor.f_detach()?.f_set_requires_grad(true)?;
            parameters.push((name.to_owned(), tensor.shallow_clone()));
            Ok(())
        })?;
        let config_of_run = TrainConfig { seed: self.seed, ..self.recipe.train.clone() };
        let mut trainer =
            Trainer::new(parameters, config_of_run, &self.identity, state).map_err(nics_core::Error::from)?;
        let mut evaluate = |_: u64| self.evaluate(&decoder).map_err(caller);
        let hooks =
            Hooks { interrupt: interrupt.clone(), progress: Some(progress), evaluate: Some(&mut evaluate) };
        let mut loss = |micro: Micro| self.loss(&decoder, micro).map_err(caller);
        let summary = trainer.run(&mut loss, hooks).map_err(nics_core::Error::from)?;
        self.write(&mut decoder, &config, &summary, out)
    }

    /// Weights drawn from the seed: matrices with deviation `1 / sqrt(in)`, what ends a residual branch smaller by
    /// `sqrt(2 layers)` (Radford et al., 2019).
    fn initial(&self, layers: usize, device: Device) -> TensorPath {
        let shrink = 1.0 / (2.0 * layers as f64).sqrt();
        let embedding = self.recipe.embedding_std;
        TensorPath::random(self.seed, 1.0, device, Kind::Float).with_transform(Arc::new(
            move |name: &str, t: Tensor| {
                let shape = t.size();
                let [_, input] = shape[..] else { return Ok(t) };
                if name.ends_with("embed_tokens.weight") {
                    return Ok(t * embedding);
                }
                let ends_branch = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
                let scale = (input as f64).powf(-0.5) * if ends_branch { shrink } else { 1.0 };
                Ok(t * scale)
            },
        ))
    }

    /// The cost of a batch of texts: of what follows their first lines. Which texts ask for recall is nothing that could be
    /// foreseen, so the word that asks is no target.
    fn loss(&self, model: &Decoder, micro: Micro) -> Result<Loss> {
        let lines = self.recipe.lines_at(micro.step);
        let tokens = lines * LINE_TOKENS;
        let batch = self.recipe.batch as u64;
        let (mut ids, mut labels) = (Vec::new(), Vec::new());
        for i in 0..batch {
            let task = if (i + 1).is_multiple_of(self.recipe.recall_every as u64) {
                Task::Recall
            } else {
                Task::Ring
            };
            let text = problem(Split::Train, micro.seed, micro.index * batch + i).ids(task, lines);
            ids.extend(text.iter().map(|&id| i64::from(id)));
            labels.extend((1..=tokens).map(|i| match text.get(i) {
                Some(&id) if i >= LINE_TOKENS && id != RECALL_ID => i64::from(id),
                _ => IGNORED,
            }));
        }
        let device = model.dims().device;
        let rows: Vec<_> = (0..batch).map(|i| (SeqId(i), 0, tokens)).collect();
        let ids = Tensor::f_from_slice(&ids)?.f_to_device(device)?;
        let batch = Batch::new(Ragged::contiguous(&rows), Input::Ids(&ids));
        let out = model.forward(&batch, &mut NoCache::new(), None)?;
        let labels = Tensor::f_from_slice(&labels)?.f_to_device(device)?;
        Ok(masked_cross_entropy(&model.logits(&out.hidden)?, &labels).map_err(nics_core::Error::from)?)
    }

    fn evaluate(&self, model: &dyn Model) -> Result<Map<String, Value>> {
        let mut row = Map::new();
        if self.recipe.validation > 0 {
            let problems: Vec<_> = problems(Split::Validation, self.seed, self.recipe.validation).collect();
            let [ring, recall] = right(model, &problems)?;
            let share = |n: u64| n as f64 / problems.len() as f64;
            tracing::info!("{ring} of {} texts without a mistake, {recall} recalled", problems.len());
            row.insert("whole_texts".into(), json!(share(ring)));
            row.insert("recalled".into(), json!(share(recall)));
        }
        Ok(row)
    }

    fn write(&self, decoder: &mut Decoder, config: &Value, summary: &Summary, out: &Path) -> Result<()> {
        let dir = AtomicDir::create(out)?;
        let (mut tensors, mut parameters) = (Vec::new(), 0);
        decoder.visit_parameters(&mut |name, tensor| {
            parameters += tensor.numel();
            let stored = tensor.f_detach()?.f_to_kind(Kind::BFloat16)?;
            // What is measured is what is stored.
            *tensor = stored.f_to_kind(Kind::Float)?;
            tensors.push((name.to_owned(), stored));
            Ok(())
        })?;
        save(dir.path(), tensors, config, DEFAULT_SHARD_BYTES).map_err(nics_core::Error::from)?;
        let problems: Vec<_> = problems(Split::Test, CARD_SEED, CARD_PROBLEMS).collect();
        let right = right(decoder, &problems)?;
        let training = json!({
            "identity": self.identity,
            "steps": summary.steps,
            "target_tokens": summary.tokens,
            "last": summary.last.as_ref().map(|row| json!({ "step": row.step, "loss": row.loss })),
            "validation": summary.eval,
        });
        for (name, value) in [
            ("tokenizer.json", files::tokenizer()),
            ("tokenizer_config.json", files::tokenizer_config()),
            ("generation_config.json", files::generation_config()),
            ("training.json", training),
        ] {
            write_atomic(dir.path().join(name), format!("{value:#}\n"))?;
        }
        let weights_hash = Checkpoint::open_dir(dir.path()).and_then(|c| c.weights_hash());
        let card = Card {
            seed: self.seed,
            recipe: self.recipe,
            summary,
            parameters,
            weights_hash: &weights_hash.map_err(nics_core::Error::from)?,
            right,
            problems: CARD_PROBLEMS as u64,
            test_seed: CARD_SEED,
        };
        write_atomic(dir.path().join("README.md"), card.render()?)?;
        Ok(dir.commit()?)
    }
}

fn caller(e: Error) -> TrainError {
    TrainError::Caller(e.into())
}

/// Texts that are written without a mistake, and first lines that are recalled.
fn right(model: &dyn Model, problems: &[AddingRing]) -> Result<[u64; 2]> {
    let texts = write(model, &mut DenseCache::new(), problems)?;
    let count = |right: Vec<usize>, all: usize| right.into_iter().filter(|n| *n == all).count() as u64;
    Ok([count(texts.prefixes(problems), TOKENS - LINE_TOKENS), count(texts.recalled(problems), DIGITS)])
}

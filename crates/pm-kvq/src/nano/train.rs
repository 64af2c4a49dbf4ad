//! Training of the models of a recipe.

use std::path::Path;

use nics_base::artefact::{AtomicDir, write_atomic};
use nics_base::interrupt::Interrupt;
use nics_core::cache::{DenseCache, NoCache};
use nics_core::checkpoint::Checkpoint;
use nics_core::models::{Batch, Decoder, Input, Model};
use nics_core::seam::{Ragged, SeqId};
use nics_core::train::{
    Hooks, IGNORED, Loss, Micro, Progress, Summary, TrainConfig, TrainError, Trainer, from_scratch,
    is_stored, masked_cross_entropy, store,
};
use nics_datasets::adding_ring::{AddingRing, DIGITS, LINE_TOKENS, RECALL_ID, TOKENS, problem, problems};
use nics_datasets::word_problems::Split;
use serde_json::{Map, Value, json};
use tch::{Device, Tensor};

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
        if is_stored(&folder, &identity)? {
            continue;
        }
        let one = One { recipe: &recipe, seed, identity };
        one.train(&state.join(&name), &folder, device, interrupt, &mut |p| report(seed, p))?;
    }
    Ok(())
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
        let (mut decoder, parameters) = from_scratch(&config, self.recipe.embedding_std, self.seed, device)?;
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

    /// The cost of a batch of texts: of what follows their first lines. Texts ask for recall at every place in turn; where is
    /// nothing that could be foreseen, so the word that asks is no target.
    fn loss(&self, model: &Decoder, micro: Micro) -> Result<Loss> {
        let lines = self.recipe.lines_at(micro.step);
        let tokens = lines * LINE_TOKENS;
        let batch = self.recipe.batch as u64;
        let (mut ids, mut labels) = (Vec::new(), Vec::new());
        for i in 0..batch {
            let index = micro.index * batch + i;
            let places = self.recipe.places(index, lines);
            let text = problem(Split::Train, micro.seed, index).ids_recalling(lines, &places);
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
        let files = [
            ("tokenizer.json", files::tokenizer()),
            ("tokenizer_config.json", files::tokenizer_config()),
            ("generation_config.json", files::generation_config()),
        ];
        let parameters = store(decoder, dir.path(), config, &files, &self.identity, summary)?;
        let problems: Vec<_> = problems(Split::Test, CARD_SEED, CARD_PROBLEMS).collect();
        let right = right(decoder, &problems)?;
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

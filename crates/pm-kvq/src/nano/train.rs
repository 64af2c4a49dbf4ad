//! Training of the models of a recipe.

use nics_core::cache::{DenseCache, NoCache};
use nics_core::models::{Batch, Decoder, Input, Model};
use nics_core::seam::{Ragged, SeqId};
use nics_core::train::{
    IGNORED, Loss, Micro, Named, Progress, Stored, Task, TrainConfig, Workshop, from_scratch,
    masked_cross_entropy,
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

/// Trains every model that is not there yet: `seed-N`. State and logs lie beside until a model is written; a run that was
/// interrupted or killed goes on from there to the same weights.
///
/// # Errors
/// What is wrong with the model's fields; a state of another recipe; an interrupt.
pub fn train(recipe: &Recipe, workshop: &Workshop, report: Report) -> Result<()> {
    for &seed in &recipe.seeds {
        // A model's own recipe: other seeds do not change it.
        let one = One { recipe: Recipe { seeds: vec![seed], ..recipe.clone() }, seed };
        workshop.train(format!("seed-{seed}"), &one, &mut |p| report(seed, p))?;
    }
    Ok(())
}

struct One {
    recipe: Recipe,
    seed: u64,
}

impl Task for One {
    type Model = Decoder;
    type Error = Error;

    fn identity(&self) -> Value {
        json!({ "task": "adding-ring", "recipe": self.recipe })
    }

    fn settings(&self) -> TrainConfig {
        TrainConfig { seed: self.seed, ..self.recipe.train.clone() }
    }

    fn config(&self) -> Value {
        files::config(&self.recipe.config)
    }

    fn files(&self) -> Vec<(&'static str, Value)> {
        vec![
            ("tokenizer.json", files::tokenizer()),
            ("tokenizer_config.json", files::tokenizer_config()),
            ("generation_config.json", files::generation_config()),
        ]
    }

    fn start(&self, config: &Value, device: Device) -> nics_core::Result<(Decoder, Named)> {
        from_scratch(config, self.recipe.embedding_std, self.seed, device)
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

    fn evaluate(&self, model: &Decoder) -> Result<Map<String, Value>> {
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

    fn card(&self, model: &Decoder, stored: &Stored) -> Result<String> {
        let problems: Vec<_> = problems(Split::Test, CARD_SEED, CARD_PROBLEMS).collect();
        let right = right(model, &problems)?;
        let (recipe, problems) = (&self.recipe, CARD_PROBLEMS as u64);
        Card { seed: self.seed, recipe, right, problems, test_seed: CARD_SEED }.render(stored)
    }
}

/// Texts that are written without a mistake, and first lines that are recalled.
fn right(model: &dyn Model, problems: &[AddingRing]) -> Result<[u64; 2]> {
    let texts = write(model, &mut DenseCache::new(), problems)?;
    let count = |right: Vec<usize>, all: usize| right.into_iter().filter(|n| *n == all).count() as u64;
    Ok([count(texts.prefixes(problems), TOKENS - LINE_TOKENS), count(texts.recalled(problems), DIGITS)])
}

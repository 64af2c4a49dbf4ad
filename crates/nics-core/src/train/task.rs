//! A small model from nothing on a task: trained, stored and described, in one move and resumable.

use std::fmt::{Display, Write};
use std::path::Path;

use nics_base::artefact::{AtomicDir, write_atomic};
use nics_base::ci::wilson;
use nics_base::interrupt::Interrupt;
use nics_base::settings;
use serde::Serialize;
use serde_json::{Map, Value};
use tch::Device;

use super::scratch::{Named, is_stored, store};
use super::{Hooks, Loss, Micro, Progress, Summary, TrainConfig, TrainError, Trainer};
use crate::checkpoint::Checkpoint;
use crate::models::Model;
use crate::{Error, Result};

/// A model that is trained from nothing, as [`Workshop::train`] asks of it.
pub trait Task {
    /// What is trained.
    type Model: Model;
    /// The crate's own error.
    type Error: From<Error> + std::error::Error + Send + Sync + 'static;

    /// What makes the model what it is: a state is gone on with, and a stored model is left alone, only where this is equal.
    fn identity(&self) -> Value;

    /// The optimiser and its schedule, with the model's seed.
    fn settings(&self) -> TrainConfig;

    /// config.json.
    fn config(&self) -> Value;

    /// The files beside config.json and weights: names and contents.
    fn files(&self) -> Vec<(&'static str, Value)>;

    /// The model with its first weights, and the parameters that are trained, as [`from_scratch`](super::from_scratch) gives
    /// them.
    fn start(&self, config: &Value, device: Device) -> Result<(Self::Model, Named)>;

    /// The cost of a micro batch.
    fn loss(&self, model: &Self::Model, micro: Micro) -> Result<Loss, Self::Error>;

    /// What the log says of the model on the way.
    fn evaluate(&self, model: &Self::Model) -> Result<Map<String, Value>, Self::Error>;

    /// The card of the finished model, which holds the weights that are stored.
    fn card(&self, model: &Self::Model, stored: &Stored) -> Result<String, Self::Error>;
}

/// Where models are trained, and what stops that.
#[derive(Debug, Clone, Copy)]
pub struct Workshop<'a> {
    /// Folder of states and logs, until a model is written.
    pub state: &'a Path,
    /// Folder of the models.
    pub out: &'a Path,
    /// What is computed on.
    pub device: Device,
    /// Asks a run to stop; its state is kept.
    pub interrupt: &'a Interrupt,
}

impl Workshop<'_> {
    /// Trains a task's model into the folder `name` unless it is there. State and log lie in a folder of that name until the
    /// model is written in one move; a run that was interrupted or killed goes on from there to the same weights.
    ///
    /// # Errors
    /// What is wrong with the model's fields; a state of another identity; an interrupt; what the task returns.
    pub fn train<T: Task>(
        &self,
        name: impl AsRef<Path>,
        task: &T,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), T::Error> {
        let name = name.as_ref();
        let (state, out) = (self.state.join(name), self.out.join(name));
        let identity = task.identity();
        if is_stored(&out, &identity)? {
            return Ok(());
        }
        let config = task.config();
        let (mut model, parameters) = task.start(&config, self.device)?;
        let mut trainer =
            Trainer::new(parameters, task.settings(), &identity, &state).map_err(Error::from)?;
        let summary = {
            let mut evaluate = |_: u64| task.evaluate(&model).map_err(caller);
            let mut loss = |micro: Micro| task.loss(&model, micro).map_err(caller);
            let hooks = Hooks {
                interrupt: self.interrupt.clone(),
                progress: Some(progress),
                evaluate: Some(&mut evaluate),
            };
            trainer.run(&mut loss, hooks).map_err(Error::from)?
        };
        let dir = AtomicDir::create(&out).map_err(Error::from)?;
        let parameters = store(&mut model, dir.path(), &config, &task.files(), &identity, &summary)?;
        let weights_hash = Checkpoint::open_dir(dir.path()).and_then(|c| c.weights_hash());
        let stored = Stored { summary, parameters, weights_hash: weights_hash.map_err(Error::from)? };
        let card = task.card(&model, &stored)?;
        write_atomic(dir.path().join("README.md"), card).map_err(Error::from)?;
        Ok(dir.commit().map_err(Error::from)?)
    }
}

fn caller(e: impl std::error::Error + Send + Sync + 'static) -> TrainError {
    TrainError::Caller(Box::new(e))
}

/// What a card tells of every model.
#[derive(Debug)]
pub struct Stored {
    /// How it was trained.
    pub summary: Summary,
    /// How many parameters it has.
    pub parameters: usize,
    /// The hash of its weights.
    pub weights_hash: String,
}

impl Stored {
    /// A card in Markdown: what the model is, how it was made (`trained_on`, by which `command` and which recipe), what it
    /// can do.
    ///
    /// # Errors
    /// A recipe that TOML cannot say.
    pub fn card(
        &self,
        [title, about]: [&str; 2],
        trained_on: &str,
        figures: &[String],
        command: &str,
        recipe: &impl Serialize,
    ) -> Result<String> {
        let Self { summary, parameters, weights_hash } = self;
        let mut card = format!("---\nlicense: apache-2.0\n---\n\n# {title}\n\n{about}\n\n");
        let mut line = |line: &dyn Display| {
            let _ = writeln!(card, "- {line}");
        };
        line(&format_args!("parameters: {parameters}, stored in bfloat16, trained and measured in float32"));
        line(&format_args!("trained on: {trained_on}"));
        line(&format_args!("training: {} steps, {} target tokens", summary.steps, summary.tokens));
        for figure in figures {
            line(figure);
        }
        line(&format_args!("hash of the weights: `{weights_hash}`"));
        line(&format_args!("command: {command}"));
        let recipe = settings::text(recipe).map_err(Error::Input)?;
        let _ = write!(card, "\n```toml\n{}\n```\n", recipe.trim_end());
        Ok(card)
    }
}

/// A share with its interval, as cards say it.
pub fn share(right: u64, of: u64) -> String {
    let [low, high] = wilson(right, of).map(|v| 100.0 * v);
    format!("{right} of {of} (95 % interval {low:.1} to {high:.1} %)")
}

/// Refuses the seeds of a recipe unless they are different numbers.
///
/// # Errors
/// What is wrong.
pub fn check_seeds(seeds: &[u64]) -> Result<(), String> {
    let mut sorted = seeds.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    if sorted.is_empty() || sorted.len() != seeds.len() {
        return Err(format!("seeds is {seeds:?}, expected different numbers"));
    }
    Ok(())
}

/// Refuses settings of a model that make no sense. `under` is what stands in front of their names, e.g. `models.small.`
///
/// # Errors
/// What is wrong.
pub fn check_model(under: &str, batch: usize, embedding_std: f64, train: &TrainConfig) -> Result<(), String> {
    if batch == 0 {
        return Err(format!("{under}batch is 0, expected at least 1"));
    }
    if !(embedding_std.is_finite() && embedding_std > 0.0) {
        return Err(format!("{under}embedding_std is {embedding_std}, expected a number above 0"));
    }
    train.validate().map_err(|e| format!("{under}train: {e}"))
}

//! Training of a router: AdamW on weighted cross entropy, early stopping on the validation loss, the best epoch's
//! weights, and a threshold.
//!
//! A run is deterministic in its seed, and a run that was killed goes on from its folder to the same weights: the order of
//! an epoch follows from seed and epoch, a step's dropout from seed and step, and the state (weights, moments, best
//! weights, losses) is replaced at once.

mod config;
mod recipe;
mod rows;
mod state;

use std::path::Path;

use nics_base::interrupt::Interrupt;
use nics_core::train::{AdamW, AdamWOptions};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use tch::Tensor;

pub use config::{LossKind, TrainingConfig};
pub use recipe::{LabelChoice, RouterShape, TrainRecipe};
pub use rows::Rows;
pub use state::STATE_FILE;

use state::{Position, State};

use crate::router::{Dropout, Router, Storage, probability_of};
use crate::thresholds::{Chosen, Scored};
use crate::{Error, Result};

/// What an epoch came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Epoch {
    /// Mean of its batches' losses.
    pub train_loss: f64,
    /// Mean of the validation batches' losses.
    pub validation_loss: f64,
    /// Share of right decisions on the validation rows at threshold 0.5.
    pub accuracy: f64,
    /// Recall there.
    pub recall: f64,
    /// F1 there.
    pub f1: f64,
    /// Share of rows sent to the large model there.
    pub positive_rate: f64,
}

/// What a run does beside training.
#[derive(Default)]
pub struct Hooks<'a> {
    /// Asks the run to stop; its state is saved first.
    pub interrupt: Interrupt,
    /// Called after every epoch with its number, counted from 1.
    pub epoch: Option<EpochReport<'a>>,
    /// Called after every step with epoch (from 1), step within it (from 1), steps of an epoch, loss.
    pub step: Option<StepReport<'a>>,
}

/// Hears of an epoch.
pub type EpochReport<'a> = &'a mut dyn FnMut(usize, &Epoch);
/// Hears of a step.
pub type StepReport<'a> = &'a mut dyn FnMut(usize, usize, usize, f64);

/// What a run ended with. The router has the best epoch's weights.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// All epochs.
    pub epochs: Vec<Epoch>,
    /// The best one, counted from 1.
    pub best_epoch: usize,
    /// The threshold, from the validation rows.
    pub threshold: Chosen,
    /// Validation rows with the router's probabilities.
    pub validation: Scored,
    /// Whether training ended before its last epoch.
    pub stopped_early: bool,
}

/// Trains `router` on `train` until the loss on `validation` no longer falls.
///
/// With a folder `dir` the run saves its state there and goes on from it.
///
/// # Errors
/// [`Error::NoPositiveLabels`] unless both kinds of rows are in both sets, [`Error::Damaged`] for a folder with another
/// run's state, a loss that is not finite, and an interrupt.
pub fn train(
    router: &mut Router,
    train: &Rows,
    validation: &Rows,
    config: &TrainingConfig,
    dir: Option<&Path>,
    mut hooks: Hooks,
) -> Result<Outcome> {
    config.validate()?;
    if router.storage() != Storage::F32 {
        return Err(Error::setting(
            "the router's storage",
            format!("{:?}", router.storage()),
            "F32, to be trained",
        ));
    }
    if router.config().args.output_dim != 1 {
        return Err(Error::setting("output_dim", router.config().args.output_dim, "1, to be trained"));
    }
    // Both kinds of rows are needed in both sets; a set without would show only at the end.
    validation.check_classes()?;
    let loss = config.loss.constants(train.check_classes()?, train.len())?;
    let parameters = router.parameters()?;
    for (_, p) in &parameters {
        let _ = p.set_requires_grad(true);
    }
    let result = (|| -> Result<Position> {
        let options = AdamWOptions { betas: config.betas, eps: config.eps, weight_decay: 0.0 };
        let named = parameters.iter().map(|(name, p)| (name.clone(), p.shallow_clone())).collect();
        let optimizer = AdamW::new(named, options)?;
        let identity = state::identity(router, config, train, validation)?;
        let mut state = State::open(dir, optimizer, identity)?;
        let steps = train.len().div_ceil(config.batch);
        while !state.position.finished(config) {
            let epoch = state.position.epochs.len();
            let order = order(train.len(), config, epoch);
            while state.position.step < steps {
                let step = state.position.step;
                if let Err(e) = hooks.interrupt.check() {
                    state.save(dir)?;
                    return Err(e.into());
                }
                let from = step * config.batch;
                let batch = train.select(&order[from..(from + config.batch).min(order.len())])?;
                let mut dropout = Dropout::new(
                    router.config().args.dropout_rate,
                    config.seed,
                    (epoch * steps + step) as u64,
                );
                let logits = router.forward(&batch.features(), Some(&mut dropout))?;
                let loss = loss.of(&logits, &batch.divergent.f_unsqueeze(1)?)?;
                let value = loss.f_detach()?.f_double_value(&[])?;
                if !value.is_finite() {
                    return Err(nics_core::Error::NotFinite {
                        what: format!("the loss of step {} in epoch {}", step + 1, epoch + 1),
                        detail: value.to_string(),
                    }
                    .into());
                }
                update(&mut state.optimizer, &loss, config)?;
                state.position.loss += value;
                state.position.step += 1;
                if let Some(report) = &mut hooks.step {
                    report(epoch + 1, step + 1, steps, value);
                }
                if state.position.step < steps && state.position.step.is_multiple_of(config.save_every) {
                    state.save(dir)?;
                }
            }
            let (validation_loss, scored) = evaluate(router, validation, &loss, config.batch)?;
            let at_half = scored.metrics(0.5);
            let ended = Epoch {
                train_loss: state.position.loss / steps as f64,
                validation_loss,
                accuracy: at_half.accuracy,
                recall: at_half.recall,
                f1: at_half.f1,
                positive_rate: at_half.positive_rate,
            };
            state.end_epoch(ended)?;
            state.save(dir)?;
            if let Some(report) = &mut hooks.epoch {
                report(epoch + 1, &ended);
            }
        }
        state.restore_best()?;
        Ok(state.position)
    })();
    for (_, p) in &parameters {
        let _ = p.set_requires_grad(false);
    }
    let position = result?;
    let (_, scored) = evaluate(router, validation, &loss, config.batch)?;
    Ok(Outcome {
        best_epoch: position.best_epoch(),
        stopped_early: position.epochs.len() < config.epochs,
        epochs: position.epochs,
        threshold: scored.at_recall(config.min_recall),
        validation: scored,
    })
}

/// The rows of an epoch in the order in which they are trained on.
fn order(rows: usize, config: &TrainingConfig, epoch: usize) -> Vec<i64> {
    let mut order: Vec<i64> = (0..rows as i64).collect();
    if config.shuffle {
        let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
        rng.set_stream(epoch as u64);
        order.shuffle(&mut rng);
    }
    order
}

/// One update, as `torch.optim.AdamW` makes it over all parameters: the core's decays matrices alone, so its decay is off
/// and done here, before the step as there.
fn update(optimizer: &mut AdamW, loss: &Tensor, config: &TrainingConfig) -> Result<()> {
    let grads: Vec<Option<Tensor>> = Tensor::f_run_backward(&[loss], optimizer.params(), false, false)?
        .into_iter()
        .map(|g| g.defined().then_some(g))
        .collect();
    {
        let _guard = tch::no_grad_guard();
        for (p, _) in optimizer.params().iter().zip(&grads).filter(|(_, g)| g.is_some()) {
            let _ = p.shallow_clone().f_mul_scalar_(1.0 - config.lr * config.weight_decay)?;
        }
    }
    Ok(optimizer.step(&grads, config.lr)?)
}

/// Every row's probability with its label, `batch` rows at a time.
///
/// # Errors
/// Features that the router does not take, [`Error::NoPositiveLabels`] unless there are rows of both kinds.
pub fn score(router: &Router, rows: &Rows, batch: usize) -> Result<Scored> {
    let all: Vec<i64> = (0..rows.len() as i64).collect();
    let mut probability = Vec::with_capacity(rows.len());
    for part in all.chunks(batch.max(1)) {
        let part = rows.select(part)?;
        probability.extend(Vec::<f32>::try_from(router.probability(&part.features())?)?);
    }
    let divergent = Vec::<f32>::try_from(&rows.divergent)?.into_iter().map(|d| d > 0.5).collect();
    Scored::new(probability, divergent)
}

/// Mean of the batches' losses, and every row's probability.
fn evaluate(router: &Router, rows: &Rows, loss: &crate::losses::Loss, batch: usize) -> Result<(f64, Scored)> {
    let _guard = tch::no_grad_guard();
    let all: Vec<i64> = (0..rows.len() as i64).collect();
    let (mut sum, mut batches, mut probability) = (0.0, 0, Vec::with_capacity(rows.len()));
    for part in all.chunks(batch) {
        let part = rows.select(part)?;
        let logits = router.forward(&part.features(), None)?;
        sum += loss.of(&logits, &part.divergent.f_unsqueeze(1)?)?.f_double_value(&[])?;
        batches += 1;
        probability.extend(Vec::<f32>::try_from(probability_of(&logits)?)?);
    }
    let divergent = Vec::<f32>::try_from(&rows.divergent)?.into_iter().map(|d| d > 0.5).collect();
    Ok((sum / f64::from(batches), Scored::new(probability, divergent)?))
}

//! `r2r train`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use nics_base::interrupt::Interrupt;
use nics_base::jsonl;
use nics_base::progress::Progress;
use nics_core::checkpoint::Checkpoint;
use nics_core::cli::{DeviceArgs, training_state};
use nics_core::models;
use nics_core::tch::{Device, Tensor};
use r2r::checkpoint::{Card, CommonArgs, LabelStatistics, save};
use r2r::labels::pipeline::{Documents, LabelColumn, LabelSet};
use r2r::router::Router;
use r2r::training::{Epoch, Hooks, STATE_FILE, TrainRecipe, train};
use serde::{Deserialize, Serialize};
use serde_json::json;

/// The log of a run, in its state's folder.
const LOG_FILE: &str = "train_log.jsonl";

/// Trains a router on labels.
///
/// The recipe (TOML) has three tables; what is not said is the paper's: [router] architecture, top_k, hidden_dims,
/// expansion_factor, dropout_rate, normalize_input; [labels] column, held_out, split_seed; [training] lr, weight_decay,
/// betas, eps, batch, epochs, patience, shuffle, loss, min_recall, seed, save_every. Rows are validated on by document:
/// those of --validation, or a share of the documents that is held out. OUT gets router.safetensors and router.json, with
/// the threshold from the validation rows and their curve. Rows are in memory. After an interrupt or a crash the same
/// command goes on, and ends with the same weights.
#[derive(Args)]
pub struct Train {
    /// The recipe (TOML); default: the paper's
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder that `label` filled, or one with the folders of all shards; once for each
    #[arg(long, value_name = "FOLDER", required = true)]
    labels: Vec<PathBuf>,
    /// Labels to validate on, in place of a share of --labels
    #[arg(long, value_name = "FOLDER")]
    validation: Vec<PathBuf>,
    /// Small model, for its embedding table; not needed by routers that read no token
    #[arg(long, short, visible_alias = "slm", value_name = "FOLDER|ID")]
    small: Option<String>,
    /// Folder of the router
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
    /// Folder of the run's state; default: OUT with `.training` behind it
    #[arg(long, value_name = "FOLDER")]
    state: Option<PathBuf>,
    /// Seed in place of the recipe's
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// What is learnt, in place of the recipe's
    #[arg(long, value_enum, value_name = "COLUMN")]
    column: Option<Column>,
    #[command(flatten)]
    run_on: DeviceArgs,
}

/// What is learnt.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Column {
    /// Where the judge found that the difference matters
    Divergent,
    /// Where the models differ at all: the ablation without a judge
    Mismatch,
}

impl From<Column> for LabelColumn {
    fn from(column: Column) -> Self {
        match column {
            Column::Divergent => Self::Divergent,
            Column::Mismatch => Self::Mismatch,
        }
    }
}

/// A line of the log.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    epoch: usize,
    train_loss: f64,
    validation_loss: f64,
    accuracy: f64,
    recall: f64,
    f1: f64,
    positive_rate: f64,
}

impl Line {
    fn of((i, e): (usize, &Epoch)) -> Self {
        Self {
            epoch: i + 1,
            train_loss: e.train_loss,
            validation_loss: e.validation_loss,
            accuracy: e.accuracy,
            recall: e.recall,
            f1: e.f1,
            positive_rate: e.positive_rate,
        }
    }
}

impl Train {
    pub fn run(self, quiet: bool) -> Result<()> {
        self.run_on.set_threads()?;
        let device = self.run_on.device.open()?;
        let mut recipe = self.config.as_deref().map(TrainRecipe::read).transpose()?.unwrap_or_default();
        if let Some(seed) = self.seed {
            recipe.training.seed = seed;
        }
        if let Some(column) = self.column {
            recipe.labels.column = column.into();
        }
        recipe.validate()?;
        let labels = LabelSet::open(&self.labels)?;
        let mut config = recipe.router(labels.hidden()?)?;
        config.args.pretrained_model_name = labels.small().map(str::to_owned);
        let embedding = match (&self.small, config.architecture.takes_token()) {
            (Some(name), true) => Some(embedding(name, &labels)?),
            (None, true) => bail!(
                "a {} reads tokens: give the small model with --small, for its embedding table",
                config.architecture.name()
            ),
            (_, false) => None,
        };
        let column = recipe.labels.column;
        let (held_out, seed) = (recipe.labels.held_out, recipe.labels.split_seed);
        let own =
            if self.validation.is_empty() { Documents::Training { held_out, seed } } else { Documents::All };
        let (rows, statistics) = labels.read(&config, column, own)?;
        let (validation, of_validation) = if self.validation.is_empty() {
            labels
                .read(&config, column, Documents::HeldOut { held_out, seed })
                .context("the held-out documents")?
        } else {
            let set = LabelSet::open(&self.validation)?;
            set.read(&config, column, Documents::All).context("the validation labels")?
        };
        let state = training_state(self.state.as_deref(), &self.out);
        std::fs::create_dir_all(&state).with_context(|| format!("cannot make {}", state.display()))?;
        let mut router =
            Router::random(config.clone(), embedding.as_ref(), None, recipe.training.seed, device)?;
        let interrupt = Interrupt::install()?;
        let bar = if quiet {
            Progress::hidden()
        } else {
            Progress::new(
                (recipe.training.epochs * rows.len().div_ceil(recipe.training.batch)) as u64,
                "train",
            )
        };
        let mut first = true;
        let mut step = |epoch: usize, step: usize, steps: usize, loss: f64| {
            let done = ((epoch - 1) * steps + step) as u64;
            if std::mem::take(&mut first) {
                bar.start_at(done.saturating_sub(1));
            }
            bar.set(done);
            bar.label(format!("epoch {epoch}, loss {loss:.4}"));
        };
        let mut told = Vec::new();
        let mut epoch = |number: usize, e: &Epoch| {
            told.push(format!(
                "epoch {number}: loss {:.4}, validation {:.4}, recall {:.3} at a rate of {:.3}",
                e.train_loss, e.validation_loss, e.recall, e.positive_rate
            ));
            tracing::info!("{}", told[told.len() - 1]);
        };
        let hooks = Hooks { interrupt, epoch: Some(&mut epoch), step: Some(&mut step) };
        let outcome = train(&mut router, &rows, &validation, &recipe.training, Some(&state), hooks)
            .with_context(|| format!("the run of {}", state.join(STATE_FILE).display()))?;
        bar.finish();
        let log: Vec<Line> = outcome.epochs.iter().enumerate().map(Line::of).collect();
        jsonl::write(state.join(LOG_FILE), &log)?;
        let chosen = outcome.threshold;
        let names = [
            ("hidden_states", config.architecture.takes_hidden()),
            ("token", config.architecture.takes_token()),
            ("logits", config.architecture.takes_logits()),
        ];
        let input_type = names.iter().filter(|(_, takes)| *takes).map(|(n, _)| (*n).to_owned()).collect();
        let mut card = Card::new(&config, CommonArgs { threshold: chosen.threshold, input_type });
        card.slm = labels.small().map(str::to_owned);
        card.llm = labels.large().map(str::to_owned);
        card.tokenizer_hash = labels.tokenizer_hash().map(str::to_owned);
        card.labels = Some(LabelStatistics { validation: of_validation.train, ..statistics });
        card.validation_curve = outcome.validation.curve();
        card.model_specific_args.extend([
            ("recipe".to_owned(), serde_json::to_value(&recipe)?),
            ("epochs".to_owned(), json!(outcome.epochs.len())),
            ("best_epoch".to_owned(), json!(outcome.best_epoch)),
            ("held_out".to_owned(), json!(self.validation.is_empty())),
            ("recall_met".to_owned(), json!(chosen.met)),
        ]);
        save(&self.out, &router, &card)?;
        eprintln!(
            "{}: best epoch {} of {}; threshold {:.4} catches {:.1} % of the divergent tokens and asks the large model for {:.1} %",
            self.out.display(),
            outcome.best_epoch,
            outcome.epochs.len(),
            chosen.threshold,
            100.0 * chosen.metrics.recall,
            100.0 * chosen.metrics.positive_rate
        );
        if !chosen.met {
            eprintln!(
                "no threshold catches {:.1} % of them: the one of highest recall was taken",
                100.0 * recipe.training.min_recall
            );
        }
        Ok(())
    }
}

/// The embedding table of the model that made the features, `[vocab, hidden]`, as it is stored.
pub fn embedding(name: &str, labels: &LabelSet) -> Result<Tensor> {
    let checkpoint = Checkpoint::open(name)?;
    let of_labels = labels.small_identity();
    if of_labels["arch_hash"].as_str().is_some_and(|hash| hash != checkpoint.arch_hash()) {
        bail!("the labels were made with another small model than {name}: its architecture differs");
    }
    if of_labels["weights_hash"].as_str() != Some(checkpoint.weights_hash()?.as_str()) {
        tracing::warn!("the labels were made with other weights than those of {name}");
    }
    table(&checkpoint)
}

/// The embedding table of a checkpoint.
pub fn table(checkpoint: &Checkpoint) -> Result<Tensor> {
    const NAME: &str = "model.embed_tokens.weight";
    let shape: Vec<i64> = checkpoint
        .shape(NAME)
        .with_context(|| format!("{} has no {NAME}", checkpoint.name()))?
        .iter()
        .map(|&n| n as i64)
        .collect();
    let at = checkpoint.root(Device::Cpu, models::stored_kind(checkpoint));
    Ok(at.tensor(NAME, &shape)?)
}

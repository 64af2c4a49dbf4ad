//! `r2r threshold`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use nics_core::cli::{DeviceArgs, JsonArg, at_least_one};
use r2r::checkpoint::{load, read_card, save_card};
use r2r::labels::pipeline::{Documents, LabelSet};
use r2r::router::Storage;
use r2r::thresholds::{Chosen, MIN_RECALL, Objective, Scored, Simulation, WINDOW};
use r2r::training::score;
use serde_json::json;

use super::train::{Column, embedding};

/// Chooses a router's threshold on labels.
///
/// With one of --min-recall, --target-rate, --objective, --max-false-positives; default: --min-recall 0.95. The thresholds
/// that are tried are 100 from 0.01 to 0.99. Labels are the held-out documents of the router's training where it held some
/// out, else all of them.
#[derive(Args)]
pub struct Threshold {
    /// Folder of the router
    #[arg(long, short, value_name = "FOLDER")]
    router: PathBuf,
    /// Folder that `label` filled, or one with the folders of all shards; once for each
    #[arg(long, value_name = "FOLDER", required = true)]
    labels: Vec<PathBuf>,
    /// Small model, for its embedding table; not needed by routers that read no token
    #[arg(long, short, visible_alias = "slm", value_name = "FOLDER|ID")]
    small: Option<String>,
    /// Share of the divergent tokens to be caught, asking the large model as rarely as that allows
    #[arg(long, value_name = "SHARE", value_parser = share, conflicts_with_all = ["target_rate", "objective"])]
    min_recall: Option<f64>,
    /// Share of all tokens that may go to the large model
    #[arg(long, value_name = "SHARE", value_parser = share, conflicts_with_all = ["objective", "max_false_positives"])]
    target_rate: Option<f64>,
    /// The best of nine thresholds from 0.1 to 0.9
    #[arg(long, value_enum, value_name = "WHAT", conflicts_with = "max_false_positives")]
    objective: Option<Best>,
    /// Share of all tokens that may go to the large model without need; with --min-recall
    #[arg(long, value_name = "SHARE", value_parser = share)]
    max_false_positives: Option<f64>,
    /// With --max-false-positives: the large model stays until the mean of so many tokens falls
    #[arg(long, value_name = "TOKENS", requires = "max_false_positives", num_args = 0..=1,
          default_missing_value = "3", value_parser = at_least_one)]
    window: Option<usize>,
    /// What is to be caught
    #[arg(long, value_enum, value_name = "COLUMN", default_value = "divergent")]
    column: Column,
    /// All documents, those that the router was trained on among them
    #[arg(long)]
    all: bool,
    /// Write the threshold into the router's card
    #[arg(long)]
    write: bool,
    /// Print what every threshold does
    #[arg(long)]
    curve: bool,
    #[command(flatten)]
    json: JsonArg,
    #[command(flatten)]
    run_on: DeviceArgs,
}

/// What a threshold should be best at.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Best {
    /// Harmonic mean of precision and recall
    F1,
    /// Precision
    Precision,
    /// Recall
    Recall,
}

fn share(text: &str) -> Result<f64, String> {
    let share: f64 = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    if (0.0..=1.0).contains(&share) { Ok(share) } else { Err("expected 0 to 1".into()) }
}

impl Threshold {
    pub fn run(self) -> Result<()> {
        self.run_on.set_threads()?;
        let device = self.run_on.device.open()?;
        let mut card = read_card(&self.router)?;
        let labels = LabelSet::open(&self.labels)?;
        if card.tokenizer_hash.is_some() && card.tokenizer_hash.as_deref() != labels.tokenizer_hash() {
            bail!("the router was made for another tokenizer than the labels: tokens do not mean the same");
        }
        let table = match (&self.small, card.model_type.takes_token()) {
            (Some(name), true) => Some(embedding(name, &labels)?),
            (None, true) => bail!("the router reads tokens: give the small model with --small"),
            (_, false) => None,
        };
        let (router, _) = load(&self.router, table.as_ref(), Storage::F32, device)?;
        let (rows, statistics) = labels.read(&card.config(), self.column.into(), self.documents(&card))?;
        let scored = score(&router, &rows, 4096)?;
        let chosen = self.choose(&scored);
        if self.write {
            card.common_args.threshold = chosen.threshold;
            save_card(&self.router, &card)?;
        }
        let m = chosen.metrics;
        if self.json.json {
            let line = json!({
                "threshold": chosen.threshold, "met": chosen.met, "rows": statistics.train,
                "recall": m.recall, "precision": m.precision, "f1": m.f1, "accuracy": m.accuracy,
                "positive_rate": m.positive_rate, "false_positives": m.false_positives,
            });
            println!("{line}");
        } else {
            println!(
                "threshold {:.6}{}",
                chosen.threshold,
                if chosen.met { "" } else { " (the condition cannot be met)" }
            );
            println!(
                "of {} rows {:.2} % go to the large model, {:.2} % of the divergent ones among them; precision {:.3}, F1 {:.3}",
                statistics.train,
                100.0 * m.positive_rate,
                100.0 * m.recall,
                m.precision,
                m.f1
            );
        }
        if self.curve {
            for point in scored.curve() {
                if self.json.json {
                    println!("{}", serde_json::to_string(&point)?);
                } else {
                    println!(
                        "{:.4}  recall {:.4}  rate {:.4}",
                        point.threshold, point.recall, point.positive_rate
                    );
                }
            }
        }
        Ok(())
    }

    /// The documents that the router's training held out, as its card says.
    fn documents(&self, card: &r2r::checkpoint::Card) -> Documents {
        let noted = &card.model_specific_args;
        let held_out = noted.get("held_out").and_then(serde_json::Value::as_bool).unwrap_or(false);
        let labels = noted.get("recipe").map(|recipe| &recipe["labels"]);
        match labels.map(|l| (l["held_out"].as_f64(), l["split_seed"].as_u64())) {
            Some((Some(share), Some(seed))) if held_out && !self.all => {
                Documents::HeldOut { held_out: share, seed }
            }
            _ => Documents::All,
        }
    }

    fn choose(&self, scored: &Scored) -> Chosen {
        let min_recall = self.min_recall.unwrap_or(MIN_RECALL);
        if let Some(rate) = self.target_rate {
            return scored.at_rate(rate);
        }
        if let Some(objective) = self.objective {
            return scored.best(match objective {
                Best::F1 => Objective::F1,
                Best::Precision => Objective::Precision,
                Best::Recall => Objective::Recall,
            });
        }
        if let Some(most) = self.max_false_positives {
            let simulation = match self.window {
                Some(window) => Simulation::Hysteresis(window),
                None => Simulation::Plain,
            };
            return scored.at_false_positives(most, min_recall, simulation);
        }
        scored.at_recall(min_recall)
    }
}

const _: () = assert!(WINDOW == 3, "the help says so");

//! `mbq study`: what nano models show.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use mbq::study::{About, Claims, Inputs, LIMITS, Study as Settings, evaluate, figures};
use nics_base::{row, study};
use nics_core::cli::{DeviceArgs, ShardArg, seeded};

/// Studies nano models: every method at every width, answering the same problems.
#[derive(Args)]
pub struct Study {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Quantize a model by every method and let it answer the same problems: points.jsonl; resumable
    Evaluate(Evaluate),
    /// Make result rows out of the points of all models
    Report(Report),
}

/// Quantizes a model under every condition, by every method, to every width, and compares what it answers with the float
/// model: OUT/points.jsonl. With --shard the shard's part alone, in a file of its own: merge them (cargo xtask merge). An
/// interrupted run goes on where it stopped.
#[derive(Args)]
struct Evaluate {
    /// The study's settings (TOML)
    #[arg(long, value_name = "FILE")]
    settings: PathBuf,
    /// Folder of the model
    #[arg(long, short, value_name = "FOLDER")]
    model: PathBuf,
    /// Seed of problems and of rescaled weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Where the result goes
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
    #[command(flatten)]
    run_on: DeviceArgs,
    #[command(flatten)]
    shard: ShardArg,
}

/// Makes result rows out of the points of all models.
///
/// Prints MBQ beside every other method: the ratio of divergences with its interval, and in how many models it diverges less.
/// With --check it fails unless what is claimed holds.
#[derive(Args)]
struct Report {
    /// The study's settings (TOML)
    #[arg(long, value_name = "FILE")]
    settings: PathBuf,
    /// A model: SEED=FOLDER of its points; once for each
    #[arg(long = "points", value_name = "SEED=FOLDER", value_parser = seeded, required = true)]
    points: Vec<(u64, PathBuf)>,
    /// The preset that rows name
    #[arg(long, value_name = "NAME", default_value = "")]
    preset: String,
    /// File of the rows
    #[arg(long, short, value_name = "FILE")]
    out: PathBuf,
    /// Fail unless the claims of this file (TOML) hold: each with the whole interval of its ratio
    #[arg(long, value_name = "FILE")]
    check: Option<PathBuf>,
}

impl Study {
    pub fn run(self, quiet: bool) -> Result<()> {
        match self.command {
            Command::Evaluate(command) => command.run(quiet),
            Command::Report(command) => command.run(),
        }
    }
}

impl Evaluate {
    fn run(&self, quiet: bool) -> Result<()> {
        self.run_on.set_threads()?;
        std::fs::create_dir_all(&self.out).with_context(|| format!("cannot make {}", self.out.display()))?;
        let study = Settings::read(&self.settings)?;
        let inputs = Inputs { model: &self.model, study: &study, seed: self.seed };
        self.shard.measure(&self.out, quiet, |output| Ok(evaluate(&inputs, output)?))
    }
}

impl Report {
    fn run(&self) -> Result<()> {
        let study = Settings::read(&self.settings)?;
        let claims = match &self.check {
            Some(file) => Claims::read(file, &study)?,
            None => Claims::default(),
        };
        let seeds = study::read(&self.points)?;
        let about = About { preset: self.preset.clone(), model: "mbq-nano".into() };
        let (rows, comparisons) = figures(&study, &claims, &about, &seeds)?;
        row::write(&self.out, &rows)?;
        for c in &comparisons.0 {
            let [low, high] = c.ratio.interval;
            println!(
                "{}, {}: {} over {}: {:.3} ({low:.3} to {high:.3}), less in {} of {} models{}",
                c.condition,
                c.quant,
                c.method,
                c.over,
                c.ratio.value,
                c.wins,
                c.models,
                if c.claimed { ", claimed" } else { "" }
            );
        }
        println!("{LIMITS}");
        Ok(comparisons.check()?)
    }
}

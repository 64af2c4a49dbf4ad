//! `r2r pair`: nano pairs.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use nics_base::interrupt::Interrupt;
use nics_core::cli::{DeviceArgs, TrainingBars, training_state};
use r2r::nano::{Recipe, train};

/// Makes nano pairs: small and large models of one vocabulary on a task of this project's own.
#[derive(Args)]
pub struct Pair {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train the models of a recipe (TOML); resumable
    Train(Train),
}

/// Trains the models of a recipe that are not in --out yet: OUT/seed-N/small, middle and large.
///
/// State and logs (metrics.jsonl) are kept in --state until a checkpoint is written in one move. After an interrupt or a
/// crash the same command goes on, and ends with the same weights as an unbroken run.
#[derive(Args)]
struct Train {
    /// The recipe
    #[arg(long, short, value_name = "FILE")]
    recipe: PathBuf,
    /// Folder of the pairs
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
    /// Folder of the runs' state; default: OUT with `.training` behind it
    #[arg(long, value_name = "FOLDER")]
    state: Option<PathBuf>,
    #[command(flatten)]
    run_on: DeviceArgs,
}

impl Pair {
    pub fn run(self, quiet: bool) -> Result<()> {
        let Command::Train(command) = self.command;
        command.run(quiet)
    }
}

impl Train {
    fn run(self, quiet: bool) -> Result<()> {
        let recipe = Recipe::read(&self.recipe)?;
        self.run_on.set_threads()?;
        let device = self.run_on.device.open()?;
        let state = training_state(self.state.as_deref(), &self.out);
        let interrupt = Interrupt::install()?;
        let mut bars = TrainingBars::new(quiet);
        train(&recipe, &state, &self.out, device, &interrupt, &mut |seed, role, p| {
            bars.show(format!("pair of seed {seed}, {}", role.name()), &p);
        })?;
        bars.finish();
        eprintln!("{}: {} pairs", self.out.display(), recipe.seeds.len());
        Ok(())
    }
}

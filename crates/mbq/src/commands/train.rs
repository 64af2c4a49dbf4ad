//! `mbq train`: nano models.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use mbq::nano::{Recipe, train};
use nics_base::interrupt::Interrupt;
use nics_core::cli::{DeviceArgs, TrainingBars, training_state};

/// Trains the nano models of a recipe that are not in --out yet: OUT/seed-N; resumable.
///
/// State and logs (metrics.jsonl) are kept in --state until a checkpoint is written in one move. After an interrupt or a
/// crash the same command goes on, and ends with the same weights as an unbroken run.
#[derive(Args)]
pub struct Train {
    /// The recipe (TOML)
    #[arg(long, short, value_name = "FILE")]
    recipe: PathBuf,
    /// Folder of the models
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
    /// Folder of the runs' state; default: OUT with `.training` behind it
    #[arg(long, value_name = "FOLDER")]
    state: Option<PathBuf>,
    #[command(flatten)]
    run_on: DeviceArgs,
}

impl Train {
    pub fn run(self, quiet: bool) -> Result<()> {
        let recipe = Recipe::read(&self.recipe)?;
        self.run_on.set_threads()?;
        let device = self.run_on.device.open()?;
        let state = training_state(self.state.as_deref(), &self.out);
        let interrupt = Interrupt::install()?;
        let mut bars = TrainingBars::new(quiet);
        train(&recipe, &state, &self.out, device, &interrupt, &mut |seed, p| {
            bars.show(format!("model of seed {seed}"), &p);
        })?;
        bars.finish();
        eprintln!("{}: {} models", self.out.display(), recipe.seeds.len());
        Ok(())
    }
}

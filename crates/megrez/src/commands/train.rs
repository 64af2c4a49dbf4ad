//! `megrez train`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use megrez::train::{Recipe, train};
use nics_base::interrupt::Interrupt;
use nics_base::progress::Progress;
use nics_core::cli::{DeviceArgs, training_state};

/// Trains a model as a recipe (TOML) says, from scratch or from a checkpoint.
///
/// State and log (metrics.jsonl) are kept in --state until the checkpoint is written to --out in one move. After an
/// interrupt or a crash the same command goes on, and ends with the same weights as an unbroken run.
#[derive(Args)]
pub struct Train {
    /// The recipe
    #[arg(long, short, value_name = "FILE")]
    recipe: PathBuf,
    /// Folder of the checkpoint
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
    /// Folder of the run's state; default: OUT with `.training` behind it
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
        let bar = if quiet { Progress::hidden() } else { Progress::new(recipe.train.steps, "steps") };
        let mut started = false;
        let summary = train(&recipe, &state, &self.out, device, &interrupt, &mut |p| {
            if !started {
                bar.start_at(p.step);
                started = true;
            }
            bar.set(p.step);
            bar.label(format!("loss {:.4}", p.loss));
        })?;
        bar.finish();
        eprintln!(
            "{}: {} steps, {} target tokens, {:.0} s of training",
            self.out.display(),
            summary.steps,
            summary.tokens,
            summary.seconds
        );
        Ok(())
    }
}

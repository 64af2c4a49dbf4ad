//! `pm-kvq train`: nano models.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use nics_base::interrupt::Interrupt;
use nics_base::progress::Progress;
use nics_core::cli::{DeviceArgs, training_state};
use pm_kvq::nano::{Recipe, train};

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
        let mut bar: Option<(u64, Progress)> = None;
        train(&recipe, &state, &self.out, device, &interrupt, &mut |seed, p| {
            if bar.as_ref().is_none_or(|(of, _)| *of != seed) {
                let new = if quiet {
                    Progress::hidden()
                } else {
                    Progress::new(p.steps, format!("model of seed {seed}"))
                };
                new.start_at(p.step);
                if let Some((_, old)) = bar.replace((seed, new)) {
                    old.finish();
                }
            }
            if let Some((_, bar)) = &bar {
                bar.set(p.step);
                bar.label(format!("model of seed {seed}: loss {:.4}", p.loss));
            }
        })?;
        if let Some((_, bar)) = bar {
            bar.finish();
        }
        eprintln!("{}: {} models", self.out.display(), recipe.seeds.len());
        Ok(())
    }
}

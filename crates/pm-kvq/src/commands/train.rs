//! `pm-kvq train`: nano models.

use anyhow::Result;
use clap::Args;
use nics_core::cli::ModelsOfRecipeArgs;
use pm_kvq::nano::{Recipe, train};

/// Trains the nano models of a recipe that are not in --out yet: OUT/seed-N; resumable.
///
/// State and logs (metrics.jsonl) are kept in --state until a checkpoint is written in one move. After an interrupt or a
/// crash the same command goes on, and ends with the same weights as an unbroken run.
#[derive(Args)]
pub struct Train {
    #[command(flatten)]
    models: ModelsOfRecipeArgs,
}

impl Train {
    pub fn run(self, quiet: bool) -> Result<()> {
        let recipe = Recipe::read(&self.models.recipe)?;
        self.models.run(quiet, |workshop, report| {
            anyhow::Ok(train(&recipe, workshop, &mut |seed, p| report(format!("model of seed {seed}"), p))?)
        })?;
        eprintln!("{}: {} models", self.models.out.display(), recipe.seeds.len());
        Ok(())
    }
}

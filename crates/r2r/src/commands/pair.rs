//! `r2r pair`: nano pairs.

use anyhow::Result;
use clap::{Args, Subcommand};
use nics_core::cli::ModelsOfRecipeArgs;
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
    #[command(flatten)]
    models: ModelsOfRecipeArgs,
}

impl Pair {
    pub fn run(self, quiet: bool) -> Result<()> {
        let Command::Train(command) = self.command;
        command.run(quiet)
    }
}

impl Train {
    fn run(self, quiet: bool) -> Result<()> {
        let recipe = Recipe::read(&self.models.recipe)?;
        self.models.run(quiet, |workshop, report| {
            anyhow::Ok(train(&recipe, workshop, &mut |seed, role, p| {
                report(format!("pair of seed {seed}, {}", role.name()), p);
            })?)
        })?;
        eprintln!("{}: {} pairs", self.models.out.display(), recipe.seeds.len());
        Ok(())
    }
}

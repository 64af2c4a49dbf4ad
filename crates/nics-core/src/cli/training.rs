//! Flags of trainings, and their progress on the terminal.

use std::path::PathBuf;

use clap::Args;
use nics_base::interrupt::Interrupt;
use nics_base::progress::Progress as Bar;

use super::{DeviceArgs, training_state};
use crate::train::{Progress, Workshop};

/// Flags of a command that trains the models of a recipe.
#[derive(Debug, Clone, Args)]
pub struct ModelsOfRecipeArgs {
    /// The recipe (TOML)
    #[arg(long, short, value_name = "FILE")]
    pub recipe: PathBuf,
    /// Folder of the models
    #[arg(long, short, value_name = "FOLDER")]
    pub out: PathBuf,
    /// Folder of the runs' state; default: OUT with `.training` behind it
    #[arg(long, value_name = "FOLDER")]
    pub state: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub run_on: DeviceArgs,
}

/// Hears how the training of a model goes: what it is called.
type Report<'a> = &'a mut dyn FnMut(String, Progress);

impl ModelsOfRecipeArgs {
    /// Calls `train` with what the flags say, and shows what it reports.
    ///
    /// # Errors
    /// A device that there is not, signals that cannot be caught, and what `train` returns.
    pub fn run<E: From<crate::Error> + From<std::io::Error>>(
        &self,
        quiet: bool,
        train: impl FnOnce(&Workshop, Report) -> Result<(), E>,
    ) -> Result<(), E> {
        self.run_on.set_threads()?;
        let device = self.run_on.device.open()?;
        let state = training_state(self.state.as_deref(), &self.out);
        let interrupt = Interrupt::install()?;
        let mut bars = TrainingBars::new(quiet);
        let workshop = Workshop { state: &state, out: &self.out, device, interrupt: &interrupt };
        train(&workshop, &mut |name, p| bars.show(name, &p))?;
        bars.finish();
        Ok(())
    }
}

/// A bar for each of several runs, one after the other.
pub struct TrainingBars {
    quiet: bool,
    current: Option<(String, Bar)>,
}

impl TrainingBars {
    /// No bar yet; with `quiet` none at all.
    pub fn new(quiet: bool) -> Self {
        Self { quiet, current: None }
    }

    /// Shows how far the run of this name is; a new name ends the bar before it.
    pub fn show(&mut self, name: String, progress: &Progress) {
        if self.current.as_ref().is_none_or(|(of, _)| *of != name) {
            let bar = if self.quiet { Bar::hidden() } else { Bar::new(progress.steps, name.clone()) };
            bar.start_at(progress.step);
            if let Some((_, old)) = self.current.replace((name, bar)) {
                old.finish();
            }
        }
        if let Some((name, bar)) = &self.current {
            bar.set(progress.step);
            bar.label(format!("{name}: loss {:.4}", progress.loss));
        }
    }

    /// The last run has ended.
    pub fn finish(self) {
        if let Some((_, bar)) = self.current {
            bar.finish();
        }
    }
}

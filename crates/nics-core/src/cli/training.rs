//! Progress of trainings on the terminal.

use nics_base::progress::Progress as Bar;

use crate::train::Progress;

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

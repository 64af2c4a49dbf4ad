//! A study on the command line: its shard, its bar, what stops it.

use std::io;
use std::path::{Path, PathBuf};

use super::ShardArg;
use crate::error::Error;
use crate::interrupt::Interrupt;
use crate::progress::Progress;
use crate::study::Output;

impl ShardArg {
    /// Lets `evaluate` measure the shard's part of a study into the folder `dir`, shows how far it is, and says where its points
    /// are.
    ///
    /// # Errors
    /// A shard that makes no sense, signals that cannot be caught, and what `evaluate` returns.
    pub fn measure<P, E: From<Error> + From<io::Error>>(
        &self,
        dir: &Path,
        quiet: bool,
        evaluate: impl FnOnce(Output) -> Result<(PathBuf, Vec<P>), E>,
    ) -> Result<(), E> {
        let shard = self.resolve()?;
        let interrupt = Interrupt::install()?;
        let mut shown: Option<Progress> = None;
        let mut report = |done: usize, all: usize, what: &str| {
            let bar = shown.get_or_insert_with(|| {
                if quiet { Progress::hidden() } else { Progress::new(all as u64, "evaluate") }
            });
            bar.set(done as u64);
            if !what.is_empty() {
                bar.label(what);
            }
        };
        let output = Output { dir, shard, interrupt: &interrupt, report: &mut report };
        let (file, points) = evaluate(output)?;
        if let Some(bar) = shown {
            bar.finish();
        }
        eprintln!("{}: {} points", file.display(), points.len());
        Ok(())
    }
}

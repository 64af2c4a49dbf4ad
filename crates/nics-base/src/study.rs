//! The points of a study: tasks that are measured one after the other, each coming to one point or several, in shards and
//! resumable.
//!
//! A shard takes its part of the list of tasks; points are appended to a log as they are measured, and a run that was stopped
//! goes on behind them.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::jsonl::{self, JsonlLog};
use crate::shard::{Shard, ShardName};

/// The name of the file with all points of a study.
pub const POINTS_FILE: &str = "points.jsonl";

/// Where points go.
pub struct Output<'a> {
    /// Folder of the result.
    pub dir: &'a Path,
    /// Which part of the work is done.
    pub shard: Shard,
    /// Asks the run to stop; what was measured is kept.
    pub interrupt: &'a Interrupt,
    /// Called with the tasks that are done, all tasks of the shard, and the name of the next one.
    pub report: &'a mut dyn FnMut(usize, usize, &str),
}

/// A study while it is measured.
pub struct Points<'a, P> {
    output: Output<'a>,
    log: JsonlLog<P>,
    measured: Vec<P>,
    tasks: Vec<usize>,
}

impl<'a> Output<'a> {
    /// Measures what has not been measured: [`POINTS_FILE`], or a shard's own file, to be merged into that. Gives the file and
    /// its points. `hash` is that of everything which decides them; `work` goes through [`Points::tasks`].
    ///
    /// # Errors
    /// A folder that cannot be written, and what `work` returns, an interrupt among it.
    pub fn measure<P: Serialize + DeserializeOwned, E: From<Error>>(
        self,
        hash: &str,
        work: impl FnOnce(&mut Points<'a, P>) -> Result<(), E>,
    ) -> Result<(PathBuf, Vec<P>), E> {
        let name = ShardName::new("points", hash, self.shard);
        let whole = self.shard.is_whole();
        let done = self.dir.join(if whole { POINTS_FILE.to_owned() } else { name.file_name() });
        let partial = self.dir.join(name.partial_name());
        if done.exists() && !partial.exists() {
            let points = jsonl::read(&done)?;
            return Ok((done, points));
        }
        let (log, measured) = JsonlLog::open(&partial)?;
        let mut study = Points { output: self, log, measured, tasks: Vec::new() };
        work(&mut study)?;
        let Points { output, log, measured, tasks } = study;
        (output.report)(tasks.len(), tasks.len(), "");
        log.finish(&done)?;
        Ok((done, measured))
    }
}

impl<P: Serialize + DeserializeOwned> Points<'_, P> {
    /// Those of `all` tasks that are the shard's, in order.
    pub fn tasks(&mut self, all: usize) -> Vec<usize> {
        self.tasks = self.output.shard.items(all).collect();
        self.tasks.clone()
    }

    /// A task is next: says so, unless the run is to stop.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub fn begin(&mut self, task: usize, name: &str) -> Result<()> {
        self.output.interrupt.check()?;
        let done = self.tasks.iter().take_while(|t| **t != task).count();
        (self.output.report)(done, self.tasks.len(), name);
        Ok(())
    }

    /// Whether such a point has been measured.
    pub fn any(&self, such: impl FnMut(&P) -> bool) -> bool {
        self.measured.iter().any(such)
    }

    /// Keeps a point.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn add(&mut self, point: P) -> Result<()> {
        self.log.append(&point)?;
        self.measured.push(point);
        Ok(())
    }
}

/// The points of several studies, each a seed and its folder.
///
/// # Errors
/// A file that cannot be read, or that holds something else.
pub fn read<P: DeserializeOwned>(folders: &[(u64, PathBuf)]) -> Result<Vec<(u64, Vec<P>)>> {
    folders.iter().map(|(seed, folder)| Ok((*seed, jsonl::read(folder.join(POINTS_FILE))?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Squares of the first numbers; stops before task `stop`.
    fn squares(dir: &Path, shard: Shard, stop: Option<usize>) -> (Result<Vec<u64>>, Vec<String>) {
        let interrupt = Interrupt::never();
        let mut heard = Vec::new();
        let mut report = |done: usize, all: usize, name: &str| heard.push(format!("{done}/{all} {name}"));
        let output = Output { dir, shard, interrupt: &interrupt, report: &mut report };
        let points = output.measure("0123456789abcdef", |points| {
            for task in points.tasks(5) {
                let square = (task * task) as u64;
                if points.any(|p| *p == square) {
                    continue;
                }
                if stop == Some(task) {
                    interrupt.request();
                }
                points.begin(task, &format!("square of {task}"))?;
                points.add(square)?;
            }
            Ok(())
        });
        (points.map(|(_, points)| points), heard)
    }

    #[test]
    fn a_stopped_run_goes_on_and_shards_make_the_whole() {
        let dir = tempfile::tempdir().unwrap();
        let whole = Shard::new(0, 1).unwrap();
        let (stopped, heard) = squares(dir.path(), whole, Some(2));
        assert!(matches!(stopped, Err(Error::Interrupted)));
        assert_eq!(heard, ["0/5 square of 0", "1/5 square of 1"]);
        let (points, heard) = squares(dir.path(), whole, None);
        assert_eq!(points.unwrap(), [0, 1, 4, 9, 16]);
        assert_eq!(heard, ["2/5 square of 2", "3/5 square of 3", "4/5 square of 4", "5/5 "]);
        // Once more finds the work done.
        let (points, heard) = squares(dir.path(), whole, Some(0));
        assert_eq!((points.unwrap().len(), heard.len()), (5, 0));
        let (part, heard) = squares(dir.path(), Shard::new(1, 2).unwrap(), None);
        assert_eq!(part.unwrap(), [1, 9]);
        assert_eq!(heard, ["0/2 square of 1", "1/2 square of 3", "2/2 "]);
        let read: Vec<(u64, Vec<u64>)> = read(&[(7, dir.path().to_owned())]).unwrap();
        assert_eq!(read, [(7, vec![0, 1, 4, 9, 16])]);
    }
}

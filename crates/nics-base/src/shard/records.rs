//! The records of one shard while they are made: a line each, appended at once, and the finished file in the order of the items.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Shard, ShardName, merge};
use crate::error::{AtPath, Result};
use crate::jsonl::{self, JsonlLog};

/// The records of a shard. A run that was interrupted or killed finds what it had made; a finished one is not repeated.
#[derive(Debug)]
pub struct Records<T> {
    done: PathBuf,
    partial: PathBuf,
    /// `None` once the finished file is there.
    log: Option<JsonlLog<T>>,
    made: Vec<T>,
}

impl<T: Serialize + DeserializeOwned> Records<T> {
    /// The shard's records in a folder, which is made where it is missing.
    ///
    /// # Errors
    /// [`Error::Busy`](crate::Error::Busy) while another process writes them; a damaged file.
    pub fn open(dir: &Path, name: &ShardName) -> Result<Self> {
        let (done, partial) = (dir.join(name.file_name()), dir.join(name.partial_name()));
        if done.exists() {
            let records = jsonl::read(&done)?;
            // Left behind where an earlier run ended between its last two steps.
            let _ = std::fs::remove_file(&partial);
            return Ok(Self { done, partial, log: None, made: records });
        }
        let (log, records) = JsonlLog::open(&partial)?;
        Ok(Self { done, partial, log: Some(log), made: records })
    }

    /// What there is so far, in the order in which it was made.
    pub fn records(&self) -> &[T] {
        &self.made
    }

    /// Whether all of it is there: then nothing is appended any more.
    pub fn is_finished(&self) -> bool {
        self.log.is_none()
    }

    /// Adds a record.
    pub fn append(&mut self, record: T) -> Result<()> {
        if let Some(log) = &mut self.log {
            log.append(&record)?;
            self.made.push(record);
        }
        Ok(())
    }

    /// Writes the finished file, in the order of `index`, and gives it with its records.
    pub fn finish(mut self, index: impl Fn(&T) -> usize) -> Result<(PathBuf, Vec<T>)> {
        if self.log.take().is_some() {
            self.made.sort_by_key(index);
            jsonl::write(&self.done, &self.made)?;
            std::fs::remove_file(&self.partial).at("remove", &self.partial)?;
        }
        Ok((self.done, self.made))
    }
}

/// The records of a run whose shards are all finished in a folder, in the order of the items: those of `stem` and
/// `config_hash`, in however many shards. `None` where there are none, or not all.
///
/// # Errors
/// A shard that is damaged, or there twice.
pub fn gathered<T: DeserializeOwned>(dir: &Path, stem: &str, config_hash: &str) -> Result<Option<Vec<T>>> {
    if !dir.is_dir() {
        return Ok(None);
    }
    let wanted = ShardName::new(stem, config_hash, Shard::WHOLE);
    let mut found: Vec<(ShardName, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(dir).at("read the folder", dir)? {
        let entry = entry.at("read the folder", dir)?;
        let name = entry.file_name().to_str().and_then(ShardName::parse);
        let same = |n: &ShardName| n.stem == wanted.stem && n.config == wanted.config && !n.shard.is_whole();
        found.extend(name.filter(same).map(|name| (name, entry.path())));
    }
    // Of several ways to cut the work, one that is complete.
    for count in found.iter().map(|(name, _)| name.shard.count()) {
        let files: Vec<PathBuf> =
            found.iter().filter(|(n, _)| n.shard.count() == count).map(|(_, path)| path.clone()).collect();
        if files.len() == count {
            let out = tempfile::NamedTempFile::new_in(dir).at("make a file in", dir)?;
            merge(&files, out.path())?;
            return jsonl::read(out.path()).map(Some);
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(shard: Shard) -> ShardName {
        ShardName::new("items", &"ab".repeat(32), shard)
    }

    fn make(dir: &Path, shard: Shard, items: usize) {
        let mut records = Records::<usize>::open(dir, &name(shard)).unwrap();
        let known = records.records().to_vec();
        for item in shard.items(items).filter(|i| !known.contains(i)) {
            records.append(item).unwrap();
        }
        records.finish(|i| *i).unwrap();
    }

    #[test]
    fn a_second_run_goes_on_and_a_third_does_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = Records::<usize>::open(dir.path(), &name(Shard::WHOLE)).unwrap();
        first.append(2).unwrap();
        first.append(0).unwrap();
        assert!(matches!(
            Records::<usize>::open(dir.path(), &name(Shard::WHOLE)),
            Err(crate::Error::Busy(_))
        ));
        drop(first);
        let mut second = Records::<usize>::open(dir.path(), &name(Shard::WHOLE)).unwrap();
        assert_eq!(second.records(), [2, 0]);
        second.append(1).unwrap();
        let (file, all) = second.finish(|i| *i).unwrap();
        assert_eq!((all, jsonl::read::<usize>(&file).unwrap()), (vec![0, 1, 2], vec![0, 1, 2]));
        let third = Records::<usize>::open(dir.path(), &name(Shard::WHOLE)).unwrap();
        assert!(third.is_finished());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn shards_are_gathered_when_all_are_there() {
        let dir = tempfile::tempdir().unwrap();
        let gathered = || gathered::<usize>(dir.path(), "items", &"ab".repeat(32)).unwrap();
        assert_eq!(gathered(), None);
        make(dir.path(), Shard::new(1, 3).unwrap(), 7);
        make(dir.path(), Shard::new(0, 3).unwrap(), 7);
        make(dir.path(), Shard::new(0, 2).unwrap(), 7);
        assert_eq!(gathered(), None);
        make(dir.path(), Shard::new(2, 3).unwrap(), 7);
        assert_eq!(gathered(), Some((0..7).collect()));
        // Others' shards do not count.
        assert_eq!(super::gathered::<usize>(dir.path(), "items", &"cd".repeat(32)).unwrap(), None);
        assert_eq!(
            super::gathered::<usize>(&dir.path().join("gone"), "items", &"ab".repeat(32)).unwrap(),
            None
        );
    }
}

//! Long work in `n` independent shards: which items are mine, what my file is called, and putting the files together.
//!
//! A shard is idempotent and named by the hash of its configuration, so shards can run anywhere, in any order, twice,
//! as a Slurm array, a Kubernetes indexed job or a loop in a shell. Item `i` belongs to shard `i % n`.

mod records;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde_json::value::RawValue;

use crate::artefact::write_atomic;
use crate::error::{AtPath, Error, Result};

pub use records::{Records, gathered};

/// One of `count` equal parts of some work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shard {
    index: usize,
    count: usize,
}

impl Shard {
    /// All of the work.
    pub const WHOLE: Self = Self { index: 0, count: 1 };

    /// Shard `index` (from 0) of `count`.
    pub fn new(index: usize, count: usize) -> Result<Self> {
        if index < count {
            return Ok(Self { index, count });
        }
        let reason = match count {
            0 => "the count must be at least 1".to_owned(),
            _ => format!("shards count from 0, so the last of {count} is {}/{count}", count - 1),
        };
        Err(Error::BadShard { given: format!("{index}/{count}"), reason })
    }

    /// The shard that a batch system assigned to this process, if one did.
    ///
    /// Slurm arrays: `SLURM_ARRAY_TASK_ID` with `_COUNT`, `_MIN` and `_STEP`. Kubernetes indexed jobs:
    /// `JOB_COMPLETION_INDEX` with `JOB_COMPLETIONS`, which the job must pass on. `NICS_SHARDS` gives or overrides the
    /// count for both and makes the task's number the index as it is: that way single tasks of an array can be
    /// submitted again (`--array=3`).
    pub fn from_env() -> Result<Option<Self>> {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    /// [`from_env`](Self::from_env) over any source of variables.
    pub fn from_lookup(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let number = |name: &'static str| -> Result<Option<usize>> {
            let Some(text) = get(name) else { return Ok(None) };
            let bad = |_| Error::BadShard {
                given: format!("{name}={text}"),
                reason: "expected a whole number".to_owned(),
            };
            text.trim().parse().map(Some).map_err(bad)
        };
        let fixed_count = number("NICS_SHARDS")?;
        if let Some(id) = number("SLURM_ARRAY_TASK_ID")? {
            if let Some(count) = fixed_count {
                return Self::new(id, count).map(Some);
            }
            let bad = |reason: &str| Error::BadShard {
                given: format!("SLURM_ARRAY_TASK_ID={id}"),
                reason: format!("{reason}; set NICS_SHARDS to the number of shards and count tasks from 0"),
            };
            let count =
                number("SLURM_ARRAY_TASK_COUNT")?.ok_or_else(|| bad("SLURM_ARRAY_TASK_COUNT is missing"))?;
            let min = number("SLURM_ARRAY_TASK_MIN")?.unwrap_or(0);
            let step = number("SLURM_ARRAY_TASK_STEP")?.unwrap_or(1).max(1);
            let offset = id.checked_sub(min).filter(|o| o % step == 0 && o / step < count);
            let offset = offset.ok_or_else(|| bad("the array is not a plain range of tasks"))?;
            return Self::new(offset / step, count).map(Some);
        }
        if let Some(index) = number("JOB_COMPLETION_INDEX")? {
            let count = match fixed_count {
                Some(count) => count,
                None => number("JOB_COMPLETIONS")?.ok_or_else(|| Error::BadShard {
                    given: format!("JOB_COMPLETION_INDEX={index}"),
                    reason: "the number of shards is unknown; set JOB_COMPLETIONS or NICS_SHARDS in the job"
                        .into(),
                })?,
            };
            return Self::new(index, count).map(Some);
        }
        Ok(None)
    }

    /// Which shard this is, from 0.
    pub fn index(self) -> usize {
        self.index
    }

    /// How many shards there are.
    pub fn count(self) -> usize {
        self.count
    }

    /// True when this shard is all of the work.
    pub fn is_whole(self) -> bool {
        self.count == 1
    }

    /// True when item `item` is this shard's.
    pub fn takes(self, item: usize) -> bool {
        item % self.count == self.index
    }

    /// The items of this shard among `items`.
    pub fn items(self, items: usize) -> impl Iterator<Item = usize> {
        (self.index..items).step_by(self.count)
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

impl FromStr for Shard {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        let Some((index, count)) = parts else {
            let reason = "expected INDEX/COUNT, for example 0/4".to_owned();
            return Err(Error::BadShard { given: text.to_owned(), reason });
        };
        Self::new(index, count)
    }
}

/// The name of a shard's file: `STEM-CONFIG.INDEX-of-COUNT.jsonl`.
///
/// `CONFIG` is the start of a hash of everything that the lines depend on; files of other settings never mix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardName {
    /// What the file holds, for example `eval-gsm8k`.
    pub stem: String,
    /// First twelve digits of the configuration's hash.
    pub config: String,
    /// Which shard.
    pub shard: Shard,
}

/// How much of the configuration's hash a file name carries.
const CONFIG_DIGITS: usize = 12;

impl ShardName {
    /// The name for `shard`, where `config_hash` comes from [`hash::value`](crate::hash::value).
    pub fn new(stem: impl Into<String>, config_hash: &str, shard: Shard) -> Self {
        Self { stem: stem.into(), config: config_hash.chars().take(CONFIG_DIGITS).collect(), shard }
    }

    /// The finished file.
    pub fn file_name(&self) -> String {
        format!("{}-{}.{}-of-{}.jsonl", self.stem, self.config, self.shard.index, self.shard.count)
    }

    /// The file while it is being written; [`JsonlLog::finish`](crate::jsonl::JsonlLog::finish) renames it.
    pub fn partial_name(&self) -> String {
        format!("{}.part", self.file_name())
    }

    /// Reads a finished shard's name back; `None` for any other name.
    pub fn parse(file_name: &str) -> Option<Self> {
        let (stem_config, shard) = file_name.strip_suffix(".jsonl")?.rsplit_once('.')?;
        let (index, count) = shard.split_once("-of-")?;
        let (stem, config) = stem_config.rsplit_once('-')?;
        let is_config = config.len() == CONFIG_DIGITS && config.bytes().all(|b| b.is_ascii_hexdigit());
        let shard = Shard::new(index.parse().ok()?, count.parse().ok()?).ok()?;
        is_config.then(|| Self { stem: stem.to_owned(), config: config.to_owned(), shard })
    }
}

/// Puts the files of all shards together into `out` and returns how many lines that are.
///
/// Lines are taken in turn, one from each shard, which is the order of an unsharded run when every item wrote one line.
/// Refused are a missing or doubled shard, another configuration or stem, an unfinished shard and a line that is not
/// JSON; `out` is then left as it was.
pub fn merge(files: &[PathBuf], out: impl AsRef<Path>) -> Result<usize> {
    let mut slots: Vec<Option<PathBuf>> = Vec::new();
    let mut first: Option<(ShardName, &Path)> = None;
    for file in files {
        let name = file.file_name().and_then(|n| n.to_str()).and_then(ShardName::parse).ok_or_else(|| {
            Error::Merge(format!(
                "{} is not a finished shard; those are called NAME-CONFIG.INDEX-of-COUNT.jsonl",
                file.display()
            ))
        })?;
        let (head, head_file) = first.get_or_insert_with(|| (name.clone(), file));
        if (&name.stem, &name.config, name.shard.count) != (&head.stem, &head.config, head.shard.count) {
            return Err(Error::Merge(format!(
                "{} and {} come from different runs (name, configuration or number of shards differ); \
                 merge the files of one run",
                head_file.display(),
                file.display()
            )));
        }
        slots.resize(name.shard.count, None);
        if let Some(twin) = slots[name.shard.index].replace(file.clone()) {
            return Err(Error::Merge(format!(
                "shard {} is there twice: {} and {}",
                name.shard,
                twin.display(),
                file.display()
            )));
        }
    }
    let Some((head, _)) = first else { return Err(Error::Merge("no shard files were given".to_owned())) };
    let missing: Vec<_> = (0..slots.len()).filter(|&i| slots[i].is_none()).map(|i| i.to_string()).collect();
    if !missing.is_empty() {
        return Err(Error::Merge(format!(
            "of the {} shards of {}-{}, these are missing: {}; run them with --shard INDEX/{}",
            slots.len(),
            head.stem,
            head.config,
            missing.join(", "),
            slots.len()
        )));
    }
    let texts: Vec<String> = slots.iter().flatten().map(|f| checked_text(f)).collect::<Result<_>>()?;
    let mut sources: Vec<_> = texts.iter().map(|t| t.lines()).collect();
    let mut merged = String::new();
    let mut lines = 0;
    loop {
        let before = lines;
        for line in sources.iter_mut().filter_map(Iterator::next) {
            merged.push_str(line);
            merged.push('\n');
            lines += 1;
        }
        if lines == before {
            break;
        }
    }
    write_atomic(out, merged)?;
    Ok(lines)
}

/// The text of a shard file in which every line is whole and JSON.
fn checked_text(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path).at("read", path)?;
    let bad =
        |line: usize, reason: String| Error::CorruptLine { path: path.to_owned(), line: line + 1, reason };
    for (i, line) in text.lines().enumerate() {
        if let Err(e) = serde_json::from_str::<&RawValue>(line) {
            return Err(bad(i, format!("not JSON ({e}); run this shard again")));
        }
    }
    if !text.is_empty() && !text.ends_with('\n') {
        return Err(bad(text.lines().count() - 1, "the line is cut short; run this shard again".into()));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_parse_and_print() {
        let shard: Shard = "2/5".parse().unwrap();
        assert_eq!((shard.index(), shard.count()), (2, 5));
        assert_eq!(shard.to_string(), "2/5");
        for (bad, why) in [
            ("5/5", "the last of 5 is 4/5"),
            ("0/0", "at least 1"),
            ("1", "INDEX/COUNT"),
            ("-1/3", "INDEX/COUNT"),
            ("1/3/4", "INDEX/COUNT"),
            ("", "INDEX/COUNT"),
        ] {
            let e = bad.parse::<Shard>().unwrap_err().to_string();
            assert!(e.contains(why) && e.contains(&format!("{bad:?}")), "{bad}: {e}");
        }
    }

    #[test]
    fn every_item_is_taken_once() {
        for count in 1..7 {
            let shards: Vec<_> = (0..count).map(|i| Shard::new(i, count).unwrap()).collect();
            for item in 0..40 {
                assert_eq!(shards.iter().filter(|s| s.takes(item)).count(), 1);
            }
            for s in shards {
                assert!(s.items(40).eq((0..40).filter(|&i| s.takes(i))));
            }
        }
    }

    fn env(vars: &[(&str, &str)]) -> Result<Option<Shard>> {
        Shard::from_lookup(|name| vars.iter().find(|v| v.0 == name).map(|v| v.1.to_owned()))
    }

    #[test]
    fn batch_systems_assign_shards() {
        let shard = |i, n| Some(Shard::new(i, n).unwrap());
        assert_eq!(env(&[]).unwrap(), None);
        let slurm = |id, count, min| {
            [("SLURM_ARRAY_TASK_ID", id), ("SLURM_ARRAY_TASK_COUNT", count), ("SLURM_ARRAY_TASK_MIN", min)]
        };
        assert_eq!(env(&slurm("0", "4", "0")).unwrap(), shard(0, 4));
        assert_eq!(env(&slurm("4", "4", "1")).unwrap(), shard(3, 4));
        let mut stepped = slurm("15", "4", "5").to_vec();
        stepped.push(("SLURM_ARRAY_TASK_STEP", "5"));
        assert_eq!(env(&stepped).unwrap(), shard(2, 4));
        let mut again = slurm("3", "1", "3").to_vec();
        again.push(("NICS_SHARDS", "4"));
        assert_eq!(env(&again).unwrap(), shard(3, 4));
        assert_eq!(env(&[("JOB_COMPLETION_INDEX", "1"), ("JOB_COMPLETIONS", "3")]).unwrap(), shard(1, 3));
        assert_eq!(env(&[("JOB_COMPLETION_INDEX", "1"), ("NICS_SHARDS", "2")]).unwrap(), shard(1, 2));
        assert_eq!(env(&[("NICS_SHARDS", "2")]).unwrap(), None);
    }

    #[test]
    fn half_an_assignment_is_an_error_not_the_whole_work() {
        for vars in [
            &[("JOB_COMPLETION_INDEX", "1")][..],
            &[("SLURM_ARRAY_TASK_ID", "1")],
            &[("SLURM_ARRAY_TASK_ID", "9"), ("SLURM_ARRAY_TASK_COUNT", "3"), ("SLURM_ARRAY_TASK_MIN", "1")],
            &[("SLURM_ARRAY_TASK_ID", "two"), ("SLURM_ARRAY_TASK_COUNT", "3")],
            &[("JOB_COMPLETION_INDEX", "4"), ("NICS_SHARDS", "4")],
        ] {
            assert!(matches!(env(vars), Err(Error::BadShard { .. })), "{vars:?}");
        }
    }

    fn line(item: usize) -> String {
        format!("{{\"item\": {item}}}\n")
    }

    fn shard_files(count: usize, items: usize, config: &str) -> (tempfile::TempDir, Vec<PathBuf>) {
        let dir = tempfile::tempdir().unwrap();
        let mut files = Vec::new();
        for i in 0..count {
            let shard = Shard::new(i, count).unwrap();
            let name = ShardName::new("eval-gsm8k", &crate::hash::bytes(config), shard);
            assert_eq!(ShardName::parse(&name.file_name()), Some(name.clone()));
            assert_eq!(ShardName::parse(&name.partial_name()), None);
            let text = shard.items(items).map(line).collect::<Vec<_>>().concat();
            files.push(dir.path().join(name.file_name()));
            std::fs::write(&files[i], text).unwrap();
        }
        (dir, files)
    }

    #[test]
    fn merging_gives_the_unsharded_order() {
        let (dir, mut files) = shard_files(3, 10, "a");
        files.reverse();
        let out = dir.path().join("merged.jsonl");
        assert_eq!(merge(&files, &out).unwrap(), 10);
        let expected = (0..10).map(line).collect::<Vec<_>>().concat();
        assert_eq!(std::fs::read_to_string(out).unwrap(), expected);
    }

    #[test]
    fn merging_refuses_what_is_not_one_whole() {
        let (dir, files) = shard_files(3, 10, "a");
        let (other_dir, other) = shard_files(3, 10, "b");
        let out = dir.path().join("merged.jsonl");
        let refuse = |files: &[PathBuf], why: &str| {
            let e = merge(files, &out).unwrap_err().to_string();
            assert!(e.contains(why), "{e}");
            assert!(!out.exists());
        };
        refuse(&[], "no shard files");
        refuse(&files[..2], "these are missing: 2; run them with --shard INDEX/3");
        refuse(&[&files[..], &files[1..2]].concat(), "shard 1/3 is there twice");
        refuse(&[&files[..2], &other[2..]].concat(), "different runs");
        let stray = other_dir.path().join("rows.jsonl");
        std::fs::write(&stray, "{}\n").unwrap();
        refuse(&[stray], "not a finished shard");
        let whole = std::fs::read_to_string(&files[1]).unwrap();
        std::fs::write(&files[1], &whole[..whole.len() - 4]).unwrap();
        refuse(&files, "line 3: not JSON");
        std::fs::write(&files[1], whole.trim_end()).unwrap();
        refuse(&files, "line 3: the line is cut short");
    }
}

//! Which files of a folder or repository hold which split of which subject.
//!
//! The layouts that the benchmarks are found in, `SUBJECT` being a part of the benchmark or a configuration:
//!
//! | where | files |
//! |---|---|
//! | hub | `SUBJECT/test-00000-of-00001.parquet` |
//! | hub, revision `refs/convert/parquet` | `SUBJECT/test/0000.parquet` |
//! | the authors' archives | `test/SUBJECT_test.csv`, `test/SUBJECT.csv` |
//! | plain | `SUBJECT/test.jsonl`, `SUBJECT_test.jsonl`, `test.jsonl` |
//!
//! in any of the three formats, at any depth.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use nics_base::hub::Source;
use serde::{Deserialize, Serialize};

use crate::error::{DatasetError, Result};
use crate::table::extension;

/// A split of a public benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// Examples to show in a prompt (five a subject).
    Dev,
    /// For decisions.
    Validation,
    /// For figures that are reported.
    Test,
    /// For training.
    Train,
}

impl Part {
    /// The name, as the hub writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dev => "dev",
            Self::Validation => "validation",
            Self::Test => "test",
            Self::Train => "train",
        }
    }

    /// The split that a word in a file name stands for.
    fn of(word: &str) -> Option<Self> {
        match word {
            "dev" => Some(Self::Dev),
            "val" | "valid" | "validation" => Some(Self::Validation),
            "test" => Some(Self::Test),
            "train" => Some(Self::Train),
            _ => None,
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::of(text)
            .ok_or_else(|| format!("no split is named `{text}`; the splits are dev, val, test and train"))
    }
}

/// The files of one split, by subject; a subject that names no part of the benchmark is empty.
#[derive(Debug)]
pub(crate) struct Layout {
    source: Source,
    part: Part,
    /// Names of the shards of each subject, in order.
    subjects: BTreeMap<String, Vec<String>>,
    /// What else there is, for messages.
    other: String,
}

impl Layout {
    pub(crate) fn find(source: &Source, part: Part) -> Result<Self> {
        let names = source.list()?;
        let mut subjects: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut parts: Vec<Part> = Vec::new();
        for name in &names {
            if let Some((subject, found)) = place(Path::new(name)) {
                parts.push(found);
                if found == part {
                    subjects.entry(subject).or_default().push(name.clone());
                }
            }
        }
        parts.sort();
        parts.dedup();
        let other = if names.is_empty() {
            "it is empty".to_owned()
        } else if parts.is_empty() {
            let some: Vec<_> = names.iter().take(4).map(String::as_str).collect();
            let more = if names.len() > 4 { ", …" } else { "" };
            format!(
                "it holds {}{more} (where the hub keeps an archive, add @refs/convert/parquet to the id)",
                some.join(", ")
            )
        } else {
            let some: Vec<_> = parts.iter().map(|p| p.name()).collect();
            format!("it has the splits {}", some.join(", "))
        };
        let layout = Self { source: source.clone(), part, subjects, other };
        for (subject, files) in &layout.subjects {
            // Shards of one table share folder and extension; anything else is a second copy.
            let home = |f: &str| {
                (Path::new(f).parent().map(Path::to_owned), extension(Path::new(f)).map(str::to_owned))
            };
            let sharded = |f: &str| shard(stem(Path::new(f))).1;
            if let Some(second) = files[1..].iter().find(|f| home(f) != home(&files[0]) || !sharded(f)) {
                return Err(DatasetError::Ambiguous {
                    source_name: source.name(),
                    wanted: layout.wanted(subject),
                    first: files[0].clone(),
                    second: second.clone(),
                });
            }
        }
        Ok(layout)
    }

    pub(crate) fn subjects(&self) -> impl Iterator<Item = &str> {
        self.subjects.keys().map(String::as_str)
    }

    pub(crate) fn has(&self, subject: &str) -> bool {
        self.subjects.contains_key(subject)
    }

    /// Local paths of the shards of a subject.
    pub(crate) fn files(&self, subject: &str) -> Result<Vec<PathBuf>> {
        let names = self.subjects.get(subject).ok_or_else(|| self.nothing(subject))?;
        names.iter().map(|name| Ok(self.source.file(name)?)).collect()
    }

    pub(crate) fn nothing(&self, subject: &str) -> DatasetError {
        let has: Vec<_> = self.subjects().filter(|s| !s.is_empty()).take(8).collect();
        let found = if has.is_empty() {
            self.other.clone()
        } else {
            format!(
                "it has the subjects {}{}",
                has.join(", "),
                if self.subjects.len() > 8 { ", …" } else { "" }
            )
        };
        DatasetError::NothingFound { source_name: self.source.name(), wanted: self.wanted(subject), found }
    }

    fn wanted(&self, subject: &str) -> String {
        if subject.is_empty() {
            return format!("the split {}", self.part);
        }
        format!("the split {} of {subject}", self.part)
    }
}

/// Subject and split of a file, if it is part of a benchmark.
fn place(path: &Path) -> Option<(String, Part)> {
    extension(path)?;
    let mut above = path.parent()?.components().rev().map(|c| c.as_os_str().to_string_lossy().into_owned());
    let parent = above.next();
    let grandparent = above.next();
    let (stem, _) = shard(stem(path));
    if let Some(part) = Part::of(stem) {
        return Some((subject(parent), part));
    }
    let folder = parent.as_deref().and_then(Part::of);
    if let Some(part) = folder {
        if stem.is_empty() {
            return Some((subject(grandparent), part));
        }
        let suffix = stem.rsplit_once('_').filter(|(_, word)| Part::of(word) == Some(part));
        return Some((suffix.map_or(stem, |(name, _)| name).to_owned(), part));
    }
    let (name, word) = stem.rsplit_once(['_', '-'])?;
    Some((name.to_owned(), Part::of(word)?))
}

/// Folders that name no subject: those of archives and configurations that hold everything.
fn subject(folder: Option<String>) -> String {
    folder.filter(|f| !matches!(f.as_str(), "main" | "default" | "data")).unwrap_or_default()
}

fn stem(path: &Path) -> &str {
    path.file_stem().and_then(|s| s.to_str()).unwrap_or_default()
}

/// Cuts `-00000-of-00001`, also with the hash that older uploads carry behind it, or a name that is nothing but a shard's
/// number; tells whether there was one.
fn shard(stem: &str) -> (&str, bool) {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if stem.len() == 4 && digits(stem) {
        return ("", true);
    }
    let count = |of: &str| match of.split_once('-') {
        Some((of, hash)) => digits(of) && hash.len() == 16 && hash.bytes().all(|b| b.is_ascii_hexdigit()),
        None => digits(of),
    };
    let cut =
        stem.rsplit_once("-of-").filter(|(_, of)| count(of)).and_then(|(rest, _)| rest.rsplit_once('-'));
    match cut {
        Some((name, index)) if digits(index) => (name, true),
        _ => (stem, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layout_is_understood() {
        let at = |path: &str| place(Path::new(path));
        let is = |subject: &str, part| Some((subject.to_owned(), part));
        assert_eq!(at("anatomy/test-00000-of-00001.parquet"), is("anatomy", Part::Test));
        assert_eq!(at("anatomy/validation/0000.parquet"), is("anatomy", Part::Validation));
        assert_eq!(at("data/dev/anatomy_dev.csv"), is("anatomy", Part::Dev));
        assert_eq!(at("val/high_school_physics_val.csv"), is("high_school_physics", Part::Validation));
        assert_eq!(at("test/agronomy.csv"), is("agronomy", Part::Test));
        assert_eq!(at("agronomy/test.jsonl"), is("agronomy", Part::Test));
        assert_eq!(at("agronomy_dev.jsonl"), is("agronomy", Part::Dev));
        assert_eq!(at("main/train-00001-of-00004.parquet"), is("", Part::Train));
        assert_eq!(at("data/val-00000-of-00005-7775fd61bc6a3d98.parquet"), is("", Part::Validation));
        assert_eq!(at("ScienceQA-IMG/test-00000-of-00001.parquet"), is("ScienceQA-IMG", Part::Test));
        assert_eq!(at("default/test/0000.parquet"), is("", Part::Test));
        assert_eq!(at("test.jsonl"), is("", Part::Test));
        assert_eq!(at("data/test.jsonl"), is("", Part::Test));
        assert_eq!(at("README.md"), None);
        assert_eq!(at("test/image.png"), None);
        assert_eq!(at("notes.jsonl"), None);
    }
}

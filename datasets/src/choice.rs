//! Multiple-choice benchmarks: MMLU, C-Eval, CMMLU.

use std::fmt;
use std::path::Path;

use nics_base::hub::Source;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::Result;
use crate::layout::{Layout, Part};
use crate::table::{Row, Table, kind};

/// A question with options, one of which is right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// `<benchmark>/<subject>/<split>/<row>`, rows counted from 0.
    pub id: String,
    /// The part of the benchmark.
    pub subject: String,
    /// What is asked.
    pub question: String,
    /// What to choose from: two to ten, lettered from A.
    pub options: Vec<String>,
    /// The index of the right option.
    pub answer: usize,
}

impl Choice {
    /// The letter of an option: A for 0.
    pub fn letter(index: usize) -> char {
        char::from(b'A' + index as u8)
    }
}

/// A multiple-choice benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Benchmark {
    /// Hendrycks et al., 2021: 57 subjects in English.
    Mmlu,
    /// Huang et al., 2023: 52 subjects in Chinese; the answers of its test split are not public.
    Ceval,
    /// Li et al., 2023: 67 subjects in Chinese.
    Cmmlu,
}

/// The most options that a question may have, lettered A to J.
const MOST_OPTIONS: usize = 10;

impl Benchmark {
    /// Every benchmark.
    pub const ALL: [Self; 3] = [Self::Mmlu, Self::Ceval, Self::Cmmlu];

    /// The name in ids and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mmlu => "mmlu",
            Self::Ceval => "ceval",
            Self::Cmmlu => "cmmlu",
        }
    }

    /// Where the hub has it. CMMLU is kept there as a script and an archive; its revision is the hub's conversion.
    pub fn hub_id(self) -> &'static str {
        match self {
            Self::Mmlu => "cais/mmlu",
            Self::Ceval => "ceval/ceval-exam",
            Self::Cmmlu => "haonan-li/cmmlu@refs/convert/parquet",
        }
    }

    /// The subjects that `source` has for `part`, sorted.
    pub fn subjects(self, source: &Source, part: Part) -> Result<Vec<String>> {
        let layout = Layout::find(source, part)?;
        let names: Vec<_> = layout.subjects().filter(|s| is_subject(s)).map(str::to_owned).collect();
        if !names.is_empty() {
            return Ok(names);
        }
        let mut named: Vec<_> = self.load(source, part, &[])?.into_iter().map(|c| c.subject).collect();
        named.sort();
        named.dedup();
        Ok(named)
    }

    /// The questions of `subjects` (all, where that is empty), in the order of subjects and rows.
    ///
    /// # Errors
    /// [`crate::DatasetError::NothingFound`] where a subject or the split is not there; [`crate::DatasetError::BadField`] naming
    /// file, row and field of the first row that is no question.
    pub fn load(self, source: &Source, part: Part, subjects: &[String]) -> Result<Vec<Choice>> {
        let layout = Layout::find(source, part)?;
        // One table with a column `subject`, as the hub has it for MMLU, spares a download a subject.
        let whole = ["all", ""].into_iter().find(|s| layout.has(s));
        let mut found = Vec::new();
        if let Some(whole) = whole {
            for file in layout.files(whole)? {
                found.extend(self.read(&file, whole, part, found.len())?);
            }
            for subject in subjects {
                if found.iter().all(|c| c.subject != *subject) {
                    return Err(layout.nothing(subject));
                }
            }
            if !subjects.is_empty() {
                found.retain(|c| subjects.contains(&c.subject));
            }
            found.sort_by(|a, b| a.subject.cmp(&b.subject));
            return Ok(found);
        }
        let names: Vec<&str> = if subjects.is_empty() {
            layout.subjects().filter(|s| is_subject(s)).collect()
        } else {
            subjects.iter().map(String::as_str).collect()
        };
        if names.is_empty() {
            return Err(layout.nothing(""));
        }
        for name in names {
            let mut rows = 0;
            for file in layout.files(name)? {
                let more = self.read(&file, name, part, rows)?;
                rows += more.len();
                found.extend(more);
            }
        }
        Ok(found)
    }

    /// The questions of one file. `first` is the number of its first row among those of its subject.
    fn read(self, file: &Path, subject: &str, part: Part, first: usize) -> Result<Vec<Choice>> {
        // The authors' archive of MMLU has no header.
        const BARE: [&str; 6] = ["question", "A", "B", "C", "D", "answer"];
        let header: &[&str] = if self == Self::Mmlu { &BARE } else { &[] };
        Table::read(file, &["question", "Question"], header)?
            .map(|row| self.choice(row, subject, part, first))
    }

    fn choice(self, row: &Row, subject: &str, part: Part, first: usize) -> Result<Choice> {
        let subject = match row.field(&["subject"]) {
            Some((_, Value::String(named))) if !is_subject(subject) => named.clone(),
            _ if !is_subject(subject) => {
                return Err(row.required(&["subject"]).map_or_else(
                    |error| error,
                    |(name, value)| row.bad(name, format!("found {}, expected a text", kind(value))),
                ));
            }
            _ => subject.to_owned(),
        };
        let question = row.text(&["question", "Question"])?;
        let options = options(row)?;
        let answer = answer(row, options.len())?;
        let id = format!("{}/{subject}/{part}/{}", self.name(), first + row.number() - 1);
        Ok(Choice { id, subject, question, options, answer })
    }
}

/// Whether a group of files is one subject, rather than everything or MMLU's additional training questions.
fn is_subject(name: &str) -> bool {
    !matches!(name, "" | "all" | "auxiliary_train")
}

impl fmt::Display for Benchmark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Benchmark {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|b| b.name() == text);
        found.ok_or_else(|| format!("no benchmark is named `{text}`; there are mmlu, ceval and cmmlu"))
    }
}

/// A list `choices`, or columns A, B, C, D.
fn options(row: &Row) -> Result<Vec<String>> {
    let Some((name, value)) = row.field(&["choices"]) else {
        return ["A", "B", "C", "D"].iter().map(|letter| row.text(&[letter])).collect();
    };
    let list = value.as_array().filter(|list| (2..=MOST_OPTIONS).contains(&list.len()));
    let list = list.ok_or_else(|| row.bad(name, format!("expected a list of 2 to {MOST_OPTIONS} texts")))?;
    list.iter()
        .map(|option| match option {
            Value::String(text) => Ok(text.clone()),
            Value::Number(number) => Ok(number.to_string()),
            other => Err(row.bad(name, format!("found {} among the options, expected texts", kind(other)))),
        })
        .collect()
}

/// A letter, or an index from 0.
fn answer(row: &Row, options: usize) -> Result<usize> {
    let (name, value) = row.required(&["answer", "Answer"])?;
    let last = Choice::letter(options - 1);
    let expected = format!("expected a letter from A to {last} or an index from 0 to {}", options - 1);
    let index = match value {
        Value::Number(n) => n.as_u64().map(|n| n as usize),
        Value::String(text) => match text.trim().as_bytes() {
            [] => {
                let reason =
                    "it is empty; where a benchmark keeps the answers of its test split to itself, use val";
                return Err(row.bad(name, reason.to_owned()));
            }
            [letter @ (b'A'..=b'J' | b'a'..=b'j')] => Some(usize::from(letter.to_ascii_uppercase() - b'A')),
            _ => text.trim().parse().ok(),
        },
        _ => None,
    };
    index.filter(|i| *i < options).ok_or_else(|| row.bad(name, format!("found {value}, {expected}")))
}

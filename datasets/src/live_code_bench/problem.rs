//! Problems in the files of `livecodebench/code_generation_lite`.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use nics_base::hub::Source;
use serde_json::{Map, Value};
use time::Date;

use super::tests::{self, Tests};
use super::{Release, Window, day};
use crate::error::{DatasetError, Result};
use crate::table::{Row, kind, unreadable};

/// A longer line is no problem: the largest are a few hundred megabytes.
const MOST_BYTES: u64 = 1 << 30;

/// A problem without its tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Its id in the benchmark.
    pub id: String,
    /// Its name.
    pub title: String,
    /// What is asked.
    pub question: String,
    /// The code to be completed, where the answer is a function.
    pub starter: Option<String>,
    /// The function that its tests call; where there is none, programs read standard input.
    pub function: Option<String>,
    /// Where it is from: `leetcode`, `atcoder`, `codeforces`.
    pub platform: String,
    /// `easy`, `medium` or `hard`.
    pub difficulty: String,
    /// The day of its contest.
    pub date: Date,
    place: Place,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    path: PathBuf,
    line: usize,
    offset: u64,
}

/// The problems of a release within a window of days, in the files' order.
///
/// # Errors
/// A file that cannot be had, [`DatasetError::Unreadable`] or [`DatasetError::BadField`] for what is wrong in one, and
/// [`DatasetError::NothingFound`] where none has a problem within the window.
pub fn load(source: &Source, release: &Release, window: Window) -> Result<Vec<Problem>> {
    let mut all = Vec::new();
    for name in release.files() {
        all.extend(read(&source.file(&name)?, window)?);
    }
    some(all, &source.name(), window)
}

/// As [`load`], from a single file.
pub fn load_file(path: &Path, window: Window) -> Result<Vec<Problem>> {
    some(read(path, window)?, &path.display().to_string(), window)
}

fn some(problems: Vec<Problem>, name: &str, window: Window) -> Result<Vec<Problem>> {
    if problems.is_empty() {
        let end = |day: Option<Date>| day.map_or("any day".to_owned(), |day| day.to_string());
        return Err(DatasetError::NothingFound {
            source_name: name.to_owned(),
            wanted: format!("problems from {} to {}", end(window.from), end(window.to)),
            found: "its problems are of other days".into(),
        });
    }
    Ok(problems)
}

fn read(path: &Path, window: Window) -> Result<Vec<Problem>> {
    let bad = |reason: &dyn ToString| unreadable(path, "JSONL", reason);
    let mut file = BufReader::new(File::open(path).map_err(|e| bad(&e))?);
    let (mut problems, mut offset, mut seen) = (Vec::new(), 0, false);
    for line in 1.. {
        let (fields, len) = next(&mut file, path, line)?;
        if len == 0 {
            break;
        }
        if let Some(fields) = fields {
            seen = true;
            let place = Place { path: path.to_owned(), line, offset };
            let problem = problem(&Row::new(path, line, fields), place)?;
            if window.holds(problem.date) {
                problems.push(problem);
            }
        }
        offset += len;
    }
    if seen { Ok(problems) } else { Err(DatasetError::Empty(path.to_owned())) }
}

/// The object on the next line, none where the line is blank, and the bytes that it takes: none at the end.
fn next(file: &mut impl BufRead, path: &Path, line: usize) -> Result<(Option<Map<String, Value>>, u64)> {
    let bad =
        |reason: &dyn ToString| unreadable(path, "JSONL", &format!("line {line}: {}", reason.to_string()));
    let mut bytes = Vec::new();
    let len = file.take(MOST_BYTES + 1).read_until(b'\n', &mut bytes).map_err(|e| bad(&e))? as u64;
    if len > MOST_BYTES {
        return Err(bad(&format!("it is longer than {MOST_BYTES} bytes")));
    }
    if bytes.trim_ascii().is_empty() {
        return Ok((None, len));
    }
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(fields)) => Ok((Some(fields), len)),
        Ok(other) => Err(bad(&format!("found {}, expected an object", kind(&other)))),
        Err(e) => Err(bad(&e)),
    }
}

fn problem(row: &Row, place: Place) -> Result<Problem> {
    let date = row.text(&["contest_date"])?;
    // A time of the day may follow.
    let date = day(date.get(..10).unwrap_or(&date)).map_err(|reason| row.bad("contest_date", reason))?;
    let optional = |name: &str| match row.field(&[name]) {
        Some((_, Value::String(text))) => Ok(Some(text.clone()).filter(|text| !text.trim().is_empty())),
        Some((_, other)) => Err(row.bad(name, format!("found {}, expected a text", kind(other)))),
        None => Ok(None),
    };
    Ok(Problem {
        id: row.text(&["question_id"])?,
        title: optional("question_title")?.unwrap_or_default(),
        question: row.text(&["question_content"])?,
        starter: optional("starter_code")?,
        function: function(row)?,
        platform: optional("platform")?.unwrap_or_default(),
        difficulty: optional("difficulty")?.unwrap_or_default(),
        date,
        place,
    })
}

/// `metadata` is an object, or the text of one.
fn function(row: &Row) -> Result<Option<String>> {
    let Some((field, value)) = row.field(&["metadata"]) else { return Ok(None) };
    let parsed = match value {
        Value::String(text) if text.trim().is_empty() => return Ok(None),
        Value::String(text) => {
            serde_json::from_str(text).map_err(|e| row.bad(field, format!("it is no JSON: {e}")))?
        }
        other => other.clone(),
    };
    let Value::Object(metadata) = parsed else {
        return Err(row.bad(field, format!("found {}, expected an object", kind(&parsed))));
    };
    match metadata.get("func_name") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(name)) if is_name(name) => Ok(Some(name.clone())),
        Some(other) => Err(row.bad(field, format!("func_name is {other}, expected the name of a function"))),
    }
}

fn is_name(text: &str) -> bool {
    !text.starts_with(|c: char| c.is_ascii_digit())
        && !text.is_empty()
        && text.chars().all(|c| c.is_alphanumeric() || c == '_')
}

impl Problem {
    /// Its tests, read from its file.
    ///
    /// # Errors
    /// As [`load`]; and a file that has changed since the problem was read.
    pub fn tests(&self) -> Result<Tests> {
        let Place { path, line, offset } = &self.place;
        let bad = |reason: &dyn ToString| unreadable(path, "JSONL", reason);
        let mut file = BufReader::new(File::open(path).map_err(|e| bad(&e))?);
        file.seek(SeekFrom::Start(*offset)).map_err(|e| bad(&e))?;
        let fields = next(&mut file, path, *line)?.0.unwrap_or_default();
        let row = Row::new(path, *line, fields);
        if row.text(&["question_id"])? != self.id {
            return Err(bad(&format!("line {line} is no longer problem {}: the file has changed", self.id)));
        }
        let mut all = Vec::new();
        let fields =
            [("public_test_cases", tests::plain as fn(&str) -> _), ("private_test_cases", tests::packed)];
        for (name, decode) in fields {
            all.extend(decode(&row.text(&[name])?).map_err(|reason| row.bad(name, reason))?);
        }
        let wrong = |reason| row.bad("public_test_cases and private_test_cases", reason);
        if all.is_empty() {
            return Err(wrong("there is not a single test".to_owned()));
        }
        Tests::new(all, self.function.as_deref()).map_err(wrong)
    }
}

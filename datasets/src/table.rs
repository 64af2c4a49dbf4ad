//! Rows of a JSONL, CSV or parquet file, with errors that name file, row and field. Raw bytes in parquet (images) are left out.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde_json::{Map, Value};

use crate::error::{DatasetError, Result};
use crate::pictures::without_bytes;

/// One row of a table and where it stands.
#[derive(Debug)]
pub(crate) struct Row<'a> {
    path: &'a Path,
    number: usize,
    fields: Map<String, Value>,
}

/// A whole file.
#[derive(Debug)]
pub(crate) struct Table {
    path: PathBuf,
    rows: Vec<Map<String, Value>>,
}

impl Table {
    /// Reads a file by its extension. `header` names the columns of a CSV file whose first line holds none of `known`.
    pub(crate) fn read(path: &Path, known: &[&str], header: &[&str]) -> Result<Self> {
        let rows = match extension(path) {
            Some("jsonl") => jsonl(path),
            Some("csv") => csv(path, known, header),
            // The parquet crate panics on some damaged files, having checked nothing but the footer.
            Some("parquet") => catch_unwind(|| parquet(path))
                .unwrap_or_else(|_| Err(unreadable(path, "parquet", "its content is damaged"))),
            _ => Err(unreadable(path, "a table", "its name ends in none of .jsonl, .csv, .parquet")),
        }?;
        if rows.is_empty() {
            return Err(DatasetError::Empty(path.to_owned()));
        }
        Ok(Self { path: path.to_owned(), rows })
    }

    /// The rows, numbered from 1.
    pub(crate) fn rows(self) -> impl Iterator<Item = (usize, Map<String, Value>)> {
        self.rows.into_iter().enumerate().map(|(i, fields)| (i + 1, fields))
    }

    /// Turns every row into an item.
    pub(crate) fn map<T>(self, mut item: impl FnMut(&Row) -> Result<T>) -> Result<Vec<T>> {
        let path = self.path.clone();
        self.rows().map(|(number, fields)| item(&Row { path: &path, number, fields })).collect()
    }
}

/// The format that a name stands for.
pub(crate) fn extension(path: &Path) -> Option<&str> {
    path.extension()?.to_str().filter(|e| matches!(*e, "jsonl" | "csv" | "parquet"))
}

impl<'a> Row<'a> {
    /// A row that was read elsewhere.
    pub(crate) fn new(path: &'a Path, number: usize, fields: Map<String, Value>) -> Self {
        Self { path, number, fields }
    }

    /// The number of the row, from 1.
    pub(crate) fn number(&self) -> usize {
        self.number
    }

    /// The first of `names` that the row has.
    pub(crate) fn field<'n>(&self, names: &[&'n str]) -> Option<(&'n str, &Value)> {
        names.iter().find_map(|n| Some((*n, self.fields.get(*n).filter(|v| !v.is_null())?)))
    }

    /// As [`field`](Self::field), where one of them must be there.
    pub(crate) fn required<'n>(&self, names: &[&'n str]) -> Result<(&'n str, &Value)> {
        self.field(names).ok_or_else(|| {
            let has: Vec<_> = self.fields.keys().map(String::as_str).collect();
            self.bad(&names.join(" or "), format!("there is no such field; the row has {}", has.join(", ")))
        })
    }

    /// A text that is not blank.
    pub(crate) fn text(&self, names: &[&str]) -> Result<String> {
        let (name, value) = self.required(names)?;
        let text = match value {
            Value::String(text) => text.clone(),
            // A CSV or parquet writer may have taken an option such as 12 for a number.
            Value::Number(number) => number.to_string(),
            Value::Bool(truth) => truth.to_string(),
            other => return Err(self.bad(name, format!("found {}, expected a text", kind(other)))),
        };
        if text.trim().is_empty() {
            return Err(self.bad(name, "it is empty".to_owned()));
        }
        Ok(text)
    }

    /// A text, which may be blank.
    pub(crate) fn string(&self, names: &[&str]) -> Result<String> {
        let (name, value) = self.required(names)?;
        match value {
            Value::String(text) => Ok(text.clone()),
            Value::Number(number) => Ok(number.to_string()),
            other => Err(self.bad(name, format!("found {}, expected a text", kind(other)))),
        }
    }

    /// A list of texts, which may be blank.
    pub(crate) fn strings(&self, name: &str) -> Result<Vec<String>> {
        let (_, value) = self.required(&[name])?;
        let wrong =
            |found: &Value| self.bad(name, format!("found {}, expected a list of texts", kind(found)));
        let list = value.as_array().ok_or_else(|| wrong(value))?;
        list.iter().map(|v| v.as_str().map(str::to_owned).ok_or_else(|| wrong(v))).collect()
    }

    /// Whether the row has a field of this name, be it empty.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.fields.contains_key(name)
    }

    /// An error about a field of this row.
    pub(crate) fn bad(&self, field: &str, reason: String) -> DatasetError {
        DatasetError::BadField {
            path: self.path.to_owned(),
            row: self.number,
            field: field.to_owned(),
            reason,
        }
    }
}

/// What a value is, in words.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

pub(crate) fn unreadable(
    path: &Path,
    format: &'static str,
    reason: &(impl ToString + ?Sized),
) -> DatasetError {
    DatasetError::Unreadable { path: path.to_owned(), format, reason: reason.to_string() }
}

fn jsonl(path: &Path) -> Result<Vec<Map<String, Value>>> {
    let bad = |reason: &dyn ToString| unreadable(path, "JSONL", reason);
    let file = File::open(path).map_err(|e| bad(&e))?;
    let mut rows = Vec::new();
    for (i, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(|e| bad(&format!("line {}: {e}", i + 1)))?;
        let text = line.trim_start_matches('\u{feff}').trim();
        if text.is_empty() {
            continue;
        }
        match serde_json::from_str(text) {
            Ok(Value::Object(fields)) => rows.push(fields),
            Ok(other) => {
                return Err(bad(&format!("line {}: found {}, expected an object", i + 1, kind(&other))));
            }
            Err(e) => return Err(bad(&format!("line {}: {e}", i + 1))),
        }
    }
    Ok(rows)
}

fn csv(path: &Path, known: &[&str], header: &[&str]) -> Result<Vec<Map<String, Value>>> {
    let bad = |reason: &dyn ToString| unreadable(path, "CSV", reason);
    let mut reader = csv::ReaderBuilder::new().has_headers(false).from_path(path).map_err(|e| bad(&e))?;
    let mut records = Vec::new();
    for record in reader.records() {
        records.push(record.map_err(|e| bad(&e))?);
    }
    let Some(first) = records.first() else { return Ok(Vec::new()) };
    let first: Vec<String> =
        first.iter().map(|name| name.trim_start_matches('\u{feff}').to_owned()).collect();
    let (names, skip) = if first.iter().any(|name| known.contains(&name.as_str())) {
        (first, 1)
    } else if first.len() == header.len() {
        (header.iter().map(|&name| name.to_owned()).collect(), 0)
    } else {
        return Err(bad(&format!("its first line names none of the columns {}", known.join(", "))));
    };
    let rows = records.iter().skip(skip);
    Ok(rows.map(|r| names.iter().cloned().zip(r.iter().map(Value::from)).collect()).collect())
}

fn parquet(path: &Path) -> Result<Vec<Map<String, Value>>> {
    let bad = |reason: &dyn ToString| unreadable(path, "parquet", reason);
    let file = File::open(path).map_err(|e| bad(&e))?;
    let reader = SerializedFileReader::new(file).map_err(|e| bad(&e))?;
    let schema = without_bytes(reader.metadata().file_metadata().schema()).map_err(|e| bad(&e))?;
    let mut rows = Vec::new();
    for row in reader.get_row_iter(Some(schema)).map_err(|e| bad(&e))? {
        let row = row.map_err(|e| bad(&e))?;
        rows.push(row.get_column_iter().map(|(name, field)| (name.clone(), plain(field))).collect());
    }
    Ok(rows)
}

/// A parquet value as JSON; what benchmarks do not use (dates, maps, bytes) becomes its printed form.
fn plain(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(v) => (*v).into(),
        Field::Byte(v) => (*v).into(),
        Field::Short(v) => (*v).into(),
        Field::Int(v) => (*v).into(),
        Field::Long(v) => (*v).into(),
        Field::UByte(v) => (*v).into(),
        Field::UShort(v) => (*v).into(),
        Field::UInt(v) => (*v).into(),
        Field::ULong(v) => (*v).into(),
        Field::Float(v) => f64::from(*v).into(),
        Field::Double(v) => (*v).into(),
        Field::Str(v) => v.as_str().into(),
        Field::ListInternal(list) => list.elements().iter().map(plain).collect(),
        Field::Group(row) => row.get_column_iter().map(|(k, v)| (k.clone(), plain(v))).collect(),
        other => other.to_string().into(),
    }
}

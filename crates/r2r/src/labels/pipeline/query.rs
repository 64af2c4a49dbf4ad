//! What the large model is asked: `queries.jsonl`.

use std::collections::HashSet;
use std::path::Path;

use nics_base::hash;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::LabelError;
use super::lines::Lines;
use crate::{Error, Result};

/// A question, or a prompt that is tokens already.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Query {
    /// Its name, a text or a number; no two are equal.
    pub id: Value,
    /// What is asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub question: Option<String>,
    /// The whole prompt as tokens: no template is put around it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ids: Option<Vec<u32>>,
    /// Where it comes from.
    #[serde(default)]
    pub source: String,
    /// What kind it is, e.g. `math`.
    #[serde(default, rename = "type")]
    pub kind: String,
}

impl Query {
    /// Its name as a text.
    pub fn name(&self) -> String {
        match &self.id {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        }
    }
}

/// What is known of a file of queries once it has been read through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueryFile {
    /// How many.
    pub queries: usize,
    /// BLAKE3 of the file.
    pub hash: String,
}

/// Reads a file through and refuses what makes no sense in it. Of each query 16 bytes stay in memory.
///
/// # Errors
/// [`LabelError::Query`]: an empty question or prompt, neither of the two or both, a name that is given twice or is no text
/// or number; a file without queries.
pub fn check(path: &Path) -> Result<QueryFile> {
    let mut names: HashSet<u128> = HashSet::new();
    let mut lines = Lines::<Query>::open(path)?;
    let mut queries = 0;
    while let Some(query) = lines.next() {
        let query = query?;
        let refuse = |reason: String| {
            let (path, line) = (path.to_owned(), lines.line());
            Err(LabelError::Query { path, line, reason }.into())
        };
        if !matches!(query.id, Value::String(_) | Value::Number(_)) {
            return refuse(format!("`id` is {}, expected a text or a number", query.id));
        }
        let name = query.name();
        match (&query.question, &query.ids) {
            (Some(_), Some(_)) => {
                return refuse(format!("{name} has both `question` and `ids`: one of them"));
            }
            (None, None) => return refuse(format!("{name} has neither `question` nor `ids`")),
            (Some(text), None) if text.trim().is_empty() => {
                return refuse(format!("the question of {name} is empty"));
            }
            (None, Some(ids)) if ids.is_empty() => return refuse(format!("the prompt of {name} is empty")),
            _ => {}
        }
        let digest = hash::bytes(name.as_bytes());
        let digest = u128::from_str_radix(&digest[..32], 16).unwrap_or_default();
        if !names.insert(digest) {
            return refuse(format!("the id {name} is there twice"));
        }
        queries += 1;
    }
    if queries == 0 {
        return Err(Error::Input(format!("{} has no queries", path.display())));
    }
    Ok(QueryFile { queries, hash: hash::file(path)? })
}

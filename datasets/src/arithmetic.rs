//! Problems whose answer is a number: GSM8K, and any table of `question` and `answer` in its form.

use std::path::Path;

use nics_base::hub::Source;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::layout::{Layout, Part};
use crate::table::{Row, Table};
use crate::word_problems::Problem;

/// A problem with a number for an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Arithmetic {
    /// `gsm8k/<split>/<row>`, rows counted from 0; the id in the file where it has one.
    pub id: String,
    /// What is asked.
    pub question: String,
    /// The worked answer, ending in `#### <number>`.
    pub answer: String,
    /// The number.
    pub gold: f64,
}

/// Where the hub has GSM8K (Cobbe et al., 2021).
pub const GSM8K_HUB_ID: &str = "openai/gsm8k";

/// GSM8K, from the hub's layout (`main/test-00000-of-00001.parquet`) or that of the authors (`test.jsonl`).
///
/// # Errors
/// [`crate::DatasetError::NothingFound`] where the split is not there; [`crate::DatasetError::BadField`] naming file,
/// row and field of the first row that is no problem.
pub fn gsm8k(source: &Source, part: Part) -> Result<Vec<Arithmetic>> {
    let layout = Layout::find(source, part)?;
    let mut found = Vec::new();
    for file in layout.files("")? {
        found.extend(read_from(&file, &format!("gsm8k/{part}"), found.len())?);
    }
    Ok(found)
}

/// The problems of one JSONL, CSV or parquet file in the form of GSM8K; ids are `<name>/<row>` unless the file has its
/// own.
pub fn arithmetic(file: &Path, name: &str) -> Result<Vec<Arithmetic>> {
    read_from(file, name, 0)
}

fn read_from(file: &Path, name: &str, first: usize) -> Result<Vec<Arithmetic>> {
    Table::read(file, &["question"], &[])?.map(|row| {
        let question = row.text(&["question"])?;
        let (answer, gold) = answer(row)?;
        let id = match row.field(&["id"]) {
            Some(_) => row.text(&["id"])?,
            None => format!("{name}/{}", first + row.number() - 1),
        };
        Ok(Arithmetic { id, question, answer, gold })
    })
}

/// The worked answer and the number after its `####`.
fn answer(row: &Row) -> Result<(String, f64)> {
    // Word problems of this crate carry the worked steps as `solution` and the bare number as `answer`.
    let field = if row.field(&["solution"]).is_some() { "solution" } else { "answer" };
    let text = row.text(&[field])?;
    let Some((_, last)) = text.rsplit_once("####") else {
        return Err(row.bad(field, "it has no line `#### <number>`".to_owned()));
    };
    let gold = number(last)
        .ok_or_else(|| row.bad(field, format!("found `{}` after ####, expected a number", last.trim())))?;
    Ok((text, gold))
}

/// A number as people write it: with commas, a currency sign, a percent sign.
fn number(text: &str) -> Option<f64> {
    let bare: String = text.trim().chars().filter(|c| !",，$¥€£%".contains(*c)).collect();
    bare.trim().trim_end_matches('.').parse().ok().filter(|n: &f64| n.is_finite())
}

impl From<Problem> for Arithmetic {
    fn from(problem: Problem) -> Self {
        Self {
            id: problem.id,
            question: problem.question,
            answer: problem.solution,
            gold: problem.answer as f64,
        }
    }
}

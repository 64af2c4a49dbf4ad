//! Benchmarks of reasoning: AIME, GPQA, MMLU-Pro and MMLU-Redux.

use std::path::{Path, PathBuf};

use nics_base::hub::Source;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{DatasetError, Result};
use crate::layout::{Layout, Part};
use crate::table::{Row, Table, extension, kind};

/// Which benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reasoning {
    /// Competition problems whose answer is a whole number.
    Aime,
    /// Graduate-level science with four options (Rein et al., 2023), the subset that experts agree on.
    GpqaDiamond,
    /// MMLU with up to ten options (Wang et al., 2024).
    MmluPro,
    /// MMLU with its errors mended (Gema et al., 2024).
    MmluRedux,
}

/// A question and its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reasoned {
    /// The id in the file where it has one, else `<benchmark>/<row>`, rows counted from 0.
    pub id: String,
    /// Its field, where the file says so.
    pub subject: String,
    /// What is asked.
    pub question: String,
    /// The options in the file's order; none where the answer is written out.
    pub options: Vec<String>,
    /// The answer: its text, or the letter of the right option. GPQA files put the right option first, so it is `A` there
    /// and the options are to be shuffled.
    pub answer: String,
}

impl Reasoning {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Aime, Self::GpqaDiamond, Self::MmluPro, Self::MmluRedux];

    /// Its name on command lines and in rows.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aime => "aime",
            Self::GpqaDiamond => "gpqa-diamond",
            Self::MmluPro => "mmlu-pro",
            Self::MmluRedux => "mmlu-redux",
        }
    }

    /// Where the hub has it.
    pub fn hub_id(self) -> &'static str {
        match self {
            Self::Aime => "GY2233/AIME-2024-2025",
            Self::GpqaDiamond => "Idavidrein/gpqa",
            Self::MmluPro => "TIGER-Lab/MMLU-Pro",
            Self::MmluRedux => "GY2233/mmlu-redux",
        }
    }

    /// Its questions: of the split `train` where there is one, else of `test`. GPQA, whose files are named by subset instead,
    /// is read from the one named `gpqa_diamond`.
    ///
    /// # Errors
    /// [`DatasetError::NothingFound`] where no file has them; [`DatasetError::BadField`] naming file, row and field of the
    /// first row that is no question.
    pub fn load(self, source: &Source) -> Result<Vec<Reasoned>> {
        let mut all = Vec::new();
        for file in self.files(source)? {
            let first = all.len();
            let header = ["question", "Question", "Problem", "problem"];
            all.extend(Table::read(&file, &header, &[])?.map(|row| self.read(row, first))?);
        }
        Ok(all)
    }

    fn files(self, source: &Source) -> Result<Vec<PathBuf>> {
        if self == Self::GpqaDiamond {
            const SUBSET: &str = "gpqa_diamond";
            let names = source.list()?;
            let named = |name: &&String| name.contains(SUBSET) && extension(Path::new(name)).is_some();
            let mut found: Vec<&String> = names.iter().filter(named).collect();
            found.sort();
            return match found[..] {
                [one] => Ok(vec![source.file(one)?]),
                [] => Err(DatasetError::NothingFound {
                    source_name: source.name(),
                    wanted: SUBSET.into(),
                    found: format!("it has {} files, none with that name", names.len()),
                }),
                [first, second, ..] => Err(DatasetError::Ambiguous {
                    source_name: source.name(),
                    wanted: SUBSET.into(),
                    first: first.clone(),
                    second: second.clone(),
                }),
            };
        }
        for part in [Part::Train, Part::Test] {
            let layout = Layout::find(source, part)?;
            let subjects: Vec<String> = layout.subjects().map(str::to_owned).collect();
            if !subjects.is_empty() || part == Part::Test {
                let subjects = if subjects.is_empty() { vec![String::new()] } else { subjects };
                let files = subjects.iter().map(|s| layout.files(s)).collect::<Result<Vec<_>>>()?;
                return Ok(files.into_iter().flatten().collect());
            }
        }
        Ok(Vec::new())
    }

    fn read(self, row: &Row, first: usize) -> Result<Reasoned> {
        let ids = ["ID", "Record ID", "question_id", "id"];
        let id = match row.field(&ids) {
            Some(_) => row.text(&ids)?,
            None => format!("{}/{}", self.name(), first + row.number() - 1),
        };
        let subjects = ["category", "subject", "Subdomain"];
        let subject = if row.field(&subjects).is_some() { row.text(&subjects)? } else { String::new() };
        let question = row.text(&["question", "Question", "Problem", "problem"])?;
        let (options, answer) = match self {
            Self::Aime => (Vec::new(), row.text(&["Answer", "answer"])?.trim().to_owned()),
            Self::GpqaDiamond => {
                let names =
                    ["Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"];
                let options = names.iter().map(|name| Ok(row.text(&[name])?.trim().to_owned()));
                (options.collect::<Result<_>>()?, "A".to_owned())
            }
            Self::MmluPro | Self::MmluRedux => {
                let options = options(row)?;
                let answer = letter(row, options.len())?;
                (options, answer)
            }
        };
        Ok(Reasoned { id, subject, question, options, answer })
    }
}

impl std::str::FromStr for Reasoning {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|b| b.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("there is no benchmark {text:?} here; there are {names}")
        })
    }
}

/// Two to ten options.
fn options(row: &Row) -> Result<Vec<String>> {
    let (name, value) = row.required(&["options", "choices"])?;
    let Value::Array(values) = value else {
        return Err(row.bad(name, format!("found {}, expected a list", kind(value))));
    };
    let options = values.iter().map(|v| match v {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        other => Err(row.bad(name, format!("found {} among the options, expected texts", kind(other)))),
    });
    let mut options = options.collect::<Result<Vec<String>>>()?;
    // Files fill up to ten.
    options.retain(|o| o != "N/A");
    if !(2..=10).contains(&options.len()) {
        return Err(row.bad(name, format!("found {} options, expected 2 to 10", options.len())));
    }
    Ok(options)
}

/// The right option's letter, from a letter or from a number counted from 0.
fn letter(row: &Row, options: usize) -> Result<String> {
    let text = row.text(&["answer", "answer_index"])?;
    let text = text.trim();
    let index = match text.parse::<usize>() {
        Ok(index) => Some(index),
        Err(_) => match text.as_bytes() {
            [letter @ b'A'..=b'J'] => Some(usize::from(letter - b'A')),
            _ => None,
        },
    };
    let index = index.filter(|i| *i < options).ok_or_else(|| {
        row.bad("answer", format!("found {text:?}, expected a letter or number of one of {options} options"))
    })?;
    Ok(char::from(b'A' + index as u8).to_string())
}

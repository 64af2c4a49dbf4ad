//! A row of each benchmark as a question.

use serde_json::Value;

use super::{Gold, Visual, VisualQuestion, python};
use crate::error::Result;
use crate::layout::Part;
use crate::table::{Row, kind};

/// The most options of a question, lettered A to Z.
const MOST_OPTIONS: usize = 26;

/// What is known of a row beside its texts.
pub(super) struct Around<'a> {
    /// The folder that the file is in, where that says something.
    pub subject: &'a str,
    /// The split.
    pub part: Part,
    /// How many rows there are before it in all files.
    pub number: usize,
    /// Columns that may hold an image though the row, which is without bytes, does not show it.
    pub columns: &'a [String],
}

impl Around<'_> {
    /// # Errors
    /// A row without an image in a column, as far as it tells without the bytes.
    fn shows(&self, row: &Row, column: &str, otherwise: &str) -> Result<()> {
        if row.field(&[column]).is_some() || !row.has(column) && self.columns.iter().any(|c| c == column) {
            return Ok(());
        }
        Err(row.bad(column, otherwise.to_owned()))
    }
}

const NO_IMAGE: &str = "there is no image";

/// The question of a row.
pub(super) fn question(of: Visual, row: &Row, around: &Around) -> Result<VisualQuestion> {
    let mut question = match of {
        Visual::Mmmu => mmmu(row, around),
        Visual::SeedBench | Visual::SeedBenchImage => seed_bench(row, around),
        Visual::OcrBench => ocr_bench(row, around),
        Visual::VizWiz => vizwiz(row, around),
        Visual::ScienceQa | Visual::ScienceQaImg => science_qa(row, around),
        Visual::TextVqa => people(row, around),
    }?;
    let own =
        if question.id.is_empty() { around.number.to_string() } else { std::mem::take(&mut question.id) };
    question.id = format!("{}/{own}", of.name());
    Ok(question)
}

fn new(row: &Row, id: &[&str], question: String, gold: Gold) -> Result<VisualQuestion> {
    Ok(VisualQuestion {
        id: if id.is_empty() { String::new() } else { row.string(id)? },
        group: String::new(),
        question,
        hint: String::new(),
        options: Vec::new(),
        gold,
        origin: String::new(),
        place: (0, 0),
        columns: vec!["image".to_owned()],
    })
}

/// The index of a letter among so many options.
fn letter(row: &Row, field: &str, options: usize) -> Result<usize> {
    let answer = row.string(&[field])?;
    let last = char::from(b'A' + options.clamp(1, MOST_OPTIONS) as u8 - 1);
    let index = match answer.trim().as_bytes() {
        [letter @ b'A'..=b'Z'] => Some(usize::from(letter - b'A')),
        _ => None,
    };
    index
        .filter(|i| *i < options)
        .ok_or_else(|| row.bad(field, format!("found {answer:?}, expected a letter from A to {last}")))
}

fn secret(row: &Row, field: &str, part: Part) -> crate::DatasetError {
    let reason = match part {
        Part::Test => "the answers of the test split are not public; use the one for validation",
        _ => "there is no answer",
    };
    row.bad(field, reason.to_owned())
}

/// `validation_Architecture_and_Engineering_12` is of Architecture_and_Engineering.
fn mmmu_subject(id: &str) -> Option<&str> {
    let (rest, number) = id.rsplit_once('_')?;
    let (_, subject) = rest.split_once('_')?;
    (!subject.is_empty() && !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
        .then_some(subject)
}

fn mmmu(row: &Row, around: &Around) -> Result<VisualQuestion> {
    let id = row.text(&["id"])?;
    let text = row.text(&["question"])?;
    let options = match row.required(&["options"])? {
        (_, Value::Array(_)) => row.strings("options")?,
        (_, Value::String(text)) => python::list(text).map_err(|reason| row.bad("options", reason))?,
        (name, other) => {
            return Err(row.bad(name, format!("found {}, expected a Python list in a text", kind(other))));
        }
    };
    if options.len() > MOST_OPTIONS {
        return Err(
            row.bad("options", format!("{} of them, at most {MOST_OPTIONS} have letters", options.len()))
        );
    }
    let answer = row.string(&["answer"])?;
    if answer.trim() == "?" || answer.trim().is_empty() {
        return Err(secret(row, "answer", around.part));
    }
    let of_choice = match row.text(&["question_type"])?.as_str() {
        "multiple-choice" => true,
        "open" => false,
        other => {
            let reason = format!("found {other:?}, expected multiple-choice or open");
            return Err(row.bad("question_type", reason));
        }
    };
    let gold = if of_choice {
        Gold::Option(letter(row, "answer", options.len())?)
    } else {
        Gold::Texts(vec![answer])
    };
    let mut question = new(row, &["id"], text, gold)?;
    mmmu_subject(&id).unwrap_or(around.subject).clone_into(&mut question.group);
    question.columns = named_images(&question.question, &options);
    if of_choice {
        question.options = options;
    }
    for column in &question.columns {
        let n = column.trim_start_matches("image_");
        around.shows(row, column, &format!("the question shows <image {n}>, which is not there"))?;
    }
    Ok(question)
}

/// The columns of the images that a question of MMMU names, as the harness shows them: each once, by number.
fn named_images(question: &str, options: &[String]) -> Vec<String> {
    let mut named = Vec::new();
    for text in std::iter::once(question).chain(options.iter().map(String::as_str)) {
        let mut rest = text;
        while let Some(at) = rest.find("<image ") {
            rest = &rest[at + "<image ".len()..];
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            if digits > 0 && rest[digits..].starts_with('>') {
                named.push(format!("image_{}", &rest[..digits]));
            }
        }
    }
    named.sort();
    named.dedup();
    named
}

fn seed_bench(row: &Row, around: &Around) -> Result<VisualQuestion> {
    let options = ["choice_a", "choice_b", "choice_c", "choice_d"];
    let options = options.iter().map(|c| row.string(&[c])).collect::<Result<Vec<_>>>()?;
    let gold = Gold::Option(letter(row, "answer", options.len())?);
    let mut question = new(row, &["question_id"], row.text(&["question"])?, gold)?;
    question.group = row.text(&["data_type"])?;
    if !matches!(question.group.as_str(), "image" | "video") {
        return Err(row.bad("data_type", format!("found {:?}, expected image or video", question.group)));
    }
    question.options = options;
    if let Some((_, Value::Array(list))) = row.field(&["image"])
        && list.is_empty()
    {
        return Err(row.bad("image", NO_IMAGE.into()));
    }
    around.shows(row, "image", NO_IMAGE)?;
    Ok(question)
}

fn ocr_bench(row: &Row, around: &Around) -> Result<VisualQuestion> {
    let answers = match row.required(&["answer"])? {
        (_, Value::Array(list)) if !list.is_empty() => row.strings("answer")?,
        _ => vec![row.text(&["answer"])?],
    };
    let question = row.text(&["question"])?.trim().to_owned();
    let mut question = new(row, &[], question, Gold::Texts(answers))?;
    question.group = row.text(&["question_type"])?;
    question.origin = row.text(&["dataset"])?;
    around.shows(row, "image", NO_IMAGE)?;
    Ok(question)
}

fn vizwiz(row: &Row, around: &Around) -> Result<VisualQuestion> {
    let mut question = people(row, around)?;
    question.group = match row.field(&["category"]) {
        Some((_, Value::String(category))) => category.clone(),
        _ => String::new(),
    };
    Ok(question)
}

/// A question with the answers of several people.
fn people(row: &Row, around: &Around) -> Result<VisualQuestion> {
    let answers = match row.field(&["answers"]) {
        Some(_) => row.strings("answers")?,
        None => Vec::new(),
    };
    if answers.iter().all(|a| a.trim().is_empty()) {
        return Err(secret(row, "answers", around.part));
    }
    around.shows(row, "image", NO_IMAGE)?;
    new(row, &["question_id"], row.string(&["question"])?, Gold::Texts(answers))
}

fn science_qa(row: &Row, around: &Around) -> Result<VisualQuestion> {
    let options = row.strings("choices")?;
    if options.is_empty() || options.len() > MOST_OPTIONS {
        return Err(row.bad("choices", format!("{} of them, expected 1 to {MOST_OPTIONS}", options.len())));
    }
    let (name, value) = row.required(&["answer"])?;
    let index = value.as_u64().map(|n| n as usize).filter(|n| *n < options.len());
    let index = index.ok_or_else(|| {
        row.bad(name, format!("found {value}, expected an index from 0 to {}", options.len() - 1))
    })?;
    let mut question = new(row, &[], row.text(&["question"])?, Gold::Option(index))?;
    question.hint = match row.field(&["hint"]) {
        Some((_, Value::String(hint))) => hint.clone(),
        _ => String::new(),
    };
    question.group = match row.field(&["subject"]) {
        Some((_, Value::String(subject))) => subject.clone(),
        _ => String::new(),
    };
    question.options = options;
    if around.shows(row, "image", NO_IMAGE).is_err() {
        question.columns.clear();
    }
    Ok(question)
}

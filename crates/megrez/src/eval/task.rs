//! What a model can be evaluated on, as items: a conversation to be answered and what counts as right.

use std::collections::HashMap;

use nics_base::hub::{Hub, Source};
use nics_core::template::Message;
use nics_core::{Error, Result};
use nics_datasets::word_problems::{self, Split};
use nics_datasets::{Arithmetic, Benchmark, Choice, GSM8K_HUB_ID, Part, gsm8k};
use serde::{Deserialize, Serialize};

use super::extract::last_number;

/// A task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Task {
    /// The project's own word problems (test split), Chinese and English
    WordProblems,
    /// GSM8K: grade-school mathematics, English
    Gsm8k,
    /// MMLU: 57 subjects, English
    Mmlu,
    /// C-Eval: 52 subjects, Chinese (validation split; the answers of the test split are not public)
    Ceval,
    /// CMMLU: 67 subjects, Chinese
    Cmmlu,
}

/// How a multiple-choice question is answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Mode {
    /// By the option letter with the highest log-probability
    #[default]
    Ppl,
    /// By the letter found in a generated reply
    Gen,
}

/// Which items of a task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selection {
    /// The task.
    pub task: Task,
    /// Folder or hub id of the data; `None` is the dataset's own id.
    pub data: Option<String>,
    /// At most so many items (1,000 word problems unless said otherwise).
    pub limit: Option<usize>,
    /// Subjects of a multiple-choice task; empty is all.
    pub subjects: Vec<String>,
    /// Solved examples before a multiple-choice question, from the development split.
    pub shots: usize,
    /// Seed of the word problems.
    pub seed: u64,
}

/// One item.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Name within the task.
    pub id: String,
    /// Subject or language.
    pub subject: String,
    /// The conversation so far; the assistant is next.
    pub messages: Vec<Message>,
    /// What is right.
    pub gold: Gold,
}

/// What is right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gold {
    /// A number, as [`last_number`] gives it.
    Number(String),
    /// An option.
    Option {
        /// Its index.
        index: usize,
        /// How many there are.
        of: usize,
    },
}

impl Task {
    /// Name in files and rows.
    pub fn name(self) -> &'static str {
        match self {
            Self::WordProblems => "word-problems",
            Self::Gsm8k => "gsm8k",
            Self::Mmlu => "mmlu",
            Self::Ceval => "ceval",
            Self::Cmmlu => "cmmlu",
        }
    }

    fn benchmark(self) -> Option<Benchmark> {
        match self {
            Self::Mmlu => Some(Benchmark::Mmlu),
            Self::Ceval => Some(Benchmark::Ceval),
            Self::Cmmlu => Some(Benchmark::Cmmlu),
            Self::WordProblems | Self::Gsm8k => None,
        }
    }

    /// Whether items are questions with options.
    pub fn is_choice(self) -> bool {
        self.benchmark().is_some()
    }

    /// The split that is evaluated.
    pub fn split(self) -> &'static str {
        if self == Self::Ceval { "val" } else { "test" }
    }
}

/// The items of a selection, always in the same order.
///
/// # Errors
/// What is wrong with the data, naming file and field; an empty selection.
pub fn items(selection: &Selection) -> Result<Vec<Item>> {
    let task = selection.task;
    let mut items = match (task.benchmark(), task) {
        (Some(benchmark), _) => choices(benchmark, selection)?,
        (None, Task::WordProblems) => word_problem_items(Split::Test, selection),
        (None, _) => {
            let source = source(selection.data.as_deref().unwrap_or(GSM8K_HUB_ID))?;
            gsm8k(&source, Part::Test)
                .map_err(Error::input)?
                .into_iter()
                .map(arithmetic)
                .collect::<Result<_>>()?
        }
    };
    items.truncate(selection.limit.unwrap_or(usize::MAX));
    if items.is_empty() {
        return Err(Error::Input(format!("{}: the selection has no item", task.name())));
    }
    Ok(items)
}

fn source(data: &str) -> Result<Source> {
    Hub::from_env().resolve_dataset(data).map_err(Error::input)
}

/// Word problems of a split, in Chinese and English.
pub fn word_problem_items(split: Split, selection: &Selection) -> Vec<Item> {
    word_problems::generate(split, selection.limit.unwrap_or(1000), selection.seed)
        .map(|p| Item {
            id: p.id,
            subject: p.lang.name().to_owned(),
            messages: vec![Message::new("user", p.question)],
            gold: Gold::Number(p.answer.to_string()),
        })
        .collect()
}

fn arithmetic(problem: Arithmetic) -> Result<Item> {
    let gold = last_number(&problem.answer).ok_or_else(|| {
        Error::Input(format!("{}: its answer has no number: {}", problem.id, problem.answer))
    })?;
    Ok(Item {
        id: problem.id,
        subject: String::new(),
        messages: vec![Message::new("user", problem.question)],
        gold: Gold::Number(gold),
    })
}

fn choices(benchmark: Benchmark, selection: &Selection) -> Result<Vec<Item>> {
    let source = source(selection.data.as_deref().unwrap_or(benchmark.hub_id()))?;
    let part = if benchmark == Benchmark::Ceval { Part::Validation } else { Part::Test };
    let subjects = if selection.subjects.is_empty() {
        benchmark.subjects(&source, part).map_err(Error::input)?
    } else {
        selection.subjects.clone()
    };
    let english = benchmark == Benchmark::Mmlu;
    let solved = if selection.shots == 0 {
        Vec::new()
    } else {
        benchmark.load(&source, Part::Dev, &subjects).map_err(Error::input)?
    };
    let mut shots: HashMap<&str, Vec<Message>> = HashMap::new();
    for subject in &subjects {
        let own: Vec<&Choice> =
            solved.iter().filter(|c| c.subject == *subject).take(selection.shots).collect();
        if own.len() < selection.shots {
            tracing::warn!("{subject}: {} solved examples instead of {}", own.len(), selection.shots);
        }
        shots.insert(subject, own.into_iter().flat_map(|c| [ask(c, english), answer(c)]).collect());
    }
    let mut items = Vec::new();
    for choice in benchmark.load(&source, part, &subjects).map_err(Error::input)? {
        let mut messages = shots.get(choice.subject.as_str()).cloned().unwrap_or_default();
        messages.push(ask(&choice, english));
        items.push(Item {
            id: choice.id,
            subject: choice.subject,
            messages,
            gold: Gold::Option { index: choice.answer, of: choice.options.len() },
        });
    }
    Ok(items)
}

/// A question with its options and the cue after which the letter follows.
fn ask(choice: &Choice, english: bool) -> Message {
    let subject = choice.subject.replace('_', " ");
    let mut text = if english {
        format!("The following is a multiple choice question about {subject}.\n\n{}\n", choice.question)
    } else {
        format!("以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n题目：{}\n", choice.question)
    };
    for (i, option) in choice.options.iter().enumerate() {
        text.extend([&Choice::letter(i).to_string(), ". ", option, "\n"]);
    }
    text += if english { "Answer:" } else { "答案是：" };
    Message::new("user", text)
}

fn answer(choice: &Choice) -> Message {
    Message::new("assistant", Choice::letter(choice.answer).to_string())
}

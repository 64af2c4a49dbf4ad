//! What replies amount to: accuracies with their intervals, result rows, `eval.json`.

use std::collections::BTreeMap;

use nics_base::ci::{bootstrap_mean, wilson};
use nics_base::row::Row;
use nics_datasets::{Visual, VisualQuestion};
use serde::{Deserialize, Serialize};

use super::Rules;
use super::choice::Fallback;
use super::reply::Reply;
use super::task::{Scored, gold, score};
use crate::artefact::Origin;
use crate::inventory::Inventory;
use crate::{Error, Result};

/// Version of `eval.json`.
pub const FORMAT: u32 = 1;
/// Its name.
pub const REPORT: &str = "eval.json";
/// Resamples behind an interval of scores that are no yes or no.
const RESAMPLES: usize = 2000;

/// The disciplines of MMMU and their subjects.
const DISCIPLINES: [(&str, &[&str]); 6] = [
    ("Art and Design", &["Art", "Art_Theory", "Design", "Music"]),
    ("Business", &["Accounting", "Economics", "Finance", "Manage", "Marketing"]),
    ("Science", &["Biology", "Chemistry", "Geography", "Math", "Physics"]),
    (
        "Health and Medicine",
        &[
            "Basic_Medical_Science",
            "Clinical_Medicine",
            "Diagnostics_and_Laboratory_Medicine",
            "Pharmacy",
            "Public_Health",
        ],
    ),
    ("Humanities and Social Science", &["History", "Literature", "Psychology", "Sociology"]),
    (
        "Tech and Engineering",
        &[
            "Agriculture",
            "Architecture_and_Engineering",
            "Computer_Science",
            "Electronics",
            "Energy_and_Power",
            "Materials",
            "Mechanical_Engineering",
        ],
    ),
];

/// A reply with its score: a line of `items-TASK.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScoredReply {
    /// The reply.
    #[serde(flatten)]
    pub reply: Reply,
    /// Subject, kind of question, `image` or `video`.
    pub group: String,
    /// What is right.
    pub gold: Vec<String>,
    /// What was found in the reply, and what it is worth.
    #[serde(flatten)]
    pub scored: Scored,
}

/// An accuracy over some questions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Questions.
    pub n: u64,
    /// 0 to 1.
    pub accuracy: f64,
    /// Its 95 % interval.
    pub ci: [f64; 2],
}

/// The figures of one task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskFigures {
    /// Which.
    pub task: Visual,
    /// Over all its questions.
    #[serde(flatten)]
    pub all: Accuracy,
    /// By subject, kind of question, or image and video.
    pub groups: BTreeMap<String, Accuracy>,
    /// MMMU: by discipline.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub disciplines: BTreeMap<String, Accuracy>,
    /// The most tokens of a reply.
    pub max_new_tokens: usize,
    /// Replies in which no answer was found.
    pub without_answer: u64,
    /// Replies that ended at their longest.
    pub cut: u64,
    /// Questions whose prompt the model's context does not hold; they count as wrong.
    pub too_long: u64,
}

/// `eval.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of the format.
    pub format_version: u32,
    /// What was measured.
    #[serde(flatten)]
    pub origin: Origin,
    /// Which of its linear layers are quantized.
    pub layers: Inventory,
    /// By which rules replies were scored.
    pub scoring: Rules,
    /// Which option counts where a reply to MMMU names none: wrong, or one by chance of this seed.
    pub guess: Option<u64>,
    /// The first so many questions of each task; absent for all.
    pub limit: Option<usize>,
    /// The figures.
    pub tasks: Vec<TaskFigures>,
    /// Their mean, of several tasks.
    pub average: Option<f64>,
}

/// Scores the replies to a task.
///
/// # Errors
/// Replies to other questions.
pub fn scored(
    task: Visual,
    questions: &[VisualQuestion],
    replies: Vec<Reply>,
    rules: Rules,
    guess: Option<u64>,
) -> Result<Vec<ScoredReply>> {
    let one = |reply: Reply| {
        let question = questions.get(reply.index).filter(|q| q.id == reply.id).ok_or_else(|| {
            Error::Input(format!(
                "{} is no question {} of {task}: the data has changed; give another --out",
                reply.id, reply.index
            ))
        })?;
        // Each question its own draw, whatever comes before it.
        let fallback =
            guess.map_or(Fallback::Wrong, |s| Fallback::Random(s.wrapping_add(reply.index as u64)));
        Ok(ScoredReply {
            scored: score(task, question, &reply.text, rules, fallback),
            group: question.group.clone(),
            gold: gold(question),
            reply,
        })
    };
    replies.into_iter().map(one).collect()
}

/// The figures of a task's replies.
pub fn figures(task: Visual, replies: &[ScoredReply], max_new_tokens: usize) -> TaskFigures {
    let mut by_group: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for r in replies.iter().filter(|r| !r.group.is_empty()) {
        by_group.entry(r.group.clone()).or_default().push(r.scored.score);
    }
    let disciplines = if task == Visual::Mmmu {
        let of = |subjects: &[&str]| -> Vec<f64> {
            subjects.iter().filter_map(|s| by_group.get(*s)).flatten().copied().collect()
        };
        let all = DISCIPLINES.iter().map(|(name, subjects)| ((*name).to_owned(), of(subjects)));
        all.filter(|(_, s)| !s.is_empty()).map(|(name, s)| (name, accuracy(task, &s))).collect()
    } else {
        BTreeMap::new()
    };
    let all: Vec<f64> = replies.iter().map(|r| r.scored.score).collect();
    let count = |f: &dyn Fn(&ScoredReply) -> bool| replies.iter().filter(|r| f(r)).count() as u64;
    TaskFigures {
        task,
        all: accuracy(task, &all),
        groups: by_group.into_iter().map(|(name, s)| (name, accuracy(task, &s))).collect(),
        disciplines,
        max_new_tokens,
        without_answer: count(&|r| r.scored.answer.is_none()),
        cut: count(&|r| r.reply.finish == "length"),
        too_long: count(&|r| r.reply.finish == "too_long"),
    }
}

/// A mean score and its interval: Wilson's where a score is yes or no, by bootstrap where people's answers are averaged.
fn accuracy(task: Visual, scores: &[f64]) -> Accuracy {
    let n = scores.len() as u64;
    let mean = if n == 0 { 0.0 } else { scores.iter().sum::<f64>() / n as f64 };
    let ci = match task {
        Visual::VizWiz | Visual::TextVqa => bootstrap_mean(scores, RESAMPLES, 0).unwrap_or([0.0, 1.0]),
        _ => wilson(scores.iter().filter(|s| **s > 0.5).count() as u64, n),
    };
    Accuracy { n, accuracy: mean, ci }
}

impl Report {
    /// The mean over tasks, as the paper's tables have it.
    pub fn average(tasks: &[TaskFigures]) -> Option<f64> {
        let n = tasks.len();
        (n > 1).then(|| tasks.iter().map(|t| t.all.accuracy).sum::<f64>() / n as f64)
    }

    /// Result rows, in percent; `common` is what all have alike: variant, preset, model, device, dtype.
    pub fn rows(&self, common: &Row) -> Vec<Row> {
        let mut rows = Vec::new();
        for figures in &self.tasks {
            let row = |metric: String, a: &Accuracy| Row {
                dataset: figures.task.name().to_owned(),
                metric,
                value: 100.0 * a.accuracy,
                unit: "%".into(),
                higher_is_better: true,
                n: Some(a.n),
                ci: Some(a.ci.map(|c| 100.0 * c)),
                ..common.clone()
            };
            rows.push(row("accuracy".into(), &figures.all));
            let parts = figures.disciplines.iter().chain(&figures.groups);
            rows.extend(parts.map(|(name, a)| row(format!("accuracy, {name}"), a)));
        }
        rows.extend(self.average.map(|mean| Row {
            dataset: "all".into(),
            metric: "accuracy, mean of tasks".into(),
            value: 100.0 * mean,
            unit: "%".into(),
            higher_is_better: true,
            n: Some(self.tasks.iter().map(|t| t.all.n).sum()),
            ..common.clone()
        }));
        rows
    }
}

//! What the label pipeline is fed with: problems as queries, and the task's synonyms for the judge that is a rule.

use std::path::Path;

use nics_base::artefact::write_atomic;
use nics_base::{jsonl, settings};
use nics_datasets::ring::{CLOSINGS, CONNECTIVES, RingProblem, SEPARATORS};
use nics_datasets::word_problems::Split;

use super::settings::Study;
use crate::labels::judges::SynonymTable;
use crate::labels::pipeline::Query;
use crate::nano::RingTask;
use crate::{Error, Result};

/// Which problems.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// What routers are trained on.
    Train,
    /// What thresholds are chosen on.
    Validation,
}

/// The file of the task's synonyms.
pub const SYNONYMS_FILE: &str = "synonyms.toml";

impl Part {
    /// The name of its file.
    pub fn file(self) -> &'static str {
        match self {
            Self::Train => "train.jsonl",
            Self::Validation => "validation.jsonl",
        }
    }
}

/// The problems of a part, for the pair of a seed.
pub(super) fn problems(study: &Study, task: &RingTask, part: Part, seed: u64) -> Vec<RingProblem> {
    let (split, n) = match part {
        Part::Train => (Split::Train, study.labels.train),
        Part::Validation => (Split::Validation, study.labels.validation),
    };
    task.ring().problems(split, study.labels.seed + seed, n).collect()
}

/// The words of the task that mean the same.
pub(super) fn synonyms() -> SynonymTable {
    let lists: [&[&str]; 3] = [&CONNECTIVES, &SEPARATORS, &CLOSINGS];
    let classes = lists.iter().map(|list| list.iter().map(|&word| word.to_owned()).collect()).collect();
    SynonymTable { classes, ignore: Vec::new() }
}

/// Writes the queries of both parts and the synonyms into `dir`.
pub fn write_queries(study: &Study, task: &RingTask, seed: u64, dir: &Path) -> Result<()> {
    for part in [Part::Train, Part::Validation] {
        let query = |problem: RingProblem| Query {
            id: problem.id.into(),
            question: Some(problem.question),
            ids: None,
            source: task.ring().name(),
            kind: "math".into(),
        };
        let queries: Vec<Query> = problems(study, task, part, seed).into_iter().map(query).collect();
        jsonl::write(dir.join(part.file()), &queries)?;
    }
    let text = settings::text(&synonyms()).map_err(Error::Input)?;
    Ok(write_atomic(dir.join(SYNONYMS_FILE), text)?)
}

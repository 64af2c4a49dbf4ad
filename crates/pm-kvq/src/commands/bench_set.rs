//! The benchmarks: their questions, and programs run on their tests.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use nics_base::cli::CodeArgs;
use nics_base::exit::Usage;
use nics_base::hash;
use nics_base::hub::{Hub, Source};
use nics_base::interrupt::Interrupt;
use nics_base::jsonl::JsonlLog;
use nics_base::progress::Progress;
use nics_base::sandbox::Limits;
use nics_datasets::Reasoning;
use nics_datasets::live_code_bench::{self, Date, Judge, Problem, Release, Verdict, Window, day};
use pm_kvq::answers::{Judging, last_fenced_code};
use pm_kvq::evaluation::{Response, is_right, maths, program};
use serde::{Deserialize, Serialize};

/// A benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Bench {
    /// Competition problems with whole numbers as answers: AIME 2024 and 2025, or a table like theirs
    Aime,
    /// Programs, judged by tests
    Livecodebench,
}

impl Bench {
    pub fn name(self) -> &'static str {
        match self {
            Self::Aime => "aime",
            Self::Livecodebench => "livecodebench",
        }
    }
}

/// Where a benchmark is.
#[derive(Debug, Clone, Args)]
pub struct BenchArgs {
    /// Where it is: a folder, or a dataset's hub id, for livecodebench also a file; default: its own on the hub
    #[arg(long, value_name = "FOLDER|ID")]
    pub source: Option<String>,
    /// livecodebench: which of its files, such as v6, v4_v5 or release_v5
    #[arg(long, value_name = "NAME", default_value = "v6")]
    pub release: Release,
    /// livecodebench: problems of contests from this day on
    #[arg(long, value_name = "YYYY-MM-DD", value_parser = day)]
    pub from: Option<Date>,
    /// livecodebench: problems of contests up to this day
    #[arg(long, value_name = "YYYY-MM-DD", value_parser = day)]
    pub to: Option<Date>,
}

/// How answers are compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Rule {
    /// By value
    #[default]
    Strict,
    /// As published figures were made, with their oddities: 025 is not 25
    Official,
}

impl From<Rule> for Judging {
    fn from(rule: Rule) -> Self {
        match rule {
            Rule::Strict => Self::Strict,
            Rule::Official => Self::Official,
        }
    }
}

/// A question as a model gets to see it.
pub struct Question {
    pub id: String,
    pub prompt: String,
    /// Empty where tests decide.
    pub gold: String,
}

/// A benchmark's questions.
pub struct Asked {
    pub questions: Vec<Question>,
    /// The problems behind them, where programs answer.
    pub problems: Vec<Problem>,
}

impl BenchArgs {
    pub fn load(&self, bench: Bench) -> Result<Asked> {
        let from = |hub_id: &str| match &self.source {
            Some(given) if Path::new(given).is_dir() => Ok(Source::folder(given)),
            given => Hub::from_env().resolve_dataset(given.as_deref().unwrap_or(hub_id)),
        };
        match bench {
            Bench::Aime => {
                let set = Reasoning::Aime;
                let question = |row: nics_datasets::Reasoned| Question {
                    id: row.id,
                    prompt: maths(&row.question),
                    gold: row.answer,
                };
                let questions = set.load(&from(set.hub_id())?)?.into_iter().map(question).collect();
                Ok(Asked { questions, problems: Vec::new() })
            }
            Bench::Livecodebench => {
                let window = Window { from: self.from, to: self.to };
                let problems = match self.source.as_deref().map(Path::new) {
                    Some(file) if file.is_file() => live_code_bench::load_file(file, window)?,
                    _ => live_code_bench::load(&from(live_code_bench::HUB_ID)?, &self.release, window)?,
                };
                let question = |p: &Problem| Question {
                    id: p.id.clone(),
                    prompt: program(&p.question, p.starter.as_deref()),
                    gold: String::new(),
                };
                Ok(Asked { questions: problems.iter().map(question).collect(), problems })
            }
        }
    }
}

/// What became of a program: a line of the log.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Judged {
    id: String,
    response: usize,
    /// Of the program, the interpreter and the limits: other ones are another verdict.
    hash: String,
    verdict: Verdict,
}

/// What tells right from wrong, made before anything is written.
pub enum Referee<'a> {
    Answers(Judging),
    Programs { problems: HashMap<&'a str, &'a Problem>, judge: Option<Box<Judge>> },
}

impl<'a> Referee<'a> {
    /// Finds interpreter and sandbox, and reads all tests once, so that nothing of that fails after hours of writing.
    pub fn prepare(bench: Bench, problems: &'a [Problem], rule: Rule, code: &CodeArgs) -> Result<Self> {
        if bench == Bench::Aime {
            if code.run_code {
                return Err(
                    Usage("--run-code is for livecodebench: other replies hold no programs".into()).into()
                );
            }
            return Ok(Self::Answers(rule.into()));
        }
        let judge =
            if code.run_code { Some(Box::new(Judge::open(&code.python, Limits::default())?)) } else { None };
        if judge.is_some() {
            problems.iter().try_for_each(|problem| problem.tests().map(drop))?;
        }
        let problems = problems.iter().map(|problem| (problem.id.as_str(), problem)).collect();
        Ok(Self::Programs { problems, judge })
    }

    /// How votes are compared; programs have none.
    pub fn voting(&self) -> Option<Judging> {
        match self {
            Self::Answers(judging) => Some(*judging),
            Self::Programs { .. } => None,
        }
    }

    /// Whether each response is right; `None` while programs may not run. Verdicts are kept in `log`, each program's once.
    pub fn judge(
        &self,
        responses: &[Response],
        code: &CodeArgs,
        log: &Path,
        quiet: bool,
        interrupt: &Interrupt,
    ) -> Result<Option<Vec<bool>>> {
        let (problems, judge) = match self {
            Self::Answers(judging) => {
                return Ok(Some(responses.iter().map(|r| is_right(*judging, r)).collect()));
            }
            Self::Programs { judge: None, .. } => return Ok(None),
            Self::Programs { problems, judge: Some(judge) } => (problems, judge),
        };
        let (mut log, known) = JsonlLog::<Judged>::open(log)?;
        let known: HashMap<(String, usize, String), bool> =
            known.into_iter().map(|j| ((j.id, j.response, j.hash), j.verdict.correct())).collect();
        let mut right = vec![false; responses.len()];
        let mut todo: Vec<(usize, String, String)> = Vec::new();
        for (n, response) in responses.iter().enumerate() {
            let program = last_fenced_code(&response.text);
            if program.trim().is_empty() {
                continue;
            }
            let hash = hash::bytes(format!("{}\n{program}", judge.settings()))[..16].to_owned();
            match known.get(&(response.id.clone(), response.response, hash.clone())) {
                Some(verdict) => right[n] = *verdict,
                None => todo.push((n, program, hash)),
            }
        }
        let bar = if quiet { Progress::hidden() } else { Progress::new(todo.len() as u64, "programs") };
        let work = |n: usize| {
            let (at, program, _) = &todo[n];
            let id = responses[*at].id.as_str();
            let problem = problems.get(id).with_context(|| format!("there is no problem {id}"))?;
            Ok((program.clone(), problem.tests()?))
        };
        judge.judge_all(todo.len(), code.jobs(), interrupt, work, |n, verdict| {
            let (at, _, hash) = &todo[n];
            right[*at] = verdict.correct();
            let (id, response) = (responses[*at].id.clone(), responses[*at].response);
            log.append(&Judged { id, response, hash: hash.clone(), verdict })?;
            bar.inc(1);
            anyhow::Ok(())
        })?;
        bar.finish();
        Ok(Some(right))
    }
}

//! Programs that were written, run on their tests.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result};
use nics_base::cli::CodeArgs;
use nics_base::exit::Usage;
use nics_base::hash;
use nics_base::interrupt::Interrupt;
use nics_base::jsonl::JsonlLog;
use nics_base::progress::Progress;
use nics_base::sandbox::Limits;
use nics_datasets::live_code_bench::{Judge, Problem, Verdict};
use serde::{Deserialize, Serialize};

use super::Item;
use super::set::Set;

/// The problems, and the judge where programs are to be run.
pub struct Programs<'a> {
    problems: HashMap<&'a str, &'a Problem>,
    judge: Option<Judge>,
}

/// What became of a program: a line of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Judged {
    id: String,
    sample: usize,
    /// Of the program, the interpreter and the limits: other ones are another verdict.
    hash: String,
    verdict: Verdict,
}

impl<'a> Programs<'a> {
    /// Finds interpreter and sandbox and reads all tests once, so that nothing of that fails after hours of writing.
    pub fn prepare(set: Set, problems: &'a [Problem], code: &CodeArgs, quiet: bool) -> Result<Self> {
        let by_id = problems.iter().map(|problem| (problem.id.as_str(), problem)).collect();
        if !code.run_code {
            return Ok(Self { problems: by_id, judge: None });
        }
        if set != Set::LiveCodeBench {
            let reason =
                format!("--run-code is for livecodebench, the replies to {} hold no programs", set.name());
            return Err(Usage(reason).into());
        }
        let judge = Judge::open(&code.python, Limits::default())?;
        let progress = progress(quiet, problems.len(), "problems");
        for problem in problems {
            problem.tests()?;
            progress.inc(1);
        }
        progress.finish();
        Ok(Self { problems: by_id, judge: Some(judge) })
    }

    /// Judges the items that are not, each once: the log in `out` knows those of earlier runs.
    pub fn judge(
        &self,
        items: &mut [Item],
        code: &CodeArgs,
        out: &Path,
        quiet: bool,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let Some(judge) = &self.judge else {
            let open = items.iter().filter(|item| item.correct.is_none()).count();
            if open > 0 {
                println!(
                    "{open} programs are in {}, not scored: they are run with --run-code alone. The same command with it \
                     goes on from here",
                    out.join("items.jsonl").display()
                );
            }
            return Ok(());
        };
        let (mut log, known) = JsonlLog::<Judged>::open(out.join("judged.jsonl"))?;
        let known: HashMap<(String, usize, String), Verdict> =
            known.into_iter().map(|line| ((line.id, line.sample, line.hash), line.verdict)).collect();
        let mut todo: Vec<(usize, String)> = Vec::new();
        for (n, item) in items.iter_mut().enumerate() {
            let (None, Some(program)) = (item.correct, &item.answer) else { continue };
            let hash = hash::bytes(format!("{}\n{program}", judge.settings()))[..16].to_owned();
            match known.get(&(item.id.clone(), item.sample, hash.clone())) {
                Some(verdict) => item.correct = Some(verdict.correct()),
                None => todo.push((n, hash)),
            }
        }
        let progress = progress(quiet, todo.len(), "programs");
        let mut verdicts: Vec<(usize, bool)> = Vec::new();
        let written = &*items;
        let work = |n: usize| {
            let item = &written[todo[n].0];
            let problem = self.problems.get(item.id.as_str());
            let problem = problem.with_context(|| format!("there is no problem {}", item.id))?;
            Ok((item.answer.clone().unwrap_or_default(), problem.tests()?))
        };
        judge.judge_all(todo.len(), code.jobs(), interrupt, work, |n, verdict| {
            let (at, hash) = &todo[n];
            verdicts.push((*at, verdict.correct()));
            let (id, sample) = (written[*at].id.clone(), written[*at].sample);
            log.append(&Judged { id, sample, hash: hash.clone(), verdict })?;
            progress.inc(1);
            anyhow::Ok(())
        })?;
        progress.finish();
        for (at, right) in verdicts {
            items[at].correct = Some(right);
        }
        Ok(())
    }
}

fn progress(quiet: bool, len: usize, unit: &'static str) -> Progress {
    if quiet { Progress::hidden() } else { Progress::new(len as u64, unit) }
}

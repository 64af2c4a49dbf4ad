//! `r2r eval`.

mod judged;
mod set;

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use nics_base::ci;
use nics_base::cli::CodeArgs;
use nics_base::interrupt::Interrupt;
use nics_base::jsonl::JsonlLog;
use nics_base::progress::Progress;
use nics_base::row::{self, Row};
use nics_core::cli::{SamplingArgs, SeedArg};
use nics_core::template::Message;
use nics_datasets::live_code_bench::{Date, Release, Window, day};
use r2r::decode::{MeanParameters, Request, TokenEvent, Usage, run};
use r2r::evaluation::{Question, pass_at_k};
use serde::{Deserialize, Serialize};
use serde_json::json;

use self::judged::Programs;
use self::set::{Asked, Set};
use super::opened::{Opened, PairArgs};
use super::written::{Colour, Written};

/// Measures a pair on a public benchmark: accuracy, pass@k, the large model's share, mean parameters a token, tokens/s.
///
/// Every sample is a line of OUT/items.jsonl, written as it is finished; a second run goes on with what is missing. The
/// figures are OUT/rows.jsonl.
///
/// LiveCodeBench asks for programs. They are run, with --run-code alone, when all replies are written, and what became of each
/// is a line of OUT/judged.jsonl; without it nothing is scored, and the same command with it goes on from there.
#[derive(Args)]
pub struct Eval {
    #[command(flatten)]
    pair: PairArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    seed: SeedArg,
    /// Benchmark: aime, gpqa-diamond, mmlu-pro, mmlu-redux, livecodebench
    #[arg(long, value_name = "NAME")]
    dataset: Set,
    /// Where it is: a folder, or a dataset's hub id, for livecodebench also a file; default: its own on the hub
    #[arg(long, value_name = "FOLDER|ID")]
    source: Option<String>,
    /// livecodebench: which of its files, such as v6, v4_v5 or release_v5
    #[arg(long, value_name = "NAME", default_value = "v4_v5")]
    release: Release,
    /// livecodebench: problems of contests from this day on
    #[arg(long, value_name = "YYYY-MM-DD", value_parser = day)]
    from: Option<Date>,
    /// livecodebench: problems of contests up to this day
    #[arg(long, value_name = "YYYY-MM-DD", value_parser = day)]
    to: Option<Date>,
    #[command(flatten)]
    code: CodeArgs,
    /// The first N questions alone
    #[arg(long, value_name = "N", value_parser = nics_core::cli::at_least_one)]
    limit: Option<usize>,
    /// Samples of each question, with seeds SEED, SEED+1, ...
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = nics_core::cli::at_least_one)]
    repeat: usize,
    /// Questions that are written together
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = nics_core::cli::at_least_one)]
    batch: usize,
    /// Name of this setting in result rows; default: the policy
    #[arg(long, value_name = "TEXT")]
    variant: Option<String>,
    /// Preset in result rows
    #[arg(long, value_name = "TEXT", default_value = "")]
    preset: String,
    /// Folder of the results
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
}

/// A graded reply.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Item {
    /// What the sample depends on beside question and seed: a run with other settings is another result.
    settings: String,
    id: String,
    subject: String,
    sample: usize,
    answer: Option<String>,
    gold: String,
    /// None for a program that was not judged.
    correct: Option<bool>,
    finish: String,
    text: String,
    usage: Usage,
}

impl Eval {
    pub fn run(self, quiet: bool) -> Result<()> {
        let window = Window { from: self.from, to: self.to };
        let Asked { questions: asked, problems } =
            self.dataset.load(self.source.as_deref(), &self.release, window, self.limit)?;
        unique(&asked)?;
        let programs = Programs::prepare(self.dataset, &problems, &self.code, quiet)?;
        let opened = Opened::open(&self.pair, self.seed.seed)?;
        let settings = self.settings(&opened)?;
        std::fs::create_dir_all(&self.out).with_context(|| format!("cannot make {}", self.out.display()))?;
        let path = self.out.join("items.jsonl");
        let (mut log, mut items) = JsonlLog::<Item>::open(&path)?;
        if let Some(other) = items.iter().find(|item| item.settings != settings) {
            bail!(
                "{} holds samples of other settings ({}): give another --out, or delete it",
                path.display(),
                other.id
            );
        }
        let done: HashSet<(String, usize)> = items.iter().map(|i| (i.id.clone(), i.sample)).collect();
        let todo: Vec<(&Question, usize)> = (0..self.repeat)
            .flat_map(|sample| asked.iter().map(move |q| (q, sample)))
            .filter(|(q, sample)| !done.contains(&(q.id.clone(), *sample)))
            .collect();
        let mut requests: Vec<Request> = Vec::with_capacity(todo.len());
        for (q, sample) in &todo {
            let ids = opened.conversation(&[Message::new("user", q.prompt.as_str())])?;
            opened.check_prompt(&ids).with_context(|| format!("question {}", q.id))?;
            let seed = self.seed.seed.wrapping_add(*sample as u64);
            requests.push(opened.request(ids, &self.sampling, seed)?);
        }
        let progress = if quiet {
            Progress::hidden()
        } else {
            Progress::new((asked.len() * self.repeat) as u64, "samples")
        };
        progress.start_at((asked.len() * self.repeat - todo.len()) as u64);
        let interrupt = Interrupt::install()?;
        let fresh =
            || Written::new(&opened.tokenizer, &self.sampling.stop, &opened.eos, Colour::Never.on_stdout());
        let mut open: Vec<Option<(Written, String, Usage)>> =
            todo.iter().map(|_| Some((fresh(), String::new(), Usage::default()))).collect();
        let mut decoder = opened.decoder()?;
        let begun = std::time::Instant::now();
        let mut written = 0u64;
        let mut each = |n: usize, event: r2r::Result<TokenEvent>| -> Result<bool> {
            interrupt.check()?;
            let (question, sample) = todo[n];
            let event = event.with_context(|| format!("question {}", question.id))?;
            let Some((text, said, usage)) = &mut open[n] else { return Ok(false) };
            written += 1;
            usage.note(&event);
            *said += &text.push(&event)?.0;
            if event.finish.is_none() && !text.stopped() {
                return Ok(true);
            }
            *said += &text.finish()?.0;
            let finish = text.why(event.finish).to_owned();
            let (text, usage) = (std::mem::take(said), *usage);
            open[n] = None;
            let (answer, correct) = question.grade(&text);
            let item = Item {
                settings: settings.clone(),
                id: question.id.clone(),
                subject: question.subject.clone(),
                sample,
                answer,
                gold: question.gold.clone(),
                correct,
                finish,
                text,
                usage,
            };
            log.append(&item)?;
            items.push(item);
            progress.inc(1);
            Ok(false)
        };
        run(&mut decoder, requests, self.batch, &mut each)?;
        progress.finish();
        // Samples of an earlier run were not timed in this one.
        let speed = (done.is_empty() && written > 0).then(|| written as f64 / begun.elapsed().as_secs_f64());
        let wanted: HashSet<&str> = asked.iter().map(|q| q.id.as_str()).collect();
        items.retain(|item| wanted.contains(item.id.as_str()) && item.sample < self.repeat);
        programs.judge(&mut items, &self.code, &self.out, quiet, &interrupt)?;
        let rows = self.rows(&opened, &items, speed);
        row::write(self.out.join("rows.jsonl"), &rows)?;
        for row in &rows {
            let interval = row.ci.map_or(String::new(), |[low, high]| format!(" ({low:.3} to {high:.3})"));
            println!("{:<32} {:>10.4} {}{interval}", row.metric, row.value, row.unit);
        }
        Ok(())
    }

    /// A hash of what decides a sample beside its question and its number.
    fn settings(&self, opened: &Opened) -> Result<String> {
        let mut said = json!({
            "dataset": self.dataset.name(), "small": self.pair.small, "large": self.pair.large.large.to_string(),
            "router": self.pair.router, "policy": opened.policy, "seed": self.seed.seed,
            "sampling": format!("{:?}", self.sampling), "dtype": self.pair.run_on.dtype.to_string(),
            "device": self.pair.run_on.device.to_string(),
        });
        if let Some(kv) = &self.pair.kv {
            said["kv"] = kv.to_string().into();
        }
        Ok(nics_base::hash::bytes(serde_json::to_vec(&said)?)[..16].to_owned())
    }

    fn rows(&self, opened: &Opened, items: &[Item], speed: Option<f64>) -> Vec<Row> {
        let n = items.len() as u64;
        let usage = items.iter().fold(Usage::default(), |sum, item| sum.and(item.usage));
        let base = Row {
            method: "r2r".into(),
            variant: self.variant.clone().unwrap_or_else(|| opened.policy.kind.to_string()),
            preset: self.preset.clone(),
            model: opened.name.clone(),
            dataset: self.dataset.name().into(),
            n: Some(n),
            seed: Some(self.seed.seed),
            ..Row::default()
        };
        let row = |metric: &str, value: f64, unit: &str, higher_is_better: bool| Row {
            metric: metric.into(),
            value,
            unit: unit.into(),
            higher_is_better,
            ..base.clone()
        };
        let mean = |sum: u64| sum as f64 / n.max(1) as f64;
        let mut rows = Vec::new();
        // Nobody's accuracy is known while a reply is not judged.
        let judged: Option<Vec<bool>> = items.iter().map(|item| item.correct).collect();
        if let Some(judged) = judged {
            let correct = judged.iter().filter(|right| **right).count() as u64;
            let ci = Some(ci::wilson(correct, n));
            rows.push(Row { ci, ..row("accuracy", mean(correct), "", true) });
            if self.repeat > 1 {
                let mut of: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
                for (item, right) in items.iter().zip(judged) {
                    let (all, correct) = of.entry(&item.id).or_default();
                    (*all, *correct) = (*all + 1, *correct + u64::from(right));
                }
                let k = self.repeat as u64;
                let sum: f64 = of.values().map(|&(all, right)| pass_at_k(all, right, k)).sum();
                rows.push(row(&format!("pass@{k}"), sum / of.len().max(1) as f64, "", true));
            }
        }
        rows.push(row("large-model share", usage.large_share(), "", false));
        rows.push(row("tokens a reply", mean(usage.tokens()), "tokens", false));
        if let Some(MeanParameters { exclusive, additive }) = opened.sizes.map(|s| usage.mean_parameters(&s))
        {
            rows.push(row("parameters a token, who chose", exclusive, "B", false));
            rows.push(row("parameters a token, what ran", additive, "B", false));
            // The paper's cost: thousands of tokens times billions of parameters.
            rows.push(row("cost", mean(usage.tokens()) / 1000.0 * exclusive, "K tokens x B", false));
        }
        rows.extend(speed.map(|speed| row("speed", speed, "tokens/s", true)));
        rows
    }
}

/// Samples are told apart by their question's id.
fn unique(asked: &[Question]) -> Result<()> {
    let mut seen = HashSet::new();
    match asked.iter().find(|q| !seen.insert(q.id.as_str())) {
        None => Ok(()),
        Some(twice) => bail!("two questions have the id {}", twice.id),
    }
}

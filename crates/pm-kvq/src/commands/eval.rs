//! `pm-kvq eval` and `pm-kvq judge`.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use nics_base::ci;
use nics_base::cli::CodeArgs;
use nics_base::interrupt::Interrupt;
use nics_base::jsonl::{self, JsonlLog};
use nics_base::progress::Progress;
use nics_base::row::{self, Row};
use nics_core::cli::{JsonArg, ModelArgs, SamplingArgs, at_least_one};
use nics_core::generate::{Generator, Request, run as generate};
use nics_core::template::Message;
use nics_core::text::TextStream;
use pm_kvq::evaluation::{Response, Scores, scores};
use serde_json::json;

use super::bench_set::{Asked, Bench, BenchArgs, Question, Referee, Rule};
use super::cache::CacheArgs;
use super::opened::{Kept, Opened};

/// Measures a model with a cache on a public benchmark: pass@1, voting, pass@k.
///
/// Every response is a line of OUT/responses.jsonl, written as it is finished; a second run goes on with what is missing. The
/// figures are OUT/rows.jsonl; `pm-kvq judge` makes them again. Replies are drawn at temperature 0.6 and top-p 0.95 unless flags
/// say otherwise.
///
/// livecodebench asks for programs. They are run, with --run-code alone, when all replies are written.
#[derive(Args)]
pub struct Eval {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    cache: CacheArgs,
    /// Key scales of `pm-kvq calibrate`
    #[arg(long, value_name = "FILE")]
    scales: Option<PathBuf>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Benchmark
    #[arg(long, value_enum, value_name = "NAME")]
    bench: Bench,
    #[command(flatten)]
    source: BenchArgs,
    #[command(flatten)]
    code: CodeArgs,
    /// How answers are compared
    #[arg(long, value_enum, default_value_t = Rule::Strict)]
    judging: Rule,
    /// Responses to each question
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    n_responses: usize,
    /// Seed of the first response to each question; the next has the next seed
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
    /// The first question, from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    start: usize,
    /// The question behind the last; default: all
    #[arg(long, value_name = "N")]
    end: Option<usize>,
    /// Responses that are written together
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = at_least_one)]
    batch: usize,
    /// Let the tokenizer add its begin to the template's, as published figures were made
    #[arg(long)]
    double_begin: bool,
    #[command(flatten)]
    labels: Labels,
    /// Folder of the results
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
}

/// Names that rows carry.
#[derive(Args)]
struct Labels {
    /// Name of this setting in result rows; default: pm-kvq
    #[arg(long, value_name = "TEXT", default_value = "pm-kvq")]
    variant: String,
    /// Name of the experiment's preset in result rows
    #[arg(long, value_name = "TEXT", default_value = "")]
    label_preset: String,
    #[command(flatten)]
    json: JsonArg,
}

/// Makes the figures of responses again: with another rule of comparison, or with programs that may now run.
#[derive(Args)]
pub struct JudgeResponses {
    /// responses.jsonl of `pm-kvq eval`
    #[arg(value_name = "FILE")]
    responses: PathBuf,
    #[command(flatten)]
    source: BenchArgs,
    #[command(flatten)]
    code: CodeArgs,
    /// How answers are compared
    #[arg(long, value_enum, default_value_t = Rule::Strict)]
    judging: Rule,
    /// Where the rows go; default: rows.jsonl beside the responses
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Name of the model in result rows
    #[arg(long, value_name = "TEXT", default_value = "")]
    model: String,
    #[command(flatten)]
    labels: Labels,
}

/// The file of verdicts beside responses.
const JUDGED: &str = "judged.jsonl";

impl Eval {
    pub fn run(self, quiet: bool) -> Result<()> {
        self.cache.kv()?;
        let Asked { mut questions, problems } = self.source.load(self.bench)?;
        let end = self.end.unwrap_or(questions.len()).min(questions.len());
        if self.start >= end {
            bail!("questions {} to {end} of {}: there is none", self.start, questions.len());
        }
        questions = questions.drain(self.start..end).collect();
        let mut seen_ids = HashSet::new();
        if let Some(twice) = questions.iter().find(|q| !seen_ids.insert(q.id.as_str())) {
            bail!("two questions have the id {}", twice.id);
        }
        let referee = Referee::prepare(self.bench, &problems, self.judging, &self.code)?;
        let mut opened = Opened::open(&self.model)?;
        let settings = self.settings(&opened)?;
        std::fs::create_dir_all(&self.out).with_context(|| format!("cannot make {}", self.out.display()))?;
        let path = self.out.join("responses.jsonl");
        let (mut log, mut responses) = JsonlLog::<Response>::open(&path)?;
        if let Some(other) = responses.iter().find(|r| r.settings != settings) {
            bail!(
                "{} holds responses of other settings ({}): give another --out, or delete it",
                path.display(),
                other.id
            );
        }
        let interrupt = Interrupt::install()?;
        self.write(&mut opened, &questions, &settings, &mut log, &mut responses, &interrupt, quiet)?;
        let wanted: HashSet<&str> = questions.iter().map(|q| q.id.as_str()).collect();
        responses.retain(|r| wanted.contains(r.id.as_str()) && r.response < self.n_responses);
        let right = referee.judge(&responses, &self.code, &self.out.join(JUDGED), quiet, &interrupt)?;
        let (device, dtype) = opened.place();
        let base = Row {
            device,
            dtype,
            seed: Some(self.seed),
            ..self.labels.base(opened.checkpoint.name(), self.bench.name())
        };
        let Some(right) = right else {
            unscored(responses.len(), &path);
            return Ok(());
        };
        self.labels.report(&responses, &right, &referee, &base, &self.out.join("rows.jsonl"))
    }

    #[allow(clippy::too_many_arguments)] // All of them are the run's.
    fn write(
        &self,
        opened: &mut Opened,
        questions: &[Question],
        settings: &str,
        log: &mut JsonlLog<Response>,
        responses: &mut Vec<Response>,
        interrupt: &Interrupt,
        quiet: bool,
    ) -> Result<()> {
        let done: HashSet<(String, usize)> = responses.iter().map(|r| (r.id.clone(), r.response)).collect();
        let todo: Vec<(&Question, usize)> = (0..self.n_responses)
            .flat_map(|n| questions.iter().map(move |q| (q, n)))
            .filter(|(q, n)| !done.contains(&(q.id.clone(), *n)))
            .collect();
        if todo.is_empty() {
            return Ok(());
        }
        let mut flags = self.sampling.clone();
        if !flags.greedy && flags.temperature.is_none() {
            flags.temperature = Some(0.6);
            flags.top_p = flags.top_p.or(Some(0.95));
        }
        let sampling = opened.sampling(&flags)?;
        let max_new_tokens = flags.max_new_tokens.unwrap_or(32_768);
        let seed = |n: usize| self.seed.wrapping_add(n as u64);
        let Kept { mut cache, log: seen } = opened.cache(&self.cache, self.scales.as_deref())?;
        let opened = &*opened;
        let mut requests: Vec<Request> = Vec::with_capacity(todo.len());
        let mut lens = Vec::with_capacity(todo.len());
        for (q, n) in &todo {
            let ids = opened.conversation(&[Message::new("user", q.prompt.as_str())], self.double_begin)?;
            opened.check_prompt(&ids).with_context(|| format!("question {}", q.id))?;
            lens.push(ids.len());
            requests.push(opened.request(&ids, &sampling, seed(*n), max_new_tokens));
        }
        let total = (questions.len() * self.n_responses) as u64;
        let progress = if quiet { Progress::hidden() } else { Progress::new(total, "responses") };
        progress.start_at(total - todo.len() as u64);
        let tokenizer = opened.tokenizer()?;
        let mut open: Vec<Option<(TextStream, String, usize)>> =
            todo.iter().map(|_| Some((TextStream::new(tokenizer, &flags.stop), String::new(), 0))).collect();
        let mut generator = Generator::new(&opened.model, &mut *cache);
        generate(&mut generator, requests, self.batch, &mut |i, token| {
            interrupt.check()?;
            let Some((stream, text, tokens)) = &mut open[i] else { return Ok(false) };
            *tokens += 1;
            *text += &stream.push(token.token)?;
            let stopped = stream.stopped().is_some();
            if token.finish.is_none() && !stopped {
                return Ok(true);
            }
            *text += &stream.finish()?;
            let (question, n) = todo[i];
            let response = Response {
                settings: settings.to_owned(),
                bench: self.bench.name().into(),
                id: question.id.clone(),
                response: n,
                seed: seed(n),
                gold: question.gold.clone(),
                finish: opened.finish(lens[i], *tokens, stopped, token.finish).into(),
                text: std::mem::take(text),
                tokens: *tokens,
                cache: seen.sequence(i),
            };
            open[i] = None;
            log.append(&response)?;
            responses.push(response);
            progress.inc(1);
            Ok(false)
        })?;
        progress.finish();
        Ok(())
    }

    /// A hash of what decides a response beside its question and its number.
    fn settings(&self, opened: &Opened) -> Result<String> {
        let file = |path: &Option<PathBuf>| path.as_ref().map(nics_base::hash::file).transpose();
        let (device, dtype) = opened.place();
        let said = json!({
            "bench": self.bench.name(), "weights": opened.checkpoint.weights_hash()?, "device": device, "dtype": dtype,
            "kv": format!("{:?}", self.cache.kv()?), "budgets": file(&self.cache.budgets)?,
            "scales": file(&self.scales)?, "seed": self.seed, "sampling": format!("{:?}", self.sampling),
            "double_begin": self.double_begin,
        });
        Ok(nics_base::hash::value(&said)?[..16].to_owned())
    }
}

impl JudgeResponses {
    pub fn run(self, quiet: bool) -> Result<()> {
        let responses: Vec<Response> = jsonl::read(&self.responses)?;
        let Some(first) = responses.first() else {
            bail!("{} has no response", self.responses.display());
        };
        let name = first.bench.clone();
        if responses.iter().any(|r| r.bench != name) {
            bail!("{} holds responses to several benchmarks", self.responses.display());
        }
        let known = [Bench::Aime, Bench::Livecodebench];
        let Some(bench) = known.into_iter().find(|b| b.name() == name) else {
            bail!("{}: there is no benchmark {name:?} here", self.responses.display());
        };
        // Answers are in the file, tests are not.
        let programs = bench == Bench::Livecodebench && self.code.run_code;
        let problems = if programs { self.source.load(bench)?.problems } else { Vec::new() };
        let referee = Referee::prepare(bench, &problems, self.judging, &self.code)?;
        let beside = self.responses.parent().unwrap_or(Path::new(""));
        let interrupt = Interrupt::install()?;
        let right = referee.judge(&responses, &self.code, &beside.join(JUDGED), quiet, &interrupt)?;
        let Some(right) = right else {
            unscored(responses.len(), &self.responses);
            return Ok(());
        };
        let out = self.out.clone().unwrap_or_else(|| beside.join("rows.jsonl"));
        let base = Row { seed: Some(first.seed), ..self.labels.base(&self.model, bench.name()) };
        self.labels.report(&responses, &right, &referee, &base, &out)
    }
}

fn unscored(n: usize, path: &Path) {
    println!(
        "{n} responses are in {}, not scored: programs are run with --run-code alone. The same command with it goes on from \
         here",
        path.display()
    );
}

impl Labels {
    fn base(&self, model: &str, dataset: &str) -> Row {
        Row {
            method: "pm-kvq".into(),
            variant: self.variant.clone(),
            preset: self.label_preset.clone(),
            model: model.into(),
            dataset: dataset.into(),
            ..Row::default()
        }
    }

    fn report(
        &self,
        responses: &[Response],
        right: &[bool],
        referee: &Referee,
        base: &Row,
        out: &Path,
    ) -> Result<()> {
        let judged: Vec<(&Response, bool)> = responses.iter().zip(right.iter().copied()).collect();
        let found = scores(&judged, referee.voting()).context("there is no response to score")?;
        let rows = rows(responses, &found, base);
        row::write(out, &rows)?;
        for row in &rows {
            if self.json.json {
                println!("{}", serde_json::to_string(row)?);
                continue;
            }
            let interval = row.ci.map_or(String::new(), |[low, high]| format!(" ({low:.2} to {high:.2})"));
            println!("{:<34} {:>10.2} {}{interval}", row.metric, row.value, row.unit);
        }
        Ok(())
    }
}

fn rows(responses: &[Response], found: &Scores, base: &Row) -> Vec<Row> {
    let n = responses.len() as u64;
    let row = |metric: &str, value: f64, unit: &str, higher_is_better: bool, n: u64| Row {
        metric: metric.into(),
        value,
        unit: unit.into(),
        higher_is_better,
        n: Some(n),
        ..base.clone()
    };
    let ci = Some(ci::wilson(found.right as u64, n).map(|share| 100.0 * share));
    let questions = found.questions as u64;
    let mut rows = vec![Row { ci, ..row("pass@1", found.pass_at_1, "%", true, n) }];
    rows.push(row("pass@1, deviation over rounds", found.deviation, "%", false, n));
    rows.extend(found.voting.map(|voting| row("voting", voting, "%", true, questions)));
    rows.extend(
        found.pass_at_k.iter().map(|(k, value)| row(&format!("pass@{k}"), *value, "%", true, questions)),
    );
    let mean = |of: &dyn Fn(&Response) -> f64| responses.iter().map(of).sum::<f64>() / n.max(1) as f64;
    rows.push(row("tokens a response", mean(&|r| r.tokens as f64), "tokens", false, n));
    let ended = |r: &Response| f64::from(u8::from(r.finish == "cache_exhausted"));
    rows.push(row("ended by the budget", 100.0 * mean(&ended), "%", false, n));
    let bytes: Vec<f64> = responses.iter().filter_map(|r| Some(r.cache?.bytes as f64)).collect();
    if !bytes.is_empty() {
        let mib = bytes.iter().sum::<f64>() / bytes.len() as f64 / f64::from(1 << 20);
        rows.push(row("cache at the end of a response", mib, "MiB", false, bytes.len() as u64));
    }
    rows
}

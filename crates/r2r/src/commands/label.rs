//! `r2r label`.

mod judge;
mod models;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use nics_base::cli::{ShardArg, Size};
use nics_base::interrupt::Interrupt;
use nics_base::progress::Progress;
use nics_core::cli::{DeviceArgs, at_least_one};
use nics_core::tokenizer::Tokenizer;
use r2r::labels::pipeline::{
    self, Budget, ContinueSettings, Form, PrefillSettings, RespondSettings, Step, Watch, Work,
};
use serde_json::{Map, Value};

use judge::JudgeArgs;
use models::Loaded;

/// Makes labels: where does the small model's token change what the large one would say?
///
/// Steps are run one after the other over one folder, or all of them by `run`. Each goes on where it was stopped, also
/// after kill -9, and ends with the same bytes as an unbroken run with the same settings and the same number of threads.
/// A folder belongs to one run: what other settings made is refused.
#[derive(Args)]
pub struct Label {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Let the large model answer the queries: responses.jsonl
    Respond(Respond),
    /// Let the small model read along: features-NNNN.safetensors and index.json
    Prefill(Prefill),
    /// Let the large model go on from the small one's tokens where they differ: mismatch.jsonl
    Continue(Continue),
    /// Let a judge compare both: judged.jsonl
    Judge(Judge),
    /// Join features and verdicts: labels-NNNN.safetensors and labels.json
    Build(Build),
    /// Do all of it
    Run(Run),
}

/// Where labels are made, and within what bounds.
#[derive(Args)]
struct PlaceArgs {
    /// Folder of the labels; a shard of several has a folder of its own in it
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
    #[command(flatten)]
    shard: ShardArg,
    /// Most memory of the process, e.g. 8GiB: sizes of batches and files follow from it; default: no limit
    #[arg(long, value_name = "SIZE")]
    mem_limit: Option<Size>,
    #[command(flatten)]
    run_on: DeviceArgs,
}

#[derive(Args)]
struct LargeArg {
    /// Large model: a folder, or a hub id ORG/NAME or ORG/NAME@REVISION
    #[arg(long, short, visible_alias = "llm", value_name = "FOLDER|ID")]
    large: String,
}

#[derive(Args)]
struct SmallArg {
    /// Small model: a folder, or a hub id
    #[arg(long, short, visible_alias = "slm", value_name = "FOLDER|ID")]
    small: String,
}

#[derive(Args)]
struct BatchArgs {
    /// Sequences that the large model writes at once
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    batch: usize,
    /// Sequences that are kept together, which a kill loses at most; default: four batches
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    group: Option<usize>,
}

impl BatchArgs {
    fn group(&self) -> usize {
        self.group.unwrap_or(4 * self.batch)
    }
}

#[derive(Args)]
struct RespondArgs {
    /// Queries, JSON Lines: `id`, `question` (a text) or `ids` (a prompt that is tokens already), and optionally `source`
    /// and `type`
    #[arg(long, value_name = "FILE")]
    queries: PathBuf,
    /// Most tokens of a response
    #[arg(long, value_name = "N", default_value_t = 32768, value_parser = at_least_one)]
    max_new_tokens: usize,
    /// What the large model is told about its role
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// A variable of the chat template, e.g. enable_thinking=true; JSON values, else text
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    template_var: Vec<(String, Value)>,
}

/// What the small model reads.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum FormArg {
    /// The tokens that were written. Encoding a text anew can give other tokens
    Exact,
    /// The conversation as a text, encoded anew: as the paper's pipeline does
    Rebuilt,
}

#[derive(Args)]
struct PrefillArgs {
    /// What the small model reads
    #[arg(long, value_enum, value_name = "FORM", default_value = "exact")]
    form: FormArg,
    /// Largest logits that are kept of a position
    #[arg(long, value_name = "K", default_value_t = 100)]
    top_k: i64,
    /// Rows of a file of features, up to the end of a document
    #[arg(long, value_name = "ROWS", default_value_t = 1 << 18, value_parser = at_least_one)]
    shard_tokens: usize,
    /// Longer conversations are left out
    #[arg(long, value_name = "N", default_value_t = 32768, value_parser = at_least_one)]
    max_tokens: usize,
}

#[derive(Args)]
struct ContinueArgs {
    /// Sentences of a continuation behind the one in which the models part
    #[arg(long, value_name = "N", default_value_t = 1)]
    sentences: usize,
    /// Most tokens of a continuation
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = at_least_one)]
    max_continuation: usize,
    /// A token that ends a sentence; once for each; default: short tokens that end in a mark or a newline
    #[arg(long, value_name = "TEXT")]
    stop_token: Vec<String>,
}

fn variable(text: &str) -> Result<(String, Value), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("{text:?}: expected NAME=VALUE"))?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
    Ok((name.to_owned(), value))
}

/// Lets the large model answer the queries, greedily. Responses whose thinking part does not end are not used further.
#[derive(Args)]
#[allow(clippy::struct_field_names)] // Groups of flags are named like what they are for.
struct Respond {
    #[command(flatten)]
    place: PlaceArgs,
    #[command(flatten)]
    large: LargeArg,
    #[command(flatten)]
    respond: RespondArgs,
    #[command(flatten)]
    batch: BatchArgs,
}

/// Lets the small model read the responses and keeps what it computed at every position, in the dtype in which it
/// computes: choose the one in which it will be used.
#[derive(Args)]
#[allow(clippy::struct_field_names)] // As above.
struct Prefill {
    #[command(flatten)]
    place: PlaceArgs,
    #[command(flatten)]
    small: SmallArg,
    /// Large model, whose tokenizer is held against the small one's
    #[arg(long, short, visible_alias = "llm", value_name = "FOLDER|ID")]
    large: Option<String>,
    #[command(flatten)]
    prefill: PrefillArgs,
}

/// Finds where the models differ and lets the large one go on from the small one's token for a sentence or two.
#[derive(Args)]
struct Continue {
    #[command(flatten)]
    place: PlaceArgs,
    #[command(flatten)]
    large: LargeArg,
    #[command(flatten)]
    continuation: ContinueArgs,
    /// Longer documents are left out
    #[arg(long, value_name = "N", default_value_t = 32768, value_parser = at_least_one)]
    max_tokens: usize,
    #[command(flatten)]
    batch: BatchArgs,
}

/// Lets a judge compare both continuations. Verdicts are kept as they come: where a server dies, the next run goes on.
#[derive(Args)]
#[allow(clippy::struct_field_names)] // As above.
struct Judge {
    #[command(flatten)]
    place: PlaceArgs,
    /// Large model; of one that is not asked the tokenizer alone is read
    #[arg(long, short, visible_alias = "llm", value_name = "FOLDER|ID")]
    large: String,
    #[command(flatten)]
    judge: JudgeArgs,
    /// A token that ends a sentence; once for each; as for `continue`
    #[arg(long, value_name = "TEXT")]
    stop_token: Vec<String>,
    #[command(flatten)]
    batch: BatchArgs,
}

/// Joins features and verdicts. Documents without a mismatch are left out.
#[derive(Args)]
struct Build {
    #[command(flatten)]
    place: PlaceArgs,
}

/// Does all steps that are not done.
#[derive(Args)]
struct Run {
    #[command(flatten)]
    place: PlaceArgs,
    #[command(flatten)]
    small: SmallArg,
    #[command(flatten)]
    large: LargeArg,
    /// Keep both models in memory; default: one after the other
    #[arg(long)]
    together: bool,
    #[command(flatten)]
    respond: RespondArgs,
    #[command(flatten)]
    prefill: PrefillArgs,
    #[command(flatten)]
    continuation: ContinueArgs,
    #[command(flatten)]
    judge: JudgeArgs,
    #[command(flatten)]
    batch: BatchArgs,
}

/// What a step works with.
struct Session {
    work: Work,
    bars: Bars,
    interrupt: Interrupt,
    limit: Option<usize>,
}

/// A bar for each step.
struct Bars {
    quiet: bool,
    now: Option<(Step, Progress)>,
}

impl Bars {
    fn at(&mut self, step: Step, done: u64, all: u64) {
        if self.now.as_ref().is_none_or(|(of, _)| *of != step) {
            let bar = if self.quiet { Progress::hidden() } else { Progress::new(all, step.name()) };
            bar.start_at(done);
            if let Some((_, old)) = self.now.replace((step, bar)) {
                old.finish();
            }
        }
        if let Some((_, bar)) = &self.now {
            bar.set(done);
        }
    }
}

impl PlaceArgs {
    fn open(&self, quiet: bool) -> Result<Session> {
        let work = Work::open(&self.out, self.shard.resolve()?)?;
        let interrupt = Interrupt::install().context("cannot listen for signals")?;
        let limit = self.mem_limit.map(|size| size.0);
        Ok(Session { work, bars: Bars { quiet, now: None }, interrupt, limit })
    }
}

impl Session {
    fn budget(&self, models: &[&Loaded]) -> Budget {
        Budget { limit: self.limit, models: models.iter().map(|m| m.bytes).sum() }
    }

    /// Does a step and says what it made.
    fn step(
        &mut self,
        step: Step,
        what: &str,
        work: impl FnOnce(&mut Work, &mut Watch) -> r2r::Result<u64>,
    ) -> Result<()> {
        let bars = &mut self.bars;
        let mut report = |step, done, all| bars.at(step, done, all);
        let mut watch = Watch { interrupt: self.interrupt.clone(), progress: Some(&mut report) };
        let made = work(&mut self.work, &mut watch)?;
        if let Some((_, bar)) = self.bars.now.take() {
            bar.finish();
        }
        eprintln!("{}: {made} {what}", self.work.file(step).display());
        Ok(())
    }

    fn respond(
        &mut self,
        large: &Loaded,
        models: &[&Loaded],
        args: &RespondArgs,
        batch: &BatchArgs,
    ) -> Result<()> {
        let settings = RespondSettings {
            max_new_tokens: args.max_new_tokens,
            batch: batch.batch,
            group: batch.group(),
            system: args.system.clone(),
            template: args.template_var.iter().cloned().collect::<Map<_, _>>(),
        };
        let budget = self.budget(models);
        self.step(Step::Respond, "responses", |work, watch| {
            pipeline::respond(work, &args.queries, &large.party(), &settings, budget, watch)
        })
    }

    fn prefill(
        &mut self,
        small: &Loaded,
        models: &[&Loaded],
        large: Option<&Tokenizer>,
        args: &PrefillArgs,
    ) -> Result<()> {
        let settings = PrefillSettings {
            form: match args.form {
                FormArg::Exact => Form::Exact,
                FormArg::Rebuilt => Form::Rebuilt,
            },
            top_k: args.top_k,
            max_tokens: args.max_tokens,
            shard_tokens: args.shard_tokens,
        };
        let budget = self.budget(models);
        self.step(Step::Prefill, "rows of features", |work, watch| {
            pipeline::prefill(work, &small.party(), large, &settings, budget, watch)
        })
    }

    fn go_on(&mut self, large: &Loaded, models: &[&Loaded], settings: &ContinueSettings) -> Result<()> {
        let budget = self.budget(models);
        self.step(Step::Continue, "mismatches", |work, watch| {
            pipeline::continue_mismatches(work, &large.party(), settings, budget, watch)
        })
    }

    /// `large` is the large model, where the judge asks it.
    fn judge(
        &mut self,
        tokenizer: &Tokenizer,
        large: Option<&Loaded>,
        args: &JudgeArgs,
        stops: &[String],
        batch: usize,
    ) -> Result<()> {
        let party = large.map(Loaded::party);
        let mut judge = args.open(tokenizer, party.as_ref(), stops, batch, &self.interrupt)?;
        self.step(Step::Judge, "verdicts", |work, watch| pipeline::judge(work, &mut *judge, watch))
    }

    fn build(&mut self) -> Result<()> {
        self.step(Step::Build, "rows of labels", pipeline::build)
    }
}

impl ContinueArgs {
    fn settings(&self, max_tokens: usize, batch: &BatchArgs) -> ContinueSettings {
        ContinueSettings {
            sentences: self.sentences,
            max_new_tokens: self.max_continuation,
            max_tokens,
            batch: batch.batch,
            group: batch.group(),
            stops: self.stop_token.clone(),
        }
    }
}

impl Label {
    pub fn run(self, quiet: bool) -> Result<()> {
        match self.command {
            Command::Respond(args) => {
                let mut session = args.place.open(quiet)?;
                let large = Loaded::open(&args.large.large, &args.place.run_on)?;
                session.respond(&large, &[&large], &args.respond, &args.batch)
            }
            Command::Prefill(args) => {
                let mut session = args.place.open(quiet)?;
                let small = Loaded::open(&args.small.small, &args.place.run_on)?;
                let large = args.large.as_deref().map(models::tokenizer).transpose()?;
                session.prefill(&small, &[&small], large.as_ref(), &args.prefill)
            }
            Command::Continue(args) => {
                let mut session = args.place.open(quiet)?;
                let large = Loaded::open(&args.large.large, &args.place.run_on)?;
                let settings = args.continuation.settings(args.max_tokens, &args.batch);
                session.go_on(&large, &[&large], &settings)
            }
            Command::Judge(args) => {
                let mut session = args.place.open(quiet)?;
                let tokenizer = models::tokenizer(&args.large)?;
                let load = || Loaded::open(&args.large, &args.place.run_on);
                let large = args.judge.needs_model().then(load).transpose()?;
                session.judge(&tokenizer, large.as_ref(), &args.judge, &args.stop_token, args.batch.batch)
            }
            Command::Build(args) => args.place.open(quiet)?.build(),
            Command::Run(args) => args.run(quiet),
        }
    }
}

impl Run {
    fn run(self, quiet: bool) -> Result<()> {
        let mut session = self.place.open(quiet)?;
        self.judge.check()?;
        if self.small.small == self.large.large {
            bail!("small and large model are both {}: labels need two models", self.small.small);
        }
        // A pair that does not fit together shows before days of work.
        let tokenizer = models::tokenizer(&self.large.large)?;
        pipeline::same_tokenizer(&models::tokenizer(&self.small.small)?, &tokenizer)?;
        let load = |name: &str| Loaded::open(name, &self.place.run_on);
        let settings = self.continuation.settings(self.prefill.max_tokens, &self.batch);
        let mut large = load(&self.large.large)?;
        if self.together {
            let small = load(&self.small.small)?;
            let both = [&large, &small];
            session.respond(&large, &both, &self.respond, &self.batch)?;
            session.prefill(&small, &both, None, &self.prefill)?;
            session.go_on(&large, &both, &settings)?;
        } else {
            session.respond(&large, &[&large], &self.respond, &self.batch)?;
            drop(large);
            let small = load(&self.small.small)?;
            session.prefill(&small, &[&small], None, &self.prefill)?;
            drop(small);
            large = load(&self.large.large)?;
            session.go_on(&large, &[&large], &settings)?;
        }
        // A judge elsewhere needs none of its memory.
        let large = self.judge.needs_model().then_some(large);
        let stops = &self.continuation.stop_token;
        session.judge(&tokenizer, large.as_ref(), &self.judge, stops, self.batch.batch)?;
        drop(large);
        session.build()
    }
}

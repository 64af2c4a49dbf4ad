//! `megrez eval` and `megrez rows`.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use megrez::eval::{Mode, Output, Record, Selection, Settings, Task, answer, items, rows};
use nics_base::interrupt::Interrupt;
use nics_base::jsonl;
use nics_base::progress::Progress;
use nics_base::row::{self, Row};
use nics_core::cli::{JsonArg, PluggedModelArgs, SamplingArgs, SeedArg, ShardArg};

use super::Loaded;

/// Measures a model: one JSON line per item, and result rows with confidence intervals.
///
/// Replies are greedy unless sampling flags say otherwise. In the folder of --out stand, in the end, items.jsonl and
/// rows.jsonl; with --shard the shard's items alone: merge them (cargo xtask merge), then `megrez rows`. An interrupted
/// run goes on where it was.
#[derive(Args)]
pub struct Eval {
    #[command(flatten)]
    model: PluggedModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    seed: SeedArg,
    #[command(flatten)]
    shard: ShardArg,
    #[command(flatten)]
    json: JsonArg,
    #[command(flatten)]
    labels: Labels,
    /// Folder of the result
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
    /// What to measure on
    #[arg(long, short)]
    task: Task,
    /// Folder or hub id of the data; default: the dataset's own id
    #[arg(long, value_name = "FOLDER|ID")]
    data: Option<String>,
    /// At most so many items
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// A subject of a multiple-choice task; may be given several times; default: all
    #[arg(long, value_name = "NAME")]
    subject: Vec<String>,
    /// Solved examples before each multiple-choice question
    #[arg(long, value_name = "N", default_value_t = 5)]
    shots: usize,
    /// How multiple-choice questions are answered
    #[arg(long, default_value = "ppl")]
    mode: Mode,
    /// Items that are answered together
    #[arg(long, value_name = "N", default_value_t = 32)]
    batch: usize,
}

/// Names that rows carry.
#[derive(Args)]
pub struct Labels {
    /// Name of what is compared, in the rows; default: the plug-ins in force
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Name of the experiment's preset, in the rows
    #[arg(long, value_name = "NAME", default_value = "")]
    preset: String,
}

impl Eval {
    pub fn run(self, quiet: bool) -> Result<()> {
        let began = Instant::now();
        let shard = self.shard.resolve()?;
        if self.limit == Some(0) {
            bail!("--limit is 0: there would be nothing to measure");
        }
        let selection = Selection {
            task: self.task,
            data: self.data.clone(),
            limit: self.limit,
            subjects: self.subject.clone(),
            shots: if self.task.is_choice() { self.shots } else { 0 },
            seed: self.seed.seed,
        };
        let items = items(&selection)?;
        let mut loaded = Loaded::open(&self.model)?;
        let greedy = nics_core::sampling::Sampling { seed: self.seed.seed, ..Default::default() };
        let settings = Settings {
            selection,
            mode: self.mode,
            sampling: self.sampling.over(&greedy)?,
            max_new_tokens: self.sampling.max_new_tokens.unwrap_or(loaded.megrez.max_new_tokens),
        };
        if loaded.hook.is_some() {
            bail!("--hook does not act on evaluations yet");
        }
        let total = shard.items(items.len()).count() as u64;
        let progress = if quiet { Progress::hidden() } else { Progress::new(total, "items") };
        let identity = loaded.identity()?;
        let interrupt = Interrupt::install()?;
        let (file, records) = answer(
            &loaded.megrez,
            &mut *loaded.cache,
            &items,
            &settings,
            &mut Output {
                dir: &self.out,
                shard,
                identity,
                batch: self.batch,
                interrupt: &interrupt,
                progress: &mut |done| progress.set(done as u64),
            },
        )?;
        progress.finish();
        if !shard.is_whole() {
            eprintln!("shard {shard}: {} items in {}", records.len(), file.display());
            return Ok(());
        }
        jsonl::write(self.out.join("items.jsonl"), &records)?;
        let (device, dtype) = loaded.place();
        let variant = self.labels.variant.clone().unwrap_or_else(|| {
            if loaded.variant.is_empty() { "megrez".into() } else { loaded.variant.clone() }
        });
        let common = Row {
            method: "megrez".into(),
            variant,
            preset: self.labels.preset.clone(),
            model: loaded.megrez.name.clone(),
            seed: Some(self.seed.seed),
            device,
            dtype,
            wall_s: Some(began.elapsed().as_secs_f64()),
            ..Row::default()
        };
        let rows = rows(&records, &common);
        row::write(self.out.join("rows.jsonl"), &rows)?;
        print(&rows, self.json.json)
    }
}

/// Makes result rows out of items that `megrez eval` has answered.
#[derive(Args)]
pub struct Rows {
    /// Answered items: items.jsonl, or the merged shards
    #[arg(value_name = "FILE")]
    items: PathBuf,
    /// Where the rows go
    #[arg(long, short, value_name = "FILE")]
    out: PathBuf,
    /// Name of the model, in the rows
    #[arg(long, value_name = "NAME", default_value = "")]
    model: String,
    #[command(flatten)]
    labels: Labels,
    #[command(flatten)]
    seed: SeedArg,
    #[command(flatten)]
    json: JsonArg,
}

impl Rows {
    pub fn run(self) -> Result<()> {
        let records: Vec<Record> = jsonl::read(&self.items)?;
        if records.is_empty() {
            bail!("{} has no items", self.items.display());
        }
        let common = Row {
            method: "megrez".into(),
            variant: self.labels.variant.clone().unwrap_or_else(|| "megrez".into()),
            preset: self.labels.preset.clone(),
            model: self.model.clone(),
            seed: Some(self.seed.seed),
            ..Row::default()
        };
        let rows = rows(&records, &common);
        row::write(&self.out, &rows)?;
        print(&rows, self.json.json)
    }
}

fn print(rows: &[Row], json: bool) -> Result<()> {
    for row in rows {
        if json {
            println!("{}", serde_json::to_string(row)?);
            continue;
        }
        let interval = row
            .ci
            .map(|[low, high]| format!("  [{:.1}, {:.1}]", 100.0 * low, 100.0 * high))
            .unwrap_or_default();
        println!(
            "{:<16} {:<28} {:>6.1} %{interval}  n = {}",
            row.dataset,
            row.metric,
            100.0 * row.value,
            row.n.unwrap_or(0)
        );
    }
    Ok(())
}

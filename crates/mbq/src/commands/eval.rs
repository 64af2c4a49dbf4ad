//! `mbq eval`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use mbq::QuantSpec;
use mbq::apply::{Summary, fold_scales, round};
use mbq::artefact::Scales;
use mbq::evaluation::Rules;
use mbq::evaluation::figures::{self, FORMAT, REPORT, Report, TaskFigures, figures};
use mbq::evaluation::reply::{Running, Settings, replies};
use mbq::evaluation::task::longest;
use mbq::inventory::Inventory;
use mbq::operators::check_groups;
use mbq::prompt::Prompter;
use nics_base::artefact::write_atomic;
use nics_base::hub::{Hub, Source};
use nics_base::interrupt::Interrupt;
use nics_base::jsonl;
use nics_base::progress::Progress;
use nics_base::row::{self, Row};
use nics_core::cli::{JsonArg, ModelArgs, ShardArg, at_least_one};
use nics_core::device::{device_name, dtype_name};
use nics_core::models::Model;
use nics_core::vision::Processor;
use nics_datasets::{Visual, VisualQuestion, VisualSet};
use serde_json::{Value, json};

use super::opened::{ActArg, Opened, Runnable};

/// Tiles of an image that the harness shows to InternVL2.
const TILES: u32 = 6;

/// Measures a model on benchmarks of questions about images: MMMU, SEED-Bench, OCRBench, VizWiz, ScienceQA, TextVQA.
///
/// Replies are greedy, with the prompts, lengths and scoring rules of the common harness. Each is a line of a file in OUT,
/// written as it is finished; the same command goes on with what is missing. In the end OUT holds items-TASK.jsonl (replies
/// with their scores), rows.jsonl and eval.json. With --shard it holds the shard's replies alone; when all shards are there,
/// the same command without --shard makes the figures.
///
/// A quantized checkpoint (ours, AutoAWQ's, GPTQ's, compressed-tensors') is measured as it is stored. --scales and --rtn quantize a
/// float model in memory first.
#[derive(Args)]
pub struct Eval {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    act: ActArg,
    #[command(flatten)]
    quantized: QuantizedArgs,
    /// Tasks, separated by commas: mmmu, seedbench, seedbench-image, ocrbench, vizwiz, scienceqa, scienceqa-img, textvqa
    #[arg(long, value_name = "TASK,…", value_delimiter = ',', required = true)]
    tasks: Vec<Visual>,
    /// Folder with a folder for each benchmark, named as on the hub (MMMU, SEED-Bench, OCRBench, VizWiz-VQA, ScienceQA,
    /// textvqa), or of one task itself; default: the hub
    #[arg(long, value_name = "FOLDER")]
    data: Option<PathBuf>,
    /// The first N questions of each task
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    limit: Option<usize>,
    /// Scoring rules: those of the paper's measurements, or with what was mended since
    #[arg(long, value_enum, default_value_t = Scoring::Paper)]
    scoring: Scoring,
    /// MMMU: where a reply names no option, take one by chance, of this seed, as the harness does; default: it is wrong
    #[arg(long, value_name = "SEED")]
    guess: Option<u64>,
    /// The most tokens of a reply; default: each task's (16 for ScienceQA and MMMU, 128 for OCRBench), else the model's (128
    /// for Qwen2-VL, 1024)
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_new_tokens: Option<usize>,
    /// InternVL2: the most tiles of an image [default: 6]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    tiles: Option<usize>,
    /// Replies that are written together
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    batch: usize,
    #[command(flatten)]
    shard: ShardArg,
    #[command(flatten)]
    labels: Labels,
    /// Folder of the results
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
}

/// How a float model is quantized before it is measured.
#[derive(Args)]
struct QuantizedArgs {
    /// Scales of `mbq calibrate` or `mbq import`: fold them and round the decoder as they were searched for
    #[arg(long, value_name = "FOLDER", conflicts_with = "rtn")]
    scales: Option<PathBuf>,
    /// Round the decoder to nearest, e.g. w3g128 or w4a8
    #[arg(long, value_name = "SPEC")]
    rtn: Option<QuantSpec>,
}

/// Names that rows carry.
#[derive(Args)]
struct Labels {
    /// Name of what is compared, in the rows; default: how the model is quantized
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Name of the experiment's preset, in the rows
    #[arg(long, value_name = "NAME", default_value = "")]
    preset: String,
    #[command(flatten)]
    json: JsonArg,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Scoring {
    /// December 2024, when the paper measured
    #[value(name = "2024")]
    Paper,
    /// With what was mended since
    #[value(name = "fixed")]
    Fixed,
}

impl From<Scoring> for Rules {
    fn from(s: Scoring) -> Self {
        match s {
            Scoring::Paper => Self::Paper,
            Scoring::Fixed => Self::Mended,
        }
    }
}

impl QuantizedArgs {
    /// Quantizes a model in memory.
    fn quantize(&self, opened: &mut Opened) -> Result<Option<Summary>> {
        let (names, decoder) = (&opened.names, opened.model.decoder_mut());
        let spec = if let Some(dir) = &self.scales {
            let scales = Scales::read(dir, &opened.origin)?;
            fold_scales(decoder, names, &scales.layers)?;
            scales.config.search.spec
        } else if let Some(spec) = self.rtn {
            check_groups(decoder.dims(), names, &spec)?;
            spec
        } else {
            return Ok(None);
        };
        Ok(Some(round(decoder, names, &spec)?.summary))
    }

    /// # Errors
    /// Flags for a checkpoint that is quantized already.
    fn check(&self, model: &Runnable) -> Result<()> {
        let Some(flag) = self.scales.as_ref().map(|_| "--scales").or(self.rtn.map(|_| "--rtn")) else {
            return Ok(());
        };
        if model.stored.is_some() {
            bail!(
                "{flag} is about float models, and {} is quantized already: leave it out, and it is measured as it is",
                model.checkpoint.name()
            );
        }
        Ok(())
    }

    /// What of it decides a reply.
    fn identity(&self) -> Result<Value> {
        let file = |dir: &PathBuf| nics_base::hash::file(dir.join(mbq::artefact::REPORT));
        let scales = self.scales.as_ref().map(file).transpose()?;
        Ok(json!({"scales": scales, "rtn": self.rtn.map(|s| s.to_string())}))
    }

    /// Its name in result rows.
    fn variant(&self, summary: Option<&Summary>, layers: &Inventory) -> String {
        match (summary, &self.scales) {
            (Some(s), Some(_)) => s.spec.clone(),
            (Some(s), None) => format!("rtn {}", s.spec),
            (None, _) => layers.decoder.keys().cloned().collect::<Vec<_>>().join(" "),
        }
    }
}

/// Where a task's data are.
fn source(task: Visual, data: Option<&Path>, alone: bool) -> Result<Source> {
    let Some(dir) = data else { return Ok(Hub::from_env().resolve_dataset(task.hub_id())?) };
    if !dir.is_dir() {
        bail!("--data {}: there is no such folder", dir.display());
    }
    let own = dir.join(task.hub_id().rsplit('/').next().unwrap_or_default());
    if own.is_dir() {
        return Ok(Source::folder(own));
    }
    if !alone {
        bail!("--data {}: {task} is expected in {}, which is no folder", dir.display(), own.display());
    }
    Ok(Source::folder(dir))
}

impl Eval {
    pub fn run(self, quiet: bool) -> Result<()> {
        let began = Instant::now();
        let shard = self.shard.resolve()?;
        let mut tasks: Vec<Visual> = Vec::new();
        for task in &self.tasks {
            if !tasks.contains(task) {
                tasks.push(*task);
            }
        }
        // All data are looked at before the model takes its time.
        let mut sets: Vec<(Visual, VisualSet)> = Vec::with_capacity(tasks.len());
        for task in tasks {
            let source = source(task, self.data.as_deref(), self.tasks.len() == 1)?;
            sets.push((task, task.load(&source, task.part())?));
        }
        let runnable = Runnable::open(&self.model.model, self.act)?;
        self.quantized.check(&runnable)?;
        let mut opened = Opened::load(runnable, &self.model)?;
        let mut prompter = Prompter::open(&opened.checkpoint)?;
        if prompter.processor.is_none()
            && let Some((task, _)) =
                sets.iter().find(|(_, set)| set.questions.iter().any(VisualQuestion::shows))
        {
            bail!("{} does not see; {task} shows images", opened.checkpoint.name());
        }
        let tiles = match prompter.processor {
            Some(Processor::InternVl(_)) => Some(self.tiles.map_or(TILES, |n| n as u32)),
            _ => None,
        };
        if let Some(most) = tiles {
            prompter.processor = prompter.processor.map(|p| p.with_most_tiles(most));
        }
        let summary = self.quantized.quantize(&mut opened)?;
        let layers =
            Inventory::of(&mut opened.model, &opened.names, opened.stored.as_ref(), summary.as_ref())?;
        // Before hours of replies, and again beside the figures.
        eprintln!("{layers}");
        if !layers.is_quantized() {
            eprintln!("nothing is quantized: this measures the float model");
        }
        std::fs::create_dir_all(&self.out).with_context(|| format!("cannot make {}", self.out.display()))?;
        let interrupt = Interrupt::install()?;
        let rules = Rules::from(self.scoring);
        let dims = opened.model.decoder().dims();
        let (device, dtype) = (device_name(dims.device), dtype_name(dims.kind));
        let mut identity = json!({"model": opened.origin, "device": device, "dtype": dtype,
            "quantized": self.quantized.identity()?});
        if let Some(stored) = &opened.stored {
            // The same tensors mean something else under another configuration.
            identity["stored"] =
                json!({"config": stored.config(), "act": self.act.act.map(|a| a.to_string())});
        }
        let eos = prompter.tokenizer.special_ids().eos.clone();
        let mut found: Vec<TaskFigures> = Vec::with_capacity(sets.len());
        for (task, set) in &mut sets {
            let settings = Settings {
                task: *task,
                limit: self.limit,
                max_new_tokens: self.longest(*task, rules, &prompter),
                tiles,
            };
            let total = shard.items(set.questions.len().min(self.limit.unwrap_or(usize::MAX))).count();
            let bar = if quiet { Progress::hidden() } else { Progress::new(total as u64, task.name()) };
            let mut running = Running {
                dir: &self.out,
                shard,
                identity: &identity,
                eos: &eos,
                batch: self.batch,
                interrupt: &interrupt,
                progress: &mut |done| bar.set(done as u64),
            };
            let replies = replies(&opened.model, &prompter, set, &settings, &mut running)?;
            bar.finish();
            if !shard.is_whole() {
                eprintln!("{task}, shard {shard}: {} replies in {}", replies.len(), self.out.display());
                continue;
            }
            let scored = figures::scored(*task, &set.questions, replies, rules, self.guess)?;
            jsonl::write(self.out.join(format!("items-{task}.jsonl")), &scored)?;
            found.push(figures(*task, &scored, settings.max_new_tokens));
        }
        if !shard.is_whole() {
            return Ok(());
        }
        let report = Report {
            format_version: FORMAT,
            origin: opened.origin.clone(),
            layers,
            scoring: rules,
            guess: self.guess,
            limit: self.limit,
            average: Report::average(&found),
            tasks: found,
        };
        let common = Row {
            method: "mbq".into(),
            variant: self
                .labels
                .variant
                .clone()
                .unwrap_or_else(|| self.quantized.variant(summary.as_ref(), &report.layers)),
            preset: self.labels.preset.clone(),
            model: opened.checkpoint.name().to_owned(),
            seed: self.guess,
            device,
            dtype,
            wall_s: Some(began.elapsed().as_secs_f64()),
            ..Row::default()
        };
        self.finish(&report, &common)
    }

    /// The most tokens of a reply: what was asked for, the benchmark's, the model's in the harness.
    fn longest(&self, task: Visual, rules: Rules, prompter: &Prompter) -> usize {
        let own = match prompter.processor {
            Some(Processor::Qwen(_)) => 128,
            _ => 1024,
        };
        self.max_new_tokens.or_else(|| longest(task, rules)).unwrap_or(own)
    }

    fn finish(&self, report: &Report, common: &Row) -> Result<()> {
        write_atomic(self.out.join(REPORT), serde_json::to_string_pretty(report)? + "\n")?;
        let rows = report.rows(common);
        row::write(self.out.join("rows.jsonl"), &rows)?;
        if self.labels.json.json {
            for row in &rows {
                println!("{}", serde_json::to_string(row)?);
            }
            return Ok(());
        }
        println!("{}", report.layers);
        for row in &rows {
            let interval = row.ci.map_or(String::new(), |[low, high]| format!("  [{low:.1}, {high:.1}]"));
            let n = row.n.unwrap_or(0);
            println!("{:<16} {:<48} {:>6.1} %{interval}  n = {n}", row.dataset, row.metric, row.value);
        }
        for t in &report.tasks {
            for (n, what) in [
                (t.without_answer, "replies name no answer"),
                (t.cut, "replies end at their longest"),
                (t.too_long, "prompts do not fit the model's context and count as wrong"),
            ] {
                if n > 0 {
                    println!("{}: {n} {what}", t.task);
                }
            }
        }
        println!("{}", self.out.join(REPORT).display());
        Ok(())
    }
}

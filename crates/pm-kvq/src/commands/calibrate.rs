//! `pm-kvq calibrate`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use nics_base::exit::Usage;
use nics_base::interrupt::Interrupt;
use nics_base::progress::Progress;
use nics_core::cli::{ModelArgs, Size, at_least_one};
use nics_core::models::Model;
use pm_kvq::Bits;
use pm_kvq::allocate::unit;
use pm_kvq::calibrate::artefact::{
    ALLOCATION, Files, MAX_KEYS, REP_SCALES, SENSITIVITY, ScalesNote, read_allocation, read_max_keys,
    write_max_keys, write_scales, write_sensitivity,
};
use pm_kvq::calibrate::max_keys::max_keys;
use pm_kvq::calibrate::search::Search;
use pm_kvq::calibrate::sensitivity::sensitivity;
use pm_kvq::calibrate::{Cut, GradOrder, MaxMode, Origin, Samples, Settings, Stage, calibrate};
use pm_kvq::quantize::default_group;

use super::cache::bits;
use super::opened::Opened;

/// Measures on texts what a model's layers can bear: widths for its layers and scales for its keys.
///
/// `all` makes everything in two passes and, interrupted or killed, goes on where it was with the same command. The others make
/// one file each of the same folder.
#[derive(Args)]
pub struct Calibrate {
    #[command(subcommand)]
    stage: Wanted,
}

#[derive(Subcommand)]
enum Wanted {
    /// Every stage: sensitivity, widths, largest keys, key scales; resumable
    All(All),
    /// How much the loss changes when a layer is stored at a width: sensitivity.json
    Sensitivity(OfSensitivity),
    /// The largest key of each head and rotary pair: max_keys.safetensors
    MaxKeys(OfMaxKeys),
    /// Key scales from the largest keys: rep_scales.safetensors
    Scales(OfScales),
}

/// What every stage asks for.
#[derive(Args)]
struct Common {
    #[command(flatten)]
    model: ModelArgs,
    /// Texts: a .jsonl file with `text` in each line, a text file, or a .safetensors file with `input_ids` [samples, tokens]
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Samples
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = at_least_one)]
    n_samples: usize,
    /// Tokens of a sample
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, value_parser = at_least_one)]
    seq_len: usize,
    /// Length that positions are stretched to, a multiple of --seq-len; default: four times that
    #[arg(long, value_name = "TOKENS", value_parser = at_least_one)]
    effective_len: Option<usize>,
    /// Channels that share a scale; default: the largest divisor of a head's channels up to 128
    #[arg(long, value_name = "N")]
    group: Option<i64>,
    /// Seed of the order of the texts
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
    /// Folder of the artefacts
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
}

/// Whose gradient a layer's error is weighed with.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Order {
    /// Its own
    Aligned,
    /// That of the layer at the same place from the other end, as the reference implementation does by mistake
    Mirrored,
}

impl From<Order> for GradOrder {
    fn from(order: Order) -> Self {
        match order {
            Order::Aligned => Self::Aligned,
            Order::Mirrored => Self::Mirrored,
        }
    }
}

/// How the largest keys are taken.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Largest {
    /// The larger of both channels of a pair at the stretched positions
    Rotated,
    /// The radius of the pair, which no position exceeds
    Hypot,
}

impl From<Largest> for MaxMode {
    fn from(mode: Largest) -> Self {
        match mode {
            Largest::Rotated => Self::Rotated,
            Largest::Hypot => Self::Hypot,
        }
    }
}

#[derive(Args)]
struct All {
    #[command(flatten)]
    common: Common,
    /// Memory of the codes of a sequence
    #[arg(long, value_name = "SIZE")]
    budget: Size,
    /// Widths in bits that a layer may end at, joined by commas
    #[arg(long, value_name = "BITS", value_delimiter = ',', default_value = "4,2", value_parser = bits)]
    choices: Vec<Bits>,
    /// Tokens that the budget is for
    #[arg(long, value_name = "TOKENS", default_value_t = 32_768, value_parser = at_least_one)]
    max_len: usize,
    /// Whose gradient a layer's error is weighed with
    #[arg(long, value_enum, default_value_t = Order::Aligned)]
    grad_order: Order,
    /// How the largest keys are taken
    #[arg(long, value_enum, default_value_t = Largest::Rotated)]
    max_mode: Largest,
}

#[derive(Args)]
struct OfSensitivity {
    #[command(flatten)]
    common: Common,
    /// Whose gradient a layer's error is weighed with
    #[arg(long, value_enum, default_value_t = Order::Aligned)]
    grad_order: Order,
}

#[derive(Args)]
struct OfMaxKeys {
    #[command(flatten)]
    common: Common,
    /// How the largest keys are taken
    #[arg(long, value_enum, default_value_t = Largest::Rotated)]
    max_mode: Largest,
}

#[derive(Args)]
struct OfScales {
    #[command(flatten)]
    common: Common,
    /// Largest keys; default: those in the folder
    #[arg(long, value_name = "FILE")]
    max_keys: Option<PathBuf>,
    /// Widths of `pm-kvq allocate` that the scales are searched at; default: those in the folder
    #[arg(long, value_name = "FILE")]
    budgets: Option<PathBuf>,
    /// One width for all layers, in bits, in place of --budgets
    #[arg(long, value_name = "BITS", value_parser = bits, conflicts_with = "budgets")]
    bits: Option<Bits>,
}

/// A model with its samples.
struct Begun {
    opened: Opened,
    origin: Origin,
    samples: Samples,
    effective_len: usize,
    group: i64,
    files: Files,
}

impl Common {
    fn begin(&self) -> Result<Begun> {
        let effective_len = self.effective_len.unwrap_or(self.seq_len.saturating_mul(4));
        // What is cheap to find wrong comes before anything is loaded.
        pm_kvq::calibrate::samples::stretch(self.seq_len, Some(effective_len))
            .map_err(|e| Usage(e.to_string()))?;
        let opened = Opened::open(&self.model)?;
        let cut = Cut { samples: self.n_samples, seq_len: self.seq_len, seed: self.seed };
        let samples = Samples::from_file(&self.data, opened.maybe_tokenizer(), cut)?;
        // Token ids in a file have a length of their own.
        let effective_len = if samples.seq_len() == self.seq_len {
            effective_len
        } else {
            self.effective_len.unwrap_or(samples.seq_len() * 4)
        };
        let vocab = opened.model.dims().vocab;
        if let Some(id) = samples.ids().iter().flatten().find(|&&id| i64::from(id) >= vocab) {
            anyhow::bail!("{}: token {id} is outside the vocabulary of {vocab}", self.data.display());
        }
        let origin = Origin::of(&opened.checkpoint)?;
        let group = self.group.unwrap_or(default_group(opened.model.dims().head_dim));
        std::fs::create_dir_all(&self.out).with_context(|| format!("cannot make {}", self.out.display()))?;
        Ok(Begun { opened, origin, samples, effective_len, group, files: Files::at(&self.out) })
    }
}

impl Calibrate {
    pub fn run(self, quiet: bool) -> Result<()> {
        match self.stage {
            Wanted::All(all) => all.run(quiet),
            Wanted::Sensitivity(stage) => stage.run(quiet),
            Wanted::MaxKeys(stage) => stage.run(quiet),
            Wanted::Scales(stage) => stage.run(quiet),
        }
    }
}

impl All {
    fn run(self, quiet: bool) -> Result<()> {
        let Begun { mut opened, origin, samples, effective_len, group, files } = self.common.begin()?;
        // Known before hours of measuring.
        let dims = opened.model.dims();
        let bit = unit(dims.kv_heads as usize, dims.head_dim as usize, self.max_len) * dims.layers as f64;
        let needed = self.choices.iter().min().map_or(0.0, |least| f64::from(least.get()) * bit);
        let given = self.budget.0 as f64;
        if needed > given {
            return Err(pm_kvq::Error::InfeasibleBudget { needed, given }.into());
        }
        let settings = Settings {
            effective_len: Some(effective_len),
            group,
            grad_order: self.grad_order.into(),
            max_mode: self.max_mode.into(),
            choices: self.choices,
            budget: self.budget.0 as u64,
            max_len: self.max_len,
        };
        let total = 2 * samples.len() as u64;
        let bar = if quiet { Progress::hidden() } else { Progress::new(total, "samples") };
        let interrupt = Interrupt::install()?;
        let mut begun = false;
        let out = &self.common.out;
        let made = calibrate(&mut opened.model, &samples, &settings, &origin, out, &interrupt, &mut |at| {
            let before = if at.stage == Stage::Sensitivity { 0 } else { samples.len() };
            let done = (before + at.done) as u64;
            if begun {
                bar.set(done);
            } else {
                bar.start_at(done);
            }
            begun = true;
        })?;
        bar.finish();
        let widths: Vec<u32> = made.widths.allocation.widths.iter().map(|b| b.get()).collect();
        println!("widths of the layers: {widths:?}");
        println!("exponents of the scales: {:?}", made.found.alphas);
        for name in [SENSITIVITY, ALLOCATION, MAX_KEYS, REP_SCALES] {
            println!("{}", files.path(name).display());
        }
        Ok(())
    }
}

impl OfSensitivity {
    fn run(self, quiet: bool) -> Result<()> {
        let Begun { opened, origin, samples, effective_len, group, files } = self.common.begin()?;
        let bar = spinner(quiet, "sensitivity");
        let order = self.grad_order.into();
        let found = sensitivity(&opened.model, &samples, Some(effective_len), group, order)?;
        bar.finish();
        written(&files.path(SENSITIVITY), |path| write_sensitivity(path, &origin, &found))
    }
}

impl OfMaxKeys {
    fn run(self, quiet: bool) -> Result<()> {
        let Begun { opened, origin, samples, effective_len, files, .. } = self.common.begin()?;
        let bar = spinner(quiet, "largest keys");
        let _no_grad = tch::no_grad_guard();
        let found = max_keys(&opened.model, &samples, Some(effective_len), self.max_mode.into())?;
        bar.finish();
        written(&files.path(MAX_KEYS), |path| write_max_keys(path, &origin, &found))
    }
}

impl OfScales {
    fn run(self, quiet: bool) -> Result<()> {
        let Begun { mut opened, origin, samples, effective_len, group, files } = self.common.begin()?;
        let dims = opened.model.dims().clone();
        let path = self.max_keys.unwrap_or_else(|| files.path(MAX_KEYS));
        let keys = read_max_keys(&path, &origin, &dims)?;
        let widths = if let Some(bits) = self.bits {
            vec![bits; dims.layers]
        } else {
            let path = self.budgets.unwrap_or_else(|| files.path(ALLOCATION));
            read_allocation(&path, &origin, dims.layers)?.allocation.widths
        };
        let bar = spinner(quiet, "scales");
        let search =
            Search { max_keys: &keys.layers, widths: &widths, group, effective_len: Some(effective_len) };
        let found = {
            let _no_grad = tch::no_grad_guard();
            search.run(&mut opened.model, &samples)?
        };
        bar.finish();
        println!("exponents of the scales: {:?}", found.alphas);
        let about = ScalesNote { alphas: found.alphas, bits: widths, samples: samples.len() };
        written(&files.path(REP_SCALES), |path| write_scales(path, &origin, &found.scales, &about))
    }
}

fn spinner(quiet: bool, label: &'static str) -> Progress {
    if quiet { Progress::hidden() } else { Progress::spinner(label) }
}

fn written(path: &Path, write: impl FnOnce(&Path) -> pm_kvq::Result<()>) -> Result<()> {
    write(path)?;
    println!("{}", path.display());
    Ok(())
}

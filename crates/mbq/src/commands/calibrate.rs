//! `mbq calibrate`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use mbq::QuantSpec;
use mbq::artefact::{REPORT, SCALES};
use mbq::calibrate::{BalanceMode, CalibConfig, Progress as At, Running, Stage, calibrate};
use mbq::candidates::{GRID, Over, Statistic};
use mbq::loss::LossKind;
use mbq::operators::check_groups;
use mbq::search::SearchConfig;
use nics_base::interrupt::Interrupt;
use nics_base::progress::Progress;
use nics_base::size::Size;
use nics_core::cli::{ModelArgs, at_least_one};
use nics_core::models::Model;

use super::data::{DataArgs, report};
use super::opened::Opened;

/// Searches, layer by layer, the scales with which a model is quantized best: scales.safetensors and scales.json.
///
/// Interrupted or killed, it goes on where it was with the same command.
#[derive(Args)]
pub struct Calibrate {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    search: SearchArgs,
    #[command(flatten)]
    limits: LimitArgs,
    /// Folder of the artefacts
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
}

/// How scales are searched.
#[derive(Debug, Args)]
pub struct SearchArgs {
    /// How the model will be quantized: w3g128, w4g128, w4row; w4a8, w8a8 with activations
    #[arg(long, value_name = "SPEC", default_value = "w3g128")]
    pub quant: QuantSpec,
    /// The norm of errors
    #[arg(long, value_enum, default_value_t = Loss::Mae)]
    loss: Loss,
    /// What errors on images weigh beside those on answers: auto (as the loss reacts), off (all positions alike), or fixed=0.1
    #[arg(long, value_name = "MODE", default_value = "auto", value_parser = balance)]
    balance: BalanceMode,
    /// Search on what the quantized layers before give
    #[arg(long)]
    distort: bool,
    /// Exponents that are tried
    #[arg(long, value_name = "N", default_value_t = GRID, value_parser = at_least_one)]
    grid: usize,
    /// Which positions the magnitude of a channel is measured over: all, as published, or balanced (answers, and images as often
    /// as errors on them weigh)
    #[arg(long, value_enum, default_value_t = ActStat::All)]
    act_stat: ActStat,
    /// Try the exponents on both statistics
    #[arg(long, conflicts_with = "act_stat")]
    stat_union: bool,
}

/// What a channel's magnitude is measured over.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum ActStat {
    /// All positions, padding and prompts included
    All,
    /// The positions that errors are compared on, by what they weigh
    Balanced,
}

/// The norm of errors.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Loss {
    /// Absolute
    Mae,
    /// Squared
    Mse,
}

fn balance(s: &str) -> std::result::Result<BalanceMode, String> {
    match (s, s.strip_prefix("fixed=")) {
        ("auto", _) => Ok(BalanceMode::Auto),
        ("off", _) => Ok(BalanceMode::Off),
        (_, Some(number)) => match number.parse::<f64>() {
            Ok(r) if r.is_finite() && r >= 0.0 => Ok(BalanceMode::Fixed(r)),
            _ => Err(format!("{number:?} is no number from 0 on")),
        },
        _ => Err("expected auto, off or fixed=NUMBER".into()),
    }
}

impl SearchArgs {
    pub fn config(&self) -> CalibConfig {
        let search = SearchConfig {
            spec: self.quant,
            loss: match self.loss {
                Loss::Mae => LossKind::Mae,
                Loss::Mse => LossKind::Mse,
            },
            grid: self.grid,
            statistic: Statistic::Activation,
            over: match (self.stat_union, self.act_stat) {
                (true, _) => Over::Union,
                (false, ActStat::All) => Over::All,
                (false, ActStat::Balanced) => Over::Balanced,
            },
            distort: self.distort,
        };
        CalibConfig { search, balance: self.balance }
    }
}

/// How much runs at once.
#[derive(Debug, Args)]
pub struct LimitArgs {
    /// Samples that run together at most
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub chunk: Option<usize>,
    /// Memory of the calibration beside the model's weights and the embedded samples, e.g. 8GiB
    #[arg(long, value_name = "SIZE")]
    pub max_memory: Option<Size>,
}

/// A bar that follows a calibration.
pub fn bar(quiet: bool) -> impl FnMut(At) {
    let mut shown: Option<(Stage, Progress)> = None;
    move |at: At| {
        if shown.as_ref().is_none_or(|(stage, _)| *stage != at.stage) {
            if let Some((_, bar)) = shown.take() {
                bar.finish();
            }
            let label = match at.stage {
                Stage::Sensitivity => "samples: sensitivity",
                Stage::Search => "layers: search",
            };
            let bar = if quiet { Progress::hidden() } else { Progress::new(at.total as u64, label) };
            bar.start_at(at.done as u64);
            shown = Some((at.stage, bar));
        }
        if let Some((_, bar)) = &shown {
            bar.set(at.done as u64);
            if at.done == at.total {
                bar.finish();
            }
        }
    }
}

impl Calibrate {
    pub fn run(self, quiet: bool) -> Result<()> {
        let config = self.search.config();
        config.check()?;
        let mut opened = Opened::open(&self.model)?;
        // Known before any sample is read.
        check_groups(opened.model.decoder().dims(), &opened.names, &config.search.spec)?;
        std::fs::create_dir_all(&self.out).with_context(|| format!("cannot make {}", self.out.display()))?;
        let interrupt = Interrupt::install()?;
        let batch = {
            let _no_grad = tch::no_grad_guard();
            self.data.batch(&opened.checkpoint, &opened.model, quiet)?
        };
        report(&batch)?;
        let mut progress = bar(quiet);
        let mut running = Running {
            out: Some(&self.out),
            chunk: self.limits.chunk,
            max_memory: self.limits.max_memory.map(|s| s.0 as u64),
            interrupt: &interrupt,
            progress: &mut progress,
        };
        let decoder = opened.model.decoder_mut();
        let found = calibrate(decoder, &opened.names, &batch, &config, &opened.origin, &mut running)?;
        for r in &found.ratios {
            println!(
                "an error on {} weighs {:.3} to {:.3} of one on an answer",
                r.modality,
                least(r),
                most(r)
            );
        }
        println!("{}", self.out.join(SCALES).display());
        println!("{}", self.out.join(REPORT).display());
        Ok(())
    }
}

fn least(r: &mbq::sensitivity::Ratios) -> f64 {
    r.attention.iter().chain(&r.mlp).copied().fold(f64::INFINITY, f64::min)
}

fn most(r: &mbq::sensitivity::Ratios) -> f64 {
    r.attention.iter().chain(&r.mlp).copied().fold(0.0, f64::max)
}

//! `r2r bench`.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use clap::Args;
use nics_base::exit::Usage;
use nics_base::interrupt::Interrupt;
use nics_base::progress::Progress;
use nics_base::row::{self, Row};
use nics_core::checkpoint::{Checkpoint, TensorPath};
use nics_core::cli::{DeviceArgs, JsonArg, SeedArg};
use nics_core::device::{device_name, dtype_name};
use nics_core::models::{self, Decoder, Model};
use nics_core::tch::{Device, Kind};
use r2r::bench::{Costs, Lap, Measured, Race, Spread, Verdict, measure, race};
use r2r::checkpoint::{Official, load};
use r2r::router::{Router, RouterConfig, Storage};
use serde_json::json;

use super::router::StorageArg;

/// Measures what each part of a token costs, predicts the speed-up over the large model alone, and runs the loop.
///
/// One sequence behind a prompt. The prediction is t_L(1) / (t_S + t_R + r t_L(1/r)): the small model's step, the router,
/// and the large model reading 1/r tokens for a share r of them. Says up to which share routing pays, or that it cannot.
#[derive(Args)]
pub struct Bench {
    /// Small model: a preset or config.json (random weights), or a checkpoint's folder or hub id with --checkpoints
    #[arg(long, visible_alias = "slm", value_name = "MODEL", default_value = "qwen3-0.6b")]
    small: String,
    /// Large model, as --small
    #[arg(long, visible_alias = "llm", value_name = "MODEL", default_value = "qwen3-8b")]
    large: String,
    /// Load checkpoints instead of drawing weights
    #[arg(long)]
    checkpoints: bool,
    /// The first N layers of each model alone
    #[arg(long, value_name = "N", conflicts_with = "checkpoints")]
    layers: Option<usize>,
    /// Router: a folder of ours or an official .pt file; default: the paper's with random weights
    #[arg(long, value_name = "PATH")]
    router: Option<PathBuf>,
    /// How the router is kept
    #[arg(long, value_enum, default_value = "int8")]
    storage: StorageArg,
    /// Tokens of the prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    context: usize,
    /// Shares of large-model tokens
    #[arg(long, value_name = "SHARES", value_delimiter = ',', default_value = "0.05,0.125,0.25")]
    rates: Vec<f64>,
    /// Tokens that each contender writes in a turn
    #[arg(long, value_name = "N", default_value_t = 80)]
    tokens: usize,
    /// Turns that count
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// Costs and prediction alone, without running the loop
    #[arg(long)]
    predict_only: bool,
    #[command(flatten)]
    run_on: DeviceArgs,
    #[command(flatten)]
    seed: SeedArg,
    /// File of the result rows
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    json: JsonArg,
}

/// Lengths of the large model's calls that are measured: those of the shares lie between them. Behind 16 rows products of other
/// kernels begin, so there is a step.
const LENGTHS: [usize; 9] = [1, 2, 4, 8, 12, 16, 17, 24, 32];

struct Subject {
    small: Decoder,
    large: Decoder,
    names: [String; 2],
    router: Router,
}

impl Bench {
    pub fn run(self, quiet: bool) -> Result<()> {
        if self.rates.is_empty() || self.rates.iter().any(|r| !(*r > 0.0 && *r <= 1.0)) {
            return Err(
                Usage(format!("--rates is {:?}, expected shares above 0, up to 1", self.rates)).into()
            );
        }
        for (flag, n) in [("--context", self.context), ("--tokens", self.tokens), ("--rounds", self.rounds)] {
            if n == 0 {
                return Err(Usage(format!("{flag} is 0, expected at least 1")).into());
            }
        }
        let threads = self.run_on.set_threads()?;
        let interrupt = Interrupt::install()?;
        let Subject { small, large, names, router } = self.subject()?;
        let laps = if self.predict_only { 0 } else { self.rounds * (1 + self.rates.len()) };
        // The first round of the costs warms up.
        let turns = self.rounds * 4 + 1 + laps;
        let bar = if quiet { Progress::hidden() } else { Progress::new(turns as u64, "turns") };
        let mut each = || {
            bar.inc(1);
            interrupt.check().map_err(r2r::Error::from)
        };
        let what = Measured { context: self.context, lengths: LENGTHS.to_vec(), rounds: self.rounds * 4 };
        let costs = measure(&small, &large, &router, &what, &mut each)?;
        let run = if self.predict_only {
            None
        } else {
            let settings = Race {
                context: self.context,
                tokens: self.tokens,
                rounds: self.rounds,
                seed: self.seed.seed,
            };
            Some(race(&small, &large, &Arc::new(Mutex::new(router)), &self.rates, &settings, &mut each)?)
        };
        bar.finish();
        let place = (device_name(small.dims().device), dtype_name(small.dims().kind));
        self.print(&names, &place, threads, &costs, run.as_ref())?;
        if let Some(out) = &self.out {
            row::write(out, &self.rows(&names, &place, &costs, run.as_ref())?)?;
        }
        Ok(())
    }

    fn model(&self, source: &str, device: Device, seed: u64) -> Result<(Decoder, String)> {
        if self.checkpoints {
            let checkpoint = Checkpoint::open(source)?;
            let kind = self.run_on.dtype.resolve(models::stored_kind(&checkpoint));
            return Ok((models::load(&checkpoint, device, kind)?, checkpoint.name().to_owned()));
        }
        let shape = models::shape(source, self.layers)?;
        let kind = self.run_on.dtype.resolve(shape.kind);
        let model = models::random(shape.config, device, kind, seed)?;
        Ok((model, format!("{} (random weights)", shape.name)))
    }

    fn subject(&self) -> Result<Subject> {
        let device = self.run_on.device.open()?;
        let (small, small_name) = self.model(&self.small, device, self.seed.seed)?;
        let (large, large_name) = self.model(&self.large, device, self.seed.seed.wrapping_add(1))?;
        let storage = Storage::from(self.storage);
        let embedding = Some(&small.embed_tokens);
        let router = match &self.router {
            None => {
                let at = TensorPath::random(self.seed.seed, 0.02, device, Kind::Float);
                Router::load(RouterConfig::paper(small.dims().hidden), &at, embedding, storage)?
            }
            Some(path) if path.is_dir() => load(path, embedding, storage, device)?.0,
            Some(path) => Official::open(path)?.router(embedding, storage, device)?,
        };
        Ok(Subject { small, large, names: [small_name, large_name], router })
    }

    fn print(
        &self,
        names: &[String; 2],
        (device, dtype): &(String, String),
        threads: usize,
        costs: &Costs,
        run: Option<&(Spread, Vec<Lap>)>,
    ) -> Result<()> {
        let predictions =
            self.rates.iter().map(|&rate| costs.predict(rate)).collect::<r2r::Result<Vec<_>>>()?;
        let verdict = costs.verdict();
        if self.json.json {
            let loop_ = run.map(|(alone, laps)| json!({ "large_alone_s": alone, "laps": laps }));
            let said = json!({
                "small": names[0], "large": names[1], "device": device, "dtype": dtype, "threads": threads,
                "context": self.context, "costs": costs, "predictions": predictions, "verdict": verdict,
                "loop": loop_,
            });
            println!("{said}");
            return Ok(());
        }
        println!(
            "{} and {}, {dtype} on {device} ({threads} threads), behind {} tokens",
            names[0], names[1], self.context
        );
        println!("medians in milliseconds (quartiles)");
        let line = |name: &str, s: &Spread, note: &str| {
            println!("{name:<34} {:>9.2} ({:.2} to {:.2}){note}", s.median * 1e3, s.low * 1e3, s.high * 1e3);
        };
        line("small model, a step", &costs.small, "");
        let of_small =
            format!(", {:.0} % of the small model's step", 100.0 * costs.router.median / costs.small.median);
        line("router with its largest logits", &costs.router, &of_small);
        for (tokens, spread) in &costs.large {
            line(&format!("large model, {tokens} token{}", if *tokens == 1 { "" } else { "s" }), spread, "");
        }
        println!();
        println!(
            "{:<8} {:>12} {:>22} {:>30} {:>8}",
            "share", "ms a token", "predicted speed-up", "measured (quartiles)", "off"
        );
        for (i, p) in predictions.iter().enumerate() {
            let measured = run.map(|(_, laps)| {
                let s = laps[i].speed_up;
                let off = 100.0 * (s.median / p.speed_up - 1.0);
                (format!("{:.2} ({:.2} to {:.2})", s.median, s.low, s.high), format!("{off:+.0} %"))
            });
            let (measured, off) = measured.unwrap_or_default();
            println!("{:<8} {:>12.2} {:>22.2} {measured:>30} {off:>8}", p.rate, p.token_s * 1e3, p.speed_up);
        }
        match verdict {
            Verdict::UpTo(rate) => println!(
                "routing is faster than the large model alone while that chooses less than {:.0} % of the tokens",
                100.0 * rate
            ),
            Verdict::Never => println!(
                "routing cannot be faster here: small model and router together take {:.2} ms a token, the large model {:.2}",
                (costs.small.median + costs.router.median) * 1e3,
                costs.large_step() * 1e3
            ),
            Verdict::Always => println!("routing is faster than the large model alone at every share"),
        }
        Ok(())
    }

    fn rows(
        &self,
        names: &[String; 2],
        (device, dtype): &(String, String),
        costs: &Costs,
        run: Option<&(Spread, Vec<Lap>)>,
    ) -> Result<Vec<Row>> {
        let base = Row {
            method: "r2r".into(),
            model: format!("{} + {}", names[0], names[1]),
            dataset: format!("{} tokens before", self.context),
            n: Some(self.rounds as u64),
            seed: Some(self.seed.seed),
            device: device.clone(),
            dtype: dtype.clone(),
            ..Row::default()
        };
        let time = |variant: &str, s: &Spread| Row {
            variant: variant.into(),
            metric: "time".into(),
            value: s.median,
            unit: "s".into(),
            ..base.clone()
        };
        let mut rows = vec![time("small model, a step", &costs.small), time("router", &costs.router)];
        rows.extend(costs.large.iter().map(|(n, s)| Row {
            x: Some(*n as f64),
            x_label: Some("tokens read in a call".into()),
            ..time("large model", s)
        }));
        let speed_up = |variant: &str, rate: f64, value: f64| Row {
            variant: variant.into(),
            metric: "speed-up over the large model".into(),
            value,
            unit: "x".into(),
            higher_is_better: true,
            x: Some(rate),
            x_label: Some("share of large-model tokens".into()),
            ..base.clone()
        };
        for (i, &rate) in self.rates.iter().enumerate() {
            rows.push(speed_up("predicted", rate, costs.predict(rate).context("prediction")?.speed_up));
            if let Some((_, laps)) = run {
                rows.push(speed_up("measured", rate, laps[i].speed_up.median));
            }
        }
        Ok(rows)
    }
}

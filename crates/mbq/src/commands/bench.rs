//! `mbq bench`.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result};
use clap::Args;
use mbq::QuantSpec;
use mbq::bench::{Measured, Protocol, Weights, measure};
use nics_base::exit::Usage;
use nics_base::interrupt::Interrupt;
use nics_base::progress::Progress;
use nics_base::row::{self, Row};
use nics_base::spread::Spread;
use nics_core::cli::{JsonArg, SeedArg};
use nics_core::device::{dtype_name, set_threads};
use nics_core::models;
use nics_core::tch::Kind;
use nics_kernels::packed::Rounding;
use serde_json::json;

/// Measures tokens a second and the peak of memory of a decoder with random weights, its layers dense or packed.
///
/// One sequence behind a prompt. Each way is made, measured and let go before the next, so that the peak is its own; nothing is
/// ever dense of what is packed. Embeddings and head stay in the model's dtype; what the head takes of a token is shown.
/// `cargo xtask bench packed-decode` lets them take turns, beside libtorch.
#[derive(Args)]
pub struct Bench {
    /// Shape: a preset, a config.json or its folder
    #[arg(long, value_name = "SHAPE", default_value = "qwen2-7b")]
    shape: String,
    /// The first N layers alone
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Ways to keep the layers: bf16, f16, f32, or bits and group as w3g128; the first is what the others are held against
    #[arg(long, value_name = "WEIGHTS", value_delimiter = ',', default_value = "bf16,w4g128,w3g128")]
    weights: Vec<Kept>,
    /// Bits that inputs of packed layers are rounded to: 8 or 16
    #[arg(long, value_name = "BITS", default_value_t = 16, value_parser = clap::builder::RangedU64ValueParser::<u8>::new().range(8..=16))]
    act: u8,
    /// Tokens of the prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    context: usize,
    /// Tokens of a round
    #[arg(long, value_name = "N", default_value_t = 16)]
    tokens: usize,
    /// Rounds that count
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// Threads; default: OMP_NUM_THREADS, or all processors
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    #[command(flatten)]
    seed: SeedArg,
    /// File of the result rows
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    json: JsonArg,
}

/// One way to keep the layers.
#[derive(Debug, Clone, Copy)]
enum Kept {
    Dense(Kind),
    Packed(QuantSpec),
}

impl FromStr for Kept {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "bf16" => Ok(Self::Dense(Kind::BFloat16)),
            "f16" => Ok(Self::Dense(Kind::Half)),
            "f32" => Ok(Self::Dense(Kind::Float)),
            _ => {
                let spec: QuantSpec = s.parse().map_err(|e| format!("{e}, or bf16, f16, f32"))?;
                if spec.act_bits.is_some() || !matches!(spec.bits, 2 | 3 | 4 | 8) {
                    return Err(format!(
                        "{s}: there are packed layers of 2, 3, 4 and 8 bits in groups or rows"
                    ));
                }
                Ok(Self::Packed(spec))
            }
        }
    }
}

impl Kept {
    fn name(self, act: u8) -> String {
        match self {
            Self::Dense(kind) => dtype_name(kind),
            Self::Packed(spec) => format!("{spec} A{act}"),
        }
    }
}

/// A way with what was measured of it.
struct Line {
    name: String,
    measured: Measured,
    token: Spread,
    head: Spread,
}

impl Bench {
    pub fn run(self, quiet: bool) -> Result<()> {
        let rounding = match self.act {
            8 => Rounding::A8,
            16 => Rounding::A16,
            other => return Err(Usage(format!("--act is {other}, expected 8 or 16")).into()),
        };
        for (flag, n) in [("--context", self.context), ("--tokens", self.tokens), ("--rounds", self.rounds)] {
            if n == 0 {
                return Err(Usage(format!("{flag} is 0, expected at least 1")).into());
            }
        }
        let threads = set_threads(self.threads)?;
        let interrupt = Interrupt::install()?;
        let shape = models::shape(&self.shape, self.layers)?;
        // Packed layers stand in a model of the dtype of the first dense way.
        let own = self.weights.iter().find_map(|w| match w {
            Kept::Dense(kind) => Some(*kind),
            Kept::Packed(_) => None,
        });
        let own = own.unwrap_or(shape.kind);
        let protocol = Protocol {
            context: self.context,
            tokens: self.tokens,
            rounds: self.rounds,
            seed: self.seed.seed,
        };
        let turns = (self.weights.len() * (self.rounds + 1)) as u64;
        let bar = if quiet { Progress::hidden() } else { Progress::new(turns, "rounds") };
        let mut lines = Vec::new();
        for kept in &self.weights {
            let (kind, weights) = match *kept {
                Kept::Dense(kind) => (kind, Weights::Dense),
                Kept::Packed(spec) => (own, Weights::Packed(spec, rounding)),
            };
            let mut each = || {
                bar.inc(1);
                interrupt.check().map_err(mbq::Error::from)
            };
            let measured = measure(&shape.config, kind, weights, &protocol, &mut each)?;
            let spread = |seconds: &[f64]| Spread::of(seconds).context("there was no round");
            let (token, head) = (spread(&measured.token_s)?, spread(&measured.head_s)?);
            lines.push(Line { name: kept.name(self.act), measured, token, head });
        }
        bar.finish();
        self.print(&shape.name, threads, &lines);
        if let Some(out) = &self.out {
            row::write(out, &self.rows(&shape.name, &lines))?;
        }
        Ok(())
    }

    fn print(&self, shape: &str, threads: usize, lines: &[Line]) {
        if self.json.json {
            for line in lines {
                println!(
                    "{}",
                    json!({
                        "shape": shape, "weights": line.name, "threads": threads, "context": self.context,
                        "tokens_per_s": 1.0 / line.token.median, "token_s": line.token, "head_s": line.head,
                        "prompt_s": line.measured.prompt_s, "peak_rss": line.measured.peak_rss,
                        "bytes": line.measured.bytes, "speed_up": lines[0].token.median / line.token.median,
                    })
                );
            }
            return;
        }
        println!("{shape}, random weights, {threads} threads, behind {} tokens", self.context);
        println!(
            "{:<12} {:>10} {:>24} {:>9} {:>12} {:>10} {:>10} {:>10} {:>10}",
            "weights",
            "tokens/s",
            "ms a token (quartiles)",
            "speed-up",
            "head, ms",
            "layers",
            "head",
            "rest",
            "peak"
        );
        for line in lines {
            let t = line.token;
            let bytes = line.measured.bytes;
            println!(
                "{:<12} {:>10.2} {:>24} {:>9.2} {:>12} {:>10} {:>10} {:>10} {:>10}",
                line.name,
                1.0 / t.median,
                format!("{:.1} ({:.1} to {:.1})", t.median * 1e3, t.low * 1e3, t.high * 1e3),
                lines[0].token.median / t.median,
                format!("{:.1} ({:.0} %)", line.head.median * 1e3, 100.0 * line.head.median / t.median),
                gigabytes(bytes.layers),
                gigabytes(bytes.head),
                gigabytes(bytes.rest),
                line.measured.peak_rss.map_or_else(|| "unknown".into(), gigabytes),
            );
        }
    }

    fn rows(&self, shape: &str, lines: &[Line]) -> Vec<Row> {
        let mut rows = Vec::new();
        for line in lines {
            let mut row = |metric: &str, value: f64, unit: &str, higher_is_better: bool| {
                rows.push(Row {
                    method: "mbq".into(),
                    variant: line.name.clone(),
                    model: format!("{shape} (random weights)"),
                    dataset: format!("{} tokens before", self.context),
                    metric: metric.into(),
                    value,
                    unit: unit.into(),
                    higher_is_better,
                    n: Some(self.rounds as u64),
                    seed: Some(self.seed.seed),
                    device: "cpu".into(),
                    ..Row::default()
                });
            };
            row("tokens per second", 1.0 / line.token.median, "1/s", true);
            row("time of a token", line.token.median, "s", false);
            row("speed-up", lines[0].token.median / line.token.median, "x", true);
            row("share of the head", line.head.median / line.token.median, "", false);
            row("weights", (line.measured.bytes.layers + line.measured.bytes.head) as f64, "bytes", false);
            if let Some(peak) = line.measured.peak_rss {
                row("peak resident memory", peak as f64, "bytes", false);
            }
        }
        rows
    }
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}

//! `pm-kvq bench`.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{ArgGroup, Args};
use nics_base::interrupt::Interrupt;
use nics_base::progress::Progress;
use nics_base::row::{self, Row};
use nics_core::cache::DenseCache;
use nics_core::cli::{DeviceArgs, JsonArg, ModelArgs, SeedArg, at_least_one};
use nics_core::device::{device_name, dtype_name};
use nics_core::models::{self, Decoder, Model, NewTokens, read_last};
use nics_core::seam::{Bytes, KvCache, SeqId};
use pm_kvq::cache::PagedCache;
use serde::Serialize;

use super::cache::Kv;
use super::opened::Opened;
use super::shape::ModelShape;

/// What is measured unless --method says otherwise: the dense cache, and the method at each of its widths.
const METHODS: [&str; 5] = [
    "dense",
    "pm-kvq:init=16,min-bits=16",
    "pm-kvq:init=8,min-bits=8",
    "pm-kvq:init=4,min-bits=4",
    "pm-kvq:init=2,min-bits=2",
];
/// Rows of a prompt that are read in one call.
const CHUNK: usize = 512;

/// Measures decoding with caches at a model's shape: tokens per second and bytes, after a context of a given length.
///
/// Of a checkpoint (--model), or of a config.json with random weights (--random-weights), whose speed is the same. Every cache
/// reads the same context; one run that does not count comes first. Baselines are simulated: their speed says nothing.
#[derive(Args)]
#[command(group(ArgGroup::new("what").required(true).args(["model", "random_weights"])))]
pub struct Measure {
    /// Checkpoint: a folder, or a hub id ORG/NAME or ORG/NAME@REVISION
    #[arg(long, short, value_name = "FOLDER|ID")]
    model: Option<String>,
    /// Model shape: a config.json, a folder with one, or a hub id; its weights are drawn
    #[arg(long, value_name = "FILE|FOLDER|ID")]
    random_weights: Option<String>,
    /// Only so many of its layers
    #[arg(long, value_name = "N", requires = "random_weights", value_parser = at_least_one)]
    layers: Option<usize>,
    #[command(flatten)]
    run_on: DeviceArgs,
    /// Cache to measure, as --kv of the other commands has it; may be given several times
    #[arg(long, value_name = "SPEC")]
    method: Vec<String>,
    /// Tokens that are read before
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, value_parser = at_least_one)]
    context: usize,
    /// Tokens that are timed
    #[arg(long, value_name = "TOKENS", default_value_t = 32, value_parser = at_least_one)]
    tokens: usize,
    /// Sequences at a time
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    batch: usize,
    /// Runs that count
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = at_least_one)]
    repeat: usize,
    #[command(flatten)]
    seed: SeedArg,
    /// File of the result rows
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    json: JsonArg,
}

/// What came of a cache.
#[derive(Serialize)]
struct Found {
    method: String,
    /// Tokens a second, all sequences together: of each run, in order.
    tokens_per_s: Vec<f64>,
    bytes: usize,
    allocated: usize,
}

impl Measure {
    pub fn run(self, quiet: bool) -> Result<()> {
        let names: Vec<String> =
            if self.method.is_empty() { METHODS.map(str::to_owned).to_vec() } else { self.method.clone() };
        let methods = names
            .iter()
            .map(|name| {
                name.parse::<Kv>().map_err(|e| nics_base::exit::Usage(format!("--method {name}: {e}")))
            })
            .collect::<Result<Vec<Kv>, _>>()?;
        let (name, model) = self.subject()?;
        let dims = model.dims().clone();
        let all = self.context + self.tokens;
        if all > dims.context {
            bail!(
                "{} tokens of context and {} to time exceed the model's {}",
                self.context,
                self.tokens,
                dims.context
            );
        }
        let open = |kv: &Kv| -> Result<Box<dyn KvCache>> {
            Ok(match kv {
                Kv::Dense => Box::new(DenseCache::new()),
                Kv::Baseline(baseline) => Box::new(baseline.cache(&dims, &[])?),
                Kv::Paged(config) => Box::new(PagedCache::new(&dims, config)?),
            })
        };
        // What does not fit the model is said before anything is measured.
        for (kv, name) in methods.iter().zip(&names) {
            open(kv).with_context(|| format!("--method {name}"))?;
        }
        let interrupt = Interrupt::install()?;
        let total = (methods.len() * (self.repeat + 1)) as u64;
        let bar = if quiet { Progress::hidden() } else { Progress::new(total, "runs") };
        let mut found = Vec::new();
        for (kv, name) in methods.iter().zip(names) {
            let mut one = Found { method: name, tokens_per_s: Vec::new(), bytes: 0, allocated: 0 };
            for run in 0..=self.repeat {
                let (speed, bytes) = self.once(&model, &mut *open(kv)?, &interrupt)?;
                bar.inc(1);
                if run > 0 {
                    one.tokens_per_s.push(speed);
                    (one.bytes, one.allocated) = (bytes.payload, bytes.allocated);
                }
            }
            one.tokens_per_s.sort_by(f64::total_cmp);
            found.push(one);
        }
        bar.finish();
        let dataset = format!("{} of context, {} at a time", self.context, self.batch);
        let base = Row {
            method: "pm-kvq".into(),
            model: name,
            dataset,
            n: Some(self.repeat as u64),
            seed: Some(self.seed.seed),
            device: device_name(dims.device),
            dtype: dtype_name(dims.kind),
            ..Row::default()
        };
        self.report(&found, &base)
    }

    /// The model and its name in rows.
    fn subject(&self) -> Result<(String, Decoder)> {
        if let Some(model) = &self.model {
            let opened = Opened::open(&ModelArgs { model: model.clone(), run_on: self.run_on.clone() })?;
            return Ok((opened.checkpoint.name().to_owned(), opened.model));
        }
        self.run_on.set_threads()?;
        let mut shape = ModelShape::read(self.random_weights.as_deref().unwrap_or_default())?;
        let mut name = format!("{} (random weights)", shape.name);
        if let Some(layers) = self.layers {
            if layers > shape.config.layers {
                bail!("--layers {layers}: the model has {}", shape.config.layers);
            }
            shape.config.layers = layers;
            shape.config.family.windows.truncate(layers);
            name = format!("{} ({layers} layers, random weights)", shape.name);
        }
        let kind = self.run_on.dtype.resolve(shape.kind);
        let model = models::random(shape.config, self.run_on.device.open()?, kind, self.seed.seed)?;
        Ok((name, model))
    }

    /// Tokens a second of decoding, and the cache's bytes behind it.
    fn once(&self, model: &Decoder, cache: &mut dyn KvCache, interrupt: &Interrupt) -> Result<(f64, Bytes)> {
        let _no_grad = tch::no_grad_guard();
        let vocab = model.dims().vocab as u32;
        // Any id does: a row costs the same whatever it holds.
        let id = |sequence: usize, at: usize| ((sequence * 31 + at * 7) as u32) % vocab;
        let seqs: Vec<SeqId> =
            (0..self.batch).map(|_| cache.open(self.context + self.tokens)).collect::<Result<_, _>>()?;
        for (s, &seq) in seqs.iter().enumerate() {
            let ids: Vec<u32> = (0..self.context).map(|at| id(s, at)).collect();
            for (n, chunk) in ids.chunks(CHUNK).enumerate() {
                interrupt.check()?;
                let _ = read_last(model, cache, &[(seq, n * CHUNK, chunk)])?;
            }
        }
        let start = Instant::now();
        for at in self.context..self.context + self.tokens {
            interrupt.check()?;
            let ids: Vec<u32> = (0..self.batch).map(|s| id(s, at)).collect();
            let new: Vec<NewTokens> =
                seqs.iter().zip(ids.chunks(1)).map(|(&seq, id)| (seq, at, id)).collect();
            let _ = model.logits(&read_last(model, cache, &new)?)?;
        }
        let seconds = start.elapsed().as_secs_f64();
        let bytes = cache.bytes();
        Ok(((self.tokens * self.batch) as f64 / seconds, bytes))
    }

    fn report(&self, found: &[Found], base: &Row) -> Result<()> {
        let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
        if !self.json.json {
            println!("{}, {} on {}; {}", base.model, base.dtype, base.device, base.dataset);
            println!(
                "{:<36} {:>12} {:>20} {:>12} {:>12}",
                "", "tokens/s", "(lowest to highest)", "MiB", "allocated"
            );
        }
        let mut rows = Vec::new();
        for one in found {
            let speeds = &one.tokens_per_s;
            let (low, high) =
                (speeds.first().copied().unwrap_or(f64::NAN), speeds.last().copied().unwrap_or(f64::NAN));
            let median = speeds.get(speeds.len() / 2).copied().unwrap_or(f64::NAN);
            if self.json.json {
                println!("{}", serde_json::to_string(one)?);
            } else {
                let spread = format!("({low:.2} to {high:.2})");
                println!(
                    "{:<36} {median:>12.2} {spread:>20} {:>12.2} {:>12.2}",
                    one.method,
                    mib(one.bytes),
                    mib(one.allocated)
                );
            }
            let row = |metric: &str, value: f64, unit: &str, higher_is_better: bool| Row {
                variant: one.method.clone(),
                metric: metric.into(),
                value,
                unit: unit.into(),
                higher_is_better,
                ..base.clone()
            };
            rows.push(row("decode", median, "tokens/s", true));
            rows.push(row("cache", one.bytes as f64, "bytes", false));
            rows.push(row("cache, allocated", one.allocated as f64, "bytes", false));
        }
        if let Some(out) = &self.out {
            row::write(out, &rows)?;
        }
        Ok(())
    }
}

//! `megrez bench`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::{ArgGroup, Args};
use megrez::Megrez;
use megrez::bench::{ClientRun, Protocol, Run, Spread, Target, measure, measure_server};
use nics_base::interrupt::Interrupt;
use nics_base::progress::Progress;
use nics_base::row::{self, Row};
use nics_core::cli::{DeviceArgs, JsonArg, PluggedModelArgs, PluginArgs, SeedArg, env_key};
use nics_core::device::{device_name, dtype_name};
use nics_core::models::{self, Decoder, Model};
use nics_core::seam::{KvCache, LayerHook};
use serde_json::json;

use super::{Loaded, Plugged};

/// The vendor's figure for Megrez-3B under its own protocol, in reply tokens per second (vLLM, on a GPU).
const VENDOR_TOKENS_PER_S: f64 = 2329.4;

/// Measures speed by the vendor's protocol: 128 tokens in, 128 out, 8 sequences, end tokens ignored.
///
/// Of a checkpoint (--model), of real shapes with random weights (--random-weights), or of a running server as its
/// clients see it (--url, its key in MEGREZ_API_KEY). One run that does not count comes first. Values are medians with
/// the lowest and the highest run.
#[derive(Args)]
#[command(group(ArgGroup::new("what").required(true).args(["model", "random_weights", "url"])))]
pub struct Bench {
    /// Checkpoint: a folder, or a hub id ORG/NAME or ORG/NAME@REVISION
    #[arg(long, short, value_name = "FOLDER|ID")]
    model: Option<String>,
    /// Shapes with random weights: megrez-3b, qwen2.5-0.5b, or a config.json of Llama, Qwen2 or Qwen3
    #[arg(long, value_name = "PRESET|FILE")]
    random_weights: Option<String>,
    /// Server of OpenAI's API, e.g. http://127.0.0.1:8000
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// The server's model; default: the first that it lists
    #[arg(long, value_name = "NAME", requires = "url")]
    served_name: Option<String>,
    #[command(flatten)]
    run_on: DeviceArgs,
    #[command(flatten)]
    plugins: PluginArgs,
    /// Tokens of a prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    input_len: usize,
    /// Tokens of a reply
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    output_len: usize,
    /// Sequences of a run; a server's requests
    #[arg(long, value_name = "N", default_value_t = 8)]
    seqs: usize,
    /// Sequences at a time; a server's concurrent clients; default: all
    #[arg(long, visible_alias = "clients", value_name = "N")]
    batch: Option<usize>,
    /// Runs that count
    #[arg(long, value_name = "N", default_value_t = 3)]
    repeat: usize,
    #[command(flatten)]
    seed: SeedArg,
    /// File of the result rows
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    json: JsonArg,
}

/// What is measured, in words.
struct About {
    model: String,
    variant: String,
    device: String,
    dtype: String,
    threads: usize,
    load_s: f64,
    vendors: bool,
}

impl Bench {
    pub fn run(self, quiet: bool) -> Result<()> {
        let batch = self.batch.unwrap_or(self.seqs);
        let protocol =
            Protocol { input_len: self.input_len, output_len: self.output_len, seqs: self.seqs, batch };
        for (flag, n) in [
            ("--input-len", self.input_len),
            ("--output-len", self.output_len),
            ("--seqs", self.seqs),
            ("--batch", batch),
            ("--repeat", self.repeat),
        ] {
            if n == 0 {
                return Err(nics_base::exit::Usage(format!("{flag} is 0, expected at least 1")).into());
            }
        }
        let interrupt = Interrupt::install()?;
        let rows = if self.url.is_some() {
            self.server(&protocol, quiet, &interrupt)?
        } else {
            self.local(&protocol, quiet, &interrupt)?
        };
        if let Some(out) = &self.out {
            row::write(out, &rows)?;
        }
        Ok(())
    }

    /// Runs `one` once for warming up, then as often as asked.
    fn repeat<T>(
        &self,
        quiet: bool,
        interrupt: &Interrupt,
        mut one: impl FnMut(usize) -> nics_core::Result<T>,
    ) -> Result<Vec<T>> {
        let bar = if quiet { Progress::hidden() } else { Progress::new(self.repeat as u64 + 1, "runs") };
        let mut runs = Vec::new();
        for i in 0..=self.repeat {
            interrupt.check()?;
            let run = one(i)?;
            bar.inc(1);
            if i > 0 {
                runs.push(run);
            }
        }
        bar.finish();
        Ok(runs)
    }

    fn local(&self, protocol: &Protocol, quiet: bool, interrupt: &Interrupt) -> Result<Vec<Row>> {
        let start = Instant::now();
        let mut subject = self.subject(protocol)?;
        let dims = subject.decoder.dims().clone();
        subject.about.load_s = start.elapsed().as_secs_f64();
        let Subject { decoder, cache, hook, prompt, about } = &mut subject;
        let runs = self.repeat(quiet, interrupt, |_| {
            let hook = hook.as_mut().map(|h| &mut **h as &mut dyn LayerHook);
            measure(decoder, &mut **cache, hook, protocol, prompt)
        })?;
        let of = |f: &dyn Fn(&Run) -> f64| spread(&runs, f);
        let rss = runs.iter().map(|r| r.peak_rss.map(|b| b as f64)).collect::<Option<Vec<f64>>>();
        let mut values = vec![
            ("requests", of(&|r| r.requests_per_s)?, "1/s", true),
            ("prefill", of(&|r| r.prefill_per_s)?, "tokens/s", true),
            ("decode", of(&|r| r.decode_per_s)?, "tokens/s", true),
            ("prefill and decode", of(&|r| r.total_per_s)?, "tokens/s", true),
            ("keys and values", of(&|r| r.kv_bytes as f64)?, "bytes", false),
        ];
        values
            .extend(rss.and_then(|rss| Spread::range(&rss)).map(|rss| ("peak memory", rss, "bytes", false)));
        if self.json.json {
            println!(
                "{}",
                json!({ "model": about.model, "variant": about.variant, "device": about.device,
                        "dtype": about.dtype, "threads": about.threads, "load_s": about.load_s,
                        "protocol": protocol, "runs": runs })
            );
        } else {
            println!(
                "{} {} on {} ({} threads){}",
                about.model,
                about.dtype,
                about.device,
                about.threads,
                if about.variant.is_empty() { String::new() } else { format!(", {}", about.variant) }
            );
            println!("loaded in {:.1} s; {} layers of {}", about.load_s, dims.layers, dims.hidden);
        }
        Ok(self.report(protocol, about, values))
    }

    fn server(&self, protocol: &Protocol, quiet: bool, interrupt: &Interrupt) -> Result<Vec<Row>> {
        let target = Target {
            url: self.url.clone().unwrap_or_default(),
            model: self.served_name.clone(),
            key: env_key("MEGREZ_API_KEY"),
            timeout: Duration::from_secs(600),
        };
        let runs = self.repeat(quiet, interrupt, |i| {
            measure_server(&target, protocol, self.seed.seed.wrapping_mul(1000).wrapping_add(i as u64))
        })?;
        let of = |f: &dyn Fn(&ClientRun) -> f64| spread(&runs, f);
        let values = vec![
            ("requests", of(&|r| r.requests_per_s)?, "1/s", true),
            ("tokens of all clients", of(&|r| r.tokens_per_s)?, "tokens/s", true),
            ("time to first token", of(&|r| r.first_token_s.median)?, "s", false),
            ("slowest time to first token", of(&|r| r.first_token_s.high)?, "s", false),
            ("time between tokens", of(&|r| r.between_tokens_s.median)?, "s", false),
        ];
        let about = About {
            model: self.served_name.clone().unwrap_or_else(|| target.url.clone()),
            variant: format!("server, {} clients", protocol.batch),
            device: String::new(),
            dtype: String::new(),
            threads: 0,
            load_s: 0.0,
            vendors: false,
        };
        if self.json.json {
            println!("{}", json!({ "url": target.url, "protocol": protocol, "runs": runs }));
        } else {
            println!("{} with {} clients", target.url, protocol.batch);
        }
        Ok(self.report(protocol, &about, values))
    }

    /// Prints the values for people, and makes rows of them.
    fn report(
        &self,
        protocol: &Protocol,
        about: &About,
        values: Vec<(&str, Spread, &str, bool)>,
    ) -> Vec<Row> {
        let Protocol { input_len, output_len, seqs, batch } = protocol;
        let dataset = format!("{input_len} in, {output_len} out, {seqs} sequences, {batch} at a time");
        if !self.json.json {
            println!("{dataset}; median of {} (lowest to highest)", self.repeat);
        }
        let mut rows = Vec::new();
        for (metric, spread, unit, higher_is_better) in values {
            if !self.json.json {
                let (shown, unit) = if unit == "bytes" {
                    (spread.scaled(1.0 / f64::from(1 << 20)), "MiB")
                } else if unit == "s" {
                    (spread.scaled(1e3), "ms")
                } else {
                    (spread, unit)
                };
                println!(
                    "{metric:<28} {:>12.2} {unit:<9} ({:.2} to {:.2})",
                    shown.median, shown.low, shown.high
                );
            }
            let own = about.vendors && *protocol == Protocol::default();
            rows.push(Row {
                method: "megrez".into(),
                variant: about.variant.clone(),
                preset: if about.vendors { "paper" } else { "" }.into(),
                model: about.model.clone(),
                dataset: dataset.clone(),
                metric: metric.into(),
                value: spread.median,
                unit: unit.into(),
                higher_is_better,
                n: Some(self.repeat as u64),
                seed: Some(self.seed.seed),
                device: about.device.clone(),
                dtype: about.dtype.clone(),
                paper: (own && metric == "decode").then_some(VENDOR_TOKENS_PER_S),
                ..Row::default()
            });
        }
        rows
    }

    /// The model, its cache and a prompt.
    fn subject(&self, protocol: &Protocol) -> Result<Subject> {
        if let Some(model) = &self.model {
            let args = PluggedModelArgs {
                model: Some(model.clone()),
                run_on: self.run_on.clone(),
                plugins: self.plugins.clone(),
            };
            let threads = self.run_on.set_threads()?;
            let loaded = Loaded::open(&args)?;
            let (device, dtype) = loaded.place();
            let Loaded { megrez: Megrez { decoder, prompter, name, .. }, cache, hook, variant, .. } = loaded;
            // The vendor's prompt; how many tokens it has depends on the tokenizer.
            let prompt = prompter.tokenizer.encode(&"hi".repeat(protocol.input_len.max(2) - 1), false)?;
            let vendors = decoder.dims().hidden == 2560 && decoder.dims().layers == 32;
            let about = About { model: name, variant, device, dtype, threads, load_s: 0.0, vendors };
            return Ok(Subject { decoder, cache, hook, prompt, about });
        }
        let source = self.random_weights.as_deref().unwrap_or_default();
        let threads = self.run_on.set_threads()?;
        let models::Shape { config, kind: stored, .. } = models::shape(source, None)?;
        let device = self.run_on.device.open()?;
        let kind = self.run_on.dtype.resolve(stored);
        let mut decoder = models::random(config, device, kind, self.seed.seed)?;
        let Plugged { cache, hook, variant } = Plugged::into(&mut decoder, &self.plugins, false)?;
        let about = About {
            model: format!("{source} (random weights)"),
            variant,
            device: device_name(device),
            dtype: dtype_name(kind),
            threads,
            load_s: 0.0,
            vendors: source == "megrez-3b",
        };
        // Any id does: every row of the table costs the same.
        let prompt = vec![(decoder.dims().vocab - 1).min(100) as u32];
        Ok(Subject { decoder, cache, hook, prompt, about })
    }
}

/// A value of each run, from the lowest to the highest.
fn spread<R>(runs: &[R], value: &dyn Fn(&R) -> f64) -> Result<Spread> {
    let values: Vec<f64> = runs.iter().map(value).collect();
    Spread::range(&values).ok_or_else(|| anyhow::anyhow!("no run"))
}

struct Subject {
    decoder: Decoder,
    cache: Box<dyn KvCache>,
    hook: Option<Box<dyn LayerHook>>,
    prompt: Vec<u32>,
    about: About,
}

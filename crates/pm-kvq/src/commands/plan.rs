//! `pm-kvq plan`.

use anyhow::{Result, bail};
use clap::Args;
use nics_base::exit::Usage;
use nics_core::cli::{JsonArg, Size, at_least_one};
use nics_core::device::{DtypeSpec, dtype_name};
use nics_core::models::ModelDims;
use pm_kvq::Bits;
use pm_kvq::budget::{Schedule, schedule};
use pm_kvq::cache::CacheConfig;
use pm_kvq::ledger::Rules;
use serde::Serialize;

use super::cache::{CacheArgs, Kv, with_widths};
use super::shape::ModelShape;

/// Foretells what a budget leads to, from a model's config.json: no weights are read.
///
/// For every kind of layer: at how many tokens each width begins, the bits that a value has in the mean, where the budget ends,
/// and the memory at its peak and averaged over the tokens. Then the same for the whole model and for a batch.
#[derive(Args)]
pub struct Plan {
    /// Model: a config.json, a folder with one, or a hub id ORG/NAME or ORG/NAME@REVISION
    #[arg(long, short, value_name = "FILE|FOLDER|ID")]
    model: String,
    #[command(flatten)]
    cache: CacheArgs,
    /// Tokens of the prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 150)]
    prompt_len: usize,
    /// Tokens of prompt and reply together; default: --max-len, that of --budgets, else the model's context
    #[arg(long, value_name = "TOKENS", value_parser = at_least_one)]
    tokens: Option<usize>,
    /// Sequences at a time
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    batch: usize,
    /// Memory that there is for caches: says how many sequences fit
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,
    /// What the model computes in: bf16, f16, f32, or auto (as its configuration says)
    #[arg(long, value_name = "DTYPE", default_value_t = DtypeSpec::Auto)]
    dtype: DtypeSpec,
    #[command(flatten)]
    json: JsonArg,
}

/// Layers of the same rules.
#[derive(Serialize)]
struct Group {
    /// Their numbers, from 0.
    layers: Vec<usize>,
    /// The lowest width.
    min_bits: Bits,
    /// Bytes that each may take.
    budget: Option<u64>,
    #[serde(flatten)]
    schedule: Schedule,
}

/// All that is foretold.
#[derive(Serialize)]
struct Forecast<'a> {
    model: &'a str,
    dtype: String,
    settings: &'a CacheConfig,
    layers: usize,
    kv_heads: i64,
    head_dim: i64,
    prompt_len: usize,
    tokens: usize,
    groups: Vec<Group>,
    /// Tokens at which the first layer is full; none: all of them fit.
    exhausted_at: Option<usize>,
    /// Bytes of a sequence at its peak: codes and exact values, then scales and zeros too.
    peak_payload: usize,
    peak_bytes: usize,
    /// Averaged over the tokens after the prompt.
    mean_bytes: f64,
    /// Bytes of the tokens that fit, kept as they are; and averaged.
    dense_bytes: usize,
    dense_mean_bytes: f64,
    batch: usize,
    batch_peak_bytes: usize,
    batch_dense_bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<usize>,
    /// Sequences that fit `memory`, and those that would fit as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    sequences: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dense_sequences: Option<usize>,
}

impl Plan {
    pub fn run(self) -> Result<()> {
        let Kv::Paged(mut settings) = self.cache.kv()? else {
            return Err(
                Usage("plan foretells what pm-kvq does: give its settings, or --preset".into()).into()
            );
        };
        let shape = ModelShape::read(&self.model)?;
        let dims = shape.dims(self.dtype.resolve(shape.kind));
        let mut tokens = self.tokens.or(settings.max_len);
        if let Some(path) = &self.cache.budgets {
            let widths = super::widths_of(path, dims.layers)?;
            with_widths(&mut settings, &widths);
            tokens = tokens.or(Some(widths.max_len));
        }
        let tokens = tokens.unwrap_or(dims.context);
        if tokens < self.prompt_len {
            bail!("the prompt has {} tokens, more than the {tokens} in all", self.prompt_len);
        }
        let forecast = self.forecast(&shape.name, &dims, &settings, tokens)?;
        if self.json.json {
            println!("{}", serde_json::to_string(&forecast)?);
        } else {
            forecast.print();
        }
        Ok(())
    }

    fn forecast<'a>(
        &self,
        model: &'a str,
        dims: &ModelDims,
        settings: &'a CacheConfig,
        tokens: usize,
    ) -> Result<Forecast<'a>> {
        let rules = settings.rules(dims)?;
        let mut kinds: Vec<(&Rules, Vec<usize>)> = Vec::new();
        for (layer, own) in rules.iter().enumerate() {
            match kinds.iter_mut().find(|(rules, _)| *rules == own) {
                Some((_, layers)) => layers.push(layer),
                None => kinds.push((own, vec![layer])),
            }
        }
        // A sequence ends where its first layer does.
        let mut groups = Vec::with_capacity(kinds.len());
        for (rules, layers) in &kinds {
            let schedule = schedule(rules, self.prompt_len, tokens)?;
            let (min_bits, budget) = (rules.floor, rules.budget);
            groups.push(Group { layers: layers.clone(), min_bits, budget, schedule });
        }
        let exhausted_at = groups.iter().filter_map(|g| g.schedule.exhausted_at).min();
        if let Some(end) = exhausted_at {
            for (group, (rules, _)) in groups.iter_mut().zip(&kinds) {
                group.schedule = schedule(rules, self.prompt_len.min(end - 1), end - 1)?;
                if group.schedule.exhausted_at.is_none() {
                    // Of those that end there, it is said once more.
                    let longer = schedule(rules, 0, end)?;
                    group.schedule.exhausted_at = longer.exhausted_at;
                }
            }
        }
        let sum = |of: &dyn Fn(&Schedule) -> f64| -> f64 {
            groups.iter().map(|g| of(&g.schedule) * g.layers.len() as f64).sum()
        };
        let peak_payload = sum(&|s| s.peak_payload as f64) as usize;
        let peak_bytes = sum(&|s| s.peak_bytes as f64) as usize;
        let mean_bytes = sum(&|s| s.mean_bytes);
        let row = 2 * (dims.kv_heads * dims.head_dim) as usize * dims.kind.elt_size_in_bytes();
        let reached = exhausted_at.map_or(tokens, |end| end - 1);
        let dense_bytes = row * reached * dims.layers;
        let dense_mean_bytes =
            row as f64 * dims.layers as f64 * (self.prompt_len.max(1) + reached) as f64 / 2.0;
        let memory = self.memory.map(|m| m.0);
        Ok(Forecast {
            model,
            dtype: dtype_name(dims.kind),
            settings,
            layers: dims.layers,
            kv_heads: dims.kv_heads,
            head_dim: dims.head_dim,
            prompt_len: self.prompt_len,
            tokens,
            exhausted_at,
            peak_payload,
            peak_bytes,
            mean_bytes,
            dense_bytes,
            dense_mean_bytes,
            batch: self.batch,
            batch_peak_bytes: peak_bytes * self.batch,
            batch_dense_bytes: dense_bytes * self.batch,
            memory,
            sequences: memory.map(|m| m / peak_bytes.max(1)),
            dense_sequences: memory.map(|m| m / dense_bytes.max(1)),
            groups,
        })
    }
}

impl Forecast<'_> {
    fn print(&self) {
        println!(
            "{}: {} layers of {} key/value heads of {} channels, {}; {} tokens, {} of them the prompt",
            self.model, self.layers, self.kv_heads, self.head_dim, self.dtype, self.tokens, self.prompt_len
        );
        for group in &self.groups {
            let Schedule { stages, exhausted_at, reached, .. } = &group.schedule;
            let budget = group.budget.map_or("no budget".into(), |b| format!("{} each", mib(b as f64)));
            println!("\nlayers {}: {budget}, down to {} bits", runs(&group.layers), group.min_bits.get());
            println!("{:>10}  {:>8}  {:>12}", "from token", "lowest", "bits a value");
            // Page by page, widths go up and down with every block: what counts is when one is reached first.
            let mut lowest = None;
            for stage in stages {
                if lowest.is_none_or(|lowest| stage.narrowest < lowest) {
                    lowest = Some(stage.narrowest);
                    println!("{:>10}  {:>8}  {:>12.2}", stage.tokens, stage.narrowest.get(), stage.mean_bits);
                }
            }
            let bits = stages.last().map_or(0.0, |stage| stage.mean_bits);
            match exhausted_at {
                Some(at) => println!("{at:>10}  the budget is full"),
                None => println!("{reached:>10}  {:>8}  {bits:>12.2}", "end"),
            }
        }
        println!("\n{:<34} {:>12} {:>12} {:>12}", "", "pm-kvq", "as they are", "share");
        let line = |name: &str, own: f64, dense: f64| {
            println!("{name:<34} {:>12} {:>12} {:>11.1} %", mib(own), mib(dense), 100.0 * own / dense);
        };
        let dense = self.dense_bytes as f64;
        line("a sequence, codes and exact values", self.peak_payload as f64, dense);
        line("a sequence, at its peak", self.peak_bytes as f64, dense);
        line("a sequence, mean over its tokens", self.mean_bytes, self.dense_mean_bytes);
        if self.batch > 1 {
            let name = format!("{} sequences, at their peak", self.batch);
            line(&name, self.batch_peak_bytes as f64, self.batch_dense_bytes as f64);
        }
        if let (Some(memory), Some(own), Some(dense)) = (self.memory, self.sequences, self.dense_sequences) {
            println!("{} hold {own} sequences; as they are {dense}", mib(memory as f64));
        }
        if let Some(end) = self.exhausted_at {
            println!("a sequence ends before token {end}: the budget of a layer is then full");
        }
    }
}

fn mib(bytes: f64) -> String {
    format!("{:.2} MiB", bytes / f64::from(1 << 20))
}

/// `0-3, 7`.
fn runs(layers: &[usize]) -> String {
    let mut text: Vec<String> = Vec::new();
    for run in layers.chunk_by(|a, b| a + 1 == *b) {
        text.push(match run {
            [one] => one.to_string(),
            [first, .., last] => format!("{first}-{last}"),
            [] => String::new(),
        });
    }
    text.join(", ")
}

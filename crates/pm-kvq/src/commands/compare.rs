//! `pm-kvq compare`.

mod table;

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use nics_base::exit::Usage;
use nics_base::hash;
use nics_base::interrupt::Interrupt;
use nics_base::jsonl::JsonlLog;
use nics_base::progress::Progress;
use nics_base::row;
use nics_core::cache::DenseCache;
use nics_core::cli::{JsonArg, ModelArgs, PromptArgs, SamplingArgs, SeedArg, at_least_one};
use nics_core::generate::{Generator, collect};
use nics_core::models::{Model, ModelDims};
use nics_core::tch::Tensor;
use pm_kvq::Bits;
use pm_kvq::answers::{Judging, equal, extract};
use pm_kvq::baselines::channel_orders;
use pm_kvq::cache::{CacheConfig, PagedCache};
use pm_kvq::calibrate::artefact::read_scales;
use pm_kvq::calibrate::{Cut, Origin, Samples, Scaled, Scales};
use pm_kvq::compare::{Measured, Rival, Text, lockstep, matched};
use pm_kvq::watch::Watched;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::cache::Kv;
use super::opened::Opened;

/// What is compared unless --method says otherwise: everyday formats, the paper's rivals, and the method.
const METHODS: [&str; 15] = [
    "q8_0",
    "fp8",
    "q4_0",
    "q4_0+rotation",
    "hf-int4",
    "rtn-4",
    "kivi-4",
    "mikv-4",
    "pm-kvq:preset=official,min-bits=4",
    "pm-kvq:preset=tuned,min-bits=4",
    "rtn-2",
    "kivi-2",
    "rotatekv-2",
    "pm-kvq:preset=official,min-bits=2",
    "pm-kvq:preset=tuned,min-bits=2",
];

/// Compares caches on the same model, prompts and seeds: memory, and how far each is from keys and values kept as they are.
///
/// The dense cache writes a reply to each prompt; then every cache reads it, and its probabilities are held against the dense
/// ones token by token. A setting of pm-kvq without a budget gets that for the tokens of prompt and reply at its lowest width. A
/// second table gives pm-kvq, by the rules of the last of its settings, as much memory, averaged over the tokens, as each other
/// cache took; one that took less than those rules can is left out of it.
///
/// Prompts attend exactly in all methods but rtn-pre, everyday formats and rotatekv. Baselines are simulated: their bytes are
/// those of their format, their speed is not. Each prompt is a line of OUT/items.jsonl, and a second run goes on with what is
/// missing; figures are OUT/rows.jsonl.
///
/// A line of the prompts may hold the right `answer`: then every cache also writes a reply of its own, with a budget for prompt
/// and --max-new-tokens, and the share of replies with the right answer is told (what is in \boxed{}, else behind "answer is").
/// Benchmarks, and several replies a problem, are `pm-kvq eval --kv ...`.
#[derive(Args)]
pub struct Compare {
    #[command(flatten)]
    model: ModelArgs,
    /// Cache to compare, as --kv of the other commands has it; may be given several times; default: the usual ones
    #[arg(long, value_name = "SPEC")]
    method: Vec<Method>,
    /// Key scales of `pm-kvq calibrate`, for pm-kvq alone
    #[arg(long, value_name = "FILE")]
    scales: Option<PathBuf>,
    /// Texts to order RotateKV's channels by (.jsonl, text, .safetensors); without, they stay in their order
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    seed: SeedArg,
    #[command(flatten)]
    prompts: PromptArgs,
    /// Continue the prompts as they are, without the chat template
    #[arg(long)]
    raw: bool,
    /// Tokens of a reply whose divergence is averaged
    #[arg(long, value_name = "TOKENS", default_value_t = 1000, value_parser = at_least_one)]
    bin: usize,
    /// Leave out the second table, which takes as long again
    #[arg(long)]
    no_equal_average: bool,
    /// Name of the experiment's preset in result rows
    #[arg(long, value_name = "TEXT", default_value = "")]
    label_preset: String,
    /// Folder of the results
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
    #[command(flatten)]
    json: JsonArg,
}

/// A cache by its name.
#[derive(Debug, Clone)]
struct Method {
    name: String,
    kv: Kv,
}

impl std::str::FromStr for Method {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(Self { name: text.to_owned(), kv: text.parse()? })
    }
}

/// A prompt that is done.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Item {
    /// Of everything that the figures depend on beside the prompt.
    settings: String,
    index: usize,
    prompt_hash: String,
    prompt_tokens: usize,
    reply_tokens: usize,
    /// The dense cache first.
    measured: Vec<Measured>,
    /// The method with as much memory in the mean as a cache of `measured`, by whose name it goes.
    matched: Vec<Measured>,
}

/// Whether the answer of a reply is the right one.
fn is_right(reply: &str, answer: &str) -> bool {
    equal(Judging::Strict, Some(&extract(reply)), Some(answer))
}

/// What caches are made from.
struct Kit {
    dims: ModelDims,
    orders: Vec<Tensor>,
    scales: Option<Scales>,
}

impl Compare {
    pub fn run(self, quiet: bool) -> Result<()> {
        let lines = self.prompts.lines()?;
        let opened = Opened::open(&self.model)?;
        let sampling = opened.sampling(&self.sampling)?;
        let max_new_tokens = self.sampling.max_new_tokens.unwrap_or(1024);
        let prompts = opened.encode_all(&lines, self.raw)?;
        let answers: Vec<&Option<String>> = lines.iter().map(|line| &line.answer).collect();
        if answers.iter().any(|answer| answer.is_some()) {
            opened.tokenizer()?;
        }
        let kit = self.kit(&opened)?;
        let methods = self.methods(&kit, quiet)?;
        let settings = self.settings(&opened, &methods, &answers, max_new_tokens)?;
        std::fs::create_dir_all(&self.out)?;
        let path = self.out.join("items.jsonl");
        let (mut log, mut items) = JsonlLog::<Item>::open(&path)?;
        for item in &items {
            let same = prompts.get(item.index).is_some_and(|p| hash::tokens(p) == item.prompt_hash);
            if !same || item.settings != settings {
                bail!(
                    "{} holds results of other settings or prompts (index {}): give another --out, or delete it",
                    path.display(),
                    item.index
                );
            }
        }
        let interrupt = Interrupt::install()?;
        for (index, prompt) in prompts.iter().enumerate() {
            if items.iter().any(|item| item.index == index) {
                continue;
            }
            interrupt.check()?;
            let seed = self.seed.seed.wrapping_add(index as u64);
            let request = opened.request(prompt, &sampling, seed, max_new_tokens);
            let mut dense = DenseCache::new();
            let reply = collect(&mut Generator::new(&opened.model, &mut dense), [request], 1)?;
            let reply = reply.into_iter().next().unwrap_or_default();
            let mut item =
                self.measure(&opened, &kit, &methods, (index, prompt, &reply), &settings, &interrupt, quiet)?;
            if let Some(answer) = &lines[index].answer {
                let request = || opened.request(prompt, &sampling, seed, max_new_tokens);
                let is_right = |reply: &[u32]| -> Result<bool> {
                    Ok(is_right(&opened.tokenizer()?.decode(reply, true)?, answer))
                };
                let bar = Progress::new(methods.len() as u64, format!("prompt {}, replies", index + 1));
                let bar = if quiet { Progress::hidden() } else { bar };
                item.measured[0].right = Some(is_right(&reply)?);
                for (method, measured) in methods.iter().zip(&mut item.measured[1..]) {
                    interrupt.check()?;
                    let mut cache = kit.rival(method, prompt.len() + max_new_tokens)?.cache;
                    let own = collect(&mut Generator::new(&opened.model, &mut *cache), [request()], 1)?;
                    measured.right = Some(is_right(own.first().map_or(&[], Vec::as_slice))?);
                    bar.inc(1);
                }
                bar.finish();
            }
            log.append(&item)?;
            items.push(item);
        }
        items.sort_by_key(|item| item.index);
        let rows = table::rows(&items, self.bin, &self.base(&opened));
        row::write(self.out.join("rows.jsonl"), &rows)?;
        if self.json.json {
            for row in &rows {
                println!("{}", serde_json::to_string(row)?);
            }
        } else {
            table::print(&items, self.bin);
        }
        Ok(())
    }

    fn kit(&self, opened: &Opened) -> Result<Kit> {
        let dims = opened.model.dims().clone();
        let orders = match &self.data {
            None => Vec::new(),
            Some(path) => {
                let cut = Cut { samples: 8, seq_len: 512.min(dims.context), ..Cut::default() };
                let samples = Samples::from_file(path, opened.maybe_tokenizer(), cut)?;
                let _no_grad = tch::no_grad_guard();
                channel_orders(&opened.model, &samples)?
            }
        };
        let scales = match &self.scales {
            None => None,
            Some(path) => Some(read_scales(path, &Origin::of(&opened.checkpoint)?, &dims)?.0),
        };
        Ok(Kit { dims, orders, scales })
    }

    /// The caches that the model can have; of the usual ones those that do not fit its heads are left out.
    fn methods(&self, kit: &Kit, quiet: bool) -> Result<Vec<Method>> {
        if !self.method.is_empty() {
            if self.method.iter().any(|m| m.kv == Kv::Dense) {
                return Err(Usage("--method dense: the dense cache is always there".into()).into());
            }
            for method in &self.method {
                kit.rival(method, 1)?;
            }
            return Ok(self.method.clone());
        }
        let mut methods = Vec::new();
        for name in METHODS {
            let method: Method = name.parse().map_err(|e: String| Usage(e))?;
            match kit.rival(&method, 1) {
                Ok(_) => methods.push(method),
                Err(e) if !quiet => eprintln!("{name} is left out: {e}"),
                Err(_) => {}
            }
        }
        Ok(methods)
    }

    #[allow(clippy::too_many_arguments)] // All of them are the run's.
    fn measure(
        &self,
        opened: &Opened,
        kit: &Kit,
        methods: &[Method],
        (index, prompt, reply): (usize, &[u32], &[u32]),
        settings: &str,
        interrupt: &Interrupt,
        quiet: bool,
    ) -> Result<Item> {
        let tokens = prompt.len() + reply.len();
        let text = Text { prompt, reply };
        let bar = |label: &str| {
            let label = format!("prompt {}, {label}", index + 1);
            if quiet { Progress::hidden() } else { Progress::new(reply.len() as u64, label) }
        };
        let read = |mut rivals: Vec<Rival>, label: &str| -> Result<Vec<Measured>> {
            let bar = bar(label);
            let all =
                lockstep(&opened.model, text, &mut rivals, self.bin, interrupt, &mut |n| bar.set(n as u64))?;
            bar.finish();
            Ok(all)
        };
        let rivals = methods.iter().map(|method| kit.rival(method, tokens)).collect::<Result<_>>()?;
        let measured = read(rivals, "caches")?;
        let mut equal = Vec::new();
        // Sink, window and rules of the last setting of pm-kvq, down to 2 bits.
        let base = methods.iter().rev().find_map(|method| match &method.kv {
            Kv::Paged(config) => Some((**config).clone()),
            _ => None,
        });
        let base = CacheConfig { min_bits: vec![Bits::B2], ..base.unwrap_or_default() };
        if !self.no_equal_average {
            for (method, own) in methods.iter().zip(&measured[1..]) {
                if matches!(method.kv, Kv::Paged(_)) {
                    continue;
                }
                let found = matched(&base, &kit.dims, prompt.len(), reply.len(), own.mean_bytes)?;
                if let Some(config) = found {
                    equal.push(kit.paged(&method.name, &config)?);
                }
            }
        }
        let matched = if equal.is_empty() { Vec::new() } else { read(equal, "equal averages")?.split_off(1) };
        Ok(Item {
            settings: settings.to_owned(),
            index,
            prompt_hash: hash::tokens(prompt),
            prompt_tokens: prompt.len(),
            reply_tokens: reply.len(),
            measured,
            matched,
        })
    }

    /// A hash of what decides the figures beside the prompts.
    fn settings(
        &self,
        opened: &Opened,
        methods: &[Method],
        answers: &[&Option<String>],
        max_new_tokens: usize,
    ) -> Result<String> {
        let file = |path: &Option<PathBuf>| path.as_ref().map(hash::file).transpose();
        let (device, dtype) = opened.place();
        let said = json!({
            "weights": opened.checkpoint.weights_hash()?, "device": device, "dtype": dtype, "bin": self.bin,
            "methods": methods.iter().map(|m| m.name.as_str()).collect::<Vec<_>>(),
            "scales": file(&self.scales)?, "data": file(&self.data)?, "seed": self.seed.seed,
            "sampling": format!("{:?}", self.sampling), "max_new_tokens": max_new_tokens,
            "equal_average": !self.no_equal_average, "answers": answers,
        });
        Ok(hash::value(&said)?[..16].to_owned())
    }

    fn base(&self, opened: &Opened) -> row::Row {
        let (device, dtype) = opened.place();
        row::Row {
            method: "pm-kvq".into(),
            preset: self.label_preset.clone(),
            model: opened.checkpoint.name().to_owned(),
            seed: Some(self.seed.seed),
            device,
            dtype,
            ..row::Row::default()
        }
    }
}

impl Kit {
    fn rival(&self, method: &Method, tokens: usize) -> Result<Rival> {
        match &method.kv {
            Kv::Dense => {
                Ok(Rival { name: method.name.clone(), cache: Box::new(DenseCache::new()), log: None })
            }
            Kv::Baseline(baseline) => Ok(Rival {
                name: method.name.clone(),
                cache: Box::new(baseline.cache(&self.dims, &self.orders)?),
                log: None,
            }),
            Kv::Paged(config) => {
                let mut config = (**config).clone();
                if config.budgets.is_empty() && config.budget.is_none() && config.max_len.is_none() {
                    config.max_len = Some(tokens);
                }
                self.paged(&method.name, &config)
            }
        }
    }

    fn paged(&self, name: &str, config: &CacheConfig) -> Result<Rival> {
        let cache = PagedCache::new(&self.dims, config)?;
        let cache = Watched::new(cache, self.dims.layers, PagedCache::stats);
        let log = Some(cache.log());
        let name = name.to_owned();
        Ok(match &self.scales {
            None => Rival { name, cache: Box::new(cache), log },
            Some(scales) => {
                Rival { name, cache: Box::new(Scaled::new(Box::new(cache), scales, &self.dims)?), log }
            }
        })
    }
}

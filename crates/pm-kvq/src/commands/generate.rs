//! `pm-kvq generate`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use nics_base::hash;
use nics_base::interrupt::Interrupt;
use nics_base::progress::Progress;
use nics_core::cli::{ModelArgs, OutArg, PromptArgs, Replies, SamplingArgs, SeedArg, at_least_one};
use nics_core::generate::{Generator, Request, run as generate};
use nics_core::text::TextStream;
use pm_kvq::watch::Held;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::cache::CacheArgs;
use super::opened::{Kept, Opened};

/// Replies to prompts, written with a cache that steps down in width.
///
/// Prompts come from --prompt, from a text file (the whole file is one prompt), or from JSON Lines with one of `prompt`
/// (text), `messages` (a conversation) or `ids` (token ids) on each line, and an optional `id`. One prompt's reply is printed as
/// it is written, and what its cache took is said on stderr; several replies are JSON Lines. With --out they are appended to
/// the file as they are finished, and a second run goes on with what is missing.
#[derive(Args)]
pub struct Generate {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    cache: CacheArgs,
    /// Key scales of `pm-kvq calibrate`
    #[arg(long, value_name = "FILE")]
    scales: Option<PathBuf>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    seed: SeedArg,
    #[command(flatten)]
    out: OutArg,
    #[command(flatten)]
    prompts: PromptArgs,
    /// Continue the prompts as they are, without the chat template
    #[arg(long)]
    raw: bool,
    /// Print JSON Lines for a single prompt, too
    #[arg(long)]
    json: bool,
    /// Prompts that are written together
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = at_least_one)]
    batch: usize,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Reply {
    index: usize,
    id: Value,
    /// By which a later run knows that a reply is to the same prompt.
    prompt_hash: String,
    text: String,
    tokens: Vec<u32>,
    /// `eos`, `stop`, `length`, `context`, or `cache_exhausted` where the budget ended it.
    finish: String,
    /// Its cache at the end.
    cache: Option<Held>,
}

impl Generate {
    pub fn run(self, quiet: bool) -> Result<()> {
        let lines = self.prompts.lines()?;
        self.cache.kv()?;
        let mut opened = Opened::open(&self.model)?;
        let sampling = opened.sampling(&self.sampling)?;
        let max_new_tokens = self.sampling.max_new_tokens.unwrap_or(1024);
        let prompts = opened.encode_all(&lines, self.raw)?;
        let Kept { mut cache, log: seen } = opened.cache(&self.cache, self.scales.as_deref())?;
        let Replies { mut log, done, todo } =
            Replies::open(self.out.out.as_deref(), &prompts, |r: &Reply| (r.index, &r.prompt_hash))?;
        let requests: Vec<Request> = todo
            .iter()
            .map(|&i| {
                let seed = self.seed.seed.wrapping_add(i as u64);
                opened.request(&prompts[i], &sampling, seed, max_new_tokens)
            })
            .collect();
        // A single reply is shown as it comes.
        let live = prompts.len() == 1 && log.is_none() && !self.json && opened.maybe_tokenizer().is_some();
        let progress =
            if quiet || live { Progress::hidden() } else { Progress::new(prompts.len() as u64, "replies") };
        progress.start_at(done as u64);
        let interrupt = Interrupt::install()?;
        let mut states: Vec<Option<(Option<TextStream>, Reply)>> = todo
            .iter()
            .map(|&i| {
                let stream = opened.maybe_tokenizer().map(|t| TextStream::new(t, &self.sampling.stop));
                let reply = Reply {
                    index: i,
                    id: lines[i].id.clone().unwrap_or_else(|| i.into()),
                    prompt_hash: hash::tokens(&prompts[i]),
                    text: String::new(),
                    tokens: Vec::new(),
                    finish: String::new(),
                    cache: None,
                };
                Some((stream, reply))
            })
            .collect();
        let mut generator = Generator::new(&opened.model, &mut *cache);
        let mut finished: Vec<Reply> = Vec::new();
        generate(&mut generator, requests, self.batch, &mut |n, token| {
            interrupt.check()?;
            let Some((stream, reply)) = &mut states[n] else { return Ok(false) };
            reply.tokens.push(token.token);
            let mut text = String::new();
            let mut stopped = false;
            if let Some(stream) = stream {
                text += &stream.push(token.token)?;
                stopped = stream.stopped().is_some();
                if token.finish.is_some() || stopped {
                    text += &stream.finish()?;
                }
            }
            if live {
                let mut stdout = std::io::stdout().lock();
                let shown = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
                shown
                    .map_err(|e| nics_core::Error::Input(format!("cannot write to standard output: {e}")))?;
            }
            reply.text += &text;
            if token.finish.is_none() && !stopped {
                return Ok(true);
            }
            let prompt = prompts[reply.index].len();
            reply.finish = opened.finish(prompt, reply.tokens.len(), stopped, token.finish).into();
            reply.cache = seen.sequence(n);
            progress.inc(1);
            if let Some((_, reply)) = states[n].take() {
                if let Some(log) = &mut log {
                    log.append(&reply)?;
                }
                finished.push(reply);
            }
            Ok(false)
        })?;
        progress.finish();
        // Without a file, replies come in the order of their prompts.
        finished.sort_by_key(|r| r.index);
        let mut stdout = std::io::stdout().lock();
        if live {
            writeln!(stdout)?;
        } else if log.is_none() {
            for reply in &finished {
                writeln!(stdout, "{}", serde_json::to_string(reply)?)?;
            }
        }
        if !quiet {
            for reply in &finished {
                eprintln!("{}", summary(reply, prompts.len() > 1));
            }
            let peak = seen.peak();
            if finished.len() > 1 {
                eprintln!("cache at its peak: {}, {} allocated", mib(peak.payload), mib(peak.allocated));
            }
        }
        Ok(())
    }
}

fn summary(reply: &Reply, named: bool) -> String {
    let mut parts = vec![format!("{} tokens, {}", reply.tokens.len(), reply.finish)];
    if let Some(held) = &reply.cache {
        parts.push(format!("cache {} for {} tokens", mib(held.bytes), held.tokens));
        match held.widths {
            None => parts.push("nothing quantized".into()),
            Some((low, high)) if low == high => parts.push(format!("{} bits", low.get())),
            Some((low, high)) => parts.push(format!("{} to {} bits", low.get(), high.get())),
        }
        parts.extend(held.mean_bits.map(|bits| format!("{bits:.2} bits a value")));
    }
    let name = if named { format!("{}: ", reply.id) } else { String::new() };
    name + &parts.join("; ")
}

fn mib(bytes: usize) -> String {
    format!("{:.2} MiB", bytes as f64 / f64::from(1 << 20))
}

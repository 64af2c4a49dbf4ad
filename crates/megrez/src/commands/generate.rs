//! `megrez generate`.

use std::io::Write;

use anyhow::{Context, Result};
use clap::Args;
use nics_base::hash;
use nics_base::interrupt::Interrupt;
use nics_base::progress::Progress;
use nics_core::cli::{
    Given, OutArg, PluggedModelArgs, PromptArgs, PromptLine, Replies, SamplingArgs, SeedArg,
};
use nics_core::generate::{Finish, Generator, Prompt, Request, run as generate};
use nics_core::sampling::Sampling;
use nics_core::template::Message;
use nics_core::text::TextStream;
use serde::{Deserialize, Serialize};

use super::Loaded;

/// Replies to prompts.
///
/// Prompts come from --prompt, from a text file (the whole file is one prompt), or from JSON Lines with one of `prompt`
/// (text), `messages` (a conversation) or `ids` (token ids) on each line, and an optional `id`. With --out, replies are
/// appended to the file as they are finished, and a second run goes on with what is missing.
#[derive(Args)]
pub struct Generate {
    #[command(flatten)]
    model: PluggedModelArgs,
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
    /// Let special tokens in prompts keep their meaning
    #[arg(long)]
    allow_special: bool,
    /// Log-probability of each token, and of the N likeliest
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "0")]
    logprobs: Option<usize>,
    /// Prompts that are written together
    #[arg(long, value_name = "N", default_value_t = 8)]
    batch: usize,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Reply {
    index: usize,
    id: serde_json::Value,
    prompt_hash: String,
    text: String,
    tokens: Vec<u32>,
    finish: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    logprobs: Vec<f32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    top_logprobs: Vec<Vec<(u32, f32)>>,
}

impl Generate {
    pub fn run(self, quiet: bool) -> Result<()> {
        let lines = self.prompts.lines()?;
        let mut loaded = Loaded::open(&self.model)?;
        loaded.megrez.prompter.allow_special = self.allow_special;
        let megrez = &loaded.megrez;
        let sampling = self.sampling.over(&megrez.sampling)?;
        let max_new_tokens = self.sampling.max_new_tokens.unwrap_or(megrez.max_new_tokens);
        let mut prompts = Vec::new();
        for (i, line) in lines.iter().enumerate() {
            prompts.push(self.encode(megrez, line).with_context(|| format!("prompt {}", i + 1))?);
        }
        let Replies { mut log, done, todo } =
            Replies::open(self.out.out.as_deref(), &prompts, |r: &Reply| (r.index, &r.prompt_hash))?;
        let requests = todo.iter().map(|&i| Request {
            prompt: Prompt::Ids(prompts[i].clone()),
            sampling: Sampling {
                seed: self.seed.seed.wrapping_add(i as u64),
                logprobs: self.logprobs,
                ..sampling.clone()
            },
            max_new_tokens,
            eos: megrez.eos.clone(),
        });
        let progress =
            if quiet { Progress::hidden() } else { Progress::new(prompts.len() as u64, "replies") };
        progress.start_at(done as u64);
        let interrupt = Interrupt::install()?;
        let tokenizer = &megrez.prompter.tokenizer;
        let mut states: Vec<Option<(TextStream, Reply)>> = todo
            .iter()
            .map(|&i| {
                let reply = Reply {
                    index: i,
                    id: lines[i].id.clone().unwrap_or_else(|| i.into()),
                    prompt_hash: hash::tokens(&prompts[i]),
                    text: String::new(),
                    tokens: Vec::new(),
                    finish: String::new(),
                    logprobs: Vec::new(),
                    top_logprobs: Vec::new(),
                };
                Some((TextStream::new(tokenizer, &self.sampling.stop), reply))
            })
            .collect();
        let mut generator = Generator::new(&megrez.decoder, &mut *loaded.cache);
        if let Some(hook) = &mut loaded.hook {
            generator = generator.with_hook(&mut **hook);
        }
        let mut finished = Vec::new();
        generate(&mut generator, requests, self.batch, &mut |n, token| {
            interrupt.check()?;
            let Some((stream, reply)) = &mut states[n] else { return Ok(false) };
            reply.tokens.push(token.token);
            reply.logprobs.extend(token.logprob);
            if !token.top.is_empty() {
                reply.top_logprobs.push(token.top.clone());
            }
            reply.text += &stream.push(token.token)?;
            if token.finish.is_none() && stream.stopped().is_none() {
                return Ok(true);
            }
            reply.text += &stream.finish()?;
            reply.finish = match (stream.stopped(), token.finish) {
                (Some(_), _) => "stop",
                (None, Some(Finish::Eos)) => "eos",
                (None, Some(Finish::Context)) => "context",
                (None, _) => "length",
            }
            .into();
            progress.inc(1);
            if let Some((_, reply)) = states[n].take() {
                match &mut log {
                    Some(log) => log.append(&reply)?,
                    None => finished.push(reply),
                }
            }
            Ok(false)
        })?;
        progress.finish();
        // Without a file, replies come in the order of their prompts.
        finished.sort_by_key(|r| r.index);
        let mut stdout = std::io::stdout().lock();
        for reply in finished {
            if self.prompts.prompt.is_some() && self.logprobs.is_none() {
                writeln!(stdout, "{}", reply.text)?;
            } else {
                writeln!(stdout, "{}", serde_json::to_string(&reply)?)?;
            }
        }
        Ok(())
    }

    fn encode(&self, megrez: &megrez::Megrez, line: &PromptLine) -> Result<Vec<u32>> {
        let ids = match (line.given()?, self.raw, self.allow_special) {
            (Given::Ids(ids), ..) => ids.to_vec(),
            (Given::Messages(messages), ..) => megrez.prompter.encode(messages, true)?,
            (Given::Text(text), false, _) => megrez.prompter.encode(&[Message::new("user", text)], true)?,
            (Given::Text(text), true, true) => megrez.prompter.tokenizer.encode(text, false)?,
            (Given::Text(text), true, false) => megrez.prompter.tokenizer.encode_ordinary(text)?,
        };
        // Before anything is written: the last of many prompts must not end a run that has written all others.
        megrez.check_prompt(&ids)?;
        Ok(ids)
    }
}

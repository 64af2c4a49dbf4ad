//! `r2r generate`.

use std::io::Write;

use anyhow::{Context, Result};
use clap::Args;
use nics_base::hash;
use nics_base::interrupt::Interrupt;
use nics_base::progress::Progress;
use nics_core::cli::{Given, OutArg, PromptArgs, PromptLine, Replies, SamplingArgs, SeedArg};
use nics_core::template::Message;
use r2r::decode::{MeanParameters, Request, TokenEvent, Usage, run};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::opened::{Opened, PairArgs};
use super::written::{Chosen, Colour, Written};

/// Replies to prompts, written by two models.
///
/// Prompts come from --prompt, from a text file (the whole file is one prompt), or from JSON Lines with one of `prompt`
/// (text), `messages` (a conversation) or `ids` (token ids) on each line, and an optional `id`. One prompt's reply is
/// printed as it is written; several replies are JSON Lines with every token's source and score. With --out they are
/// appended to the file as they are finished, and a second run goes on with what is missing.
#[derive(Args)]
pub struct Generate {
    #[command(flatten)]
    pair: PairArgs,
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
    /// Show whose text is whose by colours
    #[arg(long, value_enum, value_name = "WHEN", num_args = 0..=1, default_value = "never",
          default_missing_value = "auto")]
    color_by_source: Colour,
    /// Prompts that are written together
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = nics_core::cli::at_least_one)]
    batch: usize,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Reply {
    index: usize,
    id: Value,
    /// By which a later run knows that a reply is to the same prompt.
    prompt_hash: String,
    text: String,
    finish: String,
    tokens: Vec<Chosen>,
    usage: Usage,
    llm_token_ratio: f64,
    /// Of the pair, where the models' sizes are known: `exclusive` counts the model that chose a token, `additive` what ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mean_parameters_billions: Option<MeanParameters>,
}

/// A reply on its way.
struct Open<'a> {
    written: Written<'a>,
    reply: Reply,
}

impl Generate {
    pub fn run(self, quiet: bool) -> Result<()> {
        let lines = self.prompts.lines()?;
        let opened = Opened::open(&self.pair, self.seed.seed)?;
        let mut prompts = Vec::new();
        for (i, line) in lines.iter().enumerate() {
            prompts.push(self.encode(&opened, line).with_context(|| format!("prompt {}", i + 1))?);
        }
        let Replies { mut log, done, todo } =
            Replies::open(self.out.out.as_deref(), &prompts, |r: &Reply| (r.index, &r.prompt_hash))?;
        let requests: Vec<Request> = todo
            .iter()
            .map(|&i| {
                let seed = self.seed.seed.wrapping_add(i as u64);
                opened.request(prompts[i].clone(), &self.sampling, seed)
            })
            .collect::<Result<_>>()?;
        // A single reply is shown as it comes.
        let live = prompts.len() == 1 && log.is_none() && !self.json;
        let progress =
            if quiet || live { Progress::hidden() } else { Progress::new(prompts.len() as u64, "replies") };
        progress.start_at(done as u64);
        let interrupt = Interrupt::install()?;
        let colour = live && self.color_by_source.on_stdout();
        let mut states: Vec<Option<Open>> = todo
            .iter()
            .map(|&i| Some(self.begin(&opened, i, lines[i].id.clone(), hash::tokens(&prompts[i]), colour)))
            .collect();
        let mut decoder = opened.decoder()?;
        let mut finished: Vec<Reply> = Vec::new();
        let (mut total, mut failed) = (Usage::default(), Vec::new());
        let mut stdout = std::io::stdout();
        let mut each = |n: usize, event: r2r::Result<TokenEvent>| -> Result<bool> {
            interrupt.check()?;
            let event = match event {
                Ok(event) => event,
                Err(error) => {
                    tracing::warn!("prompt {}: {error}", todo[n] + 1);
                    states[n] = None;
                    failed.push((todo[n], error));
                    return Ok(false);
                }
            };
            let Some(open) = &mut states[n] else { return Ok(false) };
            open.reply.tokens.push(Chosen::from(&event));
            open.reply.usage.note(&event);
            total.note(&event);
            let (text, mut shown) = open.written.push(&event)?;
            open.reply.text += &text;
            let ends = event.finish.is_some() || open.written.stopped();
            if ends {
                let (text, rest) = open.written.finish()?;
                open.reply.text += &text;
                shown += &rest;
            }
            if live && !shown.is_empty() {
                stdout.write_all(shown.as_bytes())?;
                stdout.flush()?;
            }
            if !ends {
                return Ok(true);
            }
            progress.inc(1);
            if let Some(Open { written, mut reply }) = states[n].take() {
                reply.finish = written.why(event.finish).into();
                reply.llm_token_ratio = reply.usage.large_share();
                reply.mean_parameters_billions = opened.sizes.map(|s| reply.usage.mean_parameters(&s));
                match &mut log {
                    Some(log) => log.append(&reply)?,
                    None => finished.push(reply),
                }
            }
            Ok(false)
        };
        run(&mut decoder, requests, self.batch, &mut each)?;
        progress.finish();
        if live {
            writeln!(stdout)?;
        } else {
            // Without a file, replies come in the order of their prompts.
            finished.sort_by_key(|r| r.index);
            for reply in finished {
                writeln!(stdout, "{}", serde_json::to_string(&reply)?)?;
            }
        }
        if !quiet && total.tokens() > 0 {
            eprintln!("{}", opened.summary(&total));
            if let Some(traffic) = decoder.traffic() {
                eprintln!(
                    "large model's server: {} calls ({} made again), {} KiB sent, {} KiB received",
                    traffic.calls,
                    traffic.retries,
                    traffic.bytes_up / 1024,
                    traffic.bytes_down / 1024
                );
            }
        }
        let count = failed.len();
        match failed.into_iter().next() {
            None => Ok(()),
            Some((i, error)) if prompts.len() == 1 => {
                Err(anyhow::Error::from(error).context(format!("prompt {}", i + 1)))
            }
            Some((i, error)) => Err(anyhow::Error::from(error).context(format!(
                "{count} of {} prompts failed, the first of them prompt {}",
                prompts.len(),
                i + 1
            ))),
        }
    }

    fn begin<'a>(
        &self,
        opened: &'a Opened,
        index: usize,
        id: Option<Value>,
        prompt_hash: String,
        colour: bool,
    ) -> Open<'a> {
        let reply = Reply {
            index,
            id: id.unwrap_or_else(|| index.into()),
            prompt_hash,
            text: String::new(),
            finish: String::new(),
            tokens: Vec::new(),
            usage: Usage::default(),
            llm_token_ratio: 0.0,
            mean_parameters_billions: None,
        };
        let written = Written::new(&opened.tokenizer, &self.sampling.stop, &opened.eos, colour);
        Open { written, reply }
    }

    fn encode(&self, opened: &Opened, line: &PromptLine) -> Result<Vec<u32>> {
        let ids = match line.given()? {
            Given::Ids(ids) => ids.to_vec(),
            Given::Messages(messages) => opened.conversation(messages)?,
            Given::Text(text) if self.raw => opened.tokenizer.encode(text, false)?,
            Given::Text(text) => opened.conversation(&[Message::new("user", text)])?,
        };
        // Before anything is written: the last of many prompts must not end a run that has written all others.
        opened.check_prompt(&ids)?;
        Ok(ids)
    }
}

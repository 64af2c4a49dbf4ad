//! `megrez chat`.

use std::io::{IsTerminal, Write};

use anyhow::{Context, Result};
use clap::Args;
use megrez::chat::Conversation;
use nics_base::artefact::write_atomic;
use nics_base::interrupt::Interrupt;
use nics_core::cli::{PluggedModelArgs, SamplingArgs, SeedArg};
use nics_core::generate::{Generator, Prompt, Request};
use nics_core::models::Model;
use nics_core::sampling::Sampling;
use nics_core::text::TextStream;

use super::Loaded;
use super::lines::{Lines, Said};

/// Talks with a model: one line is one message.
///
/// /reset forgets the conversation, /system TEXT says what the model is told about its role (without TEXT: back to the
/// template's own), /save FILE writes the conversation as JSON, /help lists the commands, /quit or Ctrl-D ends. Ctrl-C
/// stops a reply. When the conversation outgrows the context, its oldest exchanges are forgotten.
#[derive(Args)]
pub struct Chat {
    #[command(flatten)]
    model: PluggedModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    seed: SeedArg,
    /// What the model is told about its role; default: the template's own sentence
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Let special tokens in messages keep their meaning
    #[arg(long)]
    allow_special: bool,
}

impl Chat {
    pub fn run(self) -> Result<()> {
        let mut loaded = Loaded::open(&self.model)?;
        loaded.megrez.prompter.allow_special = self.allow_special;
        let sampling = self.sampling.over(&loaded.megrez.sampling)?;
        let context = loaded.megrez.decoder.dims().context;
        let new_tokens =
            self.sampling.max_new_tokens.unwrap_or(loaded.megrez.max_new_tokens).min(context / 2).max(1);
        let mut conversation = Conversation { system: self.system.clone(), turns: Vec::new() };
        let interactive = std::io::stdin().is_terminal();
        let mut lines = Lines::new(interactive)?;
        if interactive {
            eprintln!("{} — /help lists the commands, Ctrl-D ends.", loaded.megrez.name);
        }
        let interrupt = Interrupt::install()?;
        let mut turn = 0;
        loop {
            let message = match lines.next()? {
                Said::End => return Ok(()),
                Said::Nothing => continue,
                Said::Message(line) => line,
            };
            if let Some(command) = message.strip_prefix('/') {
                match act(command, &mut conversation) {
                    Ok(true) => continue,
                    Ok(false) => return Ok(()),
                    Err(e) => {
                        eprintln!("error: {e:#}");
                        continue;
                    }
                }
            }
            conversation.user(message);
            let sampling = Sampling { seed: self.seed.seed.wrapping_add(turn), ..sampling.clone() };
            turn += 1;
            match self.reply(
                &mut loaded,
                &mut conversation,
                sampling,
                context - new_tokens,
                new_tokens,
                &interrupt,
            ) {
                Ok(reply) => conversation.assistant(reply),
                Err(e) => {
                    // What could not be answered is not part of the conversation.
                    conversation.turns.pop();
                    if !interactive {
                        return Err(e);
                    }
                    eprintln!("error: {e:#}");
                }
            }
            // On a terminal Ctrl-C stops the reply alone.
            if interrupt.take() && !interactive {
                return Err(nics_base::Error::Interrupted.into());
            }
        }
    }

    /// Writes a reply to the terminal as it comes, and gives it.
    fn reply(
        &self,
        loaded: &mut Loaded,
        conversation: &mut Conversation,
        sampling: Sampling,
        room: usize,
        max_new_tokens: usize,
        interrupt: &Interrupt,
    ) -> Result<String> {
        let megrez = &loaded.megrez;
        let (prompt, forgotten) = conversation.prompt(&megrez.prompter, room)?;
        if forgotten > 0 {
            eprintln!("({forgotten} old messages are forgotten: the context is full)");
        }
        let request =
            Request { prompt: Prompt::Ids(prompt), sampling, max_new_tokens, eos: megrez.eos.clone() };
        let mut stream = TextStream::new(&megrez.prompter.tokenizer, &self.sampling.stop);
        let mut generator = Generator::new(&megrez.decoder, &mut *loaded.cache);
        if let Some(hook) = &mut loaded.hook {
            generator = generator.with_hook(&mut **hook);
        }
        let id = generator.add(request)?;
        let mut reply = String::new();
        let mut show = |text: String| -> Result<()> {
            print!("{text}");
            std::io::stdout().flush()?;
            reply += &text;
            Ok(())
        };
        while generator.running() > 0 {
            for token in generator.step()? {
                show(stream.push(token.token)?)?;
            }
            if stream.stopped().is_some() || interrupt.requested() {
                generator.cancel(id);
            }
        }
        show(stream.finish()?)?;
        println!();
        Ok(reply)
    }
}

/// A line that begins with `/`. `false` ends the chat.
fn act(command: &str, conversation: &mut Conversation) -> Result<bool> {
    let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
    let rest = rest.trim();
    match name {
        "reset" => conversation.turns.clear(),
        "system" => conversation.system = (!rest.is_empty()).then(|| rest.to_owned()),
        "save" if rest.is_empty() => anyhow::bail!("/save needs a file: /save chat.json"),
        "save" => {
            let text = serde_json::to_string_pretty(
                &serde_json::json!({ "conversations": conversation.messages() }),
            )?;
            write_atomic(rest, text + "\n")
                .with_context(|| format!("cannot save the conversation to {rest}"))?;
            eprintln!("saved to {rest}");
        }
        "help" => eprintln!("/reset  /system [TEXT]  /save FILE  /help  /quit"),
        "quit" | "exit" => return Ok(false),
        _ => anyhow::bail!("/{name} is no command; /help lists them"),
    }
    Ok(true)
}

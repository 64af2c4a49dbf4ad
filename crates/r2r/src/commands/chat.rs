//! `r2r chat`.

use std::io::{BufRead, IsTerminal, Write};

use anyhow::{Context, Result, bail};
use clap::Args;
use nics_base::interrupt::Interrupt;
use nics_core::cli::{SamplingArgs, SeedArg};
use nics_core::template::Message;
use r2r::decode::{Decoder, Request, Usage};

use super::opened::{Opened, PairArgs};
use super::written::{Colour, Written};

/// Talks with a pair of models: one line is one message.
///
/// /reset forgets the conversation, /usage says what it has cost, /help lists the commands, /quit or Ctrl-D ends. Ctrl-C
/// stops a reply. When the conversation outgrows the context, its oldest exchanges are forgotten. Of replies that think,
/// what follows the thinking is kept.
#[derive(Args)]
pub struct Chat {
    #[command(flatten)]
    pair: PairArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    seed: SeedArg,
    /// What the models are told about their role; default: the template's own sentence
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Show whose text is whose by colours
    #[arg(long, value_enum, value_name = "WHEN", num_args = 0..=1, default_value = "never",
          default_missing_value = "auto")]
    color_by_source: Colour,
}

impl Chat {
    pub fn run(self) -> Result<()> {
        let opened = Opened::open(&self.pair, self.seed.seed)?;
        let mut decoder = opened.decoder()?;
        let new_tokens = self.sampling.max_new_tokens.unwrap_or(1024).min(opened.context / 2).max(1);
        // Wrong flags end it before anything is said.
        opened.request(vec![0], &self.sampling, 0)?;
        let interactive = std::io::stdin().is_terminal();
        if interactive {
            eprintln!(
                "{} with {}: /help lists the commands, Ctrl-D ends.",
                opened.name, self.pair.large.large
            );
        }
        let interrupt = Interrupt::install()?;
        let (mut turns, mut total, mut turn): (Vec<Message>, Usage, u64) = Default::default();
        let mut lines = std::io::stdin().lock().lines();
        loop {
            if interactive {
                eprint!("> ");
            }
            let Some(line) = lines.next() else { return Ok(()) };
            let line = line.context("cannot read standard input")?;
            let line = line.trim();
            match line {
                "" => {}
                "/reset" => turns.clear(),
                "/usage" => eprintln!("{}", opened.summary(&total)),
                "/help" => eprintln!("/reset  /usage  /help  /quit"),
                "/quit" | "/exit" => return Ok(()),
                command if command.starts_with('/') => {
                    eprintln!("error: {command} is no command; /help lists them");
                }
                message => {
                    turns.push(Message::new("user", message));
                    let seed = self.seed.seed.wrapping_add(turn);
                    turn += 1;
                    let reply = self
                        .prompt(&opened, &mut turns, opened.context - new_tokens)
                        .and_then(|prompt| opened.request(prompt, &self.sampling, seed))
                        .map(|request| Request { max_new_tokens: new_tokens, ..request })
                        .and_then(|request| {
                            self.reply(&opened, &mut decoder, request, &mut total, &interrupt)
                        });
                    match reply {
                        Ok(reply) => {
                            let kept =
                                reply.rsplit_once("</think>").map_or(reply.as_str(), |(_, answer)| answer);
                            turns.push(Message::new("assistant", kept.trim_start()));
                        }
                        Err(e) => {
                            // What could not be answered is not part of the conversation.
                            turns.pop();
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
        }
    }

    /// Token ids of the conversation, at most `room` of them: the oldest exchanges are forgotten until it fits.
    fn prompt(&self, opened: &Opened, turns: &mut Vec<Message>, room: usize) -> Result<Vec<u32>> {
        let before = turns.len();
        loop {
            let system = self.system.iter().map(|s| Message::new("system", s));
            let messages: Vec<Message> = system.chain(turns.iter().cloned()).collect();
            let ids = opened.conversation(&messages)?;
            if ids.len() <= room {
                if turns.len() < before {
                    eprintln!("({} old messages are forgotten: the context is full)", before - turns.len());
                }
                return Ok(ids);
            }
            // Up to the next message of the user, never the last one.
            match turns.iter().skip(1).position(|m| m.role == "user") {
                Some(next) => drop(turns.drain(..=next)),
                None => bail!(
                    "the message takes {} tokens, the context leaves {room} for the conversation",
                    ids.len()
                ),
            }
        }
    }

    /// Writes a reply to the terminal as it comes, and gives it.
    fn reply(
        &self,
        opened: &Opened,
        decoder: &mut Decoder,
        request: Request,
        total: &mut Usage,
        interrupt: &Interrupt,
    ) -> Result<String> {
        let colour = self.color_by_source.on_stdout();
        let mut written = Written::new(&opened.tokenizer, &self.sampling.stop, &opened.eos, colour);
        let sequence = decoder.add(request)?;
        let mut stdout = std::io::stdout();
        let mut reply = String::new();
        while decoder.running() > 0 {
            let mut step = decoder.advance()?;
            for event in &step.tokens {
                total.note(event);
                let (text, shown) = written.push(event)?;
                reply += &text;
                stdout.write_all(shown.as_bytes())?;
                stdout.flush()?;
            }
            if written.stopped() || interrupt.requested() {
                decoder.cancel(sequence);
            }
            if let Some((_, error)) = step.failed.pop() {
                let (_, shown) = written.finish()?;
                writeln!(stdout, "{shown}")?;
                return Err(error.into());
            }
        }
        let (text, shown) = written.finish()?;
        writeln!(stdout, "{shown}")?;
        Ok(reply + &text)
    }
}

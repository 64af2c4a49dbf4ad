//! Written text on its way out: whole characters, and colours that say whose they are.

use std::io::IsTerminal;

use clap::ValueEnum;
use nics_core::text::TextStream;
use nics_core::tokenizer::Tokenizer;
use r2r::decode::{Finish, Source, TokenEvent};
use serde::{Deserialize, Serialize};

/// When text is coloured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Colour {
    /// On a terminal, unless `NO_COLOR` is set
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

impl Colour {
    /// Whether standard output is coloured.
    pub fn on_stdout(self) -> bool {
        match self {
            Self::Always => true,
            Self::Never => false,
            Self::Auto => {
                let unwanted = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
                !unwanted && std::io::stdout().is_terminal()
            }
        }
    }
}

/// The large model's text; what was to be the large model's and is the small one's.
const LARGE: &str = "\u{1b}[36m";
const DEGRADED: &str = "\u{1b}[33m";
const PLAIN: &str = "\u{1b}[0m";

/// A token as JSON Lines have it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Chosen {
    /// Its id.
    pub token: u32,
    /// `small` or `large`.
    pub source: String,
    /// What the policy looked at.
    pub score: f32,
    /// Whether the large model was asked and failed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub degraded: bool,
}

impl From<&TokenEvent> for Chosen {
    fn from(event: &TokenEvent) -> Self {
        Self {
            token: event.token,
            source: event.source.name().into(),
            score: event.score,
            degraded: event.degraded,
        }
    }
}

/// The text of one reply as it comes.
pub struct Written<'a> {
    stream: TextStream<'a>,
    eos: &'a [u32],
    colour: bool,
    current: &'static str,
}

impl<'a> Written<'a> {
    pub fn new(tokenizer: &'a Tokenizer, stops: &[String], eos: &'a [u32], colour: bool) -> Self {
        Self { stream: TextStream::new(tokenizer, stops), eos, colour, current: PLAIN }
    }

    /// Takes a token; gives the text that is certain now, and the same with colours. A character that two models have
    /// written together is the second one's.
    pub fn push(&mut self, event: &TokenEvent) -> nics_core::Result<(String, String)> {
        if self.eos.contains(&event.token) {
            return Ok(Default::default());
        }
        let text = self.stream.push(event.token)?;
        let mut shown = String::new();
        if self.colour && !text.is_empty() {
            let colour = match event.source {
                Source::Large { .. } => LARGE,
                Source::Small if event.degraded => DEGRADED,
                Source::Small => PLAIN,
            };
            if colour != self.current {
                shown += colour;
                self.current = colour;
            }
        }
        shown += &text;
        Ok((text, shown))
    }

    /// What was held back, and the end of colours.
    pub fn finish(&mut self) -> nics_core::Result<(String, String)> {
        let text = self.stream.finish()?;
        let mut shown = text.clone();
        if self.current != PLAIN {
            shown += PLAIN;
            self.current = PLAIN;
        }
        Ok((text, shown))
    }

    /// Whether a stop string has come.
    pub fn stopped(&self) -> bool {
        self.stream.stopped().is_some()
    }

    /// Why a reply ended, after its last token.
    pub fn why(&self, finish: Option<Finish>) -> &'static str {
        match (self.stopped(), finish) {
            (true, _) => "stop",
            (_, Some(Finish::Eos)) => "eos",
            (_, Some(Finish::Context)) => "context",
            _ => "length",
        }
    }
}

//! `--prompt` and `--input`: what a model is to reply to.

use std::io::Read;
use std::path::PathBuf;

use clap::Args;
use serde::Deserialize;
use serde_json::Value;

use crate::template::Message;
use crate::{Error, Result};

/// `--prompt`, `--input`.
#[derive(Debug, Clone, Args)]
pub struct PromptArgs {
    /// A prompt
    #[arg(long, short, value_name = "TEXT", conflicts_with = "input")]
    pub prompt: Option<String>,
    /// Prompts: a .jsonl file, any other file as one prompt, or - for one prompt from standard input
    #[arg(long, short, value_name = "FILE", required_unless_present = "prompt")]
    pub input: Option<PathBuf>,
}

/// A line of a file of prompts: one of `prompt`, `messages` and `ids`, and what is known of it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptLine {
    /// Its name; default: its place.
    #[serde(default)]
    pub id: Option<Value>,
    /// A text.
    pub prompt: Option<String>,
    /// A conversation.
    pub messages: Option<Vec<Message>>,
    /// Token ids.
    pub ids: Option<Vec<u32>>,
    /// The right answer, for commands that judge replies.
    #[serde(default)]
    pub answer: Option<String>,
}

/// What a line gives.
#[derive(Debug, Clone, Copy)]
pub enum Given<'a> {
    /// A text; not blank.
    Text(&'a str),
    /// A conversation.
    Messages(&'a [Message]),
    /// Token ids.
    Ids(&'a [u32]),
}

impl PromptArgs {
    /// The prompts, in their order.
    ///
    /// # Errors
    /// [`Error::Input`]: a file that cannot be read, a line that is no prompt, no prompt at all.
    pub fn lines(&self) -> Result<Vec<PromptLine>> {
        let one = |prompt: String| vec![PromptLine { prompt: Some(prompt), ..PromptLine::default() }];
        let Some(path) = &self.input else { return Ok(one(self.prompt.clone().unwrap_or_default())) };
        if path.as_os_str() == "-" {
            let mut text = String::new();
            std::io::stdin()
                .read_to_string(&mut text)
                .map_err(|e| Error::Input(format!("cannot read standard input: {e}")))?;
            return Ok(one(text));
        }
        let text = std::fs::read_to_string(path)
            .map_err(|e| Error::Input(format!("cannot read {}: {e}", path.display())))?;
        if path.extension().is_none_or(|e| e != "jsonl") {
            return Ok(one(text));
        }
        let lines = text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty())
            .map(|(i, line)| {
                serde_json::from_str(line)
                    .map_err(|e| Error::Input(format!("{}, line {}: {e}", path.display(), i + 1)))
            })
            .collect::<Result<Vec<PromptLine>>>()?;
        if lines.is_empty() {
            return Err(Error::Input(format!("{} has no prompt", path.display())));
        }
        Ok(lines)
    }
}

impl PromptLine {
    /// What the line gives.
    ///
    /// # Errors
    /// [`Error::Input`]: none or several of the three, or a blank text.
    pub fn given(&self) -> Result<Given<'_>> {
        match (&self.prompt, &self.messages, &self.ids) {
            (Some(text), None, None) if text.trim().is_empty() => Err(Error::input("the prompt is empty")),
            (Some(text), None, None) => Ok(Given::Text(text)),
            (None, Some(messages), None) => Ok(Given::Messages(messages)),
            (None, None, Some(ids)) => Ok(Given::Ids(ids)),
            _ => Err(Error::input("expected one of `prompt`, `messages` and `ids`")),
        }
    }
}

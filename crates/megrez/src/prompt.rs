//! From a conversation to token ids.

use nics_core::checkpoint::Checkpoint;
use nics_core::template::{ChatTemplate, Message, RenderOptions};
use nics_core::tokenizer::Tokenizer;
use nics_core::{Error, Result};
use serde_json::{Map, Value};

use crate::labels::TurnTokens;
use crate::vocabulary::CHAT_TEMPLATE;

/// Starts a role.
pub const ROLE_START: &str = "<|role_start|>";
/// Ends a role, starts its content.
pub const ROLE_END: &str = "<|role_end|>";
/// Ends a turn.
pub const TURN_END: &str = "<|turn_end|>";

/// A piece of a turn's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Text, whatever it spells.
    Text(String),
    /// A special token.
    Special(String),
}

/// A turn whose content may hold special tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    /// Whose turn it is.
    pub role: String,
    /// Its content, in order.
    pub parts: Vec<Part>,
    /// Further fields that a template may read.
    pub extra: Map<String, Value>,
    /// A content that is no text, for the template to read as it is.
    other: Option<Message>,
}

impl Turn {
    /// A turn of text alone.
    pub fn text(role: impl Into<String>, text: impl Into<String>) -> Self {
        Self { role: role.into(), parts: vec![Part::Text(text.into())], extra: Map::new(), other: None }
    }

    /// A turn of these parts.
    pub fn new(role: impl Into<String>, parts: Vec<Part>, extra: Map<String, Value>) -> Self {
        Self { role: role.into(), parts, extra, other: None }
    }

    fn of(message: &Message) -> Self {
        match message.text() {
            Some(text) => Self { extra: message.extra.clone(), ..Self::text(&message.role, text) },
            None => Self { other: Some(message.clone()), ..Self::new(&message.role, Vec::new(), Map::new()) },
        }
    }

    fn content(&self) -> String {
        let text = |part: &Part| match part {
            Part::Text(text) | Part::Special(text) => text.clone(),
        };
        self.parts.iter().map(text).collect()
    }

    fn message(&self) -> Message {
        if let Some(message) = &self.other {
            return message.clone();
        }
        Message { extra: self.extra.clone(), ..Message::new(&self.role, self.content()) }
    }
}

/// Renders conversations with the checkpoint's template and tokenizes them.
pub struct Prompter {
    /// The checkpoint's tokenizer.
    pub tokenizer: Tokenizer,
    template: ChatTemplate,
    /// Whether special tokens in what users write keep their meaning. Off by default: they are tokenized as plain text,
    /// so that nobody can end a turn or speak as another role from inside a message.
    pub allow_special: bool,
}

impl Prompter {
    /// Reads tokenizer and template of a checkpoint; one without a template gets the rule that all Megrez checkpoints
    /// follow.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self> {
        let tokenizer = Tokenizer::from_checkpoint(checkpoint)?;
        let template = if let Some(template) = ChatTemplate::from_checkpoint(checkpoint)? {
            template
        } else {
            tracing::warn!("{} has no chat template: the rule of Megrez is used", checkpoint.name());
            ChatTemplate::parse(CHAT_TEMPLATE)?
        };
        Ok(Self { tokenizer, template, allow_special: false })
    }

    /// A prompter with the Megrez template.
    pub fn new(tokenizer: Tokenizer) -> Result<Self> {
        Ok(Self { tokenizer, template: ChatTemplate::parse(CHAT_TEMPLATE)?, allow_special: false })
    }

    /// The conversation as text; with `generate`, up to where the assistant's reply begins.
    pub fn render(&self, messages: &[Message], generate: bool) -> Result<String> {
        let options = RenderOptions { add_generation_prompt: generate, ..RenderOptions::default() };
        Ok(self.template.render(messages, &options)?)
    }

    /// The conversation as token ids; no BOS or EOS is added.
    ///
    /// # Errors
    /// An empty conversation, or what the template or the tokenizer refuse.
    pub fn encode(&self, messages: &[Message], generate: bool) -> Result<Vec<u32>> {
        if messages.is_empty() {
            return Err(Error::input("the conversation is empty"));
        }
        let turns: Vec<Turn> = messages.iter().map(Turn::of).collect();
        self.encode_turns(
            &turns,
            &RenderOptions { add_generation_prompt: generate, ..RenderOptions::default() },
        )
    }

    /// As [`encode`](Self::encode), for turns whose contents hold special tokens on purpose. Texts never become special
    /// tokens unless [`allow_special`](Self::allow_special) is set.
    ///
    /// # Errors
    /// A special token that the tokenizer lacks, or what template and tokenizer refuse.
    pub fn encode_turns(&self, turns: &[Turn], options: &RenderOptions) -> Result<Vec<u32>> {
        let plain = |part: &Part| match part {
            Part::Text(text) => self.allow_special || !self.tokenizer.has_special(text),
            Part::Special(_) => false,
        };
        if turns.iter().flat_map(|t| &t.parts).all(plain) {
            let messages: Vec<Message> = turns.iter().map(Turn::message).collect();
            return Ok(self.tokenizer.encode(&self.template.render(&messages, options)?, false)?);
        }
        // Contents stand in the rendered text as marks, so that the template's own special tokens and those in a content
        // can be told apart.
        let taken = |mark: &str| turns.iter().any(|t| t.content().contains(mark));
        let salt = (0..=u32::MAX).find(|n| !taken(&format!("\u{e000}{n}:"))).unwrap_or(0);
        let mark = |i: usize| format!("\u{e000}{salt}:{i}\u{e001}");
        let marked: Vec<Message> = (turns.iter().enumerate())
            .map(|(i, turn)| Turn { parts: vec![Part::Text(mark(i))], ..turn.clone() }.message())
            .collect();
        let rendered = self.template.render(&marked, options)?;
        let mut ids = Vec::new();
        let mut rest = rendered.as_str();
        for (i, turn) in turns.iter().enumerate() {
            // A template may leave a content out.
            let Some((before, after)) = rest.split_once(&mark(i)) else { continue };
            ids.extend(self.tokenizer.encode(before, false)?);
            for part in &turn.parts {
                match part {
                    Part::Special(token) => ids.push(self.special(token)?),
                    Part::Text(text) if self.allow_special => ids.extend(self.tokenizer.encode(text, false)?),
                    Part::Text(text) => ids.extend(self.tokenizer.encode_ordinary(text)?),
                }
            }
            rest = after;
        }
        ids.extend(self.tokenizer.encode(rest, false)?);
        Ok(ids)
    }

    fn special(&self, token: &str) -> Result<u32> {
        self.tokenizer.token_id(token).ok_or_else(|| {
            Error::Input(format!("the tokenizer has no token {token}, so this model cannot call tools"))
        })
    }

    /// Whether the template itself reads `tools`; Megrez's own does not.
    pub fn template_has_tools(&self) -> bool {
        let reads = |source: &str| {
            source.match_indices("tools").any(|(at, word)| {
                let name = |c: char| c.is_alphanumeric() || c == '_';
                !source[..at].ends_with(name) && !source[at + word.len()..].starts_with(name)
            })
        };
        self.template.source("tool_use").is_some() || self.template.source("default").is_some_and(reads)
    }

    /// The system turn that the template puts before a conversation without one; empty when it puts none.
    pub fn default_system(&self) -> Result<String> {
        let rendered = self.render(&[Message::new("user", "")], false)?;
        let turn = rendered.strip_prefix(&format!("{ROLE_START}system{ROLE_END}"));
        Ok(turn.and_then(|t| t.split_once(TURN_END)).map(|(text, _)| text.to_owned()).unwrap_or_default())
    }

    /// The tokens by which training finds the turns.
    pub fn turn_tokens(&self) -> Result<TurnTokens> {
        let header = self.tokenizer.encode(&format!("{ROLE_START}assistant{ROLE_END}"), false)?;
        let turn_end = self.tokenizer.token_id(TURN_END).ok_or_else(|| {
            Error::Input(format!("the tokenizer has no token {TURN_END}, which ends a turn of Megrez"))
        })?;
        Ok(TurnTokens { assistant_header: header, turn_end })
    }
}

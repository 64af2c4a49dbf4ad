//! From a conversation to token ids.

use nics_core::checkpoint::Checkpoint;
use nics_core::template::{ChatTemplate, Message, RenderOptions};
use nics_core::tokenizer::Tokenizer;
use nics_core::{Error, Result};

use crate::labels::TurnTokens;
use crate::vocabulary::CHAT_TEMPLATE;

/// Starts a role.
pub const ROLE_START: &str = "<|role_start|>";
/// Ends a role, starts its content.
pub const ROLE_END: &str = "<|role_end|>";
/// Ends a turn.
pub const TURN_END: &str = "<|turn_end|>";

/// A short hash of a prompt's tokens: by it a later run knows that an answer is to the same prompt.
pub fn prompt_hash(ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    nics_base::hash::bytes(bytes)[..16].to_owned()
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
        let special = |m: &Message| m.text().is_some_and(|text| self.tokenizer.has_special(text));
        if self.allow_special || !messages.iter().any(special) {
            return Ok(self.tokenizer.encode(&self.render(messages, generate)?, false)?);
        }
        self.encode_escaped(messages, generate)
    }

    /// Contents stand in the rendered text as marks, so that the template's own special tokens and those in a content
    /// can be told apart.
    fn encode_escaped(&self, messages: &[Message], generate: bool) -> Result<Vec<u32>> {
        let taken = |mark: &str| messages.iter().any(|m| m.text().is_some_and(|t| t.contains(mark)));
        let salt = (0..=u32::MAX).find(|n| !taken(&format!("\u{e000}{n}:"))).unwrap_or(0);
        let mark = |i: usize| format!("\u{e000}{salt}:{i}\u{e001}");
        let mut marked = messages.to_vec();
        for (i, m) in marked.iter_mut().enumerate() {
            if m.text().is_some() {
                m.set_text(mark(i));
            }
        }
        let rendered = self.render(&marked, generate)?;
        let mut ids = Vec::new();
        let mut rest = rendered.as_str();
        for (i, m) in messages.iter().enumerate() {
            let Some(text) = m.text() else { continue };
            // A template may leave a content out.
            let Some((before, after)) = rest.split_once(&mark(i)) else { continue };
            ids.extend(self.tokenizer.encode(before, false)?);
            ids.extend(self.tokenizer.encode_ordinary(text)?);
            rest = after;
        }
        ids.extend(self.tokenizer.encode(rest, false)?);
        Ok(ids)
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

//! A model of a pair with what belongs to it.

use nics_core::models::Model;
use nics_core::template::{ChatTemplate, Message, RenderOptions};
use nics_core::tokenizer::Tokenizer;
use serde_json::{Map, Value};

use super::LabelError;
use crate::labels::ThinkTokens;
use crate::{Error, Result};

/// A model with its tokenizer and template.
pub struct Party<'m> {
    /// The model.
    pub model: &'m dyn Model,
    /// Its tokenizer.
    pub tokenizer: &'m Tokenizer,
    /// Its chat template, where it has one.
    pub template: Option<&'m ChatTemplate>,
    /// Tokens that end a reply; the first is written where a reply has to be ended.
    pub eos: Vec<u32>,
    /// What decides its answers (hashes of architecture and weights, device, dtype, threads): part of the settings of each
    /// step that it takes part in.
    pub identity: Value,
    /// Its name, for a router's card.
    pub name: String,
}

impl Party<'_> {
    /// The text of a conversation, up to where the reply begins.
    ///
    /// # Errors
    /// A model without a template, a template that refuses the conversation.
    pub fn conversation(
        &self,
        system: Option<&str>,
        user: &str,
        extra: &Map<String, Value>,
    ) -> Result<String> {
        let template = self.template.ok_or_else(|| {
            Error::Input(format!(
                "{} has no chat template: give prompts as `ids` in the queries instead of `question`",
                self.name
            ))
        })?;
        let system = system.map(|text| Message::new("system", text));
        let messages: Vec<Message> = system.into_iter().chain([Message::new("user", user)]).collect();
        let options =
            RenderOptions { add_generation_prompt: true, extra: extra.clone(), ..RenderOptions::default() };
        Ok(template.render(&messages, &options).map_err(nics_core::Error::from)?)
    }

    /// Tokens of a text that is written out whole: special tokens that it spells are meant, and none is added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode(text, false).map_err(nics_core::Error::from)?)
    }

    /// The text of tokens, special ones included.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        Ok(self.tokenizer.decode(ids, false).map_err(nics_core::Error::from)?)
    }

    /// The token that is written where a reply has to be ended.
    ///
    /// # Errors
    /// A model that names none.
    pub fn end(&self) -> Result<u32> {
        self.eos.first().copied().ok_or_else(|| {
            Error::Input(format!("{} names no token that ends a reply (eos_token_id)", self.name))
        })
    }

    /// Its think tokens.
    ///
    /// # Errors
    /// [`Error::ThinkTokenUnknown`].
    pub fn think(&self) -> Result<ThinkTokens> {
        ThinkTokens::of(self.tokenizer)
    }
}

/// Holds the tokenizers of a pair against each other.
///
/// # Errors
/// [`LabelError::OtherTokenizer`] with the first token that differs.
pub fn same_tokenizer(small: &Tokenizer, large: &Tokenizer) -> Result<()> {
    let most = small.vocab_size().max(large.vocab_size()) as u32;
    match (0..most).find(|&id| small.token(id) != large.token(id)) {
        None => Ok(()),
        Some(id) => {
            let show = |t: &Tokenizer| t.token(id).map_or("absent".to_owned(), |token| format!("{token:?}"));
            Err(LabelError::OtherTokenizer { id, small: show(small), large: show(large) }.into())
        }
    }
}

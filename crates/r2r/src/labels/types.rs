//! Which part of a conversation a token belongs to.

use nics_core::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The tokens around the thinking part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThinkTokens {
    /// `<think>`.
    pub start: i64,
    /// `</think>`.
    pub end: i64,
}

impl ThinkTokens {
    /// `<think>` and `</think>` of a tokenizer.
    ///
    /// # Errors
    /// [`Error::ThinkTokenUnknown`].
    pub fn of(tokenizer: &Tokenizer) -> Result<Self> {
        let id = |token: &str| {
            let unknown = || Error::ThinkTokenUnknown { token: token.to_owned() };
            tokenizer.token_id(token).map(i64::from).ok_or_else(unknown)
        };
        Ok(Self { start: id("<think>")?, end: id("</think>")? })
    }
}

/// The part of a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenType {
    /// Before the model thinks.
    Instruction = 0,
    /// From the start marker on.
    Reasoning = 1,
    /// From the end marker on; a later start marker leads back to reasoning.
    Response = 2,
}

/// The part of each token.
pub fn token_types(ids: &[i64], think: ThinkTokens) -> Vec<TokenType> {
    let mut now = TokenType::Instruction;
    let mut next = |&id: &i64| {
        if id == think.start {
            now = TokenType::Reasoning;
        } else if id == think.end {
            now = TokenType::Response;
        }
        now
    };
    ids.iter().map(&mut next).collect()
}

//! Where the small model would have written another token.

use super::TokenType;
use crate::{Error, Result};

/// A conversation as the small model read it, a value for each position.
#[derive(Debug, Clone, Copy)]
pub struct Document<'a> {
    /// The tokens.
    pub tokens: &'a [i64],
    /// The small model's likeliest next token after each.
    pub predictions: &'a [i64],
    /// The part that each belongs to.
    pub types: &'a [TokenType],
}

/// A position where the models differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mismatch {
    /// The predicted position; the row that predicted it is one before.
    pub position: usize,
    /// What stands there.
    pub real: i64,
    /// What stands before it.
    pub previous: i64,
    /// What the small model would have written.
    pub small: i64,
    /// Tokens before the position: the context of the continuation.
    pub context: usize,
    /// Tokens of it since the document's last mismatch; 0 right behind one, whose context this one's is but for a token
    /// that is known anyway.
    pub new_context: usize,
}

/// The mismatches of a document, by position.
///
/// None for a document longer than `max_tokens`, without a thinking part, or that begins with it: the row that predicts
/// the first token does not exist. The end of thinking is never a mismatch.
///
/// # Errors
/// Lists of different lengths.
pub fn mismatches(document: &Document, think_end: i64, max_tokens: usize) -> Result<Vec<Mismatch>> {
    let Document { tokens, predictions, types } = *document;
    if tokens.len() != predictions.len() || tokens.len() != types.len() {
        let (t, p, k) = (tokens.len(), predictions.len(), types.len());
        return Err(Error::Input(format!("a document of {t} tokens has {p} predictions and {k} types")));
    }
    let first = types.iter().position(|t| *t != TokenType::Instruction);
    let Some(first) = first.filter(|&first| first > 0 && tokens.len() <= max_tokens) else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    let mut last = 0;
    for row in first..tokens.len().saturating_sub(1) {
        let (real, small, context) = (tokens[row + 1], predictions[row], row + 1);
        if small != real && real != think_end {
            let since = context - last;
            let new_context = if since == 1 { 0 } else { since };
            found.push(Mismatch {
                position: row + 1,
                real,
                previous: tokens[row],
                small,
                context,
                new_context,
            });
            last = context;
        }
    }
    Ok(found)
}

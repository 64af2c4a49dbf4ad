//! From a judge's scores to the labels of rows.

use std::collections::HashMap;

use super::TokenType;
use crate::{Error, Result};

/// A judge's word on a mismatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Score {
    /// The predicted position.
    pub position: usize,
    /// 1 divergent, 0 not; anything else is unusable.
    pub score: i64,
}

/// The label of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label {
    /// 1 divergent, 0 not, -1 where the judge could not tell.
    pub divergent: i64,
    /// Whether the models differ at the position that the row predicts.
    pub mismatch: bool,
    /// Whether the row may be trained on: it belongs to thinking or answer.
    pub mask: bool,
}

impl Label {
    /// Whether the row is trained on.
    pub fn counts(&self) -> bool {
        self.mask && (self.divergent == 0 || self.divergent == 1)
    }
}

/// The labels of a document's rows; `None` for a document without a score, which is left out.
///
/// The score of position p is that of row p - 1, whose features predicted it.
///
/// # Errors
/// A score at a position that no row predicts, or two of one position.
pub fn assemble(types: &[TokenType], scores: &[Score]) -> Result<Option<Vec<Label>>> {
    if scores.is_empty() {
        return Ok(None);
    }
    let mut at = HashMap::with_capacity(scores.len());
    for score in scores {
        let Score { position, .. } = *score;
        if position == 0 || position > types.len() {
            return Err(Error::Input(format!(
                "a score of position {position} in a document of {}",
                types.len()
            )));
        }
        if at.insert(position - 1, score.score).is_some() {
            return Err(Error::Input(format!("position {position} has two scores")));
        }
    }
    let label = |(row, kind): (usize, &TokenType)| {
        let score = at.get(&row);
        let divergent = match score {
            None | Some(0) => 0,
            Some(1) => 1,
            Some(_) => -1,
        };
        Label { divergent, mismatch: score.is_some(), mask: *kind != TokenType::Instruction }
    };
    Ok(Some(types.iter().enumerate().map(label).collect()))
}

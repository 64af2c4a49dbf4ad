//! Who says whether two continuations of one text mean the same.
//!
//! | judge | what it does | what it costs |
//! |---|---|---|
//! | [`RuleJudge`] | compares tokens up to synonyms from a table | nothing |
//! | [`TextJudge`] over [`RemoteChat`] | asks a chat model on a server, as the paper does | a call a mismatch |
//! | [`TextJudge`] over [`LargeChat`] | asks the large model itself | a prompt and a few tokens a mismatch |
//! | [`AnswerJudge`] | writes both branches to their ends and compares the answers | up to two whole responses a mismatch |

mod answer;
mod large;
mod remote;
mod rule;
mod text;

use serde_json::Value;

use crate::Result;

pub use answer::{AnswerJudge, Extract};
pub use large::LargeChat;
pub use remote::{RemoteChat, RemoteJudgeSettings};
pub use rule::{RuleJudge, SynonymTable};
pub use text::{Chat, Question, TextJudge, TextSettings};

/// Two ways to go on with a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// All tokens before the branches part, the prompt among them; not empty.
    pub context: Vec<u32>,
    /// The small model's token.
    pub small: u32,
    /// The large model's token.
    pub large: u32,
    /// How the large model goes on from the small one's token: a sentence or two.
    pub small_continuation: Vec<u32>,
    /// How it goes on from its own.
    pub large_continuation: Vec<u32>,
    /// What the large model wrote from its own token to the end of the response, where that is known.
    pub written: Option<Vec<u32>>,
}

/// A judge's word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// 1 the difference matters, 0 it does not, -1 the judge cannot tell.
    pub score: i64,
    /// What it said, where it speaks.
    pub reply: Option<String>,
    /// Hash of what it was asked, where it was asked something.
    pub prompt_hash: Option<String>,
}

impl Verdict {
    /// A score without words.
    pub fn of(score: i64) -> Self {
        Self { score, reply: None, prompt_hash: None }
    }
}

/// Judges pairs.
///
/// Pairs come in the order of their documents and positions. A judge whose replies depend on which pairs it is handed
/// together says so with [`unit`](Self::unit): a run that goes on hands it the same ones again.
pub trait Judge {
    /// All that its word depends on: part of the settings of the labels.
    fn identity(&self) -> Value;

    /// How many pairs it likes to be handed at once; at least 1.
    fn batch(&self) -> usize;

    /// Pairs whose verdicts are kept or made again together; 1 unless the judge says otherwise.
    fn unit(&self) -> usize {
        1
    }

    /// Judges pairs and appends a verdict for each to `verdicts`. On an error those that are there stand.
    ///
    /// # Errors
    /// What a model or a server refuses.
    fn judge(&mut self, pairs: &[Pair], verdicts: &mut Vec<Verdict>) -> Result<()>;

    /// Hears of a verdict of an earlier run, in the order in which they were made.
    fn remember(&mut self, prompt_hash: &str, score: i64) {
        let _ = (prompt_hash, score);
    }
}

//! What the agent is told, and what it says during a turn.

use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;

use super::citation::link;
use super::talker::TalkError;

/// How the agent works; the defaults are the vendor's.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Results of a search that are read.
    pub results: usize,
    /// Tokens of a page that a summary is made of.
    pub page_tokens: usize,
    /// The most tokens of a summary.
    pub summary_tokens: usize,
    /// Turns that the model sees, the new one counted.
    pub window: usize,
    /// Older turns are left out once the conversation has so many tokens.
    pub max_input_tokens: usize,
    /// The most tokens of a reply when the model may search.
    pub search_reply_tokens: usize,
    /// Its temperature.
    pub search_temperature: f32,
    /// The most tokens of a reply when it may not.
    pub plain_reply_tokens: usize,
    /// Its temperature.
    pub plain_temperature: f32,
    /// Whether the service's own excerpt stands in for a page that cannot be read.
    pub snippets: bool,
    /// Seed of the draws.
    pub seed: u64,
    /// What the model is told for now; the local time when `None`.
    pub now: Option<OffsetDateTime>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            results: 5,
            page_tokens: 2048,
            summary_tokens: 512,
            window: 2,
            max_input_tokens: 3072,
            search_reply_tokens: 512,
            search_temperature: 0.01,
            plain_reply_tokens: 2048,
            plain_temperature: 0.4,
            snippets: false,
            seed: 0,
            now: None,
        }
    }
}

/// What can be cited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Source {
    /// Its number in citations, from 1.
    pub number: usize,
    /// Its title; may be empty.
    pub title: String,
    /// Where it is.
    pub url: String,
    /// What the model knows of it.
    pub summary: String,
}

/// What happens during a turn.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A piece of the reply; citations are never split.
    Text {
        /// The piece.
        text: String,
    },
    /// The model calls a tool.
    Call {
        /// Which.
        name: String,
        /// With what.
        arguments: Value,
    },
    /// A result of the search.
    Result {
        /// Its title; may be empty.
        title: String,
        /// Where it is.
        url: String,
        /// Why its page is not used.
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// A page has been summarised.
    Summary(Source),
    /// The search gave nothing to answer from; the model is told so.
    Failed {
        /// Why.
        reason: String,
    },
    /// The end of the turn.
    Answer(Answer),
}

/// The end of a turn.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// All that was said, citations as written.
    pub text: String,
    /// The numbers of the sources that it cites, in the order of their first citation.
    pub cited: Vec<usize>,
    /// All sources that it could cite.
    pub sources: Vec<Source>,
    /// Replies that were asked of the model, summaries aside: 1 or 2.
    pub replies: usize,
}

impl Answer {
    /// The text with `[3]` in place of `[citation:3]`, numbers out of range clamped.
    pub fn linked(&self) -> String {
        link(&self.text, self.sources.len(), |n| format!("[{n}]"))
    }
}

/// Why a turn has no answer. The conversation is then as it was before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The model failed. (A search that fails is told to the model instead.)
    #[error(transparent)]
    Talk(#[from] TalkError),
    /// Whoever watches the turn asked to stop.
    #[error("stopped")]
    Stopped,
}

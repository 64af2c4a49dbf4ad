//! Who writes for the agent: the [`Talker`] trait, a Megrez of this process and a server of OpenAI's API.

mod local;
mod remote;

use nics_core::template::Message;
use serde_json::Value;

pub use local::LocalTalker;
pub use remote::{Counting, RemoteTalker};

/// A reply that is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    /// The conversation, in the form of OpenAI's API.
    pub messages: Vec<Message>,
    /// The tools that may be called, in the form of OpenAI's API; announced at the end of the system turn.
    pub tools: Vec<Value>,
    /// 0 is greedy.
    pub temperature: f32,
    /// The most tokens of the reply.
    pub max_tokens: usize,
    /// Seed of the draw.
    pub seed: u64,
}

/// Why there is no reply.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TalkError {
    /// The model of this process failed.
    #[error(transparent)]
    Model(#[from] nics_core::Error),
    /// The server cannot be reached, or stopped in the middle of a reply.
    #[error("{url}: {reason}")]
    Unreachable {
        /// The server.
        url: String,
        /// Why not.
        reason: String,
    },
    /// The server refused the request.
    #[error("{url} answered with status {status}: {message}")]
    Refused {
        /// The server.
        url: String,
        /// The status.
        status: u16,
        /// What the server says.
        message: String,
    },
    /// The server's answer is no answer of OpenAI's API.
    #[error("{url} answered with something else than OpenAI's API has: {reason}")]
    BadAnswer {
        /// The server.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Writes replies.
///
/// A call of a tool is written as the model writes it: `<|function_start|>{"name": .., "arguments": ..}<|function_end|>`.
/// Special tokens that end a reply are not part of it.
pub trait Talker {
    /// The most tokens of conversation and reply together, where that is known.
    fn context(&self) -> Option<usize>;

    /// Tokens of a conversation up to where the reply begins, tools announced.
    fn count(&self, messages: &[Message], tools: &[Value]) -> Result<usize, TalkError>;

    /// The first `tokens` tokens of a text.
    fn shorten(&self, text: &str, tokens: usize) -> Result<String, TalkError>;

    /// Writes a reply; every piece goes to `each`, which says whether to go on.
    fn reply(&mut self, ask: &Ask, each: &mut dyn FnMut(&str) -> bool) -> Result<(), TalkError>;

    /// Writes several replies, side by side where that is faster.
    fn replies(&mut self, asks: &[Ask]) -> Vec<Result<String, TalkError>> {
        let one = |ask| {
            let mut text = String::new();
            self.reply(ask, &mut |piece| {
                text.push_str(piece);
                true
            })?;
            Ok(text)
        };
        asks.iter().map(one).collect()
    }
}

impl Talker for Box<dyn Talker> {
    fn context(&self) -> Option<usize> {
        (**self).context()
    }

    fn count(&self, messages: &[Message], tools: &[Value]) -> Result<usize, TalkError> {
        (**self).count(messages, tools)
    }

    fn shorten(&self, text: &str, tokens: usize) -> Result<String, TalkError> {
        (**self).shorten(text, tokens)
    }

    fn reply(&mut self, ask: &Ask, each: &mut dyn FnMut(&str) -> bool) -> Result<(), TalkError> {
        (**self).reply(ask, each)
    }

    fn replies(&mut self, asks: &[Ask]) -> Vec<Result<String, TalkError>> {
        (**self).replies(asks)
    }
}

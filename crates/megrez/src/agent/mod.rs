//! A model that searches the web before it answers, and cites what it found.
//!
//! One turn is at most two replies of the model. The first may end in a call of `googleWebSearch`; then the results'
//! pages are read, each is summarised for the question in a conversation of its own, and the second reply answers from
//! the summaries, which it sees as an `observation`. It cites them as `[citation:i]`.
//!
//! | file | what it holds |
//! |---|---|
//! | `call.rs` | calls of tools in what the model writes |
//! | `history.rs` | how much of the conversation the model sees |
//! | `citation.rs`, `rechunk.rs` | citations, and streams that do not split them |
//! | `turn.rs`, `event.rs` | the turn, and what happens during it |
//! | `search/` | [`SearchProvider`]: a service over HTTP, a folder of documents |
//! | `talker/` | [`Talker`]: a Megrez of this process, a server of OpenAI's API |
//!
//! The texts around a conversation are [`Prompts`](crate::prompts::Prompts).

mod call;
mod citation;
mod event;
mod history;
mod rechunk;
mod search;
mod talker;
mod turn;

pub use call::{Action, FUNCTION_END, FUNCTION_START, Splitter, action};
pub use citation::{clamp, extract, link};
pub use event::{AgentError, Answer, Event, Settings, Source};
pub use history::truncate;
pub use rechunk::Rechunker;
pub use search::{
    Hit, HttpSearch, HttpSettings, LocalIndex, Method, PageError, PageLimits, SearchError, SearchProvider,
    visible_text,
};
pub use talker::{Ask, Counting, LocalTalker, RemoteTalker, TalkError, Talker};
pub use turn::{SEARCH_TOOL, WebSearchAgent};

//! The HTTP server: OpenAI's API over an [`Engine`].
//!
//! | route | answers |
//! |---|---|
//! | `GET /health` | `{"status"}`: 200 `ok`; 503 `loading`, `draining`, `stopped`, `dead`. Needs no key |
//! | `GET /metrics` | counts and histograms for Prometheus, names begin with `nics_` |
//! | `GET /v1/models`, `/v1/models/{name}` | the model, with `max_model_len` |
//! | `POST /v1/chat/completions` | chats, whole or as server-sent events |
//! | `POST /v1/completions` | texts or token ids, one or many, whole or as server-sent events |
//! | `POST /tokenize` | `{"prompt", "add_special_tokens"}` or `{"messages", ..}` to `{"count", "max_model_len", "tokens"}` |
//! | `POST /detokenize` | `{"tokens"}` to `{"prompt"}`, special tokens as they are written |
//!
//! # Requests
//! OpenAI's fields, and `top_k`, `min_p`, `repetition_penalty`, `ignore_eos`, `chat_template_kwargs`. A field whose value
//! would change the reply and that is not supported (penalties, `logit_bias`, `response_format`, ..) is refused by name;
//! fields that nobody knows are ignored, after the front end has taken its own ([`Frontend::own_fields`]). A `null` counts
//! as absent. Texts in parts are joined by line breaks; other parts are refused. A request without `seed` draws one; choice
//! `i` of a prompt uses `seed + i`, so that a prompt among others is answered as alone.
//!
//! # Replies
//! OpenAI's objects. Where the engine says something of its own about tokens ([`Written::own`]), a choice has `tokens`: a
//! list of those objects, in a stream the ones that belong to the chunk. What it counts of its own ([`Written::counts`]) is
//! in `usage`. When a request has tools and the model can call
//! them ([`ToolFormat`]), calls become `tool_calls`; what is written between the marks and is no call stays in the text,
//! marks included. Tokens of a stop string are counted and their log-probabilities given, though their text is not.
//!
//! # Refusals
//! Always `{"error": {"message", "type", "param", "code"}}`: 400 a wrong field (named by `param`), 401 no key, 403 a foreign
//! `Host` on a server without keys, 404 no such route or model, 405, 408 a body that does not arrive, 413, 415, 429 a full
//! queue (with `Retry-After`), 500 a failure, 503 no engine (any more). What fails before the first token of a stream, and
//! before a heartbeat is due, has its own status too; later failures are the stream's last event, without `[DONE]`. A head
//! that is no HTTP/1 (400) or far too long (414, 431) is refused before any route is known, with a bare status.
//!
//! # Clients that go
//! A closed connection ends its jobs before the engine's next step; closing only the writing side counts as closing. There
//! is one exception: while bytes behind the body (a pipelined request) wait to be read, the end behind them is not seen, and
//! a reply that is not streamed is written to its own end. Clients that send their head or body, or read their reply, too
//! slowly are cut ([`ServerConfig`]).
//!
//! # Starting one
//! [`spawn`] starts the engine thread and gives its [`Handle`]; [`serve`] (or [`serve_blocking`]) answers until SIGTERM or
//! SIGINT, [`start`] in the background until a [`Stopper`] says so. Binaries have `ServeArgs` and `serve_until_signal`
//! (feature `cli`), which loads behind an open port.

mod answer;
mod body;
mod chat;
mod choice;
#[cfg(feature = "cli")]
mod command;
mod completions;
mod config;
mod driver;
mod engine;
mod error;
mod fields;
mod guard;
mod listen;
mod metrics;
mod patient;
mod plan;
mod record;
mod reply;
mod routes;
mod text_engine;

#[cfg(feature = "cli")]
pub use command::{ServeArgs, serve_until_signal};
pub use config::{ApiKeys, ServerConfig};
pub use driver::{
    BoxError, Death, Driver, EngineThread, Failure, Handle, Phase, Refusal, Stats, Update, Updates, spawn,
};
pub use engine::{
    Admission, Counter, Engine, EngineStats, Event, Frontend, Job, JobId, ModelCard, ToolFormat, Written,
};
pub use listen::{Running, ServeError, Server, Stopper, serve, serve_blocking, start};
pub use routes::{ROUTES, Route};
pub use text_engine::{TextEngine, TextSettings};

//! The HTTP server: OpenAI's API over an [`Engine`].

mod answer;
mod body;
mod chat;
mod choice;
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
mod prefix;
mod record;
mod reply;
mod routes;
mod text_engine;

pub use config::{ApiKeys, ServerConfig};
pub use driver::{
    BoxError, Death, Driver, EngineThread, Failure, Handle, Phase, Refusal, Stats, Update, Updates, spawn,
};
pub use engine::{
    Admission, Engine, EngineStats, Event, Frontend, Job, JobId, ModelCard, ToolFormat, Written,
};
pub use listen::{Running, ServeError, Server, Stopper, serve, serve_blocking, start};
pub use routes::{ROUTES, Route};
pub use text_engine::{TextEngine, TextSettings};

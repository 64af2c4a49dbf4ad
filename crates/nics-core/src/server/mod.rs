//! The HTTP server: OpenAI's API over an [`Engine`].

mod driver;
mod engine;

pub use driver::{
    BoxError, Death, Driver, EngineThread, Failure, Handle, Phase, Refusal, Stats, Update, Updates, spawn,
};
pub use engine::{
    Admission, Engine, EngineStats, Event, Frontend, Job, JobId, ModelCard, ToolFormat, Written,
};

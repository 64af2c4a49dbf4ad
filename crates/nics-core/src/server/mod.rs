//! The HTTP server: OpenAI's API over an [`Engine`].

mod engine;

pub use engine::{
    Admission, Engine, EngineStats, Event, Frontend, Job, JobId, ModelCard, ToolFormat, Written,
};

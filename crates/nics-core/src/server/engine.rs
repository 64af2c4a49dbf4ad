//! What a crate gives the server: an [`Engine`], which writes tokens, and a [`Frontend`], which turns requests into
//! token ids.
//!
//! The engine owns all tensors and lives on one thread; it never sees a socket. The front end is plain data shared by
//! all connections; it never sees a tensor. Jobs and events cross between them over channels.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::generate::Finish;
use crate::sampling::Sampling;
use crate::template::Message;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Names a job; never used twice by one server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub u64);

/// One sequence to write. A request for `n` choices becomes `n` jobs with one prompt.
#[derive(Debug, Clone)]
pub struct Job {
    /// Its name.
    pub id: JobId,
    /// What it starts from; not empty, ids within the vocabulary.
    pub prompt: Arc<[u32]>,
    /// How its tokens are chosen; validated.
    pub sampling: Sampling,
    /// The most tokens to write; at least 1, and prompt and new tokens together fit the context.
    pub max_new_tokens: usize,
    /// Tokens that end it; empty when the request ignores them.
    pub eos: Vec<u32>,
    /// Fields of the request that are the engine's own, as [`Frontend::own_fields`] let them through.
    pub own: Map<String, Value>,
}

/// What an engine says to a job.
#[derive(Debug)]
pub enum Admission {
    /// It has been taken in; its events come with the following steps.
    Taken,
    /// There is no room now (sequences or memory): ask again after a step.
    Full,
    /// It can never be taken.
    Refused(Error),
}

/// What happens to a job.
#[derive(Debug)]
pub enum Event {
    /// A token was written.
    Token(Written),
    /// The job has ended by itself; the last event of a job.
    Finished {
        /// Whose end it is.
        job: JobId,
        /// Why.
        finish: Finish,
    },
    /// The job has failed; the last event of a job. Others go on.
    Failed {
        /// Whose end it is.
        job: JobId,
        /// What went wrong.
        error: Error,
    },
}

/// A token that a step wrote.
#[derive(Debug, Clone, Default)]
pub struct Written {
    /// Whose it is.
    pub job: JobId,
    /// Its id. An end token is reported too, before `Finished`.
    pub token: u32,
    /// Its log-probability, when the job's sampling asks for it.
    pub logprob: Option<f32>,
    /// The likeliest tokens with theirs, when asked for.
    pub top: Vec<(u32, f32)>,
    /// What the engine says about the token beyond that (e.g. which model wrote it); goes into the reply as it is.
    pub own: Map<String, Value>,
    /// What the token adds to the engine's own counts of the reply. They are summed up by name, and
    /// [`Frontend::usage`] says what the sums are called in the reply's `usage`.
    pub counts: Vec<(&'static str, u64)>,
}

impl Default for JobId {
    fn default() -> Self {
        Self(u64::MAX)
    }
}

/// Counts for `/metrics`; sums since the start where the name says `total`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Jobs that the engine holds.
    pub running: usize,
    /// Bytes reserved for their keys and values, kept prefixes included.
    pub kv_bytes: usize,
    /// The most that may be reserved.
    pub kv_limit_bytes: usize,
    /// Prompt tokens computed.
    pub prompt_tokens_total: u64,
    /// Prompt tokens taken from kept prefixes instead.
    pub prompt_tokens_reused_total: u64,
    /// Tokens written.
    pub generated_tokens_total: u64,
    /// Calls of [`Engine::step`] that ran a model.
    pub steps_total: u64,
}

/// A number of the engine's own for `/metrics`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Counter {
    /// Its name without the `nics_` before it: lower-case letters, digits and `_`, none of the server's own. One that
    /// ends in `_total` only grows.
    pub name: &'static str,
    /// What it counts, on one line.
    pub help: &'static str,
    /// Where it stands.
    pub value: f64,
}

/// Writes tokens for jobs. One thread owns it and calls one method at a time.
pub trait Engine {
    /// Takes a job in, or says why not. Must be quick: it runs no model, since those that write wait for it.
    fn admit(&mut self, job: &Job) -> Admission;

    /// One step for everything that runs: at most one token for each job. Events go to `emit`.
    ///
    /// # Errors
    /// A failure that concerns all jobs. The server then fails every job that runs, calls [`cancel`](Self::cancel) for
    /// each and goes on with the next ones.
    fn step(&mut self, emit: &mut dyn FnMut(Event)) -> Result<()>;

    /// Ends a job at once and frees what it holds; an unknown one is ignored. No event follows.
    fn cancel(&mut self, job: JobId);

    /// Jobs taken in and not ended: neither by an event nor by [`cancel`](Self::cancel).
    fn running(&self) -> usize;

    /// Prompt tokens of a running job that came from a kept prefix. Asked before each step until the job's first token,
    /// and final before the step that writes it.
    fn cached_tokens(&self, job: JobId) -> usize {
        let _ = job;
        0
    }

    /// Counts for `/metrics`.
    fn stats(&self) -> EngineStats;

    /// Further numbers for `/metrics`, asked for after each step. One whose name cannot stand there is left out, with an
    /// error in the log.
    fn counters(&self) -> Vec<Counter> {
        Vec::new()
    }
}

/// What the model is, for `/v1/models` and for the limits that requests are held to.
#[derive(Debug, Clone)]
pub struct ModelCard {
    /// The name that requests give.
    pub id: String,
    /// Who offers it, for `owned_by`.
    pub owner: String,
    /// Positions that prompt and reply may take together.
    pub context: usize,
    /// Rows of the embedding table.
    pub vocab: usize,
    /// How tokens are chosen when a request does not say.
    pub sampling: Sampling,
    /// The most new tokens when a request does not say.
    pub max_new_tokens: usize,
    /// Tokens that end a reply.
    pub eos: Vec<u32>,
    /// How the model writes a call of a tool, when it can.
    pub tools: Option<ToolFormat>,
}

/// How a model writes a call of a tool: between two special tokens, a JSON object with `name` and `arguments`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ToolFormat {
    /// Begins the call.
    pub start: u32,
    /// Ends it.
    pub end: u32,
}

/// Turns requests into token ids. Shared by all connections.
pub trait Frontend: Send + Sync {
    /// What the model is.
    fn card(&self) -> &ModelCard;

    /// Its tokenizer.
    fn tokenizer(&self) -> &Tokenizer;

    /// Token ids of a conversation up to where the reply begins. `tools` are those of the request, in OpenAI's form.
    ///
    /// # Errors
    /// What the template or the tokenizer refuse: the request is answered with 400 and this text.
    fn chat(
        &self,
        messages: &[Message],
        tools: Option<&[Value]>,
        settings: &Map<String, Value>,
    ) -> Result<Vec<u32>>;

    /// Token ids of a text prompt of `/v1/completions`.
    fn text(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer().encode(text, true)?)
    }

    /// Whether the engine chooses tokens in this way.
    ///
    /// # Errors
    /// `Error::Field` with the field that asks for something else: the request is answered with 400.
    fn check_sampling(&self, sampling: &Sampling) -> Result<()> {
        let _ = sampling;
        Ok(())
    }

    /// The engine's own part of a reply's `usage`, from the sums of [`Written::counts`] over all of its tokens. Fields
    /// that the server itself writes stay the server's.
    fn usage(&self, counts: &BTreeMap<&'static str, u64>) -> Map<String, Value> {
        counts.iter().map(|(name, n)| ((*name).to_owned(), (*n).into())).collect()
    }

    /// Takes out of a request the fields that only this engine knows, checked. `fields` holds what the server itself
    /// has no name for, and `stream`, true or false. What is left out is ignored, as other servers do.
    ///
    /// # Errors
    /// The request is answered with 400, and `Error::Field` names the field.
    fn own_fields(&self, fields: &Map<String, Value>) -> Result<Map<String, Value>> {
        let _ = fields;
        Ok(Map::new())
    }
}

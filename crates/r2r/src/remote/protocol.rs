//! What is asked of a server and how its replies are read, whatever it speaks.

use std::sync::atomic::AtomicBool;

use nics_core::sampling::Sampling;
use serde::Serialize;
use serde_json::{Map, Value};

use super::fault::Fault;
use super::spec::Engine;
use super::{completions, sglang};

/// One sequence of a call.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    /// All of its tokens.
    pub ids: Vec<u32>,
    /// How the token is chosen; its seed is that of the position.
    pub sampling: Sampling,
    /// Ids that may not be chosen.
    pub banned: Vec<u32>,
}

impl Ask {
    /// Whether the token is drawn, so that the seed matters.
    pub fn is_drawn(&self) -> bool {
        self.sampling.temperature > 0.0
    }
}

/// How a token is chosen, in the words that both protocols share: every parameter, since those left out are taken from the
/// model's own generation settings.
#[derive(Serialize)]
pub(super) struct Choosing {
    temperature: f32,
    top_p: f32,
    /// -1 for all: 0 is not every version's word for it.
    top_k: i64,
    min_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    /// So that an end token comes back as any other.
    ignore_eos: bool,
    skip_special_tokens: bool,
    #[serde(skip_serializing_if = "Map::is_empty")]
    logit_bias: Map<String, Value>,
}

impl From<&Ask> for Choosing {
    fn from(ask: &Ask) -> Self {
        let sampling = &ask.sampling;
        Self {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: if sampling.top_k == 0 { -1 } else { sampling.top_k as i64 },
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            ignore_eos: true,
            skip_special_tokens: false,
            logit_bias: ask.banned.iter().map(|id| (id.to_string(), (-100).into())).collect(),
        }
    }
}

/// What a server gives for one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chosen {
    pub token: u32,
    /// Tokens that it had cached, where it says so.
    pub cached: Option<usize>,
}

/// What a server says for a whole call.
pub(super) struct Given {
    /// A token for each sequence, in their order.
    pub chosen: Vec<Chosen>,
    /// Tokens that it had cached, all sequences together, where it says so.
    pub cached: Option<usize>,
}

/// How one server is spoken to.
pub(super) struct Protocol {
    pub engine: Engine,
    pub model: String,
    pub cache_salt: Option<String>,
    /// Whether the server does not give ids unless they are asked for as the tokens of log-probabilities.
    pub ids_by_logprobs: AtomicBool,
}

impl Protocol {
    pub fn new(engine: Engine, model: String, cache_salt: Option<String>) -> Self {
        Self { engine, model, cache_salt, ids_by_logprobs: AtomicBool::new(false) }
    }

    /// Whether two sequences may share a call.
    pub fn together(&self, a: &Ask, b: &Ask) -> bool {
        match self.engine {
            // Sampling is each sequence's own.
            Engine::Sglang => true,
            // A call has one set of parameters, its seed among them.
            Engine::Vllm | Engine::Nics => {
                let alike = |a: &Sampling, b: &Sampling| {
                    (a.temperature, a.top_k, a.top_p, a.min_p, a.repetition_penalty)
                        == (b.temperature, b.top_k, b.top_p, b.min_p, b.repetition_penalty)
                };
                !a.is_drawn() && alike(&a.sampling, &b.sampling) && a.banned.is_empty() && b.banned.is_empty()
            }
        }
    }

    /// Whether an id can be kept from being chosen.
    pub fn can_ban(&self) -> bool {
        self.engine != Engine::Nics
    }

    /// The path of a call.
    pub fn path(&self) -> &'static str {
        match self.engine {
            Engine::Sglang => "/generate",
            Engine::Vllm | Engine::Nics => "/v1/completions",
        }
    }

    /// The body of a call for some sequences, which go [together](Self::together).
    pub fn body(&self, asks: &[&Ask]) -> String {
        match self.engine {
            Engine::Sglang => sglang::body(asks),
            Engine::Vllm | Engine::Nics => completions::body(self, asks),
        }
    }

    /// Reads the reply to a call for `count` sequences.
    pub fn read(&self, reply: &Value, count: usize) -> Result<Given, Fault> {
        match self.engine {
            Engine::Sglang => sglang::read(reply, count),
            Engine::Vllm | Engine::Nics => completions::read(self, reply, count),
        }
    }
}

/// Puts what a server gave in the order of the sequences: by `index` where entries have one, else as they come.
pub(super) fn in_order(entries: &[Value], count: usize) -> Result<Vec<&Value>, Fault> {
    if entries.len() != count {
        return Err(Fault::Protocol(format!("it has {} answers for {count} sequences", entries.len())));
    }
    let mut ordered: Vec<Option<&Value>> = vec![None; count];
    for (i, entry) in entries.iter().enumerate() {
        let index = match &entry["index"] {
            Value::Null => i,
            index => index.as_u64().map_or(usize::MAX, |i| i as usize),
        };
        match ordered.get_mut(index) {
            Some(place @ None) => *place = Some(entry),
            Some(Some(_)) => return Err(Fault::Protocol(format!("it has two answers with index {index}"))),
            None => {
                let found = &entry["index"];
                return Err(Fault::Protocol(format!(
                    "an answer has index {found}, expected 0 to {}",
                    count - 1
                )));
            }
        }
    }
    Ok(ordered.into_iter().flatten().collect())
}

/// The one id of a list.
pub(super) fn only_id(list: &Value, what: &str) -> Result<u32, Fault> {
    let wrong = |found: &str| Fault::Protocol(format!("{what} is {found}, expected one token id"));
    let list = list.as_array().ok_or_else(|| wrong("missing"))?;
    match list.as_slice() {
        [id] => id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| wrong(&id.to_string())),
        more => Err(wrong(&format!("a list of {}", more.len()))),
    }
}

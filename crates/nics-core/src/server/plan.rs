//! A request for text, read and checked: the fields that `/v1/chat/completions` and `/v1/completions` share, and the
//! jobs that they become.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::config::ServerConfig;
use super::driver::Handle;
use super::engine::{Frontend, Job, ModelCard};
use super::error::ApiError;
use super::fields::{Fields, kind};
use crate::sampling::Sampling;

/// What a request asks for, in the form in which it is run.
#[derive(Debug)]
pub(super) struct Plan {
    pub form: Form,
    pub prompts: Vec<Prompt>,
    pub options: Options,
}

/// Which of the two APIs speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Chat {
        /// Whether calls of tools are looked for.
        tools: bool,
    },
    Text,
}

#[derive(Debug)]
pub(super) struct Prompt {
    pub ids: Arc<[u32]>,
    /// Its text, where the reply repeats it.
    pub echo: Option<String>,
}

/// What both APIs share.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools)] // The API's own fields.
pub(super) struct Options {
    pub n: usize,
    /// Its seed is that of the first choice of each prompt.
    pub sampling: Sampling,
    /// As the request gives it, with the field's name.
    pub max_new: Option<(usize, &'static str)>,
    pub stops: Vec<String>,
    pub ignore_eos: bool,
    pub stream: bool,
    pub include_usage: bool,
    /// Whether choices have the ids of their tokens.
    pub token_ids: bool,
    /// Fields of the engine's own.
    pub own: Map<String, Value>,
}

impl Options {
    /// Takes the shared fields out of a request; those that are left go to the front end. `logprobs` has been read.
    pub fn read(
        mut fields: Fields,
        logprobs: Option<usize>,
        config: &ServerConfig,
        frontend: &dyn Frontend,
    ) -> Result<Self, ApiError> {
        let f = &mut fields;
        let card = frontend.card();
        let n = f.whole("n", &(1..=config.max_n))?.unwrap_or(1);
        let max_new = max_new(f)?;
        let sampling = sampling(f, logprobs, card)?;
        frontend.check_sampling(&sampling).map_err(|e| ApiError::of_request(&e))?;
        let stops = stops(f, config)?;
        let ignore_eos = f.boolean("ignore_eos")?.unwrap_or(false);
        let stream = f.boolean("stream")?.unwrap_or(false);
        let token_ids = f.boolean("return_token_ids")?.unwrap_or(false);
        let include_usage = include_usage(f, stream)?;
        for name in ["presence_penalty", "frequency_penalty"] {
            f.neutral(name, |v| v.as_f64() == Some(0.0))?;
        }
        f.neutral("logit_bias", |v| v.as_object().is_some_and(Map::is_empty))?;
        f.neutral("response_format", |v| v.get("type").and_then(Value::as_str) == Some("text"))?;
        f.neutral("suffix", |v| v.as_str() == Some(""))?;
        f.neutral("best_of", |v| v.as_u64() == Some(n as u64))?;
        f.string("user")?;
        let mut rest = fields.rest();
        rest.insert("stream".into(), stream.into());
        let own = frontend.own_fields(&rest).map_err(|e| ApiError::of_request(&e))?;
        Ok(Self { n, sampling, max_new, stops, ignore_eos, stream, include_usage, token_ids, own })
    }
}

/// Holds the field `model` against the model that there is; a request without it means that one.
pub(super) fn check_model(fields: &mut Fields, card: &ModelCard) -> Result<(), ApiError> {
    match fields.string("model")? {
        Some(name) if name != card.id => Err(no_model(&name, card)),
        _ => Ok(()),
    }
}

/// 404 for a model that is not here.
pub(super) fn no_model(name: &str, card: &ModelCard) -> ApiError {
    let name: String = name.chars().take(80).collect();
    let message = format!("there is no model `{name}` here, only `{}`", card.id);
    ApiError {
        status: axum::http::StatusCode::NOT_FOUND,
        code: Some("model_not_found"),
        ..ApiError::field("model", message)
    }
}

fn max_new(f: &mut Fields) -> Result<Option<(usize, &'static str)>, ApiError> {
    let range = 1..=usize::MAX;
    let old = f.whole("max_tokens", &range)?.map(|n| (n, "max_tokens"));
    let new = f.whole("max_completion_tokens", &range)?.map(|n| (n, "max_completion_tokens"));
    match (old, new) {
        (Some((a, _)), Some((b, name))) if a != b => Err(ApiError::field(
            name,
            format!("max_tokens is {a} and max_completion_tokens is {b}, expected one of them"),
        )),
        (old, new) => Ok(new.or(old)),
    }
}

fn sampling(f: &mut Fields, logprobs: Option<usize>, card: &ModelCard) -> Result<Sampling, ApiError> {
    let default = &card.sampling;
    let top_k = match f.take("top_k") {
        None => default.top_k,
        // As other servers write "all of them".
        Some(v) if v.as_i64() == Some(-1) => 0,
        Some(v) => v.as_u64().and_then(|k| usize::try_from(k).ok()).filter(|&k| k <= card.vocab).ok_or_else(
            || ApiError::expected("top_k", &v, format_args!("a whole number from 0 to {}", card.vocab)),
        )?,
    };
    let seed = f.take("seed").map(|v| {
        let seed = v.as_u64().or_else(|| v.as_i64().map(i64::cast_unsigned));
        seed.ok_or_else(|| ApiError::expected("seed", &v, "a whole number of 64 bits"))
    });
    let sampling = Sampling {
        temperature: f.number("temperature", &(0.0..=100.0), "from 0 to 100")?.unwrap_or(default.temperature),
        top_k,
        top_p: f.number("top_p", &(f32::MIN_POSITIVE..=1.0), "above 0 and up to 1")?.unwrap_or(default.top_p),
        min_p: f.number("min_p", &(0.0..=1.0), "from 0 to 1")?.unwrap_or(default.min_p),
        repetition_penalty: f
            .number("repetition_penalty", &(1e-3..=1e3), "from 0.001 to 1000")?
            .unwrap_or(default.repetition_penalty),
        penalize_prompt: default.penalize_prompt,
        // Without a seed of its own a request draws one: from the system's randomness by way of the thread's generator.
        seed: seed.transpose()?.unwrap_or_else(rand::random),
        logprobs,
    };
    sampling.validate().map_err(|e| ApiError::bad(e.to_string()))?;
    Ok(sampling)
}

fn stops(f: &mut Fields, config: &ServerConfig) -> Result<Vec<String>, ApiError> {
    let list = match f.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(one) => vec![one],
    };
    if list.len() > config.max_stops {
        let message = format!("stop has {} strings, expected at most {}", list.len(), config.max_stops);
        return Err(ApiError::field("stop", message));
    }
    list.into_iter()
        .map(|v| match v {
            Value::String(s) if !s.is_empty() && s.len() <= config.max_stop_bytes => Ok(s),
            Value::String(s) => Err(ApiError::field(
                "stop",
                format!("stop has a string of {} bytes, expected 1 to {}", s.len(), config.max_stop_bytes),
            )),
            other => Err(ApiError::field(
                "stop",
                format!("stop has {}, expected a string or a list of strings", kind(&other)),
            )),
        })
        .collect()
}

fn include_usage(f: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(options) = f.object("stream_options")? else { return Ok(false) };
    if !stream {
        return Err(ApiError::field("stream_options", "stream_options is only for requests with stream"));
    }
    match options.get("include_usage") {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(usage)) => Ok(*usage),
        Some(other) => Err(ApiError::expected("stream_options.include_usage", other, "true or false")),
    }
}

impl Plan {
    /// Holds the plan against the context and the limits. `param` names the field of the prompts.
    pub fn check(&self, param: &str, card: &ModelCard, config: &ServerConfig) -> Result<(), ApiError> {
        let choices = self.prompts.len().saturating_mul(self.options.n);
        if choices > config.max_choices {
            return Err(ApiError::field(
                param,
                format!("the request asks for {choices} sequences, expected at most {}", config.max_choices),
            ));
        }
        for prompt in &self.prompts {
            let len = prompt.ids.len();
            if len == 0 {
                return Err(ApiError::field(param, "the prompt is empty: it has no token to continue from"));
            }
            if let Some(id) = prompt.ids.iter().find(|&&id| id as usize >= card.vocab) {
                return Err(ApiError::field(
                    param,
                    format!("prompt token {id} is outside the vocabulary of {}", card.vocab),
                ));
            }
            let context = card.context;
            if len >= context {
                return Err(ApiError::context(
                    param,
                    format!("the prompt has {len} tokens, which leaves no room in the context of {context}"),
                ));
            }
            if let Some((new, name)) = self.options.max_new
                && new > context - len
            {
                return Err(ApiError::context(
                    name,
                    format!(
                        "the prompt has {len} tokens and {name} is {new}: together more than the context of {context}"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// The jobs, `n` for each prompt in turn. Choice `i` of a prompt draws with seed `+ i`, so that a prompt among others
    /// is answered as alone.
    pub fn jobs(&self, card: &ModelCard, handle: &Handle) -> Vec<Job> {
        let options = &self.options;
        let eos = if options.ignore_eos { Vec::new() } else { card.eos.clone() };
        let job = |prompt: &Prompt, choice: usize| {
            let room = card.context - prompt.ids.len();
            let seed = options.sampling.seed.wrapping_add(choice as u64);
            Job {
                id: handle.job_id(),
                prompt: prompt.ids.clone(),
                sampling: Sampling { seed, ..options.sampling.clone() },
                max_new_tokens: options.max_new.map_or(card.max_new_tokens.max(1), |(n, _)| n).min(room),
                eos: eos.clone(),
                own: options.own.clone(),
            }
        };
        self.prompts
            .iter()
            .flat_map(|prompt| (0..options.n).map(move |i| (prompt, i)))
            .map(|(p, i)| job(p, i))
            .collect()
    }
}

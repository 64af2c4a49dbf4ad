//! The request of `/v1/completions`.

use serde_json::Value;

use super::config::ServerConfig;
use super::engine::Frontend;
use super::error::ApiError;
use super::fields::{Fields, kind};
use super::plan::{Form, Options, Plan, Prompt, check_model};

/// Reads a request: a string, a list of strings, a list of token ids, or a list of lists of token ids.
pub(super) fn plan(body: &[u8], config: &ServerConfig, frontend: &dyn Frontend) -> Result<Plan, ApiError> {
    let mut fields = Fields::parse(body)?;
    check_model(&mut fields, frontend.card())?;
    let prompt = fields.take("prompt").ok_or_else(|| ApiError::field("prompt", "prompt is missing"))?;
    let echo = fields.boolean("echo")?.unwrap_or(false);
    let logprobs = match fields.take("logprobs") {
        // The chat API's form, in which some clients say "none".
        None | Some(Value::Bool(false)) => None,
        Some(v) => {
            Some(v.as_u64().map(|n| n as usize).filter(|n| *n <= config.max_logprobs).ok_or_else(|| {
                ApiError::expected(
                    "logprobs",
                    &v,
                    format_args!("a whole number from 0 to {}", config.max_logprobs),
                )
            })?)
        }
    };
    if echo && logprobs.is_some() {
        let message = "echo together with logprobs is not supported by this server";
        return Err(ApiError::field("echo", message).with_code("unsupported_parameter"));
    }
    let options = Options::read(fields, logprobs, config, frontend)?;
    let parts = split(prompt)?;
    // Before the work of encoding them.
    if parts.len() > config.max_choices {
        return Err(ApiError::field(
            "prompt",
            format!("prompt has {} prompts, expected at most {}", parts.len(), config.max_choices),
        ));
    }
    let prompts = parts
        .into_iter()
        .map(|part| {
            let (ids, text) = match part {
                Part::Text(text) => {
                    let ids = frontend.text(&text).map_err(|e| ApiError::refused("prompt", &e))?;
                    (ids, Some(text))
                }
                Part::Ids(ids) => (ids, None),
            };
            let echo = match (echo, text) {
                (false, _) => None,
                (true, Some(text)) => Some(text),
                (true, None) => {
                    let text = frontend.tokenizer().decode(&ids, true);
                    Some(text.map_err(|e| ApiError::field("prompt", e.to_string()))?)
                }
            };
            Ok(Prompt { ids: ids.into(), echo })
        })
        .collect::<Result<_, ApiError>>()?;
    let plan = Plan { form: Form::Text, prompts, options };
    plan.check("prompt", frontend.card(), config)?;
    Ok(plan)
}

enum Part {
    Text(String),
    Ids(Vec<u32>),
}

fn split(prompt: Value) -> Result<Vec<Part>, ApiError> {
    let wrong = |found: &Value| {
        ApiError::field(
            "prompt",
            format!(
                "prompt has {}, expected a string, a list of strings, a list of token ids or a list of such lists",
                kind(found)
            ),
        )
    };
    match prompt {
        Value::String(text) => Ok(vec![Part::Text(text)]),
        Value::Array(list) => match list.first() {
            None => Err(ApiError::field("prompt", "prompt is an empty list")),
            Some(Value::Number(_)) => Ok(vec![Part::Ids(ids("prompt", &list)?)]),
            Some(_) => list
                .into_iter()
                .map(|part| match part {
                    Value::String(text) => Ok(Part::Text(text)),
                    Value::Array(list) => Ok(Part::Ids(ids("prompt", &list)?)),
                    other => Err(wrong(&other)),
                })
                .collect(),
        },
        other => Err(wrong(&other)),
    }
}

/// Token ids of a list.
pub(super) fn ids(param: &str, list: &[Value]) -> Result<Vec<u32>, ApiError> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    list.iter()
        .map(|v| {
            id(v).ok_or_else(|| {
                ApiError::field(param, format!("{param} has {} where a token id is expected", kind(v)))
            })
        })
        .collect()
}

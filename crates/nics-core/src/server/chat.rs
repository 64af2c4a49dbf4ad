//! The request of `/v1/chat/completions`.

use serde_json::{Map, Value};

use super::config::ServerConfig;
use super::engine::Frontend;
use super::error::ApiError;
use super::fields::{Fields, kind};
use super::plan::{Form, Options, Plan, Prompt, check_model};
use crate::template::{Content, Message};

/// Reads a request.
pub(super) fn plan(body: &[u8], config: &ServerConfig, frontend: &dyn Frontend) -> Result<Plan, ApiError> {
    let mut fields = Fields::parse(body)?;
    let card = frontend.card();
    check_model(&mut fields, card)?;
    let conversation = Conversation::take(&mut fields)?;
    fields.boolean("parallel_tool_calls")?;
    for name in ["functions", "function_call"] {
        fields.neutral(name, |v| v.as_array().is_some_and(Vec::is_empty) || v.as_str() == Some("none"))?;
    }
    fields.neutral("echo", |v| v.as_bool() == Some(false))?;
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.whole("top_logprobs", &(0..=config.max_logprobs))?;
    if top.is_some_and(|n| n > 0) && !wanted {
        return Err(ApiError::field("top_logprobs", "top_logprobs is only for requests with logprobs"));
    }
    let logprobs = wanted.then(|| top.unwrap_or(0));
    let options = Options::read(fields, logprobs, config, frontend)?;
    let ids = conversation.ids(frontend)?;
    let form = Form::Chat { tools: conversation.tools.is_some() && card.tools.is_some() };
    let plan = Plan { form, prompts: vec![Prompt { ids: ids.into(), echo: None }], options };
    plan.check("messages", card, config)?;
    Ok(plan)
}

/// Messages and tools, as the template takes them.
pub(super) struct Conversation {
    messages: Vec<Message>,
    tools: Option<Vec<Value>>,
    /// `chat_template_kwargs`: what else the template is to see.
    settings: Map<String, Value>,
}

impl Conversation {
    /// Takes `messages`, `tools`, `tool_choice` and `chat_template_kwargs` out of a request.
    pub fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let list = fields.list("messages")?;
        let list = list.ok_or_else(|| ApiError::field("messages", "messages is missing"))?;
        if list.is_empty() {
            return Err(ApiError::field("messages", "messages is an empty list"));
        }
        let messages = list
            .into_iter()
            .enumerate()
            .map(|(i, v)| message(&format!("messages[{i}]"), v))
            .collect::<Result<_, _>>()?;
        let tools = tools(fields)?;
        let settings = fields.object("chat_template_kwargs")?.unwrap_or_default();
        Ok(Self { messages, tools, settings })
    }

    /// Token ids up to where the reply begins.
    pub fn ids(&self, frontend: &dyn Frontend) -> Result<Vec<u32>, ApiError> {
        let ids = frontend.chat(&self.messages, self.tools.as_deref(), &self.settings);
        ids.map_err(|e| ApiError::refused("messages", &e))
    }
}

fn message(at: &str, value: Value) -> Result<Message, ApiError> {
    let Value::Object(mut fields) = value else {
        return Err(ApiError::field(at, format!("{at} is {}, expected an object", kind(&value))));
    };
    let role = match fields.remove("role") {
        Some(Value::String(role)) if !role.is_empty() => role,
        Some(other) => return Err(ApiError::expected(&format!("{at}.role"), &other, "a role")),
        None => return Err(ApiError::field(format!("{at}.role"), format!("{at}.role is missing"))),
    };
    let content = match fields.remove("content") {
        Some(Value::String(text)) => Some(Content::Text(text)),
        Some(Value::Array(parts)) => Some(Content::Text(text_of(&format!("{at}.content"), &parts)?)),
        // A turn that only calls tools.
        None if role == "assistant" => None,
        Some(Value::Null) if role == "assistant" => Some(Content::Null(())),
        None => return Err(ApiError::field(format!("{at}.content"), format!("{at}.content is missing"))),
        Some(other) => {
            let param = format!("{at}.content");
            return Err(ApiError::expected(&param, &other, "a string or a list of parts"));
        }
    };
    if let Some(calls) = fields.get_mut("tool_calls") {
        open_arguments(&format!("{at}.tool_calls"), calls)?;
    }
    Ok(Message { role, content, extra: fields })
}

/// The text of a content in parts, a line break between them.
fn text_of(at: &str, parts: &[Value]) -> Result<String, ApiError> {
    let mut texts = Vec::with_capacity(parts.len());
    for (i, part) in parts.iter().enumerate() {
        let string = |key: &str| {
            let param = format!("{at}[{i}].{key}");
            let message = format!("{param} is missing or no string");
            part.get(key).and_then(Value::as_str).ok_or_else(|| ApiError::field(param, message))
        };
        let kind = string("type")?;
        if kind != "text" {
            let kind: String = kind.chars().take(40).collect();
            return Err(ApiError::field(
                format!("{at}[{i}].type"),
                format!("content parts of type `{kind}` are not supported by this server, only `text`"),
            ));
        }
        texts.push(string("text")?);
    }
    Ok(texts.join("\n"))
}

/// OpenAI's API carries a call's arguments as JSON in a string; templates write them as an object.
fn open_arguments(at: &str, calls: &mut Value) -> Result<(), ApiError> {
    let calls = match calls {
        Value::Null => return Ok(()),
        Value::Array(calls) => calls,
        other => return Err(ApiError::expected(at, other, "a list of calls")),
    };
    for (i, call) in calls.iter_mut().enumerate() {
        if call.pointer("/function/name").and_then(Value::as_str).is_none() {
            let param = format!("{at}[{i}].function.name");
            return Err(ApiError::field(param.clone(), format!("{param} is missing or no string")));
        }
        if let Some(arguments) = call.pointer_mut("/function/arguments")
            && let Some(text) = arguments.as_str()
            && let Ok(object @ Value::Object(_)) = serde_json::from_str(text)
        {
            *arguments = object;
        }
    }
    Ok(())
}

/// The tools that the model is to see: none where `tool_choice` says so.
fn tools(fields: &mut Fields) -> Result<Option<Vec<Value>>, ApiError> {
    let tools = fields.list("tools")?.unwrap_or_default();
    for (i, tool) in tools.iter().enumerate() {
        let named =
            tool.pointer("/function/name").and_then(Value::as_str).is_some_and(|name| !name.is_empty());
        if tool.get("type").and_then(Value::as_str) != Some("function") || !named {
            return Err(ApiError::field(
                format!("tools[{i}]"),
                format!("tools[{i}] is no {{\"type\": \"function\", \"function\": {{\"name\": .., ..}}}}"),
            ));
        }
    }
    match fields.take("tool_choice") {
        None => Ok((!tools.is_empty()).then_some(tools)),
        Some(Value::String(choice)) if choice == "auto" => Ok((!tools.is_empty()).then_some(tools)),
        Some(Value::String(choice)) if choice == "none" => Ok(None),
        Some(other) => {
            let error = ApiError::expected("tool_choice", &other, "auto or none: this server forces no call");
            Err(error.with_code("unsupported_parameter"))
        }
    }
}

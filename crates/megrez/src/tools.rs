//! Tools in a conversation: from the form of OpenAI's API to turns of Megrez.
//!
//! Megrez's template knows neither tools nor calls. The tools are announced at the end of the system turn; a result
//! (`tool`) is a turn of the role `observation`; a call is `<|function_start|>{"name": .., "arguments": ..}<|function_end|>`
//! in the assistant's turn, its marks special tokens. A template that mentions `tools` itself gets tools and calls as they
//! are.

use nics_core::template::{Content, Message, RenderOptions};
use nics_core::tokenizer::Tokenizer;
use nics_core::{Error, Result};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use serde_json::{Map, Value};

use crate::prompt::{Part, Prompter, Turn};

/// Begins a call of a tool.
pub const FUNCTION_START: &str = "<|function_start|>";
/// Ends a call of a tool.
pub const FUNCTION_END: &str = "<|function_end|>";

/// What stands behind the system turn when there are tools: `sentence`, then their JSON schemas, indented by four, a
/// blank line between two.
///
/// # Errors
/// `Error::Input` for a tool without a name.
pub fn announce(sentence: &str, tools: &[Value]) -> Result<String> {
    let mut schemas = Vec::with_capacity(tools.len());
    for (i, tool) in tools.iter().enumerate() {
        let function = tool.get("function").unwrap_or(tool);
        if function.get("name").and_then(Value::as_str).is_none_or(str::is_empty) {
            return Err(Error::Input(format!(
                "tool {i} has no name: expected {{\"type\": \"function\", \"function\": {{\"name\": ..}}}}, found {tool}"
            )));
        }
        schemas.push(json_text(function, PrettyFormatter::with_indent(b"    ")));
    }
    Ok(format!("{sentence}\n{}", schemas.join("\n\n")))
}

/// Token ids of a conversation up to where the reply begins, with `tools` announced by `sentence`. `settings` are
/// further variables of the template.
///
/// # Errors
/// What is wrong with messages or tools, or what template and tokenizer refuse.
pub fn encode(
    prompter: &Prompter,
    sentence: &str,
    messages: &[Message],
    tools: &[Value],
    settings: &Map<String, Value>,
) -> Result<Vec<u32>> {
    if messages.is_empty() {
        return Err(Error::input("the conversation is empty"));
    }
    let mut options =
        RenderOptions { add_generation_prompt: true, extra: settings.clone(), ..RenderOptions::default() };
    if prompter.template_has_tools() {
        let turns: Vec<Turn> =
            messages.iter().map(|m| handed_over(&prompter.tokenizer, m)).collect::<Result<_>>()?;
        if !tools.is_empty() {
            let tools = Value::from(tools.to_vec());
            plain(&prompter.tokenizer, "a tool", &tools)?;
            options.tools = Some(tools);
        }
        return prompter.encode_turns(&turns, &options);
    }
    let mut turns: Vec<Turn> = messages.iter().map(turn).collect::<Result<_>>()?;
    if !tools.is_empty() {
        let announcement = announce(sentence, tools)?;
        if turns[0].role != "system" {
            turns.insert(0, Turn::text("system", prompter.default_system()?));
        }
        turns[0].parts.push(Part::Text(format!("\n{announcement}")));
    }
    prompter.encode_turns(&turns, &options)
}

/// A message as a turn of Megrez.
fn turn(message: &Message) -> Result<Turn> {
    let role = match message.role.as_str() {
        "tool" | "function" => "observation",
        "developer" => "system",
        other => other,
    };
    let mut parts = vec![Part::Text(text(message)?)];
    for (name, arguments) in calls(message)? {
        let call = Value::Object(
            [("name".into(), name.into()), ("arguments".into(), arguments)].into_iter().collect(),
        );
        parts.push(Part::Special(FUNCTION_START.into()));
        parts.push(Part::Text(json_text(&call, Spaced)));
        parts.push(Part::Special(FUNCTION_END.into()));
    }
    Ok(Turn::new(role, parts, Map::new()))
}

/// A message for a template that knows tools: as it is, the arguments of calls as objects.
fn handed_over(tokenizer: &Tokenizer, message: &Message) -> Result<Turn> {
    let mut extra = message.extra.clone();
    // What the template writes by itself cannot be told from its own special tokens.
    plain(tokenizer, "a message's field", &Value::Object(extra.clone()))?;
    let arguments = calls(message)?;
    if let Some(list) = extra.get_mut("tool_calls").and_then(Value::as_array_mut) {
        for (call, (_, arguments)) in list.iter_mut().zip(arguments) {
            call["function"]["arguments"] = arguments;
        }
    }
    Ok(Turn::new(&message.role, vec![Part::Text(text(message)?)], extra))
}

fn plain(tokenizer: &Tokenizer, what: &str, value: &Value) -> Result<()> {
    if tokenizer.has_special(&value.to_string()) {
        return Err(Error::Input(format!("{what} spells a special token of the model, which it may not")));
    }
    Ok(())
}

/// The text of a message; parts are joined by line breaks.
fn text(message: &Message) -> Result<String> {
    Ok(match &message.content {
        None | Some(Content::Null(())) => String::new(),
        Some(Content::Text(text)) => text.clone(),
        Some(Content::Object(object)) => json_text(&Value::Object(object.clone()), Spaced),
        Some(Content::Parts(parts)) => {
            let texts = parts.iter().map(|part| {
                let kind = part.get("type").and_then(Value::as_str).unwrap_or("without type");
                part.get("text").and_then(Value::as_str).filter(|_| kind == "text").ok_or_else(|| {
                    Error::Input(format!(
                        "a content part of type `{kind}` in a message of the role `{}`: this model reads `text` alone",
                        message.role
                    ))
                })
            });
            texts.collect::<Result<Vec<_>>>()?.join("\n")
        }
    })
}

/// Name and arguments of the calls of a message.
fn calls(message: &Message) -> Result<Vec<(String, Value)>> {
    let list = match message.extra.get("tool_calls") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(Error::Input(format!("tool_calls is a list of calls, found {other}"))),
    };
    let read = |call: &Value| {
        let function = call.get("function").unwrap_or(call);
        let name = function.get("name").and_then(Value::as_str);
        let arguments = match function.get("arguments") {
            // OpenAI's API carries them as a text of JSON.
            Some(Value::String(text)) if text.trim().is_empty() => Some(Value::Object(Map::new())),
            Some(Value::String(text)) => serde_json::from_str(text).ok(),
            other => other.cloned(),
        };
        name.zip(arguments).map(|(name, arguments)| (name.to_owned(), arguments)).ok_or_else(|| {
            Error::Input(format!(
                "a call of tool_calls needs function.name and function.arguments (a text of JSON), found {call}"
            ))
        })
    };
    list.iter().map(read).collect()
}

/// JSON as Python's `json.dumps` spaces it, in one line.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

/// A value in one line, as the model writes calls: `{"name": "f", "arguments": {}}`.
pub fn one_line(value: &Value) -> String {
    json_text(value, Spaced)
}

fn json_text(value: &Value, formatter: impl Formatter) -> String {
    let mut bytes = Vec::new();
    // Writing a value to memory does not fail.
    let _ = value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter));
    String::from_utf8(bytes).unwrap_or_default()
}

//! One choice of a reply: tokens in, what its client is told out.
//!
//! Streamed and whole replies run through the same [`Choice`], so that the pieces of a stream put together are exactly
//! the whole.

use serde_json::{Map, Value};

use super::engine::{ToolFormat, Written};
use crate::Result;
use crate::text::TextStream;
use crate::tokenizer::Tokenizer;

/// What has become certain of a choice since the last time.
#[derive(Debug, Default)]
pub(super) struct Delta {
    pub pieces: Vec<Piece>,
    /// Of the tokens whose text is out, and of those that have none.
    pub logprobs: Vec<Logprob>,
    /// What the engine said of tokens, one entry for each that it said something about.
    pub own: Vec<Map<String, Value>>,
    /// Ids of the tokens, end tokens included; empty unless asked for.
    pub ids: Vec<u32>,
}

impl Delta {
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty() && self.logprobs.is_empty() && self.own.is_empty() && self.ids.is_empty()
    }
}

#[derive(Debug, PartialEq)]
pub(super) enum Piece {
    Text(String),
    Call(Call),
}

/// A call of a tool.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Call {
    /// Counted from 0 within the choice.
    pub index: usize,
    pub id: String,
    pub name: String,
    /// JSON.
    pub arguments: String,
}

/// A token with its log-probability and those of the likeliest ones.
#[derive(Debug)]
pub(super) struct Logprob {
    pub bytes: Vec<u8>,
    pub of_token: f32,
    pub top: Vec<(Vec<u8>, f32)>,
}

/// Turns the tokens of one job into text and calls of tools.
pub(super) struct Choice<'a> {
    tokenizer: &'a Tokenizer,
    text: TextStream<'a>,
    tools: Option<ToolFormat>,
    /// Whether its client asks for ids.
    ids: bool,
    /// Tokens of a call that has begun, its markers included.
    call: Option<Vec<u32>>,
    calls: usize,
    /// No text has come since the last call: white space is left out until some comes.
    after_call: bool,
    waiting: Delta,
}

impl<'a> Choice<'a> {
    /// A choice that ends at any of `stops`; calls are looked for when `tools` says how they are written; `ids` says whether
    /// its client wants the tokens' ids.
    pub fn new(tokenizer: &'a Tokenizer, stops: &[String], tools: Option<ToolFormat>, ids: bool) -> Self {
        let text = TextStream::new(tokenizer, stops);
        Self {
            tokenizer,
            text,
            tools,
            ids,
            call: None,
            calls: 0,
            after_call: false,
            waiting: Delta::default(),
        }
    }

    /// Whether a stop string was met: nothing that follows belongs to the choice.
    pub fn stopped(&self) -> bool {
        self.text.stopped().is_some()
    }

    /// Whether it has called a tool.
    pub fn has_calls(&self) -> bool {
        self.calls > 0
    }

    /// Takes a token; `ends` says that it is an end token, which has no text.
    pub fn push(&mut self, written: Written, ends: bool) -> Result<Delta> {
        if let Some(of_token) = written.logprob.filter(|_| !ends) {
            let top = written.top.iter().map(|&(id, p)| (self.bytes(id), p)).collect();
            self.waiting.logprobs.push(Logprob { bytes: self.bytes(written.token), of_token, top });
        }
        if !written.own.is_empty() {
            self.waiting.own.push(written.own);
        }
        if self.ids {
            self.waiting.ids.push(written.token);
        }
        if !ends {
            self.token(written.token)?;
        }
        Ok(if self.waiting.pieces.is_empty() { Delta::default() } else { std::mem::take(&mut self.waiting) })
    }

    /// Ends the choice: what was held back.
    pub fn finish(&mut self) -> Result<Delta> {
        let rest = self.text.finish()?;
        self.say(&rest);
        if let Some(tokens) = self.call.take() {
            let text = self.tokenizer.decode(&tokens, false)?;
            self.say(&text);
        }
        Ok(std::mem::take(&mut self.waiting))
    }

    fn bytes(&self, id: u32) -> Vec<u8> {
        self.tokenizer.token_bytes(id).unwrap_or_default()
    }

    fn token(&mut self, token: u32) -> Result<()> {
        match (self.tools, &mut self.call) {
            (Some(format), Some(tokens)) => {
                tokens.push(token);
                if token == format.end {
                    let tokens = self.call.take().unwrap_or_default();
                    self.end_call(&tokens)?;
                }
            }
            (Some(format), None) if token == format.start => {
                let rest = self.text.finish()?;
                self.say(&rest);
                self.call = Some(vec![token]);
            }
            _ => {
                let text = self.text.push(token)?;
                self.say(&text);
            }
        }
        Ok(())
    }

    /// A call between its markers. What is none stays visible, markers and all.
    fn end_call(&mut self, tokens: &[u32]) -> Result<()> {
        let inner = self.tokenizer.decode(&tokens[1..tokens.len() - 1], false)?;
        let Some((name, arguments)) = read_call(&inner) else {
            let text = self.tokenizer.decode(tokens, false)?;
            self.say(&text);
            return Ok(());
        };
        let id = format!("call_{:024x}", rand::random::<u128>() >> 32);
        self.waiting.pieces.push(Piece::Call(Call { index: self.calls, id, name, arguments }));
        self.calls += 1;
        self.after_call = true;
        Ok(())
    }

    fn say(&mut self, text: &str) {
        let text = if self.after_call { text.trim_start() } else { text };
        if text.is_empty() {
            return;
        }
        self.after_call = false;
        match self.waiting.pieces.last_mut() {
            Some(Piece::Text(before)) => before.push_str(text),
            _ => self.waiting.pieces.push(Piece::Text(text.to_owned())),
        }
    }
}

/// Name and arguments of a call: an object with both and a name that is a string. Arguments may be JSON in a string.
fn read_call(text: &str) -> Option<(String, String)> {
    let Ok(Value::Object(mut call)) = serde_json::from_str(text) else { return None };
    let Some(Value::String(name)) = call.remove("name") else { return None };
    let arguments = match call.remove("arguments")? {
        object @ Value::Object(_) => object.to_string(),
        Value::String(text) if serde_json::from_str::<Map<String, Value>>(&text).is_ok() => text,
        _ => return None,
    };
    (!name.is_empty()).then_some((name, arguments))
}

#[cfg(test)]
mod tests {
    use super::read_call;

    #[test]
    fn a_call_has_a_name_and_an_object() {
        let good = [
            (r#" {"name": "f", "arguments": {"b": 1, "a": "é"}} "#, r#"{"b":1,"a":"é"}"#),
            (r#"{"name": "f", "arguments": "{\"q\": 1}"}"#, r#"{"q": 1}"#),
            (r#"{"name": "f", "arguments": {}}"#, "{}"),
        ];
        for (text, arguments) in good {
            assert_eq!(read_call(text), Some(("f".into(), arguments.into())), "{text}");
        }
        for bad in [
            "",
            "{",
            "[]",
            r#"{"name": "f"}"#,
            r#"{"arguments": {}}"#,
            r#"{"name": 1, "arguments": {}}"#,
            r#"{"name": "f", "arguments": 3}"#,
            r#"{"name": "f", "arguments": {}} and"#,
        ] {
            assert_eq!(read_call(bad), None, "{bad}");
        }
    }
}

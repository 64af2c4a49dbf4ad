//! Calls of tools in what a model writes: between two marks a JSON object with `name` and `arguments`.

use serde_json::{Map, Value};

pub use crate::tools::{FUNCTION_END, FUNCTION_START};

/// What a model's output asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Nothing: there is no call, or none that can be read.
    Nothing,
    /// A call of a tool that there is.
    Call {
        /// The tool.
        name: String,
        /// Its arguments.
        arguments: Value,
    },
    /// A call of a tool that there is not.
    Unknown {
        /// What was asked for.
        name: String,
        /// Its arguments.
        arguments: Value,
    },
}

/// The first call in `output`; later ones do not count.
pub fn action(output: &str, registered: &[impl AsRef<str>]) -> Action {
    let Some((_, after)) = output.split_once(FUNCTION_START) else { return Action::Nothing };
    let body = after.split_once(FUNCTION_END).map_or(after, |(body, _)| body);
    match parse(body) {
        None => Action::Nothing,
        Some((name, arguments)) if registered.iter().any(|r| r.as_ref() == name) => {
            Action::Call { name, arguments }
        }
        Some((name, arguments)) => Action::Unknown { name, arguments },
    }
}

/// Name and arguments of the JSON between the marks; `None` when it is no such object.
pub fn parse(body: &str) -> Option<(String, Value)> {
    let mut call: Map<String, Value> = serde_json::from_str(body.trim()).ok()?;
    let name = call.get("name")?.as_str()?.to_owned();
    Some((name, call.remove("arguments")?))
}

/// Splits a stream of output into text and the first call.
///
/// Text that may turn out to be the begin of a mark is held back. After the end of the call nothing counts any more.
#[derive(Debug, Default)]
pub struct Splitter {
    held: String,
    call: Option<String>,
    ended: bool,
}

impl Splitter {
    /// Adds output and gives the text that is certain now.
    pub fn push(&mut self, output: &str) -> String {
        if self.ended {
            return String::new();
        }
        if let Some(call) = &mut self.call {
            call.push_str(output);
            if let Some(at) = call.find(FUNCTION_END) {
                call.truncate(at);
                self.ended = true;
            }
            return String::new();
        }
        self.held.push_str(output);
        if let Some(at) = self.held.find(FUNCTION_START) {
            let rest = self.held.split_off(at);
            let text = std::mem::take(&mut self.held);
            self.call = Some(String::new());
            self.push(&rest[FUNCTION_START.len()..]);
            return text;
        }
        let keep =
            (1..FUNCTION_START.len()).rev().find(|&n| self.held.ends_with(&FUNCTION_START[..n])).unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// Ends the stream and gives the text that was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Whether the call is complete, so that the model need not write on.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// What stands between the marks, when a call has begun.
    pub fn call(&self) -> Option<&str> {
        self.call.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_are_missing_or_of_the_wrong_type_make_no_call() {
        for body in
            ["", "[]", "{}", r#"{"name": "x"}"#, r#"{"arguments": {}}"#, r#"{"name": 3, "arguments": {}}"#]
        {
            assert_eq!(parse(body), None, "{body}");
        }
        // A call that was cut off by the limit of tokens but is whole counts.
        let cut = r#"<|function_start|>{"name": "f", "arguments": {"a": 1}}"#;
        assert!(matches!(action(cut, &["f"]), Action::Call { .. }));
    }

    #[test]
    fn a_stream_cut_anywhere_splits_alike() {
        let output = "say <|func <|function_start|>{\"name\":\"x\"}<|function_end|>more";
        for step in 1..output.len() {
            let mut splitter = Splitter::default();
            let text: String = output
                .as_bytes()
                .chunks(step)
                .map(|piece| splitter.push(std::str::from_utf8(piece).unwrap()))
                .collect();
            assert_eq!(text + &splitter.finish(), "say <|func ");
            assert_eq!(splitter.call(), Some("{\"name\":\"x\"}"));
            assert!(splitter.ended());
        }
        let mut plain = Splitter::default();
        assert_eq!(plain.push("a <|fun") + &plain.finish(), "a <|fun");
        assert!(plain.call().is_none());
    }
}

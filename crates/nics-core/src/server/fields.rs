//! The fields of a request, taken one by one with their ranges. What nobody has taken is left for the engine.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;

/// A request's JSON object. An explicit null counts as absent, as in OpenAI's API.
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    /// Reads a body. Its depth is limited by the parser (128).
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        if let Err(e) = std::str::from_utf8(body) {
            return Err(ApiError::bad(format!(
                "the body is no UTF-8 text: byte {} is wrong",
                e.valid_up_to()
            )));
        }
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self(map)),
            Ok(other) => Err(ApiError::bad(format!("the body is {}, expected a JSON object", kind(&other)))),
            Err(e) => Err(ApiError::bad(format!("the body is no JSON: {e}"))),
        }
    }

    /// What is left.
    pub fn rest(self) -> Map<String, Value> {
        self.0
    }

    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|v| !v.is_null())
    }

    pub fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        self.map(name, "true or false", Value::as_bool)
    }

    pub fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        self.map(name, "a string", |v| v.as_str().map(str::to_owned))
    }

    pub fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        self.map(name, "an object", |v| v.as_object().cloned())
    }

    pub fn list(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        self.map(name, "a list", |v| v.as_array().cloned())
    }

    /// A number. `range` says in words what is allowed.
    pub fn number(
        &mut self,
        name: &str,
        allowed: &RangeInclusive<f32>,
        range: &str,
    ) -> Result<Option<f32>, ApiError> {
        self.map(name, format_args!("a number {range}"), |v| {
            v.as_f64().map(|x| x as f32).filter(|x| allowed.contains(x))
        })
    }

    /// A whole number.
    pub fn whole(&mut self, name: &str, allowed: &RangeInclusive<usize>) -> Result<Option<usize>, ApiError> {
        let (from, to) = (allowed.start(), allowed.end());
        let read =
            |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| allowed.contains(n));
        if *to == usize::MAX {
            self.map(name, format_args!("a whole number from {from} on"), read)
        } else {
            self.map(name, format_args!("a whole number from {from} to {to}"), read)
        }
    }

    /// A field of OpenAI's API that is not supported: values that change nothing are let through.
    pub fn neutral(&mut self, name: &str, changes_nothing: impl Fn(&Value) -> bool) -> Result<(), ApiError> {
        match self.take(name) {
            Some(value) if !changes_nothing(&value) => Err(ApiError::unsupported(name)),
            _ => Ok(()),
        }
    }

    fn map<T>(
        &mut self,
        name: &str,
        expected: impl Display,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        read(&value).map(Some).ok_or_else(|| ApiError::expected(name, &value, expected))
    }
}

pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

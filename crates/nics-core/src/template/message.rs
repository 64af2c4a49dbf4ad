//! One turn of a conversation.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

/// One turn of a conversation, in the form of OpenAI's and transformers' APIs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool` or what else the model knows.
    pub role: String,
    /// What is said; may be absent in a turn that only calls tools.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "present")]
    pub content: Option<Content>,
    /// Further fields that a template may read: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The content of a turn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Content {
    /// A text.
    Text(String),
    /// Parts such as `{"type": "text", "text": ".."}` or `{"type": "image"}`.
    Parts(Vec<Value>),
    /// A result of a tool in its own form.
    Object(Map<String, Value>),
    /// An explicit null.
    Null(()),
}

impl Message {
    /// A turn of plain text.
    pub fn new(role: impl Into<String>, text: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(Content::Text(text.into())), extra: Map::new() }
    }

    /// The same turn with a further field.
    #[must_use]
    pub fn with(mut self, field: impl Into<String>, value: impl Into<Value>) -> Self {
        self.extra.insert(field.into(), value.into());
        self
    }

    /// The content where it is a plain text.
    pub fn text(&self) -> Option<&str> {
        match &self.content {
            Some(Content::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// Makes the content this text.
    pub fn set_text(&mut self, text: impl Into<String>) {
        self.content = Some(Content::Text(text.into()));
    }
}

/// A field that is there, null included: templates tell null from absent.
fn present<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Content>, D::Error> {
    Content::deserialize(d).map(Some)
}

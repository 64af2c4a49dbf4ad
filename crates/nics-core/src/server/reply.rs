//! OpenAI's reply objects: whole replies and the chunks of streams.
//!
//! Beyond OpenAI's fields a choice may have `tokens`: a list of what the engine said about tokens, one object for each
//! that it said something about. With `return_token_ids` it has `token_ids`: the ids of its tokens, end tokens included. A
//! stream's lists put together are the whole reply's.

use serde_json::{Map, Value, json};

use super::choice::{Call, Delta, Logprob, Piece};
use super::plan::Form;

/// What all chunks of a reply share.
#[derive(Debug, Clone)]
pub(super) struct Head {
    pub form: Form,
    pub id: String,
    pub created: u64,
    pub model: String,
    pub fingerprint: String,
}

/// Counts of a reply.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Usage {
    /// Tokens of the prompts, each prompt once.
    pub prompt: usize,
    /// Of these, those that a kept prefix had.
    pub cached: usize,
    /// Tokens written in all choices, end tokens included.
    pub completion: usize,
}

impl Usage {
    /// With the engine's own part behind it.
    pub fn json(self, own: Map<String, Value>) -> Value {
        let mut usage = json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        });
        if let Some(usage) = usage.as_object_mut() {
            for (name, value) in own {
                usage.entry(name).or_insert(value);
            }
        }
        usage
    }
}

/// The field `usage` of a chunk.
#[derive(Debug)]
pub(super) enum UsageField {
    /// The request does not ask for it.
    Absent,
    /// A later chunk has it.
    Null,
    Counts(Value),
}

impl Head {
    fn object(&self, object: &str, choices: Vec<Value>) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("id".into(), self.id.clone().into());
        map.insert("object".into(), object.into());
        map.insert("created".into(), self.created.into());
        map.insert("model".into(), self.model.clone().into());
        map.insert("system_fingerprint".into(), self.fingerprint.clone().into());
        map.insert("choices".into(), choices.into());
        map
    }

    /// A whole reply.
    pub fn whole(&self, choices: Vec<Value>, usage: Value) -> Value {
        let object = match self.form {
            Form::Chat { .. } => "chat.completion",
            Form::Text => "text_completion",
        };
        let mut map = self.object(object, choices);
        map.insert("usage".into(), usage);
        map.into()
    }

    /// A chunk of a stream.
    pub fn chunk(&self, choice: Option<Value>, usage: &UsageField) -> Value {
        let object = match self.form {
            Form::Chat { .. } => "chat.completion.chunk",
            Form::Text => "text_completion",
        };
        let mut map = self.object(object, choice.into_iter().collect());
        match usage {
            UsageField::Absent => {}
            UsageField::Null => drop(map.insert("usage".into(), Value::Null)),
            UsageField::Counts(usage) => drop(map.insert("usage".into(), usage.clone())),
        }
        map.into()
    }
}

/// The choices of a stream's chunks.
pub(super) struct Chunks {
    form: Form,
    index: usize,
    offset: usize,
}

impl Chunks {
    pub fn new(form: Form, index: usize) -> Self {
        Self { form, index, offset: 0 }
    }

    /// What a choice begins with: the role in a chat, the prompt where it is repeated.
    pub fn begin(&mut self, echo: Option<&str>) -> Option<Value> {
        match self.form {
            Form::Chat { .. } => Some(self.choice(json!({"role": "assistant", "content": ""}), None, None)),
            Form::Text => echo.map(|text| {
                self.offset = text.chars().count();
                self.choice(text.into(), None, None)
            }),
        }
    }

    /// What has become certain.
    pub fn delta(&mut self, delta: Delta) -> Vec<Value> {
        if delta.is_empty() {
            return Vec::new();
        }
        let mut logprobs = logprobs(self.form, &delta.logprobs, &mut self.offset);
        let mut own = (!delta.own.is_empty()).then(|| Value::from(own(delta.own)));
        let mut ids = (!delta.ids.is_empty()).then(|| Value::from(delta.ids));
        let mut contents: Vec<Value> = Vec::new();
        for piece in delta.pieces {
            match (self.form, piece) {
                (Form::Chat { .. }, Piece::Text(text)) => contents.push(json!({"content": text})),
                (Form::Chat { .. }, Piece::Call(call)) => contents.extend(call_deltas(&call)),
                (Form::Text, Piece::Text(text)) => contents.push(text.into()),
                (Form::Text, Piece::Call(_)) => {}
            }
        }
        if contents.is_empty() {
            contents.push(match self.form {
                Form::Chat { .. } => json!({"content": ""}),
                Form::Text => "".into(),
            });
        }
        let choice = |content| {
            let mut value = self.choice(content, logprobs.take(), None);
            if let Some(own) = own.take() {
                value["tokens"] = own;
            }
            if let Some(ids) = ids.take() {
                value["token_ids"] = ids;
            }
            value
        };
        contents.into_iter().map(choice).collect()
    }

    /// The last chunk of a choice.
    pub fn end(&self, finish: &str) -> Value {
        let content = match self.form {
            Form::Chat { .. } => json!({}),
            Form::Text => "".into(),
        };
        self.choice(content, None, Some(finish))
    }

    fn choice(&self, content: Value, logprobs: Option<Value>, finish: Option<&str>) -> Value {
        let key = match self.form {
            Form::Chat { .. } => "delta",
            Form::Text => "text",
        };
        Map::from_iter([
            ("index".to_owned(), self.index.into()),
            (key.to_owned(), content),
            ("logprobs".to_owned(), logprobs.into()),
            ("finish_reason".to_owned(), finish.into()),
        ])
        .into()
    }
}

/// A call comes in two pieces: who is called, then with what.
fn call_deltas(call: &Call) -> [Value; 2] {
    [
        json!({"tool_calls": [{
            "index": call.index, "id": call.id, "type": "function",
            "function": {"name": call.name, "arguments": ""},
        }]}),
        json!({"tool_calls": [{"index": call.index, "function": {"arguments": call.arguments}}]}),
    ]
}

/// A choice of a whole reply, put together.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    text: String,
    calls: Vec<Call>,
    logprobs: Vec<Logprob>,
    own: Vec<Map<String, Value>>,
    ids: Vec<u32>,
    pub finish: &'static str,
}

impl Gathered {
    pub fn add(&mut self, delta: Delta) {
        for piece in delta.pieces {
            match piece {
                Piece::Text(text) => self.text.push_str(&text),
                Piece::Call(call) => self.calls.push(call),
            }
        }
        self.logprobs.extend(delta.logprobs);
        self.own.extend(delta.own);
        self.ids.extend(delta.ids);
    }

    /// The choice's object; `with_logprobs` when the request asks for them.
    pub fn json(self, form: Form, index: usize, echo: Option<&str>, with_logprobs: bool) -> Value {
        let mut offset = echo.map_or(0, |text| text.chars().count());
        let logprobs = with_logprobs.then(|| {
            logprobs(form, &self.logprobs, &mut offset).unwrap_or_else(|| match form {
                Form::Chat { .. } => json!({"content": [], "refusal": null}),
                Form::Text => {
                    json!({"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []})
                }
            })
        });
        let mut choice = match form {
            Form::Chat { .. } => {
                let content = if self.text.is_empty() && !self.calls.is_empty() {
                    Value::Null
                } else {
                    self.text.into()
                };
                let mut message = json!({"role": "assistant", "content": content, "refusal": null});
                if !self.calls.is_empty() {
                    let call = |call: Call| {
                        let function = json!({"name": call.name, "arguments": call.arguments});
                        json!({"id": call.id, "type": "function", "function": function})
                    };
                    message["tool_calls"] = self.calls.into_iter().map(call).collect();
                }
                json!({"index": index, "message": message})
            }
            Form::Text => json!({"index": index, "text": echo.unwrap_or_default().to_owned() + &self.text}),
        };
        choice["logprobs"] = logprobs.into();
        choice["finish_reason"] = self.finish.into();
        if !self.own.is_empty() {
            choice["tokens"] = own(self.own).into();
        }
        if !self.ids.is_empty() {
            choice["token_ids"] = self.ids.into();
        }
        choice
    }
}

fn own(fields: Vec<Map<String, Value>>) -> Vec<Value> {
    fields.into_iter().map(Value::Object).collect()
}

/// `None` when there are none. `offset` is that of the next token in the text, in characters.
fn logprobs(form: Form, list: &[Logprob], offset: &mut usize) -> Option<Value> {
    if list.is_empty() {
        return None;
    }
    Some(match form {
        Form::Chat { .. } => {
            let entry = |bytes: &[u8], p: f32| json!({"token": String::from_utf8_lossy(bytes), "logprob": finite(p), "bytes": bytes});
            let content: Vec<Value> = list
                .iter()
                .map(|l| {
                    let mut value = entry(&l.bytes, l.of_token);
                    value["top_logprobs"] = l.top.iter().map(|(bytes, p)| entry(bytes, *p)).collect();
                    value
                })
                .collect();
            json!({"content": content, "refusal": null})
        }
        Form::Text => {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let mut offsets = Vec::with_capacity(list.len());
            for l in list {
                offsets.push(*offset);
                // Bytes that continue a character are not counted, so that a character in pieces counts once.
                *offset += l.bytes.iter().filter(|b| **b & 0xc0 != 0x80).count();
            }
            let top: Vec<Value> = list
                .iter()
                .map(|l| {
                    l.top.iter().map(|(bytes, p)| (text(bytes), finite(*p))).collect::<Map<_, _>>().into()
                })
                .collect();
            json!({
                "tokens": list.iter().map(|l| text(&l.bytes)).collect::<Vec<_>>(),
                "token_logprobs": list.iter().map(|l| finite(l.of_token)).collect::<Vec<_>>(),
                "top_logprobs": top,
                "text_offset": offsets,
            })
        }
    })
}

/// JSON has no infinity; OpenAI's API says -9999 for what cannot be.
fn finite(p: f32) -> Value {
    (if p.is_finite() { p } else { -9999.0 }).into()
}

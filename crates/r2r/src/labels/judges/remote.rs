//! A chat model on a server that speaks OpenAI's API.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nics_base::interrupt::Interrupt;
use serde_json::{Value, json};

use super::text::{Chat, Question};
use crate::remote::client::{Client, patiently};
use crate::remote::{Fault, RemoteSettings};
use crate::{Error, Result};

/// How the judge's server is called.
#[derive(Debug, Clone)]
pub struct RemoteJudgeSettings {
    /// The model; the server's first one when `None`.
    pub model: Option<String>,
    /// The key, where the server asks for one.
    pub key: Option<String>,
    /// The most tokens of a reply. Default 16.
    pub max_tokens: usize,
    /// The most time of one call. Default 120 s.
    pub timeout: Duration,
    /// Calls made again after one that failed. Default 4.
    pub retries: usize,
    /// The pause before the first of these, which doubles with each. Default 0.5 s.
    pub backoff: Duration,
    /// Calls at a time. Default 8.
    pub connections: usize,
    /// Further fields of the request, e.g. `chat_template_kwargs`.
    pub extra: serde_json::Map<String, Value>,
    /// Ends waiting.
    pub interrupt: Interrupt,
}

impl Default for RemoteJudgeSettings {
    fn default() -> Self {
        Self {
            model: None,
            key: None,
            max_tokens: 16,
            timeout: Duration::from_secs(120),
            retries: 4,
            backoff: Duration::from_millis(500),
            connections: 8,
            extra: serde_json::Map::new(),
            interrupt: Interrupt::never(),
        }
    }
}

/// A chat model behind `/v1/chat/completions`.
pub struct RemoteChat {
    client: Client,
    pauses: RemoteSettings,
    settings: RemoteJudgeSettings,
    model: String,
}

impl RemoteChat {
    /// Greets a server. `url` is its address, with or without `/v1`.
    ///
    /// # Errors
    /// A server that cannot be reached, refuses, or has no model.
    pub fn connect(url: &str, settings: RemoteJudgeSettings) -> Result<Self> {
        let url = url.trim_end_matches('/');
        let url = url.strip_suffix("/v1").unwrap_or(url);
        if !(url.starts_with("http://") || url.starts_with("https://")) {
            return Err(Error::setting("the judge's address", format!("{url:?}"), "http://HOST:PORT"));
        }
        let pauses = RemoteSettings {
            key: settings.key.clone(),
            timeout: settings.timeout,
            retries: settings.retries,
            backoff: settings.backoff,
            connections: settings.connections,
            ..RemoteSettings::default()
        };
        pauses.validate()?;
        if settings.max_tokens == 0 {
            return Err(Error::setting("max_tokens", 0, "at least 1"));
        }
        let mut chat = Self { client: Client::new(url, &pauses), pauses, settings, model: String::new() };
        chat.model = match &chat.settings.model {
            Some(model) => model.clone(),
            None => chat.first_model()?,
        };
        Ok(chat)
    }

    fn first_model(&self) -> Result<String> {
        self.patiently(|| {
            let reply = self.client.get("/v1/models")?;
            let id = reply.json["data"][0]["id"].as_str();
            id.map(str::to_owned).ok_or_else(|| Fault::Protocol("/v1/models names no model".into()))
        })
    }

    fn ask(&self, question: &Question) -> Result<String> {
        let mut body = json!({
            "model": self.model,
            "messages": [
                { "role": "system", "content": question.system },
                { "role": "user", "content": question.user },
            ],
            "temperature": 0,
            "max_tokens": self.settings.max_tokens,
            "stream": false,
        });
        if let Some(fields) = body.as_object_mut() {
            fields.extend(self.settings.extra.clone());
        }
        let body = body.to_string();
        self.patiently(|| {
            let reply = self.client.post("/v1/chat/completions", &body)?;
            let message = &reply.json["choices"][0]["message"];
            // A reply of nothing is a reply; a message that is none is not.
            match (&message["content"], message.is_object()) {
                (Value::String(text), _) => Ok(text.clone()),
                (Value::Null, true) => Ok(String::new()),
                _ => Err(Fault::Protocol("it has no choices[0].message.content".into())),
            }
        })
    }

    /// Calls until it succeeds, cannot succeed, or has been tried often enough.
    fn patiently<T>(&self, call: impl Fn() -> Result<T, Fault>) -> Result<T> {
        let interrupt = &self.settings.interrupt;
        interrupt.check()?;
        let attentive = |time: Duration| {
            let until = Instant::now() + time;
            while !interrupt.requested() {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return true;
                }
                thread::sleep(left.min(Duration::from_millis(50)));
            }
            false
        };
        patiently(&self.pauses, attentive, call).or_else(|(fault, calls)| {
            interrupt.check()?;
            Err(fault.error(&self.client.url, calls, self.settings.timeout))
        })
    }
}

impl Chat for RemoteChat {
    fn identity(&self) -> Value {
        json!({
            "server": "chat/completions",
            "model": self.model,
            "max_tokens": self.settings.max_tokens,
            "extra": self.settings.extra,
        })
    }

    fn batch(&self) -> usize {
        // Enough that a slow reply keeps no connection idle for long.
        4 * self.settings.connections
    }

    fn in_groups(&self) -> bool {
        false
    }

    fn reply(&mut self, questions: &[Question]) -> Vec<Result<String>> {
        let chat = &*self;
        let next = AtomicUsize::new(0);
        let failed = AtomicUsize::new(usize::MAX);
        let replies: Vec<Mutex<Option<Result<String>>>> =
            questions.iter().map(|_| Mutex::new(None)).collect();
        thread::scope(|scope| {
            for _ in 0..chat.settings.connections.min(questions.len()) {
                scope.spawn(|| {
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        // Behind a failure nothing is of use: verdicts are kept in their order.
                        if at >= questions.len() || at > failed.load(Ordering::Relaxed) {
                            return;
                        }
                        let reply = chat.ask(&questions[at]);
                        if reply.is_err() {
                            failed.fetch_min(at, Ordering::Relaxed);
                        }
                        if let Ok(mut slot) = replies[at].lock() {
                            *slot = Some(reply);
                        }
                    }
                });
            }
        });
        let skipped = || Err(Error::Input("a question before this one failed".into()));
        replies.into_iter().map(|slot| slot.into_inner().ok().flatten().unwrap_or_else(skipped)).collect()
    }
}

//! A server of OpenAI's API: this project's `serve`, vLLM, llama.cpp and others.

use std::io::BufReader;
use std::time::Duration;

use nics_core::template::Message;
use serde_json::{Map, Value, json};
use ureq::Agent;
use ureq::http::Response;

use super::local::{count, shorten};
use super::{Ask, TalkError, Talker};
use crate::prompt::Prompter;
use crate::sse::Events;
use crate::tools::{FUNCTION_END, FUNCTION_START, one_line};

/// How the tokens of a text are counted.
pub enum Counting {
    /// By the model's own tokenizer and template; the text announces tools.
    Exact(Box<Prompter>, String),
    /// A guess on the safe side: a token for each character beyond ASCII, one for three characters of ASCII.
    Estimate,
}

/// A model behind a URL.
pub struct RemoteTalker {
    url: String,
    model: String,
    key: Option<String>,
    agent: Agent,
    counting: Counting,
    context: Option<usize>,
}

impl RemoteTalker {
    /// A server at `url`, with or without `/v1` at its end. Without a `model` the server's first one is asked.
    ///
    /// # Errors
    /// A server that does not answer, or offers no such model.
    pub fn connect(
        url: &str,
        model: Option<&str>,
        key: Option<String>,
        counting: Counting,
        timeout: Duration,
    ) -> Result<Self, TalkError> {
        let url = url.trim_end_matches('/');
        let url = if url.ends_with("/v1") { url.to_owned() } else { format!("{url}/v1") };
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(Duration::from_secs(10)))
            // Between two pieces of a reply, and until the first.
            .timeout_recv_response(Some(timeout))
            .timeout_per_read(Some(timeout))
            .build();
        let agent = Agent::new_with_config(config);
        let mut talker = Self { url, model: String::new(), key, agent, counting, context: None };
        let models = talker.json(talker.get("/models"))?;
        let listed = models["data"].as_array().map(Vec::as_slice).unwrap_or_default();
        let id = |entry: &Value| entry["id"].as_str().map(str::to_owned);
        let chosen = match model {
            Some(name) => listed.iter().find(|m| m["id"] == name),
            None => listed.first(),
        };
        let Some(chosen) = chosen else {
            let known: Vec<String> = listed.iter().filter_map(id).collect();
            let reason = match model {
                Some(name) => format!("it has no model {name:?}, only {}", known.join(", ")),
                None => "it lists no model".into(),
            };
            return Err(talker.bad(reason));
        };
        talker.model = id(chosen).unwrap_or_default();
        // vLLM's name for it; ours too.
        talker.context = chosen["max_model_len"].as_u64().map(|n| n as usize);
        Ok(talker)
    }

    /// The model that is asked.
    pub fn model(&self) -> &str {
        &self.model
    }

    fn bad(&self, reason: impl Into<String>) -> TalkError {
        TalkError::BadAnswer { url: self.url.clone(), reason: reason.into() }
    }

    fn get(&self, path: &str) -> Result<Response<ureq::Body>, ureq::Error> {
        let request = self.agent.get(format!("{}{path}", self.url));
        match &self.key {
            Some(key) => request.header("Authorization", format!("Bearer {key}")),
            None => request,
        }
        .call()
    }

    fn post(&self, path: &str, body: &Value) -> Result<Response<ureq::Body>, ureq::Error> {
        let request = self.agent.post(format!("{}{path}", self.url));
        let request = match &self.key {
            Some(key) => request.header("Authorization", format!("Bearer {key}")),
            None => request,
        };
        request.content_type("application/json").send(body.to_string())
    }

    /// An answer with a good status.
    fn good(
        &self,
        answer: Result<Response<ureq::Body>, ureq::Error>,
    ) -> Result<Response<ureq::Body>, TalkError> {
        let mut answer = answer.map_err(|e| self.unreachable(&e))?;
        let status = answer.status().as_u16();
        if (200..300).contains(&status) {
            return Ok(answer);
        }
        let text = answer.body_mut().with_config().limit(1 << 20).read_to_string().unwrap_or_default();
        let said = serde_json::from_str::<Value>(&text).ok();
        let said = said.and_then(|v| v["error"]["message"].as_str().map(str::to_owned));
        let message = said.unwrap_or_else(|| text.chars().take(200).collect());
        Err(TalkError::Refused { url: self.url.clone(), status, message })
    }

    fn json(&self, answer: Result<Response<ureq::Body>, ureq::Error>) -> Result<Value, TalkError> {
        let mut answer = self.good(answer)?;
        let bytes = answer.body_mut().with_config().limit(32 << 20).read_to_vec();
        let bytes = bytes.map_err(|e| self.unreachable(&e))?;
        serde_json::from_slice(&bytes).map_err(|e| self.bad(format!("no JSON: {e}")))
    }

    fn unreachable(&self, e: &ureq::Error) -> TalkError {
        TalkError::Unreachable { url: self.url.clone(), reason: e.to_string() }
    }

    fn body(&self, ask: &Ask, stream: bool) -> Value {
        let mut body = json!({
            "model": self.model,
            "messages": ask.messages,
            "temperature": ask.temperature,
            "max_tokens": ask.max_tokens,
            "seed": ask.seed,
            "stream": stream,
        });
        if !ask.tools.is_empty() {
            body["tools"] = ask.tools.clone().into();
        }
        body
    }
}

impl Talker for RemoteTalker {
    fn context(&self) -> Option<usize> {
        self.context
    }

    fn count(&self, messages: &[Message], tools: &[Value]) -> Result<usize, TalkError> {
        match &self.counting {
            Counting::Exact(prompter, sentence) => count(prompter, sentence, messages, tools),
            Counting::Estimate => {
                let texts = messages.iter().filter_map(Message::text).map(|t| estimate(t) + 8);
                let tools = tools.iter().map(|t| estimate(&format!("{t:#}")));
                Ok(texts.chain(tools).sum())
            }
        }
    }

    fn shorten(&self, text: &str, tokens: usize) -> Result<String, TalkError> {
        match &self.counting {
            Counting::Exact(prompter, _) => shorten(&prompter.tokenizer, text, tokens),
            Counting::Estimate => {
                let mut thirds = 0;
                let fits = |c: char| {
                    thirds += if c.is_ascii() { 1 } else { 3 };
                    thirds <= tokens.saturating_mul(3)
                };
                Ok(text
                    .chars()
                    .take_while({
                        let mut fits = fits;
                        move |&c| fits(c)
                    })
                    .collect())
            }
        }
    }

    fn reply(&mut self, ask: &Ask, each: &mut dyn FnMut(&str) -> bool) -> Result<(), TalkError> {
        let answer = self.good(self.post("/chat/completions", &self.body(ask, true)))?;
        // The first call, put together from its pieces.
        let mut call: Option<(String, String)> = None;
        let mut done = false;
        for event in Events::new(BufReader::new(answer.into_body().into_reader())) {
            let event = event.map_err(|e| TalkError::Unreachable {
                url: self.url.clone(),
                reason: format!("the reply broke off: {e}"),
            })?;
            if event == "[DONE]" {
                done = true;
                break;
            }
            let chunk: Value =
                serde_json::from_str(&event).map_err(|e| self.bad(format!("an event is no JSON: {e}")))?;
            if let Some(message) = chunk["error"]["message"].as_str() {
                return Err(self.bad(message));
            }
            let delta = &chunk["choices"][0]["delta"];
            if let Some(text) = delta["content"].as_str().filter(|t| !t.is_empty())
                && !each(text)
            {
                // Closing the connection is how a reply is cancelled.
                return Ok(());
            }
            for piece in delta["tool_calls"].as_array().into_iter().flatten() {
                if piece["index"].as_u64().unwrap_or(0) != 0 {
                    continue;
                }
                let (name, arguments) = call.get_or_insert_default();
                name.push_str(piece["function"]["name"].as_str().unwrap_or_default());
                arguments.push_str(piece["function"]["arguments"].as_str().unwrap_or_default());
            }
            done |= chunk["choices"][0]["finish_reason"].is_string();
        }
        if let Some((name, arguments)) = call {
            each(&written(&name, &arguments));
        }
        if done { Ok(()) } else { Err(self.bad("the stream ended before the reply did")) }
    }

    fn replies(&mut self, asks: &[Ask]) -> Vec<Result<String, TalkError>> {
        let this = &*self;
        let one = |ask: &Ask| {
            let answer = this.json(this.post("/chat/completions", &this.body(ask, false)))?;
            let message = &answer["choices"][0]["message"];
            if !message.is_object() {
                return Err(this.bad("there is no choices[0].message"));
            }
            Ok(message["content"].as_str().unwrap_or_default().to_owned())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = asks.iter().map(|ask| scope.spawn(move || one(ask))).collect();
            let join = |t: std::thread::ScopedJoinHandle<Result<String, TalkError>>| {
                t.join().unwrap_or_else(|_| Err(this.bad("a thread failed")))
            };
            threads.into_iter().map(join).collect()
        })
    }
}

/// A call as the model writes it. Arguments that are no JSON stay as they are, for the reader to refuse.
fn written(name: &str, arguments: &str) -> String {
    let call = match serde_json::from_str::<Value>(arguments) {
        Ok(arguments) => {
            let mut call = Map::new();
            call.insert("name".into(), name.into());
            call.insert("arguments".into(), arguments);
            one_line(&call.into())
        }
        Err(_) => format!("{name} {arguments}"),
    };
    format!("{FUNCTION_START}{call}{FUNCTION_END}")
}

fn estimate(text: &str) -> usize {
    text.chars().map(|c| if c.is_ascii() { 1 } else { 3 }).sum::<usize>().div_ceil(3)
}

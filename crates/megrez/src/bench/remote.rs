//! The protocol against a server of OpenAI's API: what its clients see.

use std::io::BufReader;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nics_core::{Error, Result};
use serde::Serialize;
use serde_json::{Value, json};
use ureq::Agent;

use super::{Protocol, Spread, rate};
use crate::sse::Events;

/// A server.
#[derive(Clone)]
pub struct Target {
    /// Its address, with or without `/v1` at the end.
    pub url: String,
    /// The model; the first that the server lists when `None`.
    pub model: Option<String>,
    /// The key, when it needs one.
    pub key: Option<String>,
    /// The most time between two pieces of a reply.
    pub timeout: Duration,
}

/// One run: all requests, from as many clients as the protocol's batch.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClientRun {
    /// Requests per second.
    pub requests_per_s: f64,
    /// Reply tokens per second, all clients together.
    pub tokens_per_s: f64,
    /// Seconds from a request to its first token.
    pub first_token_s: Spread,
    /// Seconds between a reply's tokens, the mean of each request.
    pub between_tokens_s: Spread,
    /// Seconds of the run.
    pub seconds: f64,
}

/// What one client saw of one request.
struct Seen {
    first: Duration,
    last: Duration,
    tokens: usize,
}

/// Runs the protocol once. Each prompt begins differently, so that no server can reuse another's.
///
/// # Errors
/// A server that cannot be reached or that refuses a request.
pub fn measure_server(target: &Target, protocol: &Protocol, seed: u64) -> Result<ClientRun> {
    let Protocol { input_len, output_len, seqs, batch } = *protocol;
    if input_len == 0 || output_len == 0 || seqs == 0 || batch == 0 {
        return Err(Error::input("lengths, requests and clients are at least 1"));
    }
    let url = target.url.trim_end_matches('/');
    let url = if url.ends_with("/v1") { url.to_owned() } else { format!("{url}/v1") };
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .timeout_connect(Some(Duration::from_secs(10)))
        .timeout_recv_response(Some(target.timeout))
        .timeout_per_read(Some(target.timeout))
        .max_idle_connections_per_host(batch)
        .max_idle_connections(batch)
        .build();
    let agent = Agent::new_with_config(config);
    let client = Client { agent, url, key: target.key.clone() };
    let model = match &target.model {
        Some(model) => model.clone(),
        None => client.first_model()?,
    };
    let next = AtomicUsize::new(0);
    let seen: Mutex<Vec<Result<Seen>>> = Mutex::default();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..batch.min(seqs) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= seqs {
                        return;
                    }
                    let body = json!({
                        "model": model,
                        "prompt": prompt(input_len, seed.wrapping_mul(1 << 20).wrapping_add(i as u64)),
                        "max_tokens": output_len,
                        "temperature": 0,
                        "ignore_eos": true,
                        "stream": true,
                        "stream_options": { "include_usage": true },
                    });
                    let result = client.request(&body);
                    let failed = result.is_err();
                    seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(result);
                    if failed {
                        // One failure is enough to end the measurement.
                        next.store(seqs, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let took = start.elapsed();
    let seen = seen.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let seen: Vec<Seen> = seen.into_iter().collect::<Result<_>>()?;
    let tokens = seen.iter().map(|s| s.tokens).sum();
    let gaps = seen.iter().filter(|s| s.tokens > 1);
    let gaps = gaps.map(|s| s.last.saturating_sub(s.first).as_secs_f64() / (s.tokens - 1) as f64);
    let (first, gaps): (Vec<f64>, Vec<f64>) =
        (seen.iter().map(|s| s.first.as_secs_f64()).collect(), gaps.collect());
    let none = Spread { median: 0.0, low: 0.0, high: 0.0 };
    Ok(ClientRun {
        requests_per_s: rate(seen.len(), took),
        tokens_per_s: rate(tokens, took),
        first_token_s: Spread::range(&first).unwrap_or(none),
        between_tokens_s: Spread::range(&gaps).unwrap_or(none),
        seconds: took.as_secs_f64(),
    })
}

/// Token ids of a prompt: ordinary ones in every vocabulary, in an order of the request's own.
fn prompt(len: usize, salt: u64) -> Vec<u32> {
    let mut state = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        // xorshift64: any order does.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        32 + (state % 64) as u32
    };
    (0..len).map(|_| next()).collect()
}

struct Client {
    agent: Agent,
    url: String,
    key: Option<String>,
}

impl Client {
    fn fail(&self, why: impl std::fmt::Display) -> Error {
        Error::Input(format!("{}: {why}", self.url))
    }

    fn first_model(&self) -> Result<String> {
        let request = self.agent.get(format!("{}/models", self.url));
        let request = match &self.key {
            Some(key) => request.header("Authorization", format!("Bearer {key}")),
            None => request,
        };
        let mut answer = request.call().map_err(|e| self.fail(e))?;
        let text = answer.body_mut().read_to_string().map_err(|e| self.fail(e))?;
        if answer.status() != 200 {
            return Err(self.refused(answer.status().as_u16(), &text));
        }
        let list: Value = serde_json::from_str(&text).map_err(|e| self.fail(e))?;
        let first = list["data"][0]["id"].as_str().map(str::to_owned);
        first.ok_or_else(|| self.fail("it lists no model"))
    }

    fn refused(&self, status: u16, text: &str) -> Error {
        let said = serde_json::from_str::<Value>(text).ok();
        let said = said.and_then(|v| v["error"]["message"].as_str().map(str::to_owned));
        let said = said.unwrap_or_else(|| text.chars().take(200).collect());
        self.fail(format!("status {status}: {said}"))
    }

    fn request(&self, body: &Value) -> Result<Seen> {
        let start = Instant::now();
        let request = self.agent.post(format!("{}/completions", self.url));
        let request = match &self.key {
            Some(key) => request.header("Authorization", format!("Bearer {key}")),
            None => request,
        };
        let answer = request.content_type("application/json").send(body.to_string());
        let mut answer = answer.map_err(|e| self.fail(e))?;
        if answer.status() != 200 {
            let text = answer.body_mut().read_to_string().unwrap_or_default();
            return Err(self.refused(answer.status().as_u16(), &text));
        }
        let (mut first, mut last, mut tokens) = (None, start, None);
        for event in Events::new(BufReader::new(answer.into_body().into_reader())) {
            let event = event.map_err(|e| self.fail(format!("the reply broke off: {e}")))?;
            if event == "[DONE]" {
                break;
            }
            let now = Instant::now();
            let chunk: Value = serde_json::from_str(&event).map_err(|e| self.fail(e))?;
            if let Some(message) = chunk["error"]["message"].as_str() {
                return Err(self.fail(message));
            }
            if chunk["choices"].as_array().is_some_and(|c| !c.is_empty()) {
                first.get_or_insert(now);
                last = now;
            }
            tokens = chunk["usage"]["completion_tokens"].as_u64().or(tokens);
        }
        let first = first.ok_or_else(|| self.fail("a reply without a token"))?;
        let tokens = tokens.ok_or_else(|| self.fail("the stream says nothing about usage"))?;
        Ok(Seen { first: first - start, last: last - start, tokens: tokens as usize })
    }
}

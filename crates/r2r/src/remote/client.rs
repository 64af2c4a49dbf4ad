//! One call of a server, over connections that are kept open.

use std::time::Duration;

use serde_json::Value;
use ureq::http::Response;
use ureq::{Agent, RequestBuilder};

use super::fault::Fault;
use super::settings::RemoteSettings;

/// The longest reply that is read.
const MAX_REPLY: u64 = 32 << 20;
/// The most that is said of a refusal.
const MAX_MESSAGE: usize = 300;

/// A reply and the length of its body in bytes.
pub(crate) struct Reply {
    pub json: Value,
    pub bytes: usize,
}

/// A server.
pub(crate) struct Client {
    pub url: String,
    key: Option<String>,
    agent: Agent,
}

impl Client {
    pub fn new(url: &str, settings: &RemoteSettings) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(settings.connect_timeout))
            .timeout_global(Some(settings.timeout))
            .max_idle_connections_per_host(settings.connections)
            .max_idle_connections(settings.connections)
            .build();
        Self { url: url.to_owned(), key: settings.key.clone(), agent: Agent::new_with_config(config) }
    }

    pub fn get(&self, path: &str) -> Result<Reply, Fault> {
        read(self.with_key(self.agent.get(format!("{}{path}", self.url))).call())
    }

    pub fn post(&self, path: &str, body: &str) -> Result<Reply, Fault> {
        let request = self.with_key(self.agent.post(format!("{}{path}", self.url)));
        read(request.content_type("application/json").send(body))
    }

    fn with_key<B>(&self, request: RequestBuilder<B>) -> RequestBuilder<B> {
        match &self.key {
            Some(key) => request.header("Authorization", format!("Bearer {key}")),
            None => request,
        }
    }
}

/// Makes a call again where that may help; the last fault, and how many calls there were. `wait` waits for so long before
/// the next one; where it is false there is none.
pub(crate) fn patiently<T>(
    settings: &RemoteSettings,
    wait: impl Fn(Duration) -> bool,
    call: impl Fn() -> Result<T, Fault>,
) -> Result<T, (Fault, usize)> {
    let mut calls = 0;
    loop {
        calls += 1;
        match call() {
            Ok(value) => return Ok(value),
            Err(fault) if fault.may_pass() && calls <= settings.retries => {
                tracing::info!(?fault, calls, "a call failed and is made again");
                if !wait(settings.pause(calls - 1, fault.retry_after())) {
                    return Err((fault, calls));
                }
            }
            Err(fault) => return Err((fault, calls)),
        }
    }
}

fn read(answer: Result<Response<ureq::Body>, ureq::Error>) -> Result<Reply, Fault> {
    let mut answer = answer.map_err(fault)?;
    let status = answer.status().as_u16();
    // Seconds; the other form, a date, is rare and the pause is as well without it.
    let retry_after = answer.headers().get("retry-after").and_then(|v| v.to_str().ok()?.parse().ok());
    let body = answer.body_mut().with_config().limit(MAX_REPLY).read_to_vec().map_err(fault)?;
    if !(200..300).contains(&status) {
        let message = said(&body);
        return Err(Fault::Refused { status, message, retry_after: retry_after.map(Duration::from_secs) });
    }
    match serde_json::from_slice(&body) {
        Ok(json) => Ok(Reply { json, bytes: body.len() }),
        Err(e) => Err(Fault::Protocol(format!("it is no JSON: {e}"))),
    }
}

/// What a refusal says, in OpenAI's form, that of FastAPI, or as text.
fn said(body: &[u8]) -> String {
    let json: Value = serde_json::from_slice(body).unwrap_or_default();
    let text = ["message", "detail", "error"].into_iter().find_map(|k| json[k].as_str());
    let text = json["error"]["message"].as_str().or(text).map(str::to_owned);
    let text = text.unwrap_or_else(|| String::from_utf8_lossy(body).into_owned());
    let text: String = text.chars().take(MAX_MESSAGE).collect();
    if text.trim().is_empty() { "no reason given".into() } else { text }
}

fn fault(error: ureq::Error) -> Fault {
    match error {
        ureq::Error::Timeout(_) => Fault::Timeout,
        ureq::Error::Io(e) if e.kind() == std::io::ErrorKind::TimedOut => Fault::Timeout,
        ureq::Error::BodyExceedsLimit(n) => Fault::Protocol(format!("it is longer than {n} bytes")),
        other => Fault::Unreachable(other.to_string()),
    }
}

//! Whether a server's model is the one that is meant and its tokenizer the small model's.

use std::thread;

use nics_core::sampling::Sampling;
use nics_core::tokenizer::Tokenizer;
use serde_json::{Value, json};

use super::client::{self, Client};
use super::fault::Fault;
use super::protocol::{Ask, Protocol};
use super::settings::RemoteSettings;
use super::spec::Engine;
use crate::{Error, Result};

/// Texts that tokenizers split differently: words, digits, code, white space, other scripts, signs of control.
pub const PROBES: [&str; 8] = [
    "The quick brown fox doesn't jump over 12345 lazy dogs.",
    "def f(x):\n    return x**2 + 0.001\t# naïve\n",
    "   leading, trailing   and\n\n\nempty lines   ",
    "\\boxed{\\frac{1}{2}} = 0.5 \u{2248} \u{221a}0.25",
    "人工智能正在改变世界。今天天气很好！",
    "Привет, мир! مرحبا بالعالم こんにちは 안녕하세요",
    "👩‍🔬🚀 café — “quoted” … №7",
    "<think>\nWait, let me check.\n</think>\n\nAnswer",
];

/// What a server says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerFacts {
    /// The model that is asked.
    pub model: String,
    /// Tokens of a sequence, where it says so.
    pub context: Option<usize>,
    /// Whether the tokenizers could be compared: the server may have no route for it.
    pub tokenizer_checked: bool,
}

/// Asks the server for its model and holds its tokenizer against ours.
pub(super) fn greet(
    client: &Client,
    engine: Engine,
    settings: &RemoteSettings,
    tokenizer: &Tokenizer,
) -> Result<ServerFacts> {
    let (model, context) = model(client, engine, settings)?;
    let tokenizer_checked = compare(client, settings, &model, tokenizer)?;
    if !tokenizer_checked {
        tracing::warn!("{} has no route that encodes a text: its tokenizer could not be checked", client.url);
    }
    Ok(ServerFacts { model, context, tokenizer_checked })
}

fn model(client: &Client, engine: Engine, settings: &RemoteSettings) -> Result<(String, Option<usize>)> {
    let asked = settings.model.as_deref();
    let bad = |reason: String| Err(Fault::Protocol(reason).error(&client.url, 1, settings.timeout));
    let reply = match patiently(settings, || client.get("/v1/models")) {
        Ok(reply) => reply.json,
        Err((Fault::Refused { status: 404, .. }, _)) if engine == Engine::Sglang => {
            let info = patiently(settings, || client.get("/get_model_info"));
            let info = info.map_err(|(fault, calls)| fault.error(&client.url, calls, settings.timeout))?;
            json!({"data": [{"id": info.json["model_path"]}]})
        }
        Err((fault, calls)) => return Err(fault.error(&client.url, calls, settings.timeout)),
    };
    let models: Vec<(&str, &Value)> = reply["data"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|m| Some((m["id"].as_str()?, &m["max_model_len"])))
        .collect();
    let chosen = match asked {
        Some(name) => models.iter().find(|(id, _)| *id == name),
        None => models.first(),
    };
    match (chosen, asked) {
        (Some((id, context)), _) => Ok(((*id).to_owned(), context.as_u64().map(|n| n as usize))),
        (None, Some(name)) => {
            let known: Vec<&str> = models.iter().map(|(id, _)| *id).collect();
            Err(Error::setting(
                "the large model's name",
                format!("{name:?}"),
                format!("one that {} has: {}", client.url, known.join(", ")),
            ))
        }
        (None, None) => bad("it lists no model".into()),
    }
}

/// Compares the probes' ids; false when the server does not encode.
fn compare(client: &Client, settings: &RemoteSettings, model: &str, tokenizer: &Tokenizer) -> Result<bool> {
    for text in PROBES {
        let ours = tokenizer.encode(text, false).map_err(nics_core::Error::from)?;
        let body = json!({"model": model, "prompt": text, "add_special_tokens": false}).to_string();
        let reply = match patiently(settings, || client.post("/tokenize", &body)) {
            Ok(reply) => reply.json,
            Err((Fault::Refused { status: 404 | 405 | 501, .. }, _)) => return Ok(false),
            Err((fault, calls)) => return Err(fault.error(&client.url, calls, settings.timeout)),
        };
        let list = reply["tokens"].as_array();
        let theirs: Option<Vec<u32>> = list
            .and_then(|ids| ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect());
        let Some(theirs) = theirs else {
            let fault = Fault::Protocol("its /tokenize gives no list `tokens` of ids".into());
            return Err(fault.error(&client.url, 1, settings.timeout));
        };
        if theirs != ours {
            return Err(Error::RemoteTokenizer {
                url: client.url.clone(),
                text: text.to_owned(),
                theirs,
                ours,
            });
        }
    }
    Ok(true)
}

/// Lets the server write one token behind the highest id that can come: it takes ids, knows this one, and gives ids back.
pub(super) fn try_out(
    client: &Client,
    protocol: &Protocol,
    settings: &RemoteSettings,
    highest: u32,
) -> Result<()> {
    let ask = Ask { ids: vec![highest], sampling: Sampling::default(), banned: Vec::new() };
    // The body is made anew for each try: the way of older servers shows by the first one's failure.
    let call =
        || client.post(protocol.path(), &protocol.body(&[&ask])).and_then(|r| protocol.read(&r.json, 1));
    match patiently(settings, call) {
        Ok(_) => Ok(()),
        Err((Fault::Refused { status: status @ 400..=422, message, retry_after }, calls)) => {
            let message = format!("asked to continue token id {highest}: {message}");
            Err(Fault::Refused { status, message, retry_after }.error(&client.url, calls, settings.timeout))
        }
        Err((fault, calls)) => Err(fault.error(&client.url, calls, settings.timeout)),
    }
}

/// [`client::patiently`], asleep between calls.
fn patiently<T>(settings: &RemoteSettings, call: impl Fn() -> Result<T, Fault>) -> Result<T, (Fault, usize)> {
    let asleep = |time| {
        thread::sleep(time);
        true
    };
    client::patiently(settings, asleep, call)
}

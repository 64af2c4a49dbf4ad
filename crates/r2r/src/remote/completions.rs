//! `/v1/completions` with token ids: vLLM and this project's server.

use std::sync::atomic::Ordering;

use serde::Serialize;
use serde_json::Value;

use super::fault::Fault;
use super::protocol::{Ask, Choosing, Chosen, Given, Protocol, in_order, only_id};
use super::spec::Engine;

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    prompt: Vec<&'a [u32]>,
    max_tokens: usize,
    n: usize,
    #[serde(flatten)]
    choosing: Choosing,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    return_token_ids: bool,
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    return_tokens_as_token_ids: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_salt: Option<&'a str>,
}

pub(super) fn body(protocol: &Protocol, asks: &[&Ask]) -> String {
    let Some(first) = asks.first() else { return "{}".into() };
    let by_logprobs = protocol.engine == Engine::Vllm && protocol.ids_by_logprobs.load(Ordering::Relaxed);
    let body = Body {
        model: &protocol.model,
        prompt: asks.iter().map(|ask| ask.ids.as_slice()).collect(),
        max_tokens: 1,
        n: 1,
        choosing: Choosing::from(*first),
        seed: first.is_drawn().then_some(first.sampling.seed),
        return_token_ids: true,
        stream: false,
        logprobs: by_logprobs.then_some(1),
        return_tokens_as_token_ids: by_logprobs.then_some(true),
        cache_salt: protocol.cache_salt.as_deref(),
    };
    serde_json::to_string(&body).unwrap_or_default()
}

pub(super) fn read(protocol: &Protocol, reply: &Value, count: usize) -> Result<Given, Fault> {
    let choices =
        reply["choices"].as_array().ok_or_else(|| Fault::Protocol("there is no list `choices`".into()))?;
    let cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().map(|n| n as usize);
    let one = |choice: &Value| {
        let token = token(choice).inspect_err(|_| {
            // The next call asks in the way of older servers, too.
            if choice["token_ids"].is_null() {
                protocol.ids_by_logprobs.store(true, Ordering::Relaxed);
            }
        })?;
        Ok(Chosen { token, cached: cached.filter(|_| count == 1) })
    };
    let chosen = in_order(choices, count)?.into_iter().map(one).collect::<Result<_, Fault>>()?;
    Ok(Given { chosen, cached })
}

/// The token of a choice: `token_ids`, or `token_id:<n>` among the log-probabilities.
fn token(choice: &Value) -> Result<u32, Fault> {
    let ids = &choice["token_ids"];
    if !ids.is_null() {
        return only_id(ids, "token_ids");
    }
    let names = choice["logprobs"]["tokens"].as_array();
    let name = match names.map(Vec::as_slice) {
        Some([name]) => name.as_str().unwrap_or_default(),
        _ => return Err(Fault::Protocol("a choice has neither token_ids nor one token_id:<n>".into())),
    };
    let id = name.strip_prefix("token_id:").and_then(|n| n.parse().ok());
    id.ok_or_else(|| Fault::Protocol(format!("a token is {name:?}, expected token_id:<n>")))
}

#[cfg(test)]
mod tests {
    use nics_core::sampling::Sampling;
    use serde_json::json;

    use super::*;

    fn protocol() -> Protocol {
        Protocol::new(Engine::Vllm, "m".into(), Some("salt".into()))
    }

    fn ask(ids: &[u32], temperature: f32) -> Ask {
        let sampling = Sampling { temperature, seed: 9, ..Sampling::default() };
        Ask { ids: ids.to_vec(), sampling, banned: Vec::new() }
    }

    #[test]
    fn every_parameter_is_said() {
        let protocol = protocol();
        let (a, b) = (ask(&[1, 2], 0.0), ask(&[3], 0.0));
        let body: Value = serde_json::from_str(&protocol.body(&[&a, &b])).unwrap();
        let expected = json!({
            "model": "m", "prompt": [[1, 2], [3]], "max_tokens": 1, "n": 1, "temperature": 0.0, "top_p": 1.0,
            "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "ignore_eos": true, "skip_special_tokens": false,
            "return_token_ids": true, "stream": false, "cache_salt": "salt",
        });
        assert_eq!(body, expected);
        protocol.ids_by_logprobs.store(true, Ordering::Relaxed);
        let drawn = Ask { banned: vec![7], ..ask(&[1], 0.5) };
        let body: Value = serde_json::from_str(&protocol.body(&[&drawn])).unwrap();
        assert_eq!((&body["seed"], &body["logprobs"]), (&json!(9), &json!(1)));
        assert_eq!(body["return_tokens_as_token_ids"], true);
        assert_eq!(body["logit_bias"], json!({"7": -100}));
        assert!(protocol.together(&a, &b) && !protocol.together(&drawn, &drawn));
        assert!(!protocol.together(&a, &Ask { banned: vec![1], ..b }));
    }

    #[test]
    fn replies_are_read_in_both_forms_and_any_order() {
        let read = |choices: Value, count| {
            let reply = json!({"choices": choices, "usage": {"prompt_tokens_details": {"cached_tokens": 5}}});
            read(&protocol(), &reply, count)
                .map(|given| given.chosen.iter().map(|c| c.token).collect::<Vec<_>>())
        };
        let two =
            json!([{"index": 1, "token_ids": [4]}, {"index": 0, "logprobs": {"tokens": ["token_id:6"]}}]);
        assert_eq!(read(two, 2).unwrap(), [6, 4]);
        for (choices, count, said) in [
            (json!([{"index": 0, "token_ids": [4, 5]}]), 1, "a list of 2"),
            (json!([{"index": 0, "token_ids": []}]), 1, "a list of 0"),
            (json!([{"index": 0, "token_ids": [-4]}]), 1, "-4"),
            (json!([{"index": 0, "text": "x"}]), 1, "neither"),
            (json!([{"index": 0, "logprobs": {"tokens": ["x"]}}]), 1, "token_id:<n>"),
            (json!([{"index": 1, "token_ids": [4]}]), 1, "index 1"),
            (json!([{"index": 0, "token_ids": [4]}]), 2, "1 answers for 2"),
            (json!([{"index": 0, "token_ids": [4]}, {"index": 0, "token_ids": [4]}]), 2, "two answers"),
            (json!(null), 1, "choices"),
        ] {
            match read(choices, count) {
                Err(Fault::Protocol(reason)) => assert!(reason.contains(said), "{reason}"),
                other => panic!("{said}: {other:?}"),
            }
        }
    }
}

//! What is written: streamed and whole, alone and in company, under settings of its own.

use nics_core::cache::DenseCache;
use nics_core::generate;
use r2r::policy::{Kind, PolicySpec, Settings};
use serde_json::{Value, json};

use crate::kit::*;

fn neural() -> PolicySpec {
    PolicySpec::new(Kind::Neural)
}

#[test]
fn a_stream_is_the_whole_reply_and_what_the_decoder_writes() {
    let pair = Pair::new();
    let server = Server::new(Setup::default());
    let tokenizer = tokenizer();
    for seed in 0..4 {
        let prompt = prompt(seed);
        let threshold = pair.middle(&prompt, 40);
        let settings = Settings { threshold: Some(threshold), ..Settings::default() };
        let events = pair.write(&neural(), request(&prompt, 40, settings));
        let expected = written(&events);
        assert!(expected.iter().any(|(_, large)| *large) && expected.iter().any(|(_, large)| !large));

        let fields = json!({"threshold": threshold, "return_sources": true});
        let whole = server.complete(&body(&prompt, 40, fields));
        let choice = &whole["choices"][0];
        assert_eq!(sources(&choice["tokens"]), expected);
        for (token, event) in choice["tokens"].as_array().unwrap().iter().zip(&events) {
            assert!((token["score"].as_f64().unwrap() - f64::from(event.score)).abs() < 1e-6);
            assert!(token.get("degraded").is_none());
        }
        let ids: Vec<u32> = expected.iter().map(|(id, _)| *id).collect();
        assert_eq!(choice["text"], tokenizer.decode(&ids, true).unwrap());
        assert_eq!(choice["finish_reason"], "length");

        // Streams have the sources unless they say no, whole replies only if they say so.
        let plain = server.complete(&body(&prompt, 40, json!({"threshold": threshold})));
        assert_eq!(plain["choices"][0]["text"], choice["text"]);
        assert!(plain["choices"][0].get("tokens").is_none());
        let (text, tokens) = gathered(
            &server.stream("/v1/completions", &body(&prompt, 40, json!({"threshold": threshold}))),
            0,
        );
        assert_eq!((text.as_str(), &tokens), (choice["text"].as_str().unwrap(), &choice["tokens"]));
        let without = body(&prompt, 40, json!({"threshold": threshold, "return_sources": false}));
        let (text, tokens) = gathered(&server.stream("/v1/completions", &without), 0);
        assert_eq!((text.as_str(), tokens), (choice["text"].as_str().unwrap(), json!([])));
    }
    server.end();
}

#[test]
fn the_ends_are_each_model_by_itself() {
    let pair = Pair::new();
    let server = Server::new(Setup::default());
    let by_itself = |model: &nics_core::models::Decoder, prompt: &[u32]| {
        let mut cache = DenseCache::new();
        let mut generator = generate::Generator::new(model, &mut cache);
        let request = generate::Request::greedy(prompt.to_vec(), 40, &[]);
        generate::collect(&mut generator, [request], 1).unwrap().remove(0)
    };
    for seed in 0..4 {
        let prompt = prompt(seed);
        let (small, large) = (by_itself(&pair.small, &prompt), by_itself(&pair.large, &prompt));
        assert_ne!(small, large);
        for (fields, expected, is_large) in [
            (json!({"threshold": 0}), &large, true),
            (json!({"target_llm_ratio": 1}), &large, true),
            (json!({"threshold": 1.5}), &small, false),
            (json!({"target_llm_ratio": 0}), &small, false),
        ] {
            let mut body = body(&prompt, 40, fields.clone());
            body["return_sources"] = true.into();
            let reply = server.complete(&body);
            let found = sources(&reply["choices"][0]["tokens"]);
            let expected: Vec<(u32, bool)> = expected.iter().map(|&id| (id, is_large)).collect();
            assert_eq!(found, expected, "{fields}");
            assert_eq!(reply["usage"]["llm_token_ratio"], f64::from(u8::from(is_large)));
        }
    }
    server.end();
}

#[test]
fn a_request_in_company_is_answered_as_alone() {
    let pair = Pair::new();
    let server = Server::new(Setup::default());
    let jobs: Vec<(Vec<u32>, usize, Settings, Value)> = (0..12)
        .map(|seed| {
            let prompt = prompt(seed);
            let new = 20 + 3 * seed as usize;
            let (settings, fields) = match seed % 4 {
                0 => (Settings::default(), json!({})),
                1 => {
                    let threshold = pair.middle(&prompt, new);
                    let settings = Settings { threshold: Some(threshold), ..Settings::default() };
                    (settings, json!({"threshold": threshold}))
                }
                2 => {
                    let settings = Settings { target: Some(0.3), ..Settings::default() };
                    (settings, json!({"target_llm_ratio": 0.3}))
                }
                _ => {
                    let settings = Settings { threshold: Some(0.0), ..Settings::default() };
                    (settings, json!({"threshold": 0.0}))
                }
            };
            (prompt, new, settings, fields)
        })
        .collect();
    let expected: Vec<Vec<(u32, bool)>> = jobs
        .iter()
        .map(|(prompt, new, settings, _)| written(&pair.write(&neural(), request(prompt, *new, *settings))))
        .collect();
    for _ in 0..2 {
        std::thread::scope(|scope| {
            for ((prompt, new, _, fields), expected) in jobs.iter().zip(&expected) {
                let server = &server;
                scope.spawn(move || {
                    let chunks = server.stream("/v1/completions", &body(prompt, *new, fields.clone()));
                    assert_eq!(&sources(&gathered(&chunks, 0).1), expected, "{fields}");
                });
            }
        });
    }
    server.end();
}

#[test]
fn usage_and_metrics_count_both_models() {
    let server = Server::new(Setup::default());
    let prompt = prompt(3);
    let fields = json!({
        "target_llm_ratio": 0.25, "return_sources": true, "n": 2, "temperature": 0.7, "seed": 5,
    });
    let whole = server.complete(&body(&prompt, 100, fields.clone()));
    let choices = whole["choices"].as_array().unwrap();
    assert_ne!(choices[0]["text"], choices[1]["text"]);
    let tokens: Vec<(u32, bool)> = choices.iter().flat_map(|c| sources(&c["tokens"])).collect();
    let large = tokens.iter().filter(|(_, large)| *large).count();
    let usage = &whole["usage"];
    assert_eq!(usage["completion_tokens"], 200);
    assert_eq!((&usage["llm_tokens"], &usage["slm_tokens"]), (&json!(large), &json!(200 - large)));
    let ratio = large as f64 / 200.0;
    // The bound of the budget: (1 + step) / (step n) for each choice of 100 tokens.
    assert!((ratio - 0.25).abs() <= 1.02 / (0.02 * 100.0), "{ratio}");
    let near = |found: &Value, expected: f64| {
        assert!((found.as_f64().unwrap() - expected).abs() < 1e-9, "{found}, {expected}");
    };
    near(&usage["llm_token_ratio"], ratio);
    near(&usage["mean_parameters_billions"]["exclusive"], (1.0 - ratio) * 1.5 + ratio * 32.0);
    near(&usage["mean_parameters_billions"]["additive"], 1.5 + ratio * 32.0 + 0.056);
    assert!(usage["llm_tokens_read"].as_u64() >= usage["llm_tokens"].as_u64());
    assert_eq!(usage["degraded_tokens"], 0);

    server.wait_for("running_sequences", 0.0);
    let first = server.metric("large_tokens_total");
    near(&json!(first), large as f64);
    near(&json!(server.metric("small_tokens_total")), 200.0 - large as f64);
    near(&json!(server.metric("large_calls_total")), large as f64);
    near(&json!(server.metric("large_tokens_read_total")), usage["llm_tokens_read"].as_f64().unwrap());
    near(&json!(server.metric("degraded_tokens_total")), 0.0);
    near(&json!(server.metric("small_kv_bytes") + server.metric("large_kv_bytes")), 0.0);

    // The same seed, the same reply, whose usage a stream carries at its end.
    let mut streamed = fields;
    streamed["stream_options"] = json!({"include_usage": true});
    let chunks = server.stream("/v1/completions", &body(&prompt, 100, streamed));
    assert_eq!(&chunks.last().unwrap()["usage"], usage);
    for (i, choice) in choices.iter().enumerate() {
        let (text, tokens) = gathered(&chunks, i);
        assert_eq!((&json!(text), &tokens), (&choice["text"], &choice["tokens"]));
    }
    server.end();
}

#[test]
fn a_stop_string_ends_a_reply_of_two_models() {
    let server = Server::new(Setup::default());
    let prompt = prompt(1);
    let fields = json!({"target_llm_ratio": 0.5, "return_sources": true});
    let whole = server.complete(&body(&prompt, 60, fields.clone()));
    let text = whole["choices"][0]["text"].as_str().unwrap();
    // From where the random bytes are whole characters.
    let chars: Vec<char> = text.chars().skip(8).collect();
    let plain = chars.windows(3).find(|w| !w.contains(&char::REPLACEMENT_CHARACTER));
    let stop: String = plain.expect("three characters").iter().collect();
    let mut fields = fields;
    fields["stop"] = json!(stop);
    let reply = server.complete(&body(&prompt, 60, fields));
    assert_eq!(reply["choices"][0]["text"], text[..text.find(&stop).unwrap()]);
    assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    let n = reply["usage"]["completion_tokens"].as_u64().unwrap();
    assert!(n < 60);
    let counted = ["slm_tokens", "llm_tokens"].map(|name| reply["usage"][name].as_u64().unwrap());
    assert_eq!(counted.iter().sum::<u64>(), n);
    assert_eq!(reply["choices"][0]["tokens"].as_array().unwrap().len() as u64, n);
    server.wait_for("running_sequences", 0.0);
    server.end();
}

#[test]
fn random_draws_follow_from_the_requests_seed() {
    let spec = PolicySpec { target: Some(0.5), ..PolicySpec::new(Kind::Random) };
    let server = Server::new(Setup { spec, ..Setup::default() });
    let prompt = prompt(2);
    let reply = |seed: u64| {
        let fields = json!({"seed": seed, "return_sources": true, "target_llm_ratio": 0.4});
        sources(&server.complete(&body(&prompt, 40, fields))["choices"][0]["tokens"])
    };
    let first = reply(1);
    assert_eq!(reply(1), first);
    assert_ne!(reply(2), first);
    server.end();
}

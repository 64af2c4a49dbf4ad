//! The form of replies, whole and streamed, over a scripted engine.

#![cfg(feature = "server")]

mod server_common;

use std::sync::atomic::Ordering;
use std::time::Duration;

use nics_core::server::ServerConfig;
use serde_json::{Value, json};
use server_common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

/// Takes what differs from reply to reply, after holding it to its form.
fn stable(mut value: Value, id: &str) -> Value {
    let map = value.as_object_mut().unwrap();
    assert!(map["id"].as_str().unwrap().starts_with(id), "{map:?}");
    assert!(map["created"].as_u64().unwrap() > 1_600_000_000);
    assert!(map["system_fingerprint"].as_str().unwrap().starts_with("fp_"));
    for key in ["id", "created", "system_fingerprint"] {
        map.remove(key);
    }
    value
}

#[tokio::test]
async fn a_whole_chat() {
    let server = Server::fake(ServerConfig::default(), 4, Fake::saying("Hi 🦀!")).await;
    let reply = server.post(CHAT, &chat("hello", json!({}))).await;
    assert_eq!(reply.header("content-type"), Some("application/json"));
    let reply = reply.json();
    assert_eq!(keys(&reply), ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]);
    let (prompt, written) = (
        reply["usage"]["prompt_tokens"].as_u64().unwrap(),
        reply["usage"]["completion_tokens"].as_u64().unwrap(),
    );
    assert_eq!(
        stable(reply, "chatcmpl-"),
        json!({
            "object": "chat.completion", "model": MODEL,
            "choices": [{
                "index": 0, "message": {"role": "assistant", "content": "Hi 🦀!", "refusal": null},
                "logprobs": null, "finish_reason": "stop",
            }],
            "usage": {
                "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
        })
    );
    server.end().await;
}

#[tokio::test]
async fn a_streamed_chat() {
    let server = Server::fake(ServerConfig::default(), 4, Fake::saying("Hi 🦀!")).await;
    for usage in [false, true] {
        let mut body = chat("hello", json!({"stream": true}));
        if usage {
            body["stream_options"] = json!({"include_usage": true});
        }
        let reply = server.post(CHAT, &body).await;
        assert_eq!(reply.header("cache-control"), Some("no-cache"));
        let chunks = reply.chunks();
        for key in ["id", "created", "model", "system_fingerprint"] {
            assert!(chunks.iter().all(|c| c[key] == chunks[0][key]), "{key}");
        }
        let expected = [
            vec![json!({"role": "assistant", "content": ""})],
            // A character of four bytes comes in one piece.
            ["H", "i", " ", "🦀", "!"].map(|t| json!({"content": t})).to_vec(),
            vec![json!({})],
        ]
        .concat();
        let n = expected.len();
        for (i, (chunk, delta)) in chunks.iter().zip(expected).enumerate() {
            let finish = if i + 1 == n { json!("stop") } else { Value::Null };
            let mut shape = json!({
                "object": "chat.completion.chunk", "model": MODEL,
                "choices": [{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish}],
            });
            if usage {
                shape["usage"] = Value::Null;
            }
            assert_eq!(stable(chunk.clone(), "chatcmpl-"), shape);
        }
        assert_eq!(chunks.len(), n + usize::from(usage));
        if usage {
            let whole = server.post(CHAT, &chat("hello", json!({}))).await.json();
            let last = stable(chunks[n].clone(), "chatcmpl-");
            assert_eq!(
                last,
                json!({"object": "chat.completion.chunk", "model": MODEL, "choices": [], "usage": whole["usage"]})
            );
        }
    }
    server.end().await;
}

#[tokio::test]
async fn ids_of_tokens_are_told_when_asked_for() {
    let server = Server::model(ServerConfig::default(), 4, settings()).await;
    let fields = json!({"max_tokens": 12, "temperature": 0.9, "seed": 7, "return_token_ids": true});
    for ignore_eos in [false, true] {
        let mut fields = fields.clone();
        fields["ignore_eos"] = ignore_eos.into();
        let prompts = json!([[40, 41, 42], [50]]);
        let whole = server.post(TEXT, &completion(prompts.clone(), fields.clone())).await.json();
        fields["stream"] = json!(true);
        let chunks = server.post(TEXT, &completion(prompts, fields)).await.chunks();
        let mut written = 0;
        for i in 0..2 {
            let ids = whole["choices"][i]["token_ids"].as_array().unwrap();
            let of_choice = chunks.iter().map(|c| &c["choices"][0]).filter(|c| c["index"] == i);
            let streamed: Vec<Value> =
                of_choice.flat_map(|c| c["token_ids"].as_array().cloned().unwrap_or_default()).collect();
            assert_eq!(streamed, *ids);
            written += ids.len();
        }
        assert_eq!(whole["usage"]["completion_tokens"], written);
    }
    let without = server.post(TEXT, &completion("x", json!({}))).await.json();
    assert!(without["choices"][0].get("token_ids").is_none());
    server.end().await;
}

#[tokio::test]
async fn completions_of_all_kinds_of_prompts() {
    let server = Server::fake(ServerConfig::default(), 4, Fake::babbling()).await;
    let post = async |prompt: Value, fields: Value| server.post(TEXT, &completion(prompt, fields)).await;
    let front = Front::new();
    let ids = |t: &str| front.tokenizer.encode(t, true).unwrap();
    let fixed = json!({"max_tokens": 9, "seed": 5});
    let one = post(json!("first"), fixed.clone()).await.json();
    let two = post(json!("the second"), fixed.clone()).await.json();
    let text = |r: &Value| whole_texts(r)[0].clone();
    assert_ne!(text(&one), text(&two));
    assert_eq!(
        stable(one.clone(), "cmpl-"),
        json!({
            "object": "text_completion", "model": MODEL,
            "choices": [{"index": 0, "text": text(&one), "logprobs": null, "finish_reason": "length"}],
            "usage": one["usage"],
        })
    );
    assert_eq!(text(&post(json!(ids("first")), fixed.clone()).await.json()), text(&one));
    for both in [
        json!(["first", "the second"]),
        json!([ids("first"), ids("the second")]),
        json!(["first", ids("the second")]),
    ] {
        let reply = post(both.clone(), fixed.clone()).await.json();
        assert_eq!(whole_texts(&reply), [text(&one), text(&two)], "{both}");
        assert_eq!(reply["choices"][1]["index"], 1);
        let sum = |key: &str| one["usage"][key].as_u64().unwrap() + two["usage"][key].as_u64().unwrap();
        for key in ["prompt_tokens", "completion_tokens", "total_tokens"] {
            assert_eq!(reply["usage"][key], sum(key), "a prompt counts once");
        }
        let mut streamed = fixed.clone();
        streamed["stream"] = json!(true);
        let chunks = post(both, streamed).await.chunks();
        assert_eq!(streamed_texts(&chunks, 2), [text(&one), text(&two)]);
        assert!(chunks.iter().all(|c| c["object"] == "text_completion" && c.get("usage").is_none()));
        let ends: Vec<&Value> =
            chunks.iter().map(|c| &c["choices"][0]).filter(|c| !c["finish_reason"].is_null()).collect();
        assert_eq!(ends.len(), 2);
        assert!(ends.iter().all(|c| c["text"] == "" && c["finish_reason"] == "length"));
    }
    // The prompt repeated, streamed and whole.
    for prompt in [json!("first"), json!(ids("first"))] {
        let mut fields = fixed.clone();
        fields["echo"] = json!(true);
        let reply = post(prompt.clone(), fields.clone()).await.json();
        assert_eq!(whole_texts(&reply), [format!("first{}", text(&one))]);
        fields["stream"] = json!(true);
        let chunks = post(prompt, fields).await.chunks();
        assert_eq!(streamed_texts(&chunks, 1), whole_texts(&reply));
    }
    let refused = post(json!("x"), json!({"echo": true, "logprobs": 1})).await;
    assert_eq!(refused.error(400).0.as_deref(), Some("echo"));
    server.end().await;
}

#[tokio::test]
async fn choices_have_seeds_of_their_own() {
    let server = Server::fake(ServerConfig::default(), 4, Fake::babbling()).await;
    let texts = async |path: &str, fields: Value| {
        let body = if path == CHAT { chat("x", fields) } else { completion("x", fields) };
        whole_texts(&server.post(path, &body).await.json())
    };
    for path in [CHAT, TEXT] {
        let four = texts(path, json!({"n": 4, "seed": 7})).await;
        let distinct: std::collections::HashSet<_> = four.iter().collect();
        assert_eq!(distinct.len(), 4);
        for (i, text) in four.iter().enumerate() {
            assert_eq!(&texts(path, json!({"seed": 7 + i})).await, std::slice::from_ref(text), "seed + {i}");
        }
        assert_eq!(texts(path, json!({"n": 4, "seed": 7})).await, four);
        // Without a seed each request draws one.
        assert_ne!(texts(path, json!({})).await, texts(path, json!({})).await);
        let edge = texts(path, json!({"n": 2, "seed": u64::MAX})).await;
        assert_eq!(edge[1], texts(path, json!({"seed": 0})).await[0]);
        assert_eq!(texts(path, json!({"seed": -1})).await[0], edge[0]);

        let body = if path == CHAT {
            chat("x", json!({"n": 3, "seed": 7, "stream": true}))
        } else {
            completion("x", json!({"n": 3, "seed": 7, "stream": true}))
        };
        let chunks = server.post(path, &body).await.chunks();
        assert_eq!(streamed_texts(&chunks, 3), four[..3]);
        if path == CHAT {
            let begins = chunks.iter().filter(|c| c["choices"][0]["delta"]["role"] == "assistant");
            assert_eq!(begins.count(), 3);
        }
    }
    server.end().await;
}

#[tokio::test]
async fn a_stop_string_ends_a_choice_and_its_job() {
    let fake = Fake { pace: Duration::from_millis(8), ..Fake::saying("One, two, three, four") };
    let seen = fake.seen.clone();
    let server = Server::fake(ServerConfig::default(), 4, fake).await;
    for (stop, text, finish) in [
        (json!(", th"), "One, two", "stop"),
        (json!(["five", "two", "One, t"]), "", "stop"),
        (json!("four"), "One, two, three, ", "stop"),
        (json!("fourth"), "One, two, three, four", "stop"),
        (json!(["x"]), "One, two, three, four", "stop"),
    ] {
        for path in [CHAT, TEXT] {
            let body = |stream| {
                let fields = json!({"stop": stop, "stream": stream, "max_tokens": 60});
                if path == CHAT { chat("x", fields) } else { completion("x", fields) }
            };
            let reply = server.post(path, &body(false)).await.json();
            assert_eq!(whole_texts(&reply), [text], "{stop}");
            assert_eq!(reply["choices"][0]["finish_reason"], finish);
            let chunks = server.post(path, &body(true)).await.chunks();
            assert_eq!(streamed_texts(&chunks, 1), [text]);
            assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], finish);
        }
    }
    // Two of the stop strings are met long before the end, by four requests each; those jobs end there.
    let cancelled = || seen.cancelled.load(Ordering::SeqCst);
    until("jobs are cancelled", || seen.running.load(Ordering::SeqCst) == 0).await;
    assert!(cancelled() >= 8, "{}", cancelled());
    server.end().await;
}

#[tokio::test]
async fn log_probabilities_of_both_forms() {
    let server = Server::fake(ServerConfig::default(), 4, Fake::saying("a🦀")).await;
    let bytes = [&b"a"[..], b"\xf0", b"\x9f", b"\xa6", b"\x80"];
    let reply = server.post(CHAT, &chat("x", json!({"logprobs": true, "top_logprobs": 2}))).await.json();
    let content = reply["choices"][0]["logprobs"]["content"].as_array().unwrap();
    // The end token is none of the reply's.
    assert_eq!(content.len(), bytes.len());
    for (entry, bytes) in content.iter().zip(bytes) {
        assert_eq!(keys(entry), ["token", "logprob", "bytes", "top_logprobs"]);
        assert_eq!(entry["bytes"], json!(bytes));
        assert_eq!(entry["token"], json!(String::from_utf8_lossy(bytes)));
        assert_eq!(entry["logprob"], -0.5);
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 2);
        assert_eq!(entry["top_logprobs"][0]["bytes"], json!(bytes));
    }
    let chunks = server
        .post(CHAT, &chat("x", json!({"logprobs": true, "top_logprobs": 2, "stream": true})))
        .await
        .chunks();
    let streamed: Vec<Value> = chunks
        .iter()
        .filter_map(|c| c["choices"][0]["logprobs"]["content"].as_array().cloned())
        .flatten()
        .collect();
    assert_eq!(&streamed, content);
    let none = server.post(CHAT, &chat("x", json!({"logprobs": true}))).await.json();
    assert_eq!(none["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));

    let reply = server.post(TEXT, &completion("x", json!({"logprobs": 1}))).await.json();
    let logprobs = &reply["choices"][0]["logprobs"];
    assert_eq!(keys(logprobs), ["tokens", "token_logprobs", "top_logprobs", "text_offset"]);
    assert_eq!(logprobs["tokens"][0], "a");
    assert_eq!(logprobs["token_logprobs"], json!(vec![-0.5; 5]));
    assert_eq!(logprobs["top_logprobs"][0], json!({"a": -0.5}));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 2, 2]));
    let chunks = server.post(TEXT, &completion("x", json!({"logprobs": 1, "stream": true}))).await.chunks();
    for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let parts = chunks.iter().filter_map(|c| c["choices"][0]["logprobs"][key].as_array().cloned());
        assert_eq!(json!(parts.flatten().collect::<Vec<_>>()), logprobs[key], "{key}");
    }
    server.end().await;
}

#[tokio::test]
async fn the_engines_own_fields_go_through() {
    let server = Server::fake(ServerConfig::default(), 4, Fake::saying("ab")).await;
    let expected = json!([{"mood": "fine", "at": 0}, {"mood": "fine", "at": 1}, {"mood": "fine", "at": 2}]);
    for path in [CHAT, TEXT] {
        let body = |stream| {
            let fields = json!({"mood": "fine", "stream": stream});
            if path == CHAT { chat("x", fields) } else { completion("x", fields) }
        };
        let reply = server.post(path, &body(false)).await.json();
        assert_eq!(reply["choices"][0]["tokens"], expected);
        // Its counts are summed up; what the server itself counts stays the server's.
        let usage = &reply["usage"];
        assert_eq!(usage["moods"], 3);
        assert!(usage["prompt_tokens"].as_u64() < Some(1000));
        let chunks = server.post(path, &body(true)).await.chunks();
        let own = chunks.iter().filter_map(|c| c["choices"][0]["tokens"].as_array().cloned()).flatten();
        assert_eq!(json!(own.collect::<Vec<_>>()), expected);
        let mut counted = body(true);
        counted["stream_options"] = json!({"include_usage": true});
        let chunks = server.post(path, &counted).await.chunks();
        assert_eq!(&chunks.last().unwrap()["usage"], usage);
    }
    server.end().await;
}

#[tokio::test]
async fn end_tokens_may_be_ignored() {
    let front = Front::new();
    let eos = front.card.eos[0];
    let server =
        Server::fake(ServerConfig::default(), 4, Fake::new(move |_| vec![65, eos, 66, eos, 67])).await;
    let reply =
        server.post(TEXT, &completion("x", json!({"ignore_eos": true, "max_tokens": 5}))).await.json();
    assert_eq!(
        (&reply["usage"]["completion_tokens"], &reply["choices"][0]["finish_reason"]),
        (&json!(5), &json!("length"))
    );
    assert_eq!(whole_texts(&reply)[0].len(), 3);
    let reply = server.post(TEXT, &completion("x", json!({"max_tokens": 5}))).await.json();
    assert_eq!(
        (&reply["usage"]["completion_tokens"], &reply["choices"][0]["finish_reason"]),
        (&json!(2), &json!("stop"))
    );
    server.end().await;
}

#[tokio::test]
async fn failures_before_and_within_a_stream() {
    // Refused by the engine: its own status, streamed or not.
    let server = Server::fake(ServerConfig::default(), 4, Fake::babbling()).await;
    for stream in [false, true] {
        let body = completion(json!(vec![5; 13]), json!({"mood": "bad", "stream": stream}));
        let reply = server.post(TEXT, &body).await;
        assert!(reply.text().contains("13 is a bad number"), "{}", reply.text());
        reply.error(400);
    }
    server.end().await;

    let server =
        Server::fake(ServerConfig::default(), 4, Fake { fail_at: Some(3), ..Fake::babbling() }).await;
    server.post(CHAT, &chat("x", json!({}))).await.error(500);
    let reply = server.post(CHAT, &chat("x", json!({"stream": true}))).await;
    assert_eq!(reply.status, 200);
    let last: Value = serde_json::from_str(reply.events().last().unwrap()).unwrap();
    assert_eq!(keys(&last["error"]), ["message", "type", "param", "code"]);
    server.end().await;

    // The engine panics: those who wait are told, health says so, the process lives.
    let server = Server::fake(ServerConfig::default(), 4, Fake::new(|_| panic!("boom"))).await;
    server.post(CHAT, &chat("x", json!({}))).await.error(503);
    assert_eq!(server.get("/health").await.json(), json!({"status": "dead"}));
    server.running.stopper().drain();
    timely(server.running.join()).await.unwrap();
}

#[tokio::test]
async fn comments_keep_a_quiet_stream_alive() {
    let config = ServerConfig { heartbeat: Duration::from_millis(50), ..ServerConfig::default() };
    let fake = Fake { pace: Duration::from_millis(200), ..Fake::saying("ab") };
    let server = Server::fake(config, 4, fake).await;
    let reply = server.post(CHAT, &chat("x", json!({"stream": true}))).await;
    let comments = reply.text().split("\n\n").filter(|b| *b == ": keep-alive").count();
    assert!(comments >= 3, "{}", reply.text());
    assert_eq!(streamed_texts(&reply.chunks(), 1), ["ab"]);
    server.end().await;

    // A failure after the head is out is an event.
    let config = ServerConfig { heartbeat: Duration::from_millis(50), ..ServerConfig::default() };
    let fake = Fake { pace: Duration::from_millis(200), fail_at: Some(0), ..Fake::saying("ab") };
    let server = Server::fake(config, 4, fake).await;
    let reply = server.post(CHAT, &chat("x", json!({"stream": true}))).await;
    assert_eq!(reply.status, 200);
    let last: Value = serde_json::from_str(reply.events().last().unwrap()).unwrap();
    assert!(last["error"]["message"].is_string());
    server.end().await;
}

#[tokio::test]
async fn a_connection_serves_one_request_after_another() {
    let server = Server::fake(ServerConfig::default(), 4, Fake::saying("Hi")).await;
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    for stream_it in [true, false, true] {
        let body = chat("x", json!({"stream": stream_it})).to_string();
        let head = String::from_utf8(head("POST", CHAT, &[], body.len()))
            .unwrap()
            .replace("Connection: close\r\n", "");
        stream.write_all((head + &body).as_bytes()).await.unwrap();
        let mut seen = Vec::new();
        let end: &[u8] = if stream_it { b"\r\n0\r\n\r\n" } else { b"}}}" };
        while !seen.ends_with(end) {
            let mut bytes = [0; 4096];
            let n = timely(stream.read(&mut bytes)).await.unwrap();
            assert!(n > 0, "closed: {}", String::from_utf8_lossy(&seen));
            seen.extend_from_slice(&bytes[..n]);
        }
    }
    drop(stream);
    server.end().await;
}

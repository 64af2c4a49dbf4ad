//! The fields of requests: what is wrong is refused by name, what changes nothing is let through.

#![cfg(feature = "server")]

mod server_common;

use nics_core::server::ServerConfig;
use serde_json::{Value, json};
use server_common::*;

#[tokio::test]
async fn a_wrong_field_is_named() {
    let server = Server::fake(ServerConfig::default(), 4, Fake::saying("hi")).await;
    let both = [
        ("temperature", json!(999_999)),
        ("temperature", json!(-0.1)),
        ("temperature", json!("hot")),
        ("temperature", json!([1])),
        ("top_p", json!(-1)),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-2)),
        ("top_k", json!(1e9)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("n", json!(1_000_000)),
        ("n", json!(0)),
        ("n", json!(1.5)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(2_147_483_648u64)),
        ("max_tokens", json!(1e300)),
        ("max_completion_tokens", json!(257)),
        ("stop", json!(3)),
        ("stop", json!([3])),
        ("stop", json!("")),
        ("stop", json!(vec!["a"; 17])),
        ("stop", json!("a".repeat(257))),
        ("seed", json!("x")),
        ("seed", json!(1.5)),
        ("stream", json!(1)),
        ("stream_options", json!({"include_usage": true})),
        ("ignore_eos", json!("no")),
        ("return_token_ids", json!(1)),
        ("presence_penalty", json!(0.5)),
        ("frequency_penalty", json!(-0.5)),
        ("logit_bias", json!({"5": 1})),
        ("response_format", json!({"type": "json_object"})),
        ("suffix", json!("end")),
        ("best_of", json!(3)),
        ("user", json!(3)),
        ("model", json!(3)),
    ];
    let chats = [
        ("messages", json!(null)),
        ("messages", json!([])),
        ("messages", json!("hi")),
        ("messages[0]", json!(["hi"])),
        ("messages[0].role", json!([{"content": "hi"}])),
        ("messages[0].role", json!([{"role": 3, "content": "hi"}])),
        ("messages[0].content", json!([{"role": "user"}])),
        ("messages[0].content", json!([{"role": "user", "content": 3}])),
        ("messages[0].content[0].type", json!([{"role": "user", "content": [{"text": "hi"}]}])),
        ("messages[0].content[0].text", json!([{"role": "user", "content": [{"type": "text"}]}])),
        (
            "messages[0].content[1].type",
            json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "file:///x"}}]}]),
        ),
        ("messages[0].tool_calls", json!([{"role": "assistant", "content": "a", "tool_calls": 3}])),
        ("messages[0].tool_calls[0].function.name", json!([{"role": "assistant", "tool_calls": [{}]}])),
    ];
    let check = async |path: &str, mut body: Value, param: &str, field: &str, value: Value| {
        body[field] = value.clone();
        let reply = server.post(path, &body).await;
        assert_eq!(reply.error(400).0.as_deref(), Some(param), "{field}: {value}: {}", reply.text());
    };
    for (field, value) in both {
        check("/v1/chat/completions", chat("hi", json!({})), field, field, value.clone()).await;
        check("/v1/completions", completion("hi", json!({})), field, field, value).await;
    }
    for (param, value) in chats {
        check("/v1/chat/completions", chat("hi", json!({})), param, "messages", value).await;
    }
    for (field, value) in [
        ("tools", json!("all")),
        ("tools[0]", json!([3])),
        ("tool_choice", json!("required")),
        ("tool_choice", json!({"type": "function", "function": {"name": "f"}})),
        ("logprobs", json!(3)),
        ("top_logprobs", json!(2)),
        ("chat_template_kwargs", json!(2)),
        ("functions", json!([{"name": "f"}])),
    ] {
        let name = field.split('[').next().unwrap();
        check("/v1/chat/completions", chat("hi", json!({})), field, name, value).await;
    }
    for (field, value) in [
        ("prompt", json!(null)),
        ("prompt", json!("")),
        ("prompt", json!([])),
        ("prompt", json!([[]])),
        ("prompt", json!(3)),
        ("prompt", json!([1, "a"])),
        ("prompt", json!(["a", 1])),
        ("prompt", json!([[1, 2], [3, -1]])),
        ("prompt", json!([320])),
        ("prompt", json!([4_294_967_296u64])),
        ("prompt", json!({"a": 1})),
        ("prompt", json!(vec!["a"; 65])),
        ("logprobs", json!(21)),
        ("logprobs", json!(true)),
        ("echo", json!(1)),
    ] {
        check("/v1/completions", completion("hi", json!({})), field, field, value).await;
    }
    let reply = server.post("/v1/completions", &completion("hi", json!({"mood": 3}))).await;
    assert!(reply.text().contains("mood is no string"));
    assert_eq!(reply.json()["error"]["param"], "mood");
    reply.error(400);
    let reply = server.post("/v1/completions", &completion("hi", json!({"min_p": 0.95}))).await;
    assert_eq!(reply.json()["error"]["param"], "min_p");
    reply.error(400);
    server.end().await;
}

#[tokio::test]
async fn values_that_change_nothing_are_let_through() {
    let server = Server::fake(ServerConfig::default(), 4, Fake::saying("hi")).await;
    let neutral = json!({
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"},
        "suffix": null, "best_of": 1, "user": "me", "temperature": null, "top_p": 1, "top_k": -1, "min_p": 0,
        "stop": null, "n": null, "stream": false, "stream_options": null, "seed": -3, "max_tokens": 2,
        "max_completion_tokens": 2, "logprobs": null, "no_such_field": [1, 2],
    });
    assert_eq!(server.post("/v1/completions", &completion("x", neutral.clone())).await.status, 200);
    let mut neutral = neutral;
    neutral["tools"] = json!([]);
    neutral["tool_choice"] = json!("none");
    neutral["logprobs"] = json!(false);
    neutral["messages"] = json!([
        {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "hi", "name": "me"},
    ]);
    let reply = server.post("/v1/chat/completions", &neutral).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    server.end().await;
}

#[tokio::test]
async fn prompt_and_reply_must_fit_the_context() {
    let server = Server::fake(ServerConfig::default(), 4, Fake::babbling()).await;
    let ids = |n: usize| json!(vec![5; n]);
    let post =
        async |n: usize, fields: Value| server.post("/v1/completions", &completion(ids(n), fields)).await;
    for (n, fields) in [(256, json!({})), (250, json!({"max_tokens": 7})), (5000, json!({"max_tokens": 1}))] {
        let (_, code) = post(n, fields).await.error(400);
        assert_eq!(code.as_deref(), Some("context_length_exceeded"), "{n}");
    }
    // Absent, it is the model's own, as far as there is room.
    for (n, fields, written) in
        [(250, json!({"max_tokens": 6}), 6), (250, json!({}), 6), (20, json!({}), 24), (255, json!({}), 1)]
    {
        let reply = post(n, fields).await.json();
        let usage = json!({
            "prompt_tokens": n, "completion_tokens": written, "total_tokens": n + written,
            "prompt_tokens_details": {"cached_tokens": 0},
        });
        assert_eq!(reply["usage"], usage);
        assert_eq!(reply["choices"][0]["finish_reason"], "length");
    }
    server.end().await;
}

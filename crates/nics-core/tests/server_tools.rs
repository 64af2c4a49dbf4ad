//! Calls of tools, whole and streamed, over a scripted engine.

#![cfg(feature = "server")]

mod server_common;

use nics_core::server::ServerConfig;
use serde_json::{Value, json};
use server_common::*;

const CHAT: &str = "/v1/chat/completions";

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

const TOOLS: &str =
    r#"[{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]"#;

fn with_tools(fields: Value) -> Value {
    let mut body = chat("x", fields);
    body["tools"] = serde_json::from_str(TOOLS).unwrap();
    body["max_tokens"] = json!(150);
    body
}

#[tokio::test]
async fn a_call_of_a_tool() {
    let said = "Let me see. <|function_start|>{\"name\": \"search\", \"arguments\": {\"q\": \"é\", \"n\": 2}}<|function_end|>\n<|function_start|>{\"name\": \"search\", \"arguments\": \"{}\"}<|function_end|> \n";
    let server = Server::fake(ServerConfig::default(), 4, Fake::saying(said)).await;
    let reply = server.post(CHAT, &with_tools(json!({"tool_choice": "auto"}))).await.json();
    let choice = &reply["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("tool_calls"), &json!("Let me see. "))
    );
    let calls = choice["message"]["tool_calls"].as_array().unwrap();
    assert_eq!(calls.len(), 2);
    for (call, arguments) in calls.iter().zip(["{\"q\":\"é\",\"n\":2}", "{}"]) {
        assert_eq!(keys(call), ["id", "type", "function"]);
        assert!(call["id"].as_str().unwrap().starts_with("call_"));
        assert_eq!(call["type"], "function");
        assert_eq!(call["function"], json!({"name": "search", "arguments": arguments}));
    }
    assert_ne!(calls[0]["id"], calls[1]["id"]);

    let chunks = server.post(CHAT, &with_tools(json!({"stream": true}))).await.chunks();
    assert_eq!(streamed_texts(&chunks, 1), ["Let me see. "]);
    let deltas: Vec<&Value> =
        chunks.iter().filter_map(|c| c["choices"][0]["delta"]["tool_calls"].get(0)).collect();
    assert_eq!(deltas.len(), 4);
    for (i, pair) in deltas.chunks(2).enumerate() {
        assert_eq!(keys(pair[0]), ["index", "id", "type", "function"]);
        assert_eq!(pair[0]["function"], json!({"name": "search", "arguments": ""}));
        assert_eq!(
            pair[1],
            &json!({"index": i, "function": calls[i]["function"].as_object().map(|f| json!({"arguments": f["arguments"]}))})
        );
    }
    assert_eq!(
        chunks.last().unwrap()["choices"][0],
        json!({"index": 0, "delta": {}, "logprobs": null, "finish_reason": "tool_calls"})
    );

    // Nobody asked for tools: the markers are special tokens like others, hidden.
    for fields in [json!({"tool_choice": "none"}), json!({"tools": null})] {
        let mut body = with_tools(json!({}));
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let reply = server.post(CHAT, &body).await.json();
        let text = said.replace("<|function_start|>", "").replace("<|function_end|>", "");
        assert_eq!(whole_texts(&reply), [text]);
        assert_eq!(reply["choices"][0]["finish_reason"], "stop");
        assert!(reply["choices"][0]["message"].get("tool_calls").is_none());
    }
    server.end().await;

    let alone = "<|function_start|>{\"name\": \"search\", \"arguments\": {}}<|function_end|>";
    let server = Server::fake(ServerConfig::default(), 4, Fake::saying(alone)).await;
    let reply = server.post(CHAT, &with_tools(json!({}))).await.json();
    assert_eq!(reply["choices"][0]["message"]["content"], Value::Null);
    // The conversation goes on with the call and its result.
    let mut next = with_tools(json!({}));
    next["max_tokens"] = json!(60);
    let turns = next["messages"].as_array_mut().unwrap();
    let mut call = reply["choices"][0]["message"].clone();
    call["content"] = json!("");
    turns.push(call);
    turns.push(json!({"role": "observation", "content": "found"}));
    assert_eq!(server.post(CHAT, &next).await.status, 200);
    server.end().await;
}

#[tokio::test]
async fn what_is_no_call_stays_visible() {
    for said in [
        "a<|function_start|>{\"name\": 3}<|function_end|>b",
        "a<|function_start|>never<|function_end|> b",
        "a<|function_start|>{\"name\": \"f\", \"argu",
        "a<|function_start|><|function_end|>",
    ] {
        let server = Server::fake(ServerConfig::default(), 4, Fake::saying(said)).await;
        let reply = server.post(CHAT, &with_tools(json!({}))).await.json();
        assert_eq!(whole_texts(&reply), [said]);
        assert_eq!(reply["choices"][0]["finish_reason"], "stop");
        let chunks = server.post(CHAT, &with_tools(json!({"stream": true}))).await.chunks();
        assert_eq!(streamed_texts(&chunks, 1), [said]);
        server.end().await;
    }
}

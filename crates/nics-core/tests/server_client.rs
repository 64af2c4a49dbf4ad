//! A client that others wrote (async-openai) against the tiny model of the fixture.

#![cfg(feature = "server")]

mod server_common;

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::types::chat::{
    ChatCompletionRequestUserMessageArgs, ChatCompletionStreamOptions, CreateChatCompletionRequestArgs,
    CreateChatCompletionResponse, CreateChatCompletionStreamResponse, FinishReason,
};
use async_openai::types::completions::CreateCompletionRequestArgs;
use futures_util::StreamExt;
use nics_core::server::{ApiKeys, ServerConfig, TextSettings};
use serde_json::{Value, json};
use server_common::*;

async fn server() -> (Server, Client<OpenAIConfig>) {
    let config = ServerConfig { keys: ApiKeys::new(["sk-secret"]).unwrap(), ..ServerConfig::default() };
    let server = Server::model(config, 16, TextSettings::default()).await;
    let config = OpenAIConfig::new()
        .with_api_base(format!("http://{}/v1", server.address()))
        .with_api_key("sk-secret");
    (server, Client::with_config(config))
}

fn turn(text: &str) -> CreateChatCompletionRequestArgs {
    let mut request = CreateChatCompletionRequestArgs::default();
    let message = ChatCompletionRequestUserMessageArgs::default().content(text).build().unwrap();
    request.model(MODEL).messages([message.into()]).max_completion_tokens(20u32);
    request
}

#[tokio::test]
async fn models() {
    let (server, client) = server().await;
    let list = client.models().list().await.unwrap();
    assert_eq!(list.data.iter().map(|m| m.id.as_str()).collect::<Vec<_>>(), [MODEL]);
    assert_eq!(client.models().retrieve(MODEL).await.unwrap().owned_by, "tests");
    assert!(client.models().retrieve("other").await.unwrap_err().to_string().contains("no model"));
    let stranger =
        OpenAIConfig::new().with_api_base(format!("http://{}/v1", server.address())).with_api_key("sk-x");
    assert!(Client::with_config(stranger).models().list().await.unwrap_err().to_string().contains("API key"));
    server.end().await;
}

#[tokio::test]
async fn a_stream_is_the_whole_chat_in_pieces() {
    let (server, client) = server().await;
    for (temperature, seed, n) in [(0.0, 1, 1), (1.0, 2, 1), (1.0, 3, 3)] {
        let mut request = turn("hello");
        request.temperature(temperature).seed(seed).n(n);
        let whole = client.chat().create(request.build().unwrap()).await.unwrap();
        let usage = whole.usage.clone().unwrap();
        assert_eq!(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);
        assert!(usage.completion_tokens > 0 && usage.completion_tokens <= 20 * u32::from(n));

        request.stream_options(ChatCompletionStreamOptions {
            include_usage: Some(true),
            include_obfuscation: None,
        });
        let mut stream = client.chat().create_stream(request.stream(true).build().unwrap()).await.unwrap();
        let mut texts = vec![String::new(); usize::from(n)];
        let mut ends = vec![None; usize::from(n)];
        let mut counted = None;
        while let Some(chunk) = timely(stream.next()).await {
            let chunk = chunk.unwrap();
            assert!(counted.is_none(), "nothing follows the usage");
            if let Some(usage) = chunk.usage {
                assert!(chunk.choices.is_empty());
                counted = Some(usage);
            }
            for choice in chunk.choices {
                texts[choice.index as usize] += choice.delta.content.as_deref().unwrap_or_default();
                if choice.finish_reason.is_some() {
                    ends[choice.index as usize] = choice.finish_reason;
                }
            }
        }
        for (choice, (text, end)) in whole.choices.iter().zip(texts.iter().zip(&ends)) {
            assert_eq!(choice.message.content.as_ref(), Some(text));
            assert_eq!(&choice.finish_reason, end);
            assert!(matches!(end, Some(FinishReason::Stop | FinishReason::Length)));
        }
        let counted = counted.expect("a chunk with the usage");
        assert_eq!(
            (counted.prompt_tokens, counted.completion_tokens),
            (usage.prompt_tokens, usage.completion_tokens)
        );
    }
    server.end().await;
}

#[tokio::test]
async fn log_probabilities_and_stops() {
    let (server, client) = server().await;
    let mut request = turn("hello");
    request.temperature(0.0).logprobs(true).top_logprobs(3);
    let reply = client.chat().create(request.build().unwrap()).await.unwrap();
    let text = reply.choices[0].message.content.clone().unwrap();
    let content = reply.choices[0].logprobs.clone().unwrap().content.unwrap();
    let bytes: Vec<u8> = content.iter().flat_map(|c| c.bytes.clone().unwrap()).collect();
    // Special tokens have their literal form there and none in the text.
    if !content.iter().any(|c| c.token.starts_with("<|")) {
        assert_eq!(String::from_utf8_lossy(&bytes), text);
    }
    for entry in &content {
        // Greedy: the token is the likeliest one.
        assert_eq!((entry.top_logprobs.len(), entry.top_logprobs[0].logprob), (3, entry.logprob));
        assert!(entry.top_logprobs.is_sorted_by(|a, b| a.logprob >= b.logprob) && entry.logprob <= 0.0);
    }
    // A stop string from the middle of that text ends it there.
    let stop: String = text.chars().skip(3).take(2).collect();
    let reply = client.chat().create(request.stop(stop.clone()).build().unwrap()).await.unwrap();
    let at = text.find(&stop).unwrap();
    assert_eq!(reply.choices[0].message.content.as_deref(), Some(&text[..at]));
    assert_eq!(reply.choices[0].finish_reason, Some(FinishReason::Stop));
    server.end().await;
}

#[tokio::test]
async fn completions() {
    let (server, client) = server().await;
    let mut request = CreateCompletionRequestArgs::default();
    request.model(MODEL).prompt(["one", "two"]).max_tokens(12u32).temperature(1.0).seed(4).logprobs(2);
    let whole = client.completions().create(request.build().unwrap()).await.unwrap();
    assert_eq!(whole.choices.len(), 2);
    let mut stream = client.completions().create_stream(request.stream(true).build().unwrap()).await.unwrap();
    let mut texts = vec![String::new(); 2];
    while let Some(chunk) = timely(stream.next()).await {
        for choice in chunk.unwrap().choices {
            texts[choice.index as usize] += &choice.text;
        }
    }
    for (choice, text) in whole.choices.iter().zip(texts) {
        assert_eq!(choice.text, text);
        let logprobs = choice.logprobs.as_ref().unwrap();
        assert_eq!(logprobs.tokens.len(), logprobs.token_logprobs.len());
    }
    server.end().await;
}

#[tokio::test]
async fn fields_that_its_types_lack() {
    let (server, client) = server().await;
    let body = chat(
        "hello",
        json!({"top_k": 1, "repetition_penalty": 1.1, "temperature": 1.0, "ignore_eos": true, "max_tokens": 9}),
    );
    let reply: Value = client.chat().create_byot(body.clone()).await.unwrap();
    assert_eq!(reply["usage"]["completion_tokens"], 9);
    // The likeliest of one is the likeliest.
    let mut greedy = body;
    greedy["temperature"] = json!(0);
    let typed: CreateChatCompletionResponse = client.chat().create_byot(greedy.clone()).await.unwrap();
    assert_eq!(
        typed.choices[0].message.content.as_deref(),
        reply["choices"][0]["message"]["content"].as_str()
    );
    greedy["stream"] = json!(true);
    let mut stream = client.chat().create_stream_byot(greedy).await.unwrap();
    let mut text = String::new();
    while let Some(chunk) = timely(stream.next()).await {
        let chunk: CreateChatCompletionStreamResponse = chunk.unwrap();
        text += chunk.choices[0].delta.content.as_deref().unwrap_or_default();
    }
    assert_eq!(typed.choices[0].message.content.as_ref(), Some(&text));
    server.end().await;
}

#[tokio::test]
async fn a_prefix_that_was_read_before_is_counted() {
    let (server, client) = server().await;
    let request = turn("a question that is long enough to be kept").seed(1).build().unwrap();
    let cached = async || {
        let usage = client.chat().create(request.clone()).await.unwrap().usage.unwrap();
        usage.prompt_tokens_details.unwrap().cached_tokens.unwrap()
    };
    assert_eq!(cached().await, 0);
    assert!(cached().await > 0);
    server.end().await;
}

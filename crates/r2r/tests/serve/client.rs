//! A client that others wrote (async-openai): the source of each token, read from a stream by types of our own.

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::json;

use crate::kit::*;

#[derive(Deserialize)]
struct Chunk {
    choices: Vec<Choice>,
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Choice {
    delta: Delta,
    #[serde(default)]
    tokens: Vec<Token>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
}

#[derive(Deserialize)]
struct Token {
    id: u32,
    source: String,
    score: f64,
}

#[derive(Deserialize)]
struct Usage {
    completion_tokens: usize,
    llm_tokens: usize,
    llm_token_ratio: f64,
}

#[test]
fn the_source_of_each_token_is_in_the_stream() {
    let server = Server::new(Setup { key: Some("sk-secret"), ..Setup::default() });
    let config = OpenAIConfig::new().with_api_base(format!("{}/v1", server.url)).with_api_key("sk-secret");
    let client = Client::with_config(config);
    server.block_on(async {
        let request = json!({
            "model": "pair", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 30, "temperature": 0,
            "target_llm_ratio": 0.4, "stream": true, "stream_options": {"include_usage": true}, "ignore_eos": true,
        });
        let mut stream = client.chat().create_stream_byot(request).await.unwrap();
        let (mut text, mut tokens, mut usage) = (String::new(), Vec::new(), None);
        while let Some(chunk) = tokio::time::timeout(LIVENESS, stream.next()).await.unwrap() {
            let chunk: Chunk = chunk.unwrap();
            usage = chunk.usage.or(usage);
            for choice in chunk.choices {
                text += choice.delta.content.as_deref().unwrap_or_default();
                tokens.extend(choice.tokens);
            }
        }
        let usage = usage.expect("the last chunk has the usage");
        assert_eq!((tokens.len(), usage.completion_tokens), (30, 30));
        let large = tokens.iter().filter(|t| t.source == "large").count();
        assert_eq!(large, usage.llm_tokens);
        assert!((usage.llm_token_ratio - large as f64 / 30.0).abs() < 1e-9);
        assert!(tokens.iter().all(|t| t.source == "large" || t.source == "small"));
        assert!(tokens.iter().all(|t| (0.0..=1.0).contains(&t.score)));
        let ids: Vec<u32> = tokens.iter().map(|t| t.id).collect();
        assert_eq!(tokenizer().decode(&ids, true).unwrap(), text);
    });
    server.end();
}

//! Files of a small model whose tokens are words between white space.

use serde_json::{Map, Value, json};

/// `base` with these fields, which win.
#[must_use]
pub fn with_fields(mut base: Value, fields: &Map<String, Value>) -> Value {
    if let Value::Object(base) = &mut base {
        base.extend(fields.iter().map(|(k, v)| (k.clone(), v.clone())));
    }
    base
}

/// A config.json of Llama but for its sizes: `vocab` words, `context` positions, ids of the end and of padding.
pub fn llama_config(vocab: usize, context: usize, eos: u32, pad: u32) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "rope_scaling": null,
        "max_position_embeddings": context,
        "attention_bias": false,
        "mlp_bias": false,
        "attention_dropout": 0.0,
        "tie_word_embeddings": false,
        "bos_token_id": null,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
    })
}

/// A token as tokenizer.json and tokenizer_config.json have it.
fn added(word: &str) -> Value {
    json!({
        "content": word, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true,
    })
}

/// `added_tokens` of a tokenizer.json: special tokens, each with its id.
pub fn added_tokens(tokens: &[(u32, &str)]) -> Vec<Value> {
    let one = |(id, word): &(u32, &str)| {
        let mut token = added(word);
        token["id"] = json!(id);
        token
    };
    tokens.iter().map(one).collect()
}

/// The same tokens as `added_tokens_decoder` of a tokenizer_config.json.
pub fn added_tokens_decoder(tokens: &[(u32, &str)]) -> Map<String, Value> {
    tokens.iter().map(|(id, word)| (id.to_string(), added(word))).collect()
}

/// A tokenizer.json of these words, each with its place as id; `unknown` stands for all others.
pub fn tokenizer(words: &[String], added_tokens: &[Value], unknown: &str) -> Value {
    let vocabulary: Map<String, Value> =
        words.iter().enumerate().map(|(id, word)| (word.clone(), json!(id))).collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens,
        "normalizer": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" },
        "post_processor": null,
        "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": unknown },
    })
}

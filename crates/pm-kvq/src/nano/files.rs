//! The files of a checkpoint beside its weights.

use nics_datasets::adding_ring::{self as ring, EOS, LINE_TOKENS, TOKENS, UNKNOWN};
use serde_json::{Map, Value, json};

/// Positions that the models are made for.
const CONTEXT: usize = 128;
const UNKNOWN_ID: u32 = 0;
const EOS_ID: u32 = 1;

/// A config.json of Llama with the fields of a recipe in it.
pub(super) fn config(fields: &Map<String, Value>) -> Value {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "rope_scaling": null,
        "max_position_embeddings": CONTEXT,
        "attention_bias": false,
        "mlp_bias": false,
        "attention_dropout": 0.0,
        "tie_word_embeddings": false,
        "bos_token_id": null,
        "eos_token_id": EOS_ID,
        "pad_token_id": UNKNOWN_ID,
        "vocab_size": ring::vocabulary().len(),
        "torch_dtype": "bfloat16",
    });
    if let Value::Object(config) = &mut config {
        config.extend(fields.iter().map(|(k, v)| (k.clone(), v.clone())));
    }
    config
}

/// Tokens with a role.
const ADDED: [(u32, &str); 2] = [(UNKNOWN_ID, UNKNOWN), (EOS_ID, EOS)];

fn added(id: Option<u32>, word: &str) -> Value {
    let mut token = json!({
        "content": word, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true,
    });
    if let Some(id) = id {
        token["id"] = json!(id);
    }
    token
}

/// A tokenizer.json: words between white space.
pub(super) fn tokenizer() -> Value {
    let vocabulary: Map<String, Value> =
        ring::vocabulary().into_iter().enumerate().map(|(id, word)| (word, json!(id))).collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": ADDED.map(|(id, word)| added(Some(id), word)),
        "normalizer": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" },
        "post_processor": null,
        "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN },
    })
}

/// A tokenizer_config.json.
pub(super) fn tokenizer_config() -> Value {
    let decoder: Map<String, Value> =
        ADDED.iter().map(|(id, word)| (id.to_string(), added(None, word))).collect();
    json!({
        "add_bos_token": false,
        "add_eos_token": false,
        "added_tokens_decoder": decoder,
        "eos_token": EOS,
        "pad_token": UNKNOWN,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": false,
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
}

/// A generation_config.json.
pub(super) fn generation_config() -> Value {
    json!({
        "eos_token_id": [EOS_ID],
        "pad_token_id": UNKNOWN_ID,
        "do_sample": false,
        "max_new_tokens": TOKENS - LINE_TOKENS,
    })
}

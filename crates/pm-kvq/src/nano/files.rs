//! The files of a checkpoint beside its weights.

use nics_core::train::words;
use nics_datasets::adding_ring::{self as ring, EOS, LINE_TOKENS, TOKENS, UNKNOWN};
use serde_json::{Map, Value, json};

/// Positions that the models are made for.
const CONTEXT: usize = 128;
const UNKNOWN_ID: u32 = 0;
const EOS_ID: u32 = 1;

/// A config.json of Llama with the fields of a recipe in it.
pub(super) fn config(fields: &Map<String, Value>) -> Value {
    let config = words::llama_config(ring::vocabulary().len(), CONTEXT, EOS_ID, UNKNOWN_ID);
    words::with_fields(config, fields)
}

/// Tokens with a role.
const ADDED: [(u32, &str); 2] = [(UNKNOWN_ID, UNKNOWN), (EOS_ID, EOS)];

/// A tokenizer.json: words between white space.
pub(super) fn tokenizer() -> Value {
    words::tokenizer(&ring::vocabulary(), &words::added_tokens(&ADDED), UNKNOWN)
}

/// A tokenizer_config.json.
pub(super) fn tokenizer_config() -> Value {
    json!({
        "add_bos_token": false,
        "add_eos_token": false,
        "added_tokens_decoder": words::added_tokens_decoder(&ADDED),
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

//! The files of a checkpoint beside its weights.

use nics_core::train::words;
use nics_datasets::ring;
use serde_json::{Map, Value, json};

use super::RingTask;

/// Positions that the models are made for.
pub(super) const CONTEXT: usize = 128;

/// A config.json of Qwen3 with the fields of a recipe in it.
pub(super) fn config(task: &RingTask, fields: &Map<String, Value>) -> Value {
    let id = |word: &str| task.words().iter().position(|w| w == word);
    let config = json!({
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "rope_scaling": null,
        "max_position_embeddings": CONTEXT,
        "attention_bias": false,
        "attention_dropout": 0.0,
        "use_sliding_window": false,
        "sliding_window": null,
        "tie_word_embeddings": false,
        "bos_token_id": id(ring::BOS),
        "eos_token_id": id(ring::EOS),
        "pad_token_id": id(ring::UNKNOWN),
        "vocab_size": task.words().len(),
        "torch_dtype": "bfloat16",
    });
    words::with_fields(config, fields)
}

/// A tokenizer.json: words between white space.
pub(super) fn tokenizer(task: &RingTask) -> Value {
    let one = |(id, word, special)| {
        json!({
            "id": id, "content": word, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special,
        })
    };
    let added: Vec<Value> = added(task).into_iter().map(one).collect();
    words::tokenizer(task.words(), &added, ring::UNKNOWN)
}

/// Tokens with a role; those around the thinking part are ordinary text, as Qwen3 has them.
fn added(task: &RingTask) -> Vec<(usize, &str, bool)> {
    let words = [
        (ring::UNKNOWN, true),
        (ring::BOS, true),
        (ring::EOS, true),
        (ring::THINK, false),
        (ring::THINK_END, false),
    ];
    let find = |(word, special): (&'static str, bool)| {
        task.words().iter().position(|w| w == word).map(|id| (id, word, special))
    };
    words.into_iter().filter_map(find).collect()
}

/// A tokenizer_config.json. The template is what the models were trained on: `<bos>`, the question, the response.
pub(super) fn tokenizer_config(task: &RingTask) -> Value {
    let decoder: Map<String, Value> = added(task)
        .into_iter()
        .map(|(id, word, special)| {
            let token = json!({
                "content": word, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false,
                "special": special,
            });
            (id.to_string(), token)
        })
        .collect();
    json!({
        "add_bos_token": false,
        "add_eos_token": false,
        "added_tokens_decoder": decoder,
        "bos_token": ring::BOS,
        "eos_token": ring::EOS,
        "pad_token": ring::UNKNOWN,
        "unk_token": ring::UNKNOWN,
        "chat_template": "{% for message in messages %}{% if message['role'] == 'assistant' %}\
                          {{ ' ' + message['content'] + ' <eos>' }}{% else %}{{ '<bos> ' + message['content'] }}\
                          {% endif %}{% endfor %}",
        "clean_up_tokenization_spaces": false,
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
}

/// A generation_config.json.
pub(super) fn generation_config(task: &RingTask) -> Value {
    json!({
        "bos_token_id": task.words().iter().position(|w| w == ring::BOS),
        "eos_token_id": [task.eos()],
        "pad_token_id": task.words().iter().position(|w| w == ring::UNKNOWN),
        "do_sample": false,
        "max_new_tokens": super::RESPONSE_TOKENS,
    })
}

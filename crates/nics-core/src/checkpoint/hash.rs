//! `arch_hash` and `weights_hash`: what a calibrated artefact names so that it is not put on another model.

use serde_json::{Map, Value};

use super::CheckpointError;
use super::files::WeightFiles;

/// Fields of `config.json` that do not describe the architecture: versions, dtypes, quantization, token ids, what only
/// training or generation reads, and the defaults that old releases of transformers wrote into every file.
const NOT_ARCHITECTURE: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "attention_dropout",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "quantization",
    "quantization_config",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "use_bfloat16",
    "use_cache",
];

/// Hash over the architecture fields of a configuration, in 64 hexadecimal digits.
///
/// Independent of the order of fields, of null fields, and of how a number is written (`1e6`, `1000000`).
pub(super) fn arch_hash(config: &Map<String, Value>) -> String {
    let mut text = String::new();
    canonical_object(config, &mut text);
    nics_base::hash::bytes(text)
}

/// Hash over names, dtypes, shapes and bytes of all tensors, in 64 hexadecimal digits; independent of the sharding.
pub(super) fn weights_hash(files: &WeightFiles) -> Result<String, CheckpointError> {
    let mut hasher = blake3::Hasher::new();
    for entry in files.entries() {
        let head = format!("{}\0{}\0{:?}\0", entry.name, entry.dtype, entry.shape);
        hasher.update(head.as_bytes());
        hasher.update(files.bytes(&entry.name)?.unwrap_or_default());
        files.release(&entry.name);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn canonical_object(map: &Map<String, Value>, out: &mut String) {
    let mut keys: Vec<&String> = map
        .iter()
        .filter(|(k, v)| !v.is_null() && !NOT_ARCHITECTURE.contains(&k.as_str()))
        .map(|(k, _)| k)
        .collect();
    keys.sort_unstable();
    out.push('{');
    for key in keys {
        out.push_str(&Value::from(key.as_str()).to_string());
        out.push(':');
        canonical(&map[key], out);
        out.push(',');
    }
    out.push('}');
}

fn canonical(value: &Value, out: &mut String) {
    match value {
        // Nested configurations (towers, text_config) carry the same fields that say nothing.
        Value::Object(map) => canonical_object(map, out),
        Value::Array(items) => {
            out.push('[');
            for item in items {
                canonical(item, out);
                out.push(',');
            }
            out.push(']');
        }
        Value::Number(n) => match n.as_f64() {
            Some(f) if n.is_f64() => out.push_str(&f.to_string()),
            _ => out.push_str(&n.to_string()),
        },
        other => out.push_str(&other.to_string()),
    }
}

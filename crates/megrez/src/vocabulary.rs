//! Training a tokenizer in the layout of Megrez: a byte-level BPE with the Qwen2 pre-tokenisation, the special tokens
//! behind the ordinary vocabulary, and the two files that `transformers` reads it from.
//!
//! Every digit is a token of its own (the pattern takes `\p{N}` one at a time and merges never cross its pieces), and
//! neither BOS nor EOS is added.

use std::path::Path;

use nics_base::artefact::write_atomic;
use serde_json::{Map, Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

/// The special tokens of Megrez, in the order of their ids, which follow the ordinary vocabulary.
pub const SPECIAL_TOKENS: [&str; 19] = [
    "<|eos|>",
    "<|unk|>",
    "<|pad|>",
    "<|role_start|>",
    "<|role_end|>",
    "<|turn_end|>",
    "<|code_start|>",
    "<|code_end|>",
    "<|commit_start|>",
    "<|function_start|>",
    "<|function_end|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|image_id_start|>",
    "<|image_id_end|>",
    "<|slice_start|>",
    "<|slice_end|>",
    "<|audio_start|>",
    "<|audio_end|>",
];

/// The system sentence that the template of Megrez-3B-Instruct puts before a conversation without one.
pub const DEFAULT_SYSTEM: &str = "你是Megrez-3B-Instruct，将针对用户的问题给出详细的、积极的回答。";

/// The chat template of Megrez-3B-Instruct, as its `tokenizer_config.json` has it.
pub const CHAT_TEMPLATE: &str = "{% for message in messages %}\
{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|role_start|>system<|role_end|>你是Megrez-3B-Instruct，将针对用户的问题给出详细的、积极的回答。<|turn_end|>' }}\
{% endif %}\
{{ '<|role_start|>' + message['role'] + '<|role_end|>' + message['content'] + '<|turn_end|>' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|role_start|>assistant<|role_end|>' }}{% endif %}";

/// Where Qwen2 cuts text before BPE.
const PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Bytes, each an entry of every byte-level vocabulary.
const BYTES: usize = 256;

/// What can go wrong in training or writing a vocabulary.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VocabularyError {
    /// No room for the bytes and the special tokens.
    #[error(
        "a vocabulary of {asked} has no room for {BYTES} bytes and {specials} special tokens; ask for at least {}",
        BYTES + specials
    )]
    TooSmall {
        /// Entries asked for.
        asked: usize,
        /// Special tokens to add.
        specials: usize,
    },
    /// The texts hold fewer distinct merges than asked for.
    #[error(
        "the texts give only {found} of the {asked} ordinary entries asked for; give more text or ask for fewer"
    )]
    TooLittleText {
        /// Ordinary entries found, bytes included.
        found: usize,
        /// Ordinary entries asked for.
        asked: usize,
    },
    /// A special token that the vocabulary already has.
    #[error("`{token}` is in the vocabulary already and cannot be a special token")]
    SpecialTaken {
        /// The token.
        token: String,
    },
    /// The trained tokenizer lacks a token that the configuration names.
    #[error("the tokenizer has no token `{token}`, which the Megrez template and configuration need")]
    MissingSpecial {
        /// The token.
        token: &'static str,
    },
    /// The tokenizers library refused.
    #[error("tokenizer: {0}")]
    Tokenizer(#[source] tokenizers::Error),
    /// A file could not be written.
    #[error(transparent)]
    Write(#[from] nics_base::Error),
}

/// Trains a tokenizer of exactly `vocab_size` entries, the 256 bytes first, then merges, then `specials` (usually
/// [`SPECIAL_TOKENS`]).
///
/// The same texts give the same tokenizer, whatever their order and the number of threads.
///
/// # Errors
/// [`VocabularyError::TooSmall`], [`VocabularyError::TooLittleText`], [`VocabularyError::SpecialTaken`].
pub fn train_bpe(
    texts: impl Iterator<Item = String> + Send,
    vocab_size: usize,
    specials: &[&str],
) -> Result<Tokenizer, VocabularyError> {
    let failed = VocabularyError::Tokenizer;
    let ordinary = vocab_size
        .checked_sub(specials.len())
        .filter(|n| *n >= BYTES)
        .ok_or(VocabularyError::TooSmall { asked: vocab_size, specials: specials.len() })?;

    let split = Split::new(SplitPattern::Regex(PATTERN.into()), SplitDelimiterBehavior::Isolated, false);
    let bytes = ByteLevel::new(false, true, false);
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_normalizer(Some(NFC)).map_err(failed)?;
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![split.map_err(failed)?.into(), bytes.into()])));
    tokenizer.with_decoder(Some(bytes));

    // The specials stay out of the trainer, which would number them first.
    let trainer = BpeTrainerBuilder::new()
        .vocab_size(ordinary)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    tokenizer.train(&mut TrainerWrapper::from(trainer), texts).map_err(failed)?;
    let found = tokenizer.get_vocab_size(false);
    if found != ordinary {
        return Err(VocabularyError::TooLittleText { found, asked: ordinary });
    }
    for (i, token) in specials.iter().enumerate() {
        let added = AddedToken::from(*token, true).normalized(false);
        tokenizer.add_special_tokens([added]).map_err(failed)?;
        if tokenizer.token_to_id(token) != Some((ordinary + i) as u32) {
            return Err(VocabularyError::SpecialTaken { token: (*token).to_owned() });
        }
    }
    Ok(tokenizer)
}

/// Writes `tokenizer.json` and `tokenizer_config.json` into `dir`, as `transformers.AutoTokenizer` reads them.
///
/// `max_tokens` is the context of the model that the tokenizer belongs to.
///
/// # Errors
/// [`VocabularyError::MissingSpecial`] where the tokenizer was trained without the tokens of the Megrez template.
pub fn save(tokenizer: &Tokenizer, dir: &Path, max_tokens: usize) -> Result<(), VocabularyError> {
    let config = tokenizer_config(tokenizer, max_tokens)?;
    let json = tokenizer.to_string(true).map_err(VocabularyError::Tokenizer)?;
    write_atomic(dir.join("tokenizer.json"), json + "\n")?;
    write_atomic(dir.join("tokenizer_config.json"), format!("{config:#}\n"))?;
    Ok(())
}

/// The `tokenizer_config.json` that goes with `tokenizer`.
///
/// # Errors
/// [`VocabularyError::MissingSpecial`].
pub fn tokenizer_config(tokenizer: &Tokenizer, max_tokens: usize) -> Result<Value, VocabularyError> {
    for token in ["<|eos|>", "<|unk|>", "<|pad|>", "<|role_start|>", "<|role_end|>", "<|turn_end|>"] {
        tokenizer.token_to_id(token).ok_or(VocabularyError::MissingSpecial { token })?;
    }
    let mut added: Vec<_> = tokenizer.get_added_tokens_decoder().into_iter().collect();
    added.sort_by_key(|(id, _)| *id);
    let decoder: Map<String, Value> = added
        .into_iter()
        .map(|(id, token)| {
            let entry = json!({
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            });
            (id.to_string(), entry)
        })
        .collect();
    Ok(json!({
        "add_bos_token": false,
        "add_eos_token": false,
        "added_tokens_decoder": decoder,
        "bos_token": null,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": false,
        "eos_token": "<|turn_end|>",
        "model_max_length": max_tokens,
        "pad_token": "<|pad|>",
        "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<|unk|>",
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nics_datasets::word_problems::{Split, generate};

    fn texts() -> Vec<String> {
        generate(Split::Train, 2_000, 0).map(|p| format!("{}\n{}", p.question, p.solution)).collect()
    }

    fn trained() -> Tokenizer {
        train_bpe(texts().into_iter(), 640, &SPECIAL_TOKENS).unwrap()
    }

    fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
        tokenizer.encode(text, false).unwrap().get_ids().to_vec()
    }

    #[test]
    fn the_same_texts_give_the_same_tokenizer_in_any_order() {
        let mut reversed = texts();
        reversed.reverse();
        let again = train_bpe(reversed.into_iter(), 640, &SPECIAL_TOKENS).unwrap();
        assert_eq!(again.to_string(false).unwrap(), trained().to_string(false).unwrap());
    }

    #[test]
    fn special_tokens_follow_the_ordinary_vocabulary_in_their_order() {
        let tokenizer = trained();
        assert_eq!(tokenizer.get_vocab_size(true), 640);
        for (i, token) in SPECIAL_TOKENS.iter().enumerate() {
            let id = (640 - SPECIAL_TOKENS.len() + i) as u32;
            assert_eq!(tokenizer.token_to_id(token), Some(id));
            assert_eq!(ids(&tokenizer, &format!("12{token}34"))[2], id, "not taken as one token");
        }
        let text =
            tokenizer.decode(&ids(&tokenizer, "<|role_start|>user<|role_end|>hi<|turn_end|>"), true).unwrap();
        assert_eq!(text, "userhi");
    }

    #[test]
    fn every_digit_is_a_token_and_every_text_comes_back() {
        let tokenizer = trained();
        assert_eq!(ids(&tokenizer, "1234567").len(), 7);
        assert_eq!(ids(&tokenizer, "12+30=42").len(), 8);
        for text in [
            "",
            " ",
            "Emma's 12 apples\r\n\r\n  and  30 pears ",
            "小明有12个苹果，又买了30个。",
            "émoji 🙂 عربى ￥\u{0}\u{7f}",
            "it's we'LL x\ty\n\n\nz",
        ] {
            assert_eq!(tokenizer.decode(&ids(&tokenizer, text), false).unwrap(), text);
        }
        assert_eq!(ids(&tokenizer, "e\u{301}"), ids(&tokenizer, "é"), "NFC, as Qwen2");
        assert!(ids(&tokenizer, "现在有多少").len() <= 3, "common words were not merged");
    }

    #[test]
    fn the_files_are_what_the_configuration_says() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = trained();
        save(&tokenizer, dir.path(), 512).unwrap();
        let read = Tokenizer::from_file(dir.path().join("tokenizer.json")).unwrap();
        assert_eq!(ids(&read, "Emma has 12 apples."), ids(&tokenizer, "Emma has 12 apples."));
        let config = std::fs::read_to_string(dir.path().join("tokenizer_config.json")).unwrap();
        let config: Value = serde_json::from_str(&config).unwrap();
        assert_eq!(config["eos_token"], "<|turn_end|>");
        assert_eq!(config["bos_token"], Value::Null);
        assert_eq!(config["model_max_length"], 512);
        let decoder = config["added_tokens_decoder"].as_object().unwrap();
        assert_eq!(decoder.len(), SPECIAL_TOKENS.len());
        for (id, entry) in decoder {
            assert_eq!(read.id_to_token(id.parse().unwrap()).unwrap(), entry["content"]);
        }
        assert!(config["chat_template"].as_str().unwrap().contains(DEFAULT_SYSTEM));
    }

    #[test]
    fn what_cannot_be_trained_is_refused() {
        let train =
            |size, specials: &[&str]| train_bpe(texts().into_iter(), size, specials).unwrap_err().to_string();
        assert!(train(200, &SPECIAL_TOKENS).contains("ask for at least 275"));
        assert!(train(1_000_000, &SPECIAL_TOKENS).contains("give more text or ask for fewer"));
        assert!(train(640, &["<|eos|>", "a"]).contains("`a` is in the vocabulary already"));
        let bare = train_bpe(texts().into_iter(), 640, &["<|eos|>"]).unwrap();
        assert!(tokenizer_config(&bare, 512).unwrap_err().to_string().contains("has no token `<|unk|>`"));
    }
}

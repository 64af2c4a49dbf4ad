//! Tokenizers: text to ids and back, as Hugging Face's fast tokenizers do it.
//!
//! `tokenizer.json` does the work (crate `tokenizers`); `tokenizer_config.json` names the special tokens. Two things
//! differ from the Python side on purpose: [`Tokenizer::encode_ordinary`] never turns what a user typed into a control
//! token, and decoding never applies `clean_up_tokenization_spaces`, which deletes spaces that the model wrote.

mod settings;
mod stream;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde_json::Value;

use crate::checkpoint::{Checkpoint, CheckpointError, read_bounded};

pub use settings::SpecialTokens;
pub(crate) use settings::read_settings;
pub use stream::DecodeStream;

/// Longest `tokenizer.json` that is read; the largest published ones take 35 MB.
const MAX_TOKENIZER: u64 = 128 << 20;

/// What can be wrong with a tokenizer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// There is no `tokenizer.json`.
    #[error(
        "{dir} has no tokenizer.json{}; write one with AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        also(.found)
    )]
    Missing {
        /// The checkpoint's folder.
        dir: PathBuf,
        /// Files of the older tokenizers that are there.
        found: Vec<&'static str>,
    },
    /// A file could not be read or is no JSON.
    #[error(transparent)]
    File(#[from] CheckpointError),
    /// `tokenizer.json` describes no tokenizer.
    #[error("{path} is not a tokenizer: {detail}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// A setting beside the tokenizer has the wrong form.
    #[error("{path}: {field} is {found}, expected {expected}")]
    BadSetting {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// What it holds.
        found: String,
        /// What it should hold.
        expected: &'static str,
    },
    /// The tokenizer failed on a text.
    #[error("the tokenizer cannot encode this text: {detail}")]
    Encode {
        /// What is wrong.
        detail: String,
    },
    /// A text cannot be encoded without the special token that it spells.
    #[error("the text spells the special token {token}, and this tokenizer has no other way to encode it")]
    SpecialFromText {
        /// The token.
        token: String,
    },
    /// The tokenizer failed on ids.
    #[error("the tokenizer cannot decode these ids: {detail}")]
    Decode {
        /// What is wrong.
        detail: String,
    },
}

fn also(found: &[&str]) -> String {
    if found.is_empty() { String::new() } else { format!(", only {}", found.join(", ")) }
}

/// Ids with a meaning for generation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// Begin of sequence.
    pub bos: Option<u32>,
    /// Each of these ends a reply: from `generation_config.json`, else `config.json`, else the tokenizer's `eos_token`.
    pub eos: Vec<u32>,
    /// Padding, as the tokenizer names it.
    pub pad: Option<u32>,
    /// Stands for what the vocabulary lacks.
    pub unk: Option<u32>,
}

/// A tokenizer; cheap to clone.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    hf: tokenizers::Tokenizer,
    /// The same with special tokens read as text; made when a text first spells one.
    ordinary: OnceLock<tokenizers::Tokenizer>,
    tokens: SpecialTokens,
    ids: SpecialIds,
    /// Whether to put bos before and eos behind, where the tokenizer's class says so instead of its post-processor.
    around: Option<(bool, bool)>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` with the settings beside it.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self, TokenizerError> {
        let Some(path) = checkpoint.try_file("tokenizer.json")? else {
            let mut found = Vec::new();
            for name in ["tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json"]
            {
                if checkpoint.try_file(name)?.is_some() {
                    found.push(name);
                }
            }
            return Err(TokenizerError::Missing { dir: checkpoint.dir().to_owned(), found });
        };
        let hf = load(&path)?;
        let settings = read_settings(checkpoint)?;
        let tokens = settings.special_tokens()?;
        let ids = resolve_ids(checkpoint, &hf, &tokens)?;
        let around = settings.around();
        Ok(Self { inner: Arc::new(Inner { hf, ordinary: OnceLock::new(), tokens, ids, around }) })
    }

    /// Reads a `tokenizer.json` by itself: no settings, so no special token has a role.
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let (tokens, ids) = (SpecialTokens::default(), SpecialIds::default());
        let inner = Inner { hf: load(path)?, ordinary: OnceLock::new(), tokens, ids, around: None };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Ids of `text`. Special tokens that the text spells are recognised, as transformers does.
    ///
    /// With `add_special`, the tokens that the model expects around a text (such as a begin token) are added.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let inner = &self.inner;
        let Some((bos, eos)) = inner.around.filter(|_| add_special) else {
            return encode(&inner.hf, text, add_special);
        };
        let eos_token = inner.tokens.eos().and_then(|token| self.token_id(token));
        let mut ids: Vec<u32> = inner.ids.bos.filter(|_| bos).into_iter().collect();
        ids.extend(encode(&inner.hf, text, false)?);
        ids.extend(eos_token.filter(|_| eos));
        Ok(ids)
    }

    /// Ids of a text that somebody else wrote: a special token that it spells becomes ordinary tokens of its characters.
    ///
    /// Nothing is added around it. Only the token for unknown characters can be among the result.
    pub fn encode_ordinary(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let ids = encode(&self.inner.hf, text, false)?;
        if self.first_special(&ids).is_none() {
            return Ok(ids);
        }
        let ordinary = self.inner.ordinary.get_or_init(|| {
            let mut copy = self.inner.hf.clone();
            copy.set_encode_special_tokens(true);
            copy
        });
        let ids = encode(ordinary, text, false)?;
        match self.first_special(&ids) {
            None => Ok(ids),
            Some(token) => Err(TokenizerError::SpecialFromText { token }),
        }
    }

    /// Text of `ids`. Ids beyond the vocabulary have no text, as in transformers.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        let text = guarded(|| self.inner.hf.decode(ids, skip_special));
        text.map_err(|detail| TokenizerError::Decode { detail })
    }

    /// Starts decoding id by id.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// The id of a token, by its literal form in the vocabulary (special tokens as they are written).
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.hf.token_to_id(token)
    }

    /// The literal form of an id in the vocabulary, e.g. `Ġthe` in byte-level vocabularies.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.hf.id_to_token(id)
    }

    /// Whether `text` spells a special token, so that [`encode`](Self::encode) and
    /// [`encode_ordinary`](Self::encode_ordinary) differ.
    pub fn has_special(&self, text: &str) -> bool {
        encode(&self.inner.hf, text, false).is_ok_and(|ids| self.first_special(&ids).is_some())
    }

    /// Whether an id is a special token.
    pub fn is_special(&self, id: u32) -> bool {
        self.token(id).is_some_and(|token| self.is_special_token(&token))
    }

    /// How many tokens there are, added ones included. A model's `vocab_size` may be larger.
    pub fn vocab_size(&self) -> usize {
        self.inner.hf.get_vocab_size(true)
    }

    /// Ids with a meaning for generation.
    pub fn special_ids(&self) -> &SpecialIds {
        &self.inner.ids
    }

    /// Special tokens by role, as templates see them.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.inner.tokens
    }

    fn is_special_token(&self, token: &str) -> bool {
        self.inner.hf.get_added_vocabulary().is_special_token(token)
    }

    /// The first special token among `ids`, the one for unknown characters aside.
    fn first_special(&self, ids: &[u32]) -> Option<String> {
        let unk = self.inner.ids.unk;
        ids.iter().filter(|id| Some(**id) != unk && self.is_special(**id)).find_map(|id| self.token(*id))
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

/// Runs the tokenizer. The crate unwraps here and there on what a sound `tokenizer.json` never holds; that is an error
/// like any other.
fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("the parts of tokenizer.json contradict each other".to_owned()),
    }
}

fn encode(hf: &tokenizers::Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
    let encoding = guarded(|| hf.encode_fast(text, add_special));
    encoding.map(|e| e.get_ids().to_vec()).map_err(|detail| TokenizerError::Encode { detail })
}

fn load(path: &Path) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let bytes = read_bounded(path, "the tokenizer", MAX_TOKENIZER)?;
    let invalid = |detail: String| TokenizerError::Invalid { path: path.to_owned(), detail };
    let mut hf = guarded(|| tokenizers::Tokenizer::from_bytes(&bytes)).map_err(invalid)?;
    // Stored truncation and padding are those of the last training batch; transformers resets them as well.
    hf.with_truncation(None).map_err(|e| invalid(e.to_string()))?.with_padding(None);
    // What a post-processor refers to shows on its first use only.
    guarded(|| hf.encode_fast("a", true)).map_err(invalid)?;
    Ok(hf)
}

fn resolve_ids(
    checkpoint: &Checkpoint,
    hf: &tokenizers::Tokenizer,
    tokens: &SpecialTokens,
) -> Result<SpecialIds, TokenizerError> {
    let generation = checkpoint.generation_config()?.unwrap_or_default();
    let config = checkpoint.config_json();
    let text_config = config.get("text_config").unwrap_or(&Value::Null);
    // A field in the first place that has it; which file is at fault is said by its name.
    let field = |name: &str| {
        [("generation_config.json", generation.get(name)), ("config.json", config.get(name))]
            .into_iter()
            .chain([("config.json", text_config.get(name))])
            .find_map(|(file, value)| value.filter(|v| !v.is_null()).map(|v| (file, v.clone())))
    };
    let ids = |name: &str| -> Result<Vec<u32>, TokenizerError> {
        let Some((file, value)) = field(name) else { return Ok(Vec::new()) };
        settings::id_list(&value).ok_or_else(|| TokenizerError::BadSetting {
            path: checkpoint.dir().join(file),
            field: name.to_owned(),
            found: value.to_string(),
            expected: "a token id or a list of token ids",
        })
    };
    let id = |token: Option<&str>| {
        let token = token?;
        let id = hf.token_to_id(token);
        if id.is_none() {
            tracing::warn!(token, "the tokenizer's settings name a special token that its vocabulary lacks");
        }
        id
    };
    let mut eos = ids("eos_token_id")?;
    if eos.is_empty() {
        eos.extend(id(tokens.eos()));
    }
    Ok(SpecialIds {
        bos: id(tokens.bos()).or(ids("bos_token_id")?.first().copied()),
        eos,
        pad: id(tokens.get("pad_token")).or(ids("pad_token_id")?.first().copied()),
        unk: id(tokens.get("unk_token")),
    })
}

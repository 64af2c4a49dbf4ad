//! Samples to calibrate with.

use std::path::Path;

use nics_core::checkpoint::TensorPath;
use nics_core::tokenizer::Tokenizer;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use tch::Kind;

use crate::{Error, Result};

/// Token ids of equally long samples.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Samples {
    ids: Vec<Vec<u32>>,
}

/// How texts are cut into samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Samples at most; the paper's are 512.
    pub samples: usize,
    /// Tokens of each; the paper's are 2048.
    pub seq_len: usize,
    /// Of the shuffle of the texts.
    pub seed: u64,
}

impl Default for Cut {
    fn default() -> Self {
        Self { samples: 512, seq_len: 2048, seed: 42 }
    }
}

#[derive(Deserialize)]
struct Row {
    text: String,
}

impl Samples {
    /// Samples of one length.
    ///
    /// # Errors
    /// [`Error::EmptyCalibration`]: none, several lengths, or fewer than 2 tokens each.
    pub fn new(ids: Vec<Vec<u32>>) -> Result<Self> {
        let Some(first) = ids.first() else { return Err(Error::EmptyCalibration("there is none".into())) };
        if let Some(other) = ids.iter().find(|s| s.len() != first.len()) {
            let (a, b) = (first.len(), other.len());
            return Err(Error::EmptyCalibration(format!(
                "found one of {a} and one of {b} tokens, expected one length"
            )));
        }
        if first.len() < 2 {
            return Err(Error::EmptyCalibration(format!("found samples of {} tokens", first.len())));
        }
        Ok(Self { ids })
    }

    /// Texts, shuffled, tokenized without special tokens, put together and cut.
    ///
    /// # Errors
    /// [`Error::EmptyCalibration`] when the texts do not make one sample.
    pub fn from_texts(mut texts: Vec<String>, tokenizer: &Tokenizer, cut: Cut) -> Result<Self> {
        texts.shuffle(&mut ChaCha8Rng::seed_from_u64(cut.seed));
        let wanted = cut.samples.saturating_mul(cut.seq_len);
        let mut ids = Vec::new();
        for text in &texts {
            if ids.len() >= wanted {
                break;
            }
            ids.extend(tokenizer.encode_ordinary(text).map_err(nics_core::Error::from)?);
        }
        let found = ids.len();
        let all: Vec<Vec<u32>> =
            ids.chunks_exact(cut.seq_len.max(1)).take(cut.samples).map(<[u32]>::to_vec).collect();
        if all.is_empty() {
            return Err(Error::EmptyCalibration(format!(
                "the texts have {found} tokens, a sample takes {}",
                cut.seq_len
            )));
        }
        if all.len() < cut.samples {
            tracing::warn!("the texts make {} samples, {} were asked for", all.len(), cut.samples);
        }
        Self::new(all)
    }

    /// A file: `.safetensors` with `input_ids` (int64 `[samples, tokens]`, of which the first so many are taken),
    /// `.jsonl` with a field `text` in each line, or one text.
    ///
    /// # Errors
    /// A file that cannot be read or is not what its name says; texts without a tokenizer; no sample.
    pub fn from_file(path: &Path, tokenizer: Option<&Tokenizer>, cut: Cut) -> Result<Self> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        if extension == "safetensors" {
            return Self::from_tensor_file(path, cut);
        }
        let Some(tokenizer) = tokenizer else {
            return Err(Error::Artefact {
                path: path.to_owned(),
                reason: "texts need the model's tokenizer.json; or give token ids in a .safetensors file"
                    .into(),
            });
        };
        let texts = if extension == "jsonl" {
            nics_base::jsonl::read::<Row>(path)?.into_iter().map(|row| row.text).collect()
        } else {
            let text = std::fs::read_to_string(path).map_err(|source| nics_base::Error::Io {
                action: "read",
                path: path.to_owned(),
                source,
            })?;
            vec![text]
        };
        Self::from_texts(texts, tokenizer, cut)
    }

    fn from_tensor_file(path: &Path, cut: Cut) -> Result<Self> {
        let wrong = |reason: String| Error::Artefact { path: path.to_owned(), reason };
        let ids = TensorPath::from_file(path).and_then(|file| file.stored("input_ids"));
        let ids = ids.map_err(nics_core::Error::from)?;
        let (n, tokens) = match ids.size()[..] {
            [n, tokens] if ids.kind() == Kind::Int64 => (n, tokens),
            _ => {
                return Err(wrong(format!(
                    "input_ids is {:?} {:?}, expected Int64 [samples, tokens]",
                    ids.kind(),
                    ids.size()
                )));
            }
        };
        let mut all = Vec::new();
        for i in 0..n.min(cut.samples as i64) {
            let row = Vec::<i64>::try_from(ids.f_get(i)?)?;
            let row: Option<Vec<u32>> = row.into_iter().map(|id| u32::try_from(id).ok()).collect();
            all.push(row.ok_or_else(|| wrong(format!("sample {i} has an id that is no token")))?);
        }
        if tokens < 2 {
            return Err(wrong(format!("samples of {tokens} tokens; calibration needs at least 2")));
        }
        Self::new(all)
    }

    /// The number of samples.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Never: there is at least one sample.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Tokens of each.
    pub fn seq_len(&self) -> usize {
        self.ids[0].len()
    }

    /// The ids, sample by sample.
    pub fn ids(&self) -> &[Vec<u32>] {
        &self.ids
    }

    /// A hash of all ids: by it a later run knows that it has the same samples.
    pub fn hash(&self) -> String {
        nics_base::hash::tokens(&self.ids.concat())
    }
}

/// The step between positions that stretches samples of `seq_len` tokens to `effective` ones; 1 without.
///
/// # Errors
/// [`Error::EffectiveLenNotMultiple`].
pub fn stretch(seq_len: usize, effective: Option<usize>) -> Result<usize> {
    let effective = effective.unwrap_or(seq_len);
    if seq_len == 0 || effective == 0 || !effective.is_multiple_of(seq_len) {
        return Err(Error::EffectiveLenNotMultiple { len: seq_len, effective });
    }
    Ok(effective / seq_len)
}

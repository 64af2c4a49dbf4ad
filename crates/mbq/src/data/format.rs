//! How samples are put together: as they are, in pairs, or in pairs with a piece of text between.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::collate::Sample;
use crate::{Error, Result};

/// The format of a calibration's samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// One by one.
    #[default]
    Plain,
    /// Samples `2i` and `2i + 1` behind each other.
    FewShot,
    /// Sample `2i`, text `2i`, sample `2i + 1`; the text is to be predicted too.
    Interleave,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "plain",
            Self::FewShot => "few-shot",
            Self::Interleave => "interleave",
        })
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "plain" => Ok(Self::Plain),
            "few-shot" => Ok(Self::FewShot),
            "interleave" => Ok(Self::Interleave),
            _ => Err(Error::Setting {
                field: "format",
                found: s.to_owned(),
                expected: "plain, few-shot or interleave",
            }),
        }
    }
}

/// Samples in a format. Of an odd number the last is dropped. `texts` are ids of documents, for [`Format::Interleave`].
///
/// # Errors
/// Too few texts.
pub fn formatted(samples: &[Sample], format: Format, texts: &[Vec<i64>]) -> Result<Vec<Sample>> {
    if format == Format::Plain {
        return Ok(samples.to_vec());
    }
    let pairs = samples.chunks_exact(2).enumerate();
    pairs
        .map(|(i, pair)| {
            let mut all = pair[0].clone();
            if format == Format::Interleave {
                let text = texts.get(2 * i).ok_or_else(|| {
                    Error::NoData(format!(
                        "{} samples take texts up to number {}, there are {}",
                        samples.len(),
                        2 * i,
                        texts.len()
                    ))
                })?;
                all.ids.extend(text);
                all.labels.extend(text);
            }
            all.ids.extend(&pair[1].ids);
            all.labels.extend(&pair[1].labels);
            Ok(all)
        })
        .collect()
}

/// Text to calibrate on without images: documents of at most `longest` tokens, put together and cut into blocks of that
/// length; what is left over is dropped. There are no masks, so that nothing can be balanced.
pub fn blocks(documents: &[Vec<i64>], longest: usize) -> Vec<Vec<i64>> {
    let short = documents.iter().filter(|d| d.len() <= longest);
    let all: Vec<i64> = short.flatten().copied().collect();
    all.chunks_exact(longest.max(1)).map(<[i64]>::to_vec).collect()
}

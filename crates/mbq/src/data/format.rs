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

/// What a sample of a format is put together from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// A sample by its number.
    Sample(usize),
    /// A text by its number.
    Text(usize),
}

/// The pieces of each sample of a format, from so many samples and texts. Of an odd number the last sample is dropped.
///
/// # Errors
/// Too few texts.
pub fn pieces(samples: usize, format: Format, texts: usize) -> Result<Vec<Vec<Piece>>> {
    let pair = |i: usize| match format {
        Format::Interleave => vec![Piece::Sample(2 * i), Piece::Text(2 * i), Piece::Sample(2 * i + 1)],
        _ => vec![Piece::Sample(2 * i), Piece::Sample(2 * i + 1)],
    };
    let needed = if format == Format::Interleave && samples > 1 { samples / 2 * 2 - 1 } else { 0 };
    if texts < needed {
        return Err(Error::NoData(format!("{samples} samples take {needed} texts, there are {texts}")));
    }
    Ok(match format {
        Format::Plain => (0..samples).map(|i| vec![Piece::Sample(i)]).collect(),
        _ => (0..samples / 2).map(pair).collect(),
    })
}

/// Samples in a format. `texts` are ids of documents, for [`Format::Interleave`].
///
/// # Errors
/// Too few texts.
pub fn formatted(samples: &[Sample], format: Format, texts: &[Vec<i64>]) -> Result<Vec<Sample>> {
    let of = |group: Vec<Piece>| {
        let mut all = Sample { ids: Vec::new(), labels: Vec::new() };
        for piece in group {
            let (ids, labels) = match piece {
                Piece::Sample(i) => (&samples[i].ids, &samples[i].labels),
                Piece::Text(i) => (&texts[i], &texts[i]),
            };
            all.ids.extend(ids);
            all.labels.extend(labels);
        }
        all
    };
    Ok(pieces(samples.len(), format, texts.len())?.into_iter().map(of).collect())
}

/// Text to calibrate on without images: documents of at most `longest` tokens, put together and cut into blocks of that
/// length; what is left over is dropped. There are no masks, so that nothing can be balanced.
pub fn blocks(documents: &[Vec<i64>], longest: usize) -> Vec<Vec<i64>> {
    let short = documents.iter().filter(|d| d.len() <= longest);
    let all: Vec<i64> = short.flatten().copied().collect();
    all.chunks_exact(longest.max(1)).map(<[i64]>::to_vec).collect()
}

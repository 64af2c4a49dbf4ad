//! Token ids with labels, put into one padded batch, and the positions of each modality in it.

use nics_core::train::IGNORED;

use crate::{Error, Result};

/// One sample: ids, and for each its label or −100.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Token ids; placeholders of images may be negative.
    pub ids: Vec<i64>,
    /// As many labels.
    pub labels: Vec<i64>,
}

impl Sample {
    /// # Errors
    /// Ids and labels of different numbers.
    pub fn new(ids: Vec<i64>, labels: Vec<i64>) -> Result<Self> {
        if ids.len() == labels.len() {
            return Ok(Self { ids, labels });
        }
        Err(Error::Input(format!("a sample of {} ids with {} labels", ids.len(), labels.len())))
    }

    /// Qwen2-VL's labels: everything from the last start of a turn on, its header included.
    ///
    /// # Errors
    /// Ids without such a start.
    pub fn from_last_turn(ids: Vec<i64>, start: i64) -> Result<Self> {
        let Some(from) = ids.iter().rposition(|id| *id == start) else {
            return Err(Error::Input(format!(
                "a sample of {} ids has no start of a turn ({start})",
                ids.len()
            )));
        };
        let labels = ids.iter().enumerate().map(|(i, id)| if i < from { IGNORED } else { *id }).collect();
        Ok(Self { ids, labels })
    }

    /// The same without what an attention mask hides.
    ///
    /// # Errors
    /// A mask of another length.
    pub fn unpadded(&self, attention: &[bool]) -> Result<Self> {
        if attention.len() != self.ids.len() {
            return Err(Error::Input(format!(
                "a mask of {} positions for {} ids",
                attention.len(),
                self.ids.len()
            )));
        }
        let keep = |of: &[i64]| of.iter().zip(attention).filter(|(_, a)| **a).map(|(v, _)| *v).collect();
        Ok(Self { ids: keep(&self.ids), labels: keep(&self.labels) })
    }
}

/// The side on which short samples are filled up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Before them: Qwen2-VL.
    Left,
    /// Behind them: LLaVA, InternVL2.
    Right,
}

/// Samples of one length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Padded {
    /// `[samples][positions]`.
    pub ids: Vec<Vec<i64>>,
    /// −100 where padded.
    pub labels: Vec<Vec<i64>>,
    /// False where padded.
    pub attention: Vec<Vec<bool>>,
}

/// Where the attention mask comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// From the lengths of the samples.
    Lengths,
    /// Ids other than that of padding, as InternVL2 and Qwen2-VL have it.
    Ids,
}

/// Fills samples up to the longest with `pad`.
pub fn pad(samples: &[Sample], pad: i64, side: Side, attention: Attention) -> Padded {
    let longest = samples.iter().map(|s| s.ids.len()).max().unwrap_or(0);
    let filled = |of: &[i64], with: i64| {
        let fill = std::iter::repeat_n(with, longest - of.len());
        match side {
            Side::Left => fill.chain(of.iter().copied()).collect(),
            Side::Right => of.iter().copied().chain(fill).collect::<Vec<_>>(),
        }
    };
    let ids: Vec<Vec<i64>> = samples.iter().map(|s| filled(&s.ids, pad)).collect();
    let seen = |(s, ids): (&Sample, &Vec<i64>)| match attention {
        Attention::Ids => ids.iter().map(|id| *id != pad).collect(),
        Attention::Lengths => filled(&vec![1; s.ids.len()], 0).into_iter().map(|v| v == 1).collect(),
    };
    Padded {
        attention: samples.iter().zip(&ids).map(seen).collect(),
        labels: samples.iter().map(|s| filled(&s.labels, IGNORED)).collect(),
        ids,
    }
}

/// A sample of LLaVA with its placeholders widened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expanded {
    /// Labels, −100 at images.
    pub labels: Vec<i64>,
    /// Positions of images.
    pub vision: Vec<bool>,
}

/// LLaVA's images: the `n`-th placeholder becomes `lengths[n]` positions.
///
/// # Errors
/// Another number of placeholders than of lengths.
pub fn expand(sample: &Sample, placeholder: i64, lengths: &[usize]) -> Result<Expanded> {
    let found = sample.ids.iter().filter(|id| **id == placeholder).count();
    if found != lengths.len() {
        return Err(Error::Input(format!("a sample with {found} placeholders for {} images", lengths.len())));
    }
    let mut lengths = lengths.iter();
    let mut all = Expanded { labels: Vec::new(), vision: Vec::new() };
    for (id, label) in sample.ids.iter().zip(&sample.labels) {
        let image = *id == placeholder;
        let (n, label) = if image { (lengths.next().copied().unwrap_or(0), IGNORED) } else { (1, *label) };
        all.labels.extend(std::iter::repeat_n(label, n));
        all.vision.extend(std::iter::repeat_n(image, n));
    }
    Ok(all)
}

/// Positions whose id is one of an image's, where a model's processor has put them in the ids already: `<IMG_CONTEXT>` of
/// InternVL2, `image_token_id` of Qwen2-VL.
pub fn is_image(ids: &[i64], image: i64) -> Vec<bool> {
    ids.iter().map(|id| *id == image).collect()
}

/// Positions with an answer.
pub fn is_answer(labels: &[i64]) -> Vec<bool> {
    labels.iter().map(|l| *l != IGNORED).collect()
}

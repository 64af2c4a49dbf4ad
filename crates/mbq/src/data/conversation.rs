//! Captions as a model reads them: its chat template, its images, and labels for what it is to answer.

use std::path::{Path, PathBuf};

use nics_core::train::IGNORED;
use nics_core::vision::{Media, MediaPrompt, Processor, TokenKind, picture};
use tch::{Kind, Tensor};

use super::captions::Caption;
use super::collate::{Sample, Side};
use super::format::{Format, Piece, pieces};
use crate::batch::{CalibBatch, Modality};
use crate::language::Language;
use crate::prompt::Prompter;
use crate::{Error, Result};

/// Begins a turn of Qwen2-VL, whose labels include its header.
const TURN: &str = "<|im_start|>";

/// What captions are read with.
pub struct Reader<'a> {
    /// The model's tokenizer, template and processor.
    pub prompter: &'a Prompter,
    /// What image paths are relative to.
    pub images: &'a Path,
    /// The most positions of a sample.
    pub longest: usize,
}

/// A sample, embedded.
#[derive(Debug)]
pub struct Embedded {
    /// `[positions, hidden]`.
    pub embeds: Tensor,
    /// One a position.
    pub labels: Vec<i64>,
    /// One a position.
    pub kinds: Vec<TokenKind>,
    /// Where the positions are in time, height and width, for a model that places images so; one a position.
    pub planes: Option<Vec<[i64; 3]>>,
}

impl Embedded {
    /// Text that is to be predicted in full.
    pub fn text(model: &Language, ids: &[i64]) -> Result<Self> {
        let kinds = vec![TokenKind::Text; ids.len()];
        Ok(Self { embeds: model.embed(ids)?, labels: ids.to_vec(), kinds, planes: None })
    }

    fn positions(&self) -> usize {
        self.labels.len()
    }

    /// Places in time, height and width; those of text alone are its numbers.
    fn planes_or_places(&self) -> Vec<[i64; 3]> {
        self.planes.clone().unwrap_or_else(|| (0..self.positions() as i64).map(|p| [p; 3]).collect())
    }
}

/// A caption as ids, with what its images become.
struct Prompted {
    ids: Vec<i64>,
    /// One a position, images included.
    labels: Vec<i64>,
    /// One a position.
    kinds: Vec<TokenKind>,
    shown: Option<MediaPrompt>,
}

impl Reader<'_> {
    /// A caption, embedded.
    ///
    /// # Errors
    /// [`Error::DataItemInvalid`] with the caption's line in `file`: an image that cannot be read, a conversation that the
    /// template refuses, a sample that is too long.
    pub fn read(&self, file: &Path, caption: &Caption, model: &Language) -> Result<Embedded> {
        self.embedded(caption, model).map_err(|e| match e {
            e @ Error::DataItemInvalid { .. } => e,
            e => Error::DataItemInvalid { path: file.to_owned(), line: caption.line, reason: e.to_string() },
        })
    }

    /// Positions of each modality that a caption takes, `answer` first and `prompt` last: what is known without the model's
    /// weights.
    ///
    /// # Errors
    /// As [`read`](Self::read), without the line.
    pub fn counts(&self, caption: &Caption) -> Result<Vec<(&'static str, usize)>> {
        let prompted = self.prompted(caption)?;
        let of = |kind| prompted.kinds.iter().filter(|k| **k == kind).count();
        let answer = prompted.labels.iter().filter(|l| **l != IGNORED).count();
        Ok(vec![
            ("answer", answer),
            (TokenKind::Image.name(), of(TokenKind::Image)),
            ("prompt", of(TokenKind::Text) - answer),
        ])
    }

    fn embedded(&self, caption: &Caption, model: &Language) -> Result<Embedded> {
        let Prompted { ids, labels, kinds, shown } = self.prompted(caption)?;
        let (embeds, planes) = match shown {
            Some(prompt) => {
                let embedded = model.vlm()?.embed_prompt(&prompt)?;
                (embedded.embeddings, embedded.rotary.map(|r| r.planes))
            }
            None => (model.embed(&ids)?, None),
        };
        Ok(Embedded { embeds, labels, kinds, planes })
    }

    fn prompted(&self, caption: &Caption) -> Result<Prompted> {
        let sample = self.tokens(caption)?;
        let ids: Vec<u32> = sample.ids.iter().map(|id| *id as u32).collect();
        self.prompter.check(&ids, caption.images.len())?;
        let placeholder = self.prompter.placeholder().map(i64::from);
        let Some(processor) = self.prompter.processor.as_ref().filter(|_| !caption.images.is_empty()) else {
            self.fits(sample.ids.len())?;
            let kinds = vec![TokenKind::Text; sample.ids.len()];
            return Ok(Prompted { ids: sample.ids, labels: sample.labels, kinds, shown: None });
        };
        let mut media = Vec::with_capacity(caption.images.len());
        for path in &caption.images {
            let path: PathBuf = self.images.join(path);
            media.push(Media::Image(picture::open(&path).map_err(nics_core::Error::from)?));
        }
        let prompt = processor.prompt(&ids, &media)?;
        self.fits(prompt.ids.len())?;
        // Images have grown, text has not.
        let mut text = sample.ids.iter().zip(&sample.labels).filter(|(id, _)| Some(**id) != placeholder);
        let label = |kind: &TokenKind| match kind {
            TokenKind::Text => text.next().map_or(IGNORED, |(_, label)| *label),
            TokenKind::Image | TokenKind::Video => IGNORED,
        };
        let labels = prompt.kinds.iter().map(label).collect();
        let kinds = prompt.kinds.clone();
        Ok(Prompted { ids: sample.ids, labels, kinds, shown: Some(prompt) })
    }

    fn fits(&self, positions: usize) -> Result<()> {
        if positions <= self.longest {
            return Ok(());
        }
        Err(Error::Input(format!("it takes {positions} positions, at most {} are allowed", self.longest)))
    }

    /// Ids with one placeholder for each image, and labels.
    fn tokens(&self, caption: &Caption) -> Result<Sample> {
        let Prompter { tokenizer, processor, .. } = self.prompter;
        let messages = self.prompter.conversation(&caption.conversations, caption.images.len())?;
        let encoded = |of, generation| self.prompter.encoded(of, generation);
        let ids: Vec<i64> = encoded(&messages, false)?.into_iter().map(i64::from).collect();
        if let (Some(Processor::Qwen(_)), Some(start)) = (processor, tokenizer.token_id(TURN)) {
            return Sample::from_last_turn(ids, i64::from(start));
        }
        let mut labels = vec![IGNORED; ids.len()];
        for n in (0..messages.len()).filter(|n| messages[*n].role == "assistant") {
            // What the turn adds behind its header.
            let before = common(&encoded(&messages[..n], true)?, &ids);
            let after = common(&encoded(&messages[..=n], false)?, &ids);
            if before < after {
                labels[before..after].copy_from_slice(&ids[before..after]);
            }
        }
        Sample::new(ids, labels)
    }

    /// The side on which the model's samples are filled up.
    pub fn side(&self) -> Side {
        match self.prompter.processor {
            Some(Processor::Qwen(_)) => Side::Left,
            _ => Side::Right,
        }
    }
}

/// Ids that both begin with.
fn common(a: &[u32], b: &[i64]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| i64::from(**a) == **b).count()
}

/// Samples put together in a format; see [`super::format::formatted`].
///
/// # Errors
/// Too few texts, or none at all.
pub fn joined(samples: &[Embedded], format: Format, texts: &[Embedded]) -> Result<Vec<Embedded>> {
    let of = |group: Vec<Piece>| -> Result<Embedded> {
        let group: Vec<&Embedded> = group
            .into_iter()
            .map(|p| match p {
                Piece::Sample(i) => &samples[i],
                Piece::Text(i) => &texts[i],
            })
            .collect();
        let embeds: Vec<&Tensor> = group.iter().map(|e| &e.embeds).collect();
        Ok(Embedded {
            embeds: Tensor::f_cat(&embeds, 0)?,
            labels: group.iter().flat_map(|e| e.labels.clone()).collect(),
            kinds: group.iter().flat_map(|e| e.kinds.clone()).collect(),
            planes: behind_each_other(&group),
        })
    };
    pieces(samples.len(), format, texts.len())?.into_iter().map(of).collect()
}

/// Places in time, height and width of samples behind each other: each begins behind the largest number so far.
fn behind_each_other(group: &[&Embedded]) -> Option<Vec<[i64; 3]>> {
    if group.iter().all(|e| e.planes.is_none()) {
        return None;
    }
    let (mut all, mut next) = (Vec::new(), 0);
    for e in group {
        let own = e.planes_or_places();
        let last = own.iter().flatten().max().copied().unwrap_or(-1);
        all.extend(own.into_iter().map(|plane| plane.map(|p| p + next)));
        next += last + 1;
    }
    Some(all)
}

/// How the positions of samples are numbered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Numbering {
    /// One after the other along the row, padding included, as in published calibrations.
    #[default]
    Sequential,
    /// As the model places images in time, height and width, where it does (Qwen2-VL).
    Multimodal,
}

/// [`batched`], with positions as the model numbers them.
///
/// # Errors
/// No sample.
pub fn batched_as(samples: &[Embedded], side: Side, numbering: Numbering) -> Result<CalibBatch> {
    let batch = batched(samples, side)?;
    if numbering == Numbering::Sequential || samples.iter().all(|s| s.planes.is_none()) {
        return Ok(batch);
    }
    let longest = batch.positions() as usize;
    let mut planes = Vec::with_capacity(samples.len() * longest);
    for sample in samples {
        let own = sample.planes_or_places();
        // Nobody attends to padding.
        let fill = std::iter::repeat_n([0; 3], longest - own.len());
        match side {
            Side::Left => planes.extend(fill.chain(own)),
            Side::Right => planes.extend(own.into_iter().chain(fill)),
        }
    }
    batch.with_planes(planes)
}

/// Samples filled up to the longest, as a batch with the modalities `image` and `video`.
///
/// # Errors
/// No sample.
pub fn batched(samples: &[Embedded], side: Side) -> Result<CalibBatch> {
    let longest = samples.iter().map(Embedded::positions).max().unwrap_or(0);
    let (mut embeds, mut labels, mut attention) = (Vec::new(), Vec::new(), Vec::new());
    let mut masks = [(TokenKind::Image, Vec::new()), (TokenKind::Video, Vec::new())];
    for sample in samples {
        let fill = longest - sample.positions();
        let (before, after) = match side {
            Side::Left => (fill, 0),
            Side::Right => (0, fill),
        };
        let padding = [0, 0, before as i64, after as i64];
        embeds.push(sample.embeds.f_to_kind(Kind::Float)?.f_constant_pad_nd(padding)?);
        let put = |values: &mut Vec<i64>, of: &mut dyn Iterator<Item = i64>, with: i64| {
            values.extend(std::iter::repeat_n(with, before));
            values.extend(of);
            values.extend(std::iter::repeat_n(with, after));
        };
        put(&mut labels, &mut sample.labels.iter().copied(), IGNORED);
        put(&mut attention, &mut sample.labels.iter().map(|_| 1), 0);
        for (kind, mask) in &mut masks {
            put(mask, &mut sample.kinds.iter().map(|k| i64::from(k == kind)), 0);
        }
    }
    if embeds.is_empty() {
        return Err(Error::NoData("there is no sample to calibrate with".into()));
    }
    let embeds = Tensor::f_stack(&embeds, 0)?;
    let device = embeds.device();
    let shape = [samples.len() as i64, longest as i64];
    let whole = |values: &[i64]| -> Result<Tensor> {
        Ok(Tensor::f_from_slice(values)?.f_view(shape)?.f_to_device(device)?)
    };
    let mut modalities = Vec::new();
    for (kind, mask) in &masks {
        if mask.contains(&1) || *kind == TokenKind::Image {
            let mask = whole(mask)?.f_to_kind(Kind::Bool)?;
            modalities.push(Modality { name: kind.name().to_owned(), mask });
        }
    }
    CalibBatch::new(&embeds, whole(&attention)?.f_to_kind(Kind::Bool)?, whole(&labels)?, modalities)
}

//! Captions as a model reads them: its chat template, its images, and labels for what it is to answer.

use std::path::{Path, PathBuf};

use nics_core::template::{ChatTemplate, Content, Message, RenderOptions};
use nics_core::tokenizer::Tokenizer;
use nics_core::train::IGNORED;
use nics_core::vision::{Media, Processor, TokenKind, picture};
use serde_json::json;
use tch::{Kind, Tensor};

use super::captions::{Caption, Speaker};
use super::collate::{Sample, Side};
use super::format::{Format, Piece, pieces};
use crate::batch::{CalibBatch, Modality};
use crate::language::Language;
use crate::{Error, Result};

/// Stands for an image in caption data.
const IMAGE: &str = "<image>";
/// Begins a turn of Qwen2-VL, whose labels include its header.
const TURN: &str = "<|im_start|>";

/// What captions are read with.
pub struct Reader<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Its chat template.
    pub template: &'a ChatTemplate,
    /// How it sees; `None` for text alone.
    pub processor: Option<&'a Processor>,
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
}

impl Embedded {
    /// Text that is to be predicted in full.
    pub fn text(model: &Language, ids: &[i64]) -> Result<Self> {
        Ok(Self { embeds: model.embed(ids)?, labels: ids.to_vec(), kinds: vec![TokenKind::Text; ids.len()] })
    }

    fn positions(&self) -> usize {
        self.labels.len()
    }
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

    fn embedded(&self, caption: &Caption, model: &Language) -> Result<Embedded> {
        if !caption.images.is_empty() && self.processor.is_none() {
            return Err(Error::Input("it shows an image, but the model does not see".into()));
        }
        let sample = self.tokens(caption)?;
        let placeholder = self.processor.map(|p| i64::from(p.placeholders().image));
        let found = sample.ids.iter().filter(|id| Some(**id) == placeholder).count();
        if found != caption.images.len() {
            return Err(Error::Input(format!(
                "its text has {found} places for {} images; the chat template is not one of a model that sees",
                caption.images.len()
            )));
        }
        let Some(processor) = self.processor.filter(|_| found > 0) else {
            self.fits(sample.ids.len())?;
            let mut all = Embedded::text(model, &sample.ids)?;
            all.labels = sample.labels;
            return Ok(all);
        };
        let mut media = Vec::with_capacity(caption.images.len());
        for path in &caption.images {
            let path: PathBuf = self.images.join(path);
            media.push(Media::Image(picture::open(&path).map_err(nics_core::Error::from)?));
        }
        let ids: Vec<u32> = sample.ids.iter().map(|id| *id as u32).collect();
        let prompt = processor.prompt(&ids, &media)?;
        self.fits(prompt.ids.len())?;
        let embedded = model.vlm()?.embed_prompt(&prompt)?;
        // Images have grown, text has not.
        let mut text = sample.ids.iter().zip(&sample.labels).filter(|(id, _)| Some(**id) != placeholder);
        let label = |kind: &TokenKind| match kind {
            TokenKind::Text => text.next().map_or(IGNORED, |(_, label)| *label),
            TokenKind::Image | TokenKind::Video => IGNORED,
        };
        let labels = embedded.kinds.iter().map(label).collect();
        Ok(Embedded { embeds: embedded.embeddings, labels, kinds: embedded.kinds })
    }

    fn fits(&self, positions: usize) -> Result<()> {
        if positions <= self.longest {
            return Ok(());
        }
        Err(Error::Input(format!("it takes {positions} positions, at most {} are allowed", self.longest)))
    }

    /// Ids with one placeholder for each image, and labels.
    fn tokens(&self, caption: &Caption) -> Result<Sample> {
        let parts = self.messages(caption, true);
        let wanted = caption.images.len();
        let fits = |messages: &[Message]| -> Result<bool> {
            let Some(processor) = self.processor.filter(|_| wanted > 0) else { return Ok(true) };
            let image = processor.placeholders().image;
            Ok(self.encoded(messages, false)?.iter().filter(|id| **id == image).count() == wanted)
        };
        // Templates of older checkpoints know texts alone.
        let messages = match fits(&parts) {
            Ok(true) => parts,
            _ => self.messages(caption, false),
        };
        let ids: Vec<i64> = self.encoded(&messages, false)?.into_iter().map(i64::from).collect();
        if let (Some(Processor::Qwen(_)), Some(start)) = (self.processor, self.tokenizer.token_id(TURN)) {
            return Sample::from_last_turn(ids, i64::from(start));
        }
        let mut labels = vec![IGNORED; ids.len()];
        for n in (0..messages.len()).filter(|n| messages[*n].role == "assistant") {
            // What the turn adds behind its header.
            let before = common(&self.encoded(&messages[..n], true)?, &ids);
            let after = common(&self.encoded(&messages[..=n], false)?, &ids);
            if before < after {
                labels[before..after].copy_from_slice(&ids[before..after]);
            }
        }
        Sample::new(ids, labels)
    }

    fn encoded(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Vec<u32>> {
        let options = RenderOptions { add_generation_prompt, ..RenderOptions::default() };
        let text = self.template.render(messages, &options).map_err(nics_core::Error::from)?;
        Ok(self.tokenizer.encode(&text, false).map_err(nics_core::Error::from)?)
    }

    /// Turns of a conversation. Images come first in the first turn of the one who asks.
    fn messages(&self, caption: &Caption, as_parts: bool) -> Vec<Message> {
        let marker = match self.processor {
            Some(Processor::Qwen(_)) => "<|vision_start|><|image_pad|><|vision_end|>",
            Some(Processor::InternVl(_)) => "<img><IMG_CONTEXT></img>\n",
            _ => "<image>\n",
        };
        let mut images = caption.images.len();
        let turn = |turn: &super::captions::Turn| {
            let text = turn.value.replace(IMAGE, "").trim().to_owned();
            let role = match turn.from {
                Speaker::Human => "user",
                Speaker::Gpt => "assistant",
                Speaker::System => "system",
            };
            let shown = if turn.from == Speaker::Human { std::mem::take(&mut images) } else { 0 };
            if shown == 0 {
                return Message::new(role, text);
            }
            if !as_parts {
                return Message::new(role, marker.repeat(shown) + &text);
            }
            let mut parts = vec![json!({"type": "image"}); shown];
            parts.push(json!({"type": "text", "text": text}));
            Message { content: Some(Content::Parts(parts)), ..Message::new(role, "") }
        };
        caption.conversations.iter().map(turn).collect()
    }

    /// The side on which the model's samples are filled up.
    pub fn side(&self) -> Side {
        match self.processor {
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
        })
    };
    pieces(samples.len(), format, texts.len())?.into_iter().map(of).collect()
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

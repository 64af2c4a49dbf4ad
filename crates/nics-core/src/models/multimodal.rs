//! A language model that sees: a [`Decoder`] with a family's tower and projector in front.
//!
//! [`Vlm`] is what the families share: it puts what a [`Vision`] makes of images and videos in the place of their
//! placeholders' embeddings. From there on it is a [`Model`] like any other, with caches, hooks and generation. Where
//! positions have several axes ([`Positions::Mrope`]), rows carry them ([`Ragged::with_planes`]), and decoding goes on
//! behind the largest.
//!
//! [`Ragged::with_planes`]: crate::seam::Ragged::with_planes

use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use super::decoder::refuse_quantized;
use super::{Batch, Decoder, DecoderConfig, Model, ModelDims, Output, ProjectionVisitor};
use super::{internvl2, llava, llava_onevision, qwen2_5_vl, qwen2_vl};
use crate::checkpoint::{Checkpoint, TensorPath};
use crate::seam::{KvCache, LayerHook, Ragged, SeqId};
use crate::vision::{Layout, MediaPrompt, Prepared, TokenKind, VisionError};
use crate::{Error, Result};

/// Architectures that [`load_vlm`] reads, as `architectures[0]` of config.json names them.
pub const VLM_ARCHITECTURES: [&str; 6] = [
    "LlavaForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "InternVLChatModel",
    "LlavaQwenForCausalLM",
];

/// The tower and projector of a family.
pub trait Vision: Send {
    /// What a medium is to the language model: `[tokens, hidden]`, as many as were prepared, in their order.
    fn encode(&self, media: &Prepared) -> Result<Tensor>;

    /// Hands every linear layer, with its path in the checkpoint, to `f`, which may replace it.
    fn visit_projections(&mut self, f: &mut ProjectionVisitor) -> Result<()>;

    /// Hands every parameter, with its checkpoint key, to `f`, which may replace it.
    fn visit_parameters(&mut self, f: &mut dyn FnMut(&str, &mut Tensor) -> Result<()>) -> Result<()>;
}

/// How a family's tokens are placed for the rotary embeddings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Positions {
    /// One after the other, whatever they are.
    Sequential,
    /// In time, height and width (Qwen2-VL): a text token at the same number in all three, a medium's tokens as an own
    /// block of them, and what follows one behind the largest number so far.
    Mrope {
        /// Patches along the edge of a token.
        merge: usize,
        /// Numbers in time for each second of a video; `None` is one for each patch in time.
        per_second: Option<f64>,
    },
}

/// Positions of a sequence in time, height and width.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RotaryPositions {
    /// Of each token.
    pub planes: Vec<[i64; 3]>,
    /// What is added to the number of a token behind these to have its position in all three.
    pub delta: i64,
}

/// A prompt ready for the language model.
#[derive(Debug)]
pub struct Embedded {
    /// Ids, placeholders repeated.
    pub ids: Vec<u32>,
    /// What each id stands for.
    pub kinds: Vec<TokenKind>,
    /// `[tokens, hidden]`.
    pub embeddings: Tensor,
    /// Where the tokens are, when that is not just their number.
    pub rotary: Option<RotaryPositions>,
}

impl Embedded {
    /// Whole prompts as the rows of one call, sequence after sequence, and their embeddings, `[rows, hidden]`.
    ///
    /// # Errors
    /// No prompt, or prompts of several widths.
    pub fn batch(prompts: &[(SeqId, &Self)]) -> Result<(Ragged, Tensor)> {
        let lens: Vec<_> = prompts.iter().map(|&(seq, prompt)| (seq, 0, prompt.ids.len())).collect();
        let mut rows = Ragged::contiguous(&lens);
        if prompts.iter().any(|(_, prompt)| prompt.rotary.is_some()) {
            let planes = prompts.iter().flat_map(|(_, prompt)| match &prompt.rotary {
                Some(rotary) => rotary.planes.clone(),
                None => (0..prompt.ids.len() as i64).map(|position| [position; 3]).collect(),
            });
            rows = rows.with_planes(planes.collect())?;
        }
        let embeddings: Vec<&Tensor> = prompts.iter().map(|(_, prompt)| &prompt.embeddings).collect();
        if embeddings.is_empty() {
            return Err(Error::input("a batch without a prompt"));
        }
        Ok((rows, Tensor::f_cat(&embeddings, 0)?))
    }
}

impl Positions {
    /// Positions of a prompt; `None` when they are just the tokens' numbers.
    ///
    /// # Errors
    /// A medium whose layout has no time, height and width.
    pub fn of(&self, prompt: &MediaPrompt) -> Result<Option<RotaryPositions>> {
        let Self::Mrope { merge, per_second } = *self else { return Ok(None) };
        if prompt.media.is_empty() {
            return Ok(None);
        }
        let mut planes: Vec<[i64; 3]> = Vec::with_capacity(prompt.ids.len());
        let mut next = 0;
        for placed in &prompt.media {
            let Layout::Patches { grid: [_, rows, columns], seconds } = placed.media.layout else {
                return Err(Error::input(
                    "a medium without a grid of patches has no place in time and space",
                ));
            };
            let (rows, columns) = ((rows / merge).max(1), (columns / merge).max(1));
            for (i, &row) in placed.rows.iter().enumerate() {
                if i == 0 || row != planes.len() {
                    while planes.len() < row {
                        planes.push([next; 3]);
                        next += 1;
                    }
                }
                let t = (i / (rows * columns)) as f64 * per_second.map_or(1.0, |n| n * seconds);
                let (y, x) = (i / columns % rows, i % columns);
                planes.push([next + t as i64, next + y as i64, next + x as i64]);
            }
            next = planes.iter().flatten().max().map_or(0, |last| last + 1);
        }
        while planes.len() < prompt.ids.len() {
            planes.push([next; 3]);
            next += 1;
        }
        Ok(Some(RotaryPositions { delta: next - planes.len() as i64, planes }))
    }
}

/// A language model that sees.
pub struct Vlm {
    /// The language model.
    pub language_model: Decoder,
    /// Tower and projector.
    pub vision: Box<dyn Vision>,
    /// What stands before the language model's keys in the checkpoint, e.g. `language_model.`.
    prefix: &'static str,
    positions: Positions,
}

impl Vlm {
    /// A model of its parts; `prefix` is where the language model's keys are in the checkpoint, with its dot.
    pub fn new(
        language_model: Decoder,
        vision: Box<dyn Vision>,
        prefix: &'static str,
        positions: Positions,
    ) -> Self {
        Self { language_model, vision, prefix, positions }
    }

    /// How its tokens are placed.
    pub fn positions(&self) -> Positions {
        self.positions
    }

    /// Embeds a prompt with all that it shows ([`crate::vision::Processor::prompt`]).
    ///
    /// # Errors
    /// An id outside the vocabulary, pixels of another shape than the tower's.
    pub fn embed_prompt(&self, prompt: &MediaPrompt) -> Result<Embedded> {
        let dims = self.dims();
        let ids: Vec<i64> = prompt.ids.iter().map(|&id| i64::from(id)).collect();
        // A placeholder need not be in the embedding table (InternVL2's are; some checkpoints leave theirs out).
        let looked_up: Vec<i64> = ids
            .iter()
            .zip(&prompt.kinds)
            .map(|(&id, &kind)| if kind == TokenKind::Text { id } else { 0 })
            .collect();
        let looked_up = Tensor::f_from_slice(&looked_up)?.f_to_device(dims.device)?;
        let mut embeddings = self.language_model.embed(&looked_up)?;
        for placed in &prompt.media {
            let features = self.vision.encode(&placed.media)?;
            let expected = [placed.rows.len() as i64, dims.hidden];
            if features.size() != expected {
                let (found, expected) = (features.size(), format!("{expected:?}"));
                return Err(VisionError::Shape { what: "what the projector made", found, expected }.into());
            }
            let rows: Vec<i64> = placed.rows.iter().map(|&row| row as i64).collect();
            let rows = Tensor::f_from_slice(&rows)?.f_to_device(dims.device)?;
            embeddings = embeddings.f_index_copy(0, &rows, &features.f_to_kind(embeddings.kind())?)?;
        }
        Ok(Embedded {
            ids: prompt.ids.clone(),
            kinds: prompt.kinds.clone(),
            embeddings,
            rotary: self.positions.of(prompt)?,
        })
    }
}

impl Model for Vlm {
    fn dims(&self) -> &ModelDims {
        self.language_model.dims()
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        self.language_model.embed(ids)
    }

    fn forward(
        &self,
        batch: &Batch,
        cache: &mut dyn KvCache,
        hook: Option<&mut dyn LayerHook>,
    ) -> Result<Output> {
        self.language_model.forward(batch, cache, hook)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.language_model.logits(hidden)
    }

    fn visit_projections(&mut self, f: &mut ProjectionVisitor) -> Result<()> {
        self.vision.visit_projections(f)?;
        let prefix = self.prefix;
        self.language_model
            .visit_projections(&mut |path, projection| f(&format!("{prefix}{path}"), projection))
    }

    fn visit_parameters(&mut self, f: &mut dyn FnMut(&str, &mut Tensor) -> Result<()>) -> Result<()> {
        self.vision.visit_parameters(f)?;
        let prefix = self.prefix;
        self.language_model.visit_parameters(&mut |key, tensor| f(&format!("{prefix}{key}"), tensor))
    }
}

/// Loads a language model that sees: any checkpoint whose architecture is one of [`VLM_ARCHITECTURES`].
///
/// # Errors
/// `Error::UnsupportedArchitecture` for another family, `Error::Config` for a field that is missing or senseless,
/// `Error::Checkpoint` for tensors that are missing or of another shape.
pub fn load_vlm(checkpoint: &Checkpoint, device: Device, kind: Kind) -> Result<Vlm> {
    load_vlm_at(checkpoint.config_json(), &checkpoint.loading(device, kind)).map_err(|e| match e {
        Error::Config(_)
        | Error::Vision(VisionError::Field { .. })
        | Error::UnsupportedArchitecture { .. } => e.in_file(&checkpoint.dir().join("config.json")),
        other => other,
    })
}

/// The name of the family: `architectures[0]`, or where that is missing (transformers 4.57 writes it into `text_config`
/// alone) by `model_type`.
///
/// # Errors
/// `Error::Config` when neither is there.
pub fn vlm_architecture(json: &Map<String, Value>) -> Result<&str> {
    const TYPES: [&str; 6] =
        ["llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "internvl_chat", "llava_qwen"];
    if let Some(named) = json.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str) {
        return Ok(named);
    }
    let model_type = json
        .get("model_type")
        .and_then(Value::as_str)
        .ok_or_else(|| Error::Config("`architectures` is missing or empty, and so is `model_type`".into()))?;
    let known = TYPES.iter().position(|t| *t == model_type);
    Ok(known.map_or(model_type, |family| VLM_ARCHITECTURES[family]))
}

/// Loads a model of which the configuration is known from the root of its tensors, and warns of tensors that nobody
/// asked for.
///
/// # Errors
/// As [`load_vlm`].
pub fn load_vlm_at(json: &Map<String, Value>, root: &TensorPath) -> Result<Vlm> {
    refuse_quantized(json)?;
    let model = match vlm_architecture(json)? {
        "LlavaForConditionalGeneration" => llava::load(json, root)?,
        "LlavaOnevisionForConditionalGeneration" | "LlavaQwenForCausalLM" => {
            llava_onevision::load(json, root)?
        }
        "Qwen2VLForConditionalGeneration" => qwen2_vl::load(json, root)?,
        "Qwen2_5_VLForConditionalGeneration" => qwen2_5_vl::load(json, root)?,
        "InternVLChatModel" => internvl2::load(json, root)?,
        other => {
            let known = VLM_ARCHITECTURES.join(", ");
            return Err(Error::UnsupportedArchitecture { found: other.to_owned(), known });
        }
    };
    super::report_unread(root);
    Ok(model)
}

/// The language model of a `text_config` (or `llm_config`) without `architectures`: by its `model_type`. Whether the head
/// is tied is said there or at the top.
pub(super) fn text_config(
    json: &Map<String, Value>,
    field: &'static str,
    default_type: &str,
) -> Result<DecoderConfig> {
    let mut text = crate::vision::object(json, field)?.clone();
    if !text.contains_key("tie_word_embeddings")
        && let Some(tied) = json.get("tie_word_embeddings")
    {
        text.insert("tie_word_embeddings".into(), tied.clone());
    }
    let model_type = text.get("model_type").and_then(Value::as_str).unwrap_or(default_type).to_owned();
    super::config_of_type(&model_type, &text).map_err(|e| match e {
        Error::Config(reason) => Error::Config(format!("`{field}`: {reason}")),
        other => other,
    })
}

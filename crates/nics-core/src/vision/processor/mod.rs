//! How each family makes pixels of images and videos: a file a family.

mod clip;
mod internvl;
mod onevision;
mod qwen;

use serde_json::{Map, Value};

pub use clip::ClipProcessor;
pub use internvl::InternVlProcessor;
pub use onevision::OneVisionProcessor;
pub use qwen::{QwenProcessor, patches, smart_resize, video_range};

use super::{Media, MediaPrompt, Placeholders, Prepared, PreprocessorConfig};
use crate::checkpoint::Checkpoint;
use crate::models::{VLM_ARCHITECTURES, vlm_architecture};
use crate::{Error, Result};

/// Prepares what a checkpoint's model is to see, and its place in a prompt.
#[derive(Debug)]
pub enum Processor {
    /// LLaVA-1.5.
    Clip(ClipProcessor),
    /// LLaVA-OneVision.
    OneVision(OneVisionProcessor),
    /// Qwen2-VL and Qwen2.5-VL.
    Qwen(QwenProcessor),
    /// InternVL2.
    InternVl(InternVlProcessor),
}

impl Processor {
    /// The processor of a checkpoint, from its config.json and preprocessor_config.json.
    ///
    /// # Errors
    /// `Error::UnsupportedArchitecture` for a family that is not one of [`VLM_ARCHITECTURES`]; a field that is missing
    /// or senseless.
    pub fn open(checkpoint: &Checkpoint) -> Result<Self> {
        let json = checkpoint.config_json();
        let preprocessor = PreprocessorConfig::open(checkpoint)?;
        if vlm_architecture(json)? == "InternVLChatModel" {
            let context = added_token(checkpoint, internvl::CONTEXT)?;
            return Ok(Self::InternVl(InternVlProcessor::new(json, &preprocessor, context)?));
        }
        Self::new(json, &preprocessor)
    }

    /// The processor of a config.json and a preprocessor_config.json.
    ///
    /// # Errors
    /// As [`open`](Self::open); InternVL2, whose tokenizer alone knows what stands for an image.
    pub fn new(json: &Map<String, Value>, preprocessor: &PreprocessorConfig) -> Result<Self> {
        let processor = match vlm_architecture(json)? {
            "LlavaForConditionalGeneration" => Self::Clip(ClipProcessor::new(json, preprocessor)?),
            "LlavaOnevisionForConditionalGeneration" | "LlavaQwenForCausalLM" => {
                Self::OneVision(OneVisionProcessor::new(json, preprocessor)?)
            }
            family @ ("Qwen2VLForConditionalGeneration" | "Qwen2_5_VLForConditionalGeneration") => {
                let newer = family.starts_with("Qwen2_5");
                Self::Qwen(QwenProcessor::new(json, preprocessor, newer)?)
            }
            "InternVLChatModel" => {
                let reason = "InternVLChatModel needs its tokenizer: open the whole checkpoint";
                return Err(Error::Config(reason.into()));
            }
            other => {
                return Err(Error::UnsupportedArchitecture {
                    found: other.to_owned(),
                    known: VLM_ARCHITECTURES.join(", "),
                });
            }
        };
        Ok(processor)
    }

    /// The same with at most so many tiles of an image, where images are cut into tiles of one size (InternVL2).
    #[must_use]
    pub fn with_most_tiles(self, most: u32) -> Self {
        match self {
            Self::InternVl(p) => Self::InternVl(p.with_most_tiles(most)),
            other => other,
        }
    }

    /// Prepares everything that one prompt shows, in its order.
    ///
    /// # Errors
    /// Media without a pixel, of a kind or shape that the model does not see.
    pub fn prepare(&self, media: &[Media]) -> Result<Vec<Prepared>> {
        match self {
            Self::Clip(p) => media.iter().map(|m| p.prepare(m)).collect(),
            Self::OneVision(p) => p.prepare(media),
            Self::Qwen(p) => media.iter().map(|m| p.prepare(m)).collect(),
            Self::InternVl(p) => media.iter().map(|m| p.prepare(m)).collect(),
        }
    }

    /// The ids that stand for images and videos.
    pub fn placeholders(&self) -> Placeholders {
        match self {
            Self::Clip(p) => p.placeholders,
            Self::OneVision(p) => p.placeholders,
            Self::Qwen(p) => p.placeholders,
            Self::InternVl(p) => p.placeholders,
        }
    }

    /// Prepares media and puts them into the prompt `ids`, which has a placeholder for each
    /// ([`Placeholders::expand`]).
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare) and [`Placeholders::expand`].
    pub fn prompt(&self, ids: &[u32], media: &[Media]) -> Result<MediaPrompt> {
        Ok(self.placeholders().expand(ids, self.prepare(media)?)?)
    }
}

/// The id of a token that was added to a checkpoint's vocabulary, from whichever file lists it.
fn added_token(checkpoint: &Checkpoint, token: &'static str) -> Result<u32> {
    for file in ["tokenizer_config.json", "added_tokens.json", "tokenizer.json"] {
        let Some(path) = checkpoint.try_file(file)? else { continue };
        let json = crate::checkpoint::read_object(&path, "the tokenizer's settings", MAX_TOKENIZER)?;
        let listed = match file {
            "added_tokens.json" => json.get(token).and_then(Value::as_u64),
            "tokenizer.json" => json
                .get("added_tokens")
                .and_then(Value::as_array)
                .and_then(|all| all.iter().find(|t| t["content"] == token).and_then(|t| t["id"].as_u64())),
            _ => json.get("added_tokens_decoder").and_then(Value::as_object).and_then(|all| {
                all.iter().find(|(_, t)| t["content"] == token).and_then(|(id, _)| id.parse().ok())
            }),
        };
        if let Some(id) = listed.and_then(|id| u32::try_from(id).ok()) {
            return Ok(id);
        }
    }
    Err(Error::Config(format!("the tokenizer of {} has no token {token}", checkpoint.dir().display())))
}

/// Longest tokenizer file that is searched.
const MAX_TOKENIZER: u64 = 64 << 20;

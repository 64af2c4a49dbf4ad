//! A conversation about images as a model reads it: its chat template, with a place for each image.

use nics_core::checkpoint::Checkpoint;
use nics_core::template::{ChatTemplate, Content, Message, RenderOptions};
use nics_core::tokenizer::Tokenizer;
use nics_core::vision::Processor;
use serde_json::json;

use crate::data::captions::{Speaker, Turn};
use crate::language::Language;
use crate::{Error, Result};

/// Stands for an image in caption data.
const IMAGE: &str = "<image>";

/// What a model reads conversations with.
pub struct Prompter {
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template.
    pub template: ChatTemplate,
    /// How it sees; `None` for a model of text alone.
    pub processor: Option<Processor>,
}

impl Prompter {
    /// Of a checkpoint.
    ///
    /// # Errors
    /// A tokenizer, template or processor that is missing or damaged.
    pub fn open(checkpoint: &Checkpoint) -> Result<Self> {
        let template = ChatTemplate::from_checkpoint(checkpoint).map_err(nics_core::Error::from)?;
        let template = template.ok_or_else(|| {
            Error::Input(format!("{} has no chat template: conversations need one", checkpoint.name()))
        })?;
        Ok(Self {
            tokenizer: Tokenizer::from_checkpoint(checkpoint).map_err(nics_core::Error::from)?,
            template,
            processor: if Language::sees(checkpoint) { Some(Processor::open(checkpoint)?) } else { None },
        })
    }

    /// The id that stands for an image.
    pub fn placeholder(&self) -> Option<u32> {
        self.processor.as_ref().map(|p| p.placeholders().image)
    }

    /// The ids of one question about so many images, up to where the reply begins; each image has one placeholder.
    ///
    /// # Errors
    /// Images for a model that does not see, or a template that has no place for them.
    pub fn question(&self, text: &str, images: usize) -> Result<Vec<u32>> {
        let turn = Turn { from: Speaker::Human, value: text.to_owned() };
        let ids = self.encoded(&self.conversation(&[turn], images)?, true)?;
        self.check(&ids, images)?;
        Ok(ids)
    }

    /// # Errors
    /// Another number of placeholders than of images.
    pub(crate) fn check(&self, ids: &[u32], images: usize) -> Result<()> {
        let placeholder = self.placeholder();
        let found = ids.iter().filter(|id| Some(**id) == placeholder).count();
        if found == images {
            return Ok(());
        }
        Err(Error::Input(format!(
            "its text has {found} places for {images} images; the chat template is not one of a model that sees"
        )))
    }

    /// A conversation as the template takes it. Images come first in the first turn of the one who asks.
    pub(crate) fn conversation(&self, turns: &[Turn], images: usize) -> Result<Vec<Message>> {
        if images > 0 && self.processor.is_none() {
            return Err(Error::Input("it shows an image, but the model does not see".into()));
        }
        let parts = self.messages(turns, images, true);
        let fits = || -> Result<bool> {
            let Some(placeholder) = self.placeholder().filter(|_| images > 0) else { return Ok(true) };
            Ok(self.encoded(&parts, false)?.iter().filter(|id| **id == placeholder).count() == images)
        };
        // Templates of older checkpoints know texts alone.
        Ok(match fits() {
            Ok(true) => parts,
            _ => self.messages(turns, images, false),
        })
    }

    /// The ids of a conversation.
    pub(crate) fn encoded(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Vec<u32>> {
        let options = RenderOptions { add_generation_prompt, ..RenderOptions::default() };
        let text = self.template.render(messages, &options).map_err(nics_core::Error::from)?;
        Ok(self.tokenizer.encode(&text, false).map_err(nics_core::Error::from)?)
    }

    fn messages(&self, turns: &[Turn], mut images: usize, as_parts: bool) -> Vec<Message> {
        let marker = match self.processor {
            Some(Processor::Qwen(_)) => "<|vision_start|><|image_pad|><|vision_end|>",
            Some(Processor::InternVl(_)) => "<img><IMG_CONTEXT></img>\n",
            _ => "<image>\n",
        };
        let turn = |turn: &Turn| {
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
        turns.iter().map(turn).collect()
    }
}

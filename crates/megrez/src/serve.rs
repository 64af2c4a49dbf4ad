//! Megrez behind OpenAI's API: the [`Frontend`] of the server in [`nics_core::server`].

use nics_core::checkpoint::Checkpoint;
use nics_core::server::{Frontend, ModelCard, ToolFormat};
use nics_core::template::Message;
use nics_core::tokenizer::Tokenizer;
use nics_core::{Error, Result};
use serde_json::{Map, Value};

use crate::model::{Replies, decoder_config};
use crate::prompt::Prompter;
use crate::prompts::Prompts;
use crate::tools::{self, FUNCTION_END, FUNCTION_START};

/// Turns requests into Megrez's turns. Special tokens in what users write are plain text; tools are announced in the
/// system turn (see [`tools`]).
pub struct MegrezFrontend {
    card: ModelCard,
    prompter: Prompter,
    sentence: String,
}

impl MegrezFrontend {
    /// The front end of a checkpoint under the name `id`, limited to `context` tokens when given. Reads no weights.
    ///
    /// # Errors
    /// What is wrong with the checkpoint, or a `context` beyond the model's own.
    pub fn open(
        checkpoint: &Checkpoint,
        id: &str,
        context: Option<usize>,
        prompts: &Prompts,
    ) -> Result<Self> {
        let config = decoder_config(checkpoint)?;
        let prompter = Prompter::from_checkpoint(checkpoint)?;
        let Replies { eos, sampling, max_new_tokens } = Replies::read(checkpoint, &prompter)?;
        let context = match context {
            Some(asked) if asked > config.context || asked < 2 => {
                return Err(Error::Input(format!(
                    "a context of {asked} tokens: expected 2 to {}, the model's own",
                    config.context
                )));
            }
            asked => asked.unwrap_or(config.context),
        };
        let mark = |token| prompter.tokenizer.token_id(token);
        let tools = mark(FUNCTION_START).zip(mark(FUNCTION_END));
        let card = ModelCard {
            id: id.to_owned(),
            owner: "megrez".into(),
            context,
            vocab: config.vocab as usize,
            sampling,
            max_new_tokens,
            eos,
            tools: tools.map(|(start, end)| ToolFormat { start, end }),
        };
        Ok(Self { card, prompter, sentence: prompts.functions.clone() })
    }
}

impl Frontend for MegrezFrontend {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn tokenizer(&self) -> &Tokenizer {
        &self.prompter.tokenizer
    }

    fn chat(
        &self,
        messages: &[Message],
        tools: Option<&[Value]>,
        settings: &Map<String, Value>,
    ) -> Result<Vec<u32>> {
        tools::encode(&self.prompter, &self.sentence, messages, tools.unwrap_or_default(), settings)
    }
}

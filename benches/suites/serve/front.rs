//! A front end over a vocabulary that is made up: byte-level, and as large as the model's, so that turning tokens into text
//! costs what it does with a real one.

use anyhow::Result;
use nics_core::models::ModelDims;
use nics_core::sampling::Sampling;
use nics_core::server::{Frontend, ModelCard};
use nics_core::template::Message;
use nics_core::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};

/// The name of the model.
pub const MODEL: &str = "random";

/// The front end.
pub struct Front {
    card: ModelCard,
    tokenizer: Tokenizer,
}

impl Front {
    /// For a model of these dimensions.
    pub fn new(dims: &ModelDims) -> Result<Self> {
        let mut vocab: Map<String, Value> =
            byte_characters().into_iter().enumerate().map(|(id, c)| (c.to_string(), id.into())).collect();
        for id in vocab.len() as i64..dims.vocab {
            // A blank in front, as most tokens have it.
            vocab.insert(format!("Ġw{id}"), id.into());
        }
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []
            }
        });
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), tokenizer.to_string())?;
        let tokenizer = Tokenizer::from_file(file.path())?;
        let card = ModelCard {
            id: MODEL.into(),
            owner: "benches".into(),
            context: dims.context,
            vocab: dims.vocab as usize,
            sampling: Sampling::default(),
            max_new_tokens: 16,
            eos: Vec::new(),
            tools: None,
        };
        Ok(Self { card, tokenizer })
    }

    /// The text of a reply.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        Ok(self.tokenizer.decode(ids, true)?)
    }
}

impl Frontend for Front {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    fn chat(
        &self,
        _: &[Message],
        _: Option<&[Value]>,
        _: &Map<String, Value>,
    ) -> nics_core::Result<Vec<u32>> {
        Err(nics_core::Error::input("this server has no chat template: use /v1/completions"))
    }
}

/// The character by which byte-level vocabularies write each byte: itself where it is visible, else one from U+0100 on.
fn byte_characters() -> Vec<char> {
    let visible = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut hidden = 0x100;
    (0..256u32)
        .filter_map(|b| {
            let code = if visible(b) { b } else { hidden };
            hidden += u32::from(!visible(b));
            char::from_u32(code)
        })
        .collect()
}

//! `tokenizer_config.json` and `special_tokens_map.json`: which token has which role.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Map, Value};

use super::TokenizerError;
use crate::checkpoint::{Checkpoint, MAX_CONFIG, read_object};

/// The roles that transformers knows and hands to templates.
const ROLES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Special tokens by role, e.g. `eos_token`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    roles: BTreeMap<String, String>,
    additional: Vec<String>,
}

impl SpecialTokens {
    /// The token of a role, e.g. `pad_token`.
    pub fn get(&self, role: &str) -> Option<&str> {
        self.roles.get(role).map(String::as_str)
    }

    /// Begin of sequence.
    pub fn bos(&self) -> Option<&str> {
        self.get("bos_token")
    }

    /// End of sequence.
    pub fn eos(&self) -> Option<&str> {
        self.get("eos_token")
    }

    /// All roles that are set, with their tokens.
    pub fn roles(&self) -> impl Iterator<Item = (&str, &str)> {
        self.roles.iter().map(|(role, token)| (role.as_str(), token.as_str()))
    }

    /// `additional_special_tokens`.
    pub fn additional(&self) -> &[String] {
        &self.additional
    }

    /// Sets the token of a role.
    #[must_use]
    pub fn with(mut self, role: &str, token: &str) -> Self {
        self.roles.insert(role.to_owned(), token.to_owned());
        self
    }
}

/// What lies beside a tokenizer.
pub(crate) struct Settings {
    path: PathBuf,
    pub config: Map<String, Value>,
}

/// Reads `tokenizer_config.json`, filled up from `special_tokens_map.json` where roles are missing.
pub(crate) fn read_settings(checkpoint: &Checkpoint) -> Result<Settings, TokenizerError> {
    let read = |name: &str| -> Result<Map<String, Value>, TokenizerError> {
        let path = checkpoint.try_file(name)?;
        path.map_or_else(
            || Ok(Map::new()),
            |path| Ok(read_object(&path, "the tokenizer's settings", MAX_CONFIG)?),
        )
    };
    let mut config = read("tokenizer_config.json")?;
    for (role, token) in read("special_tokens_map.json")? {
        if !config.contains_key(&role) {
            config.insert(role, token);
        }
    }
    Ok(Settings { path: checkpoint.dir().join("tokenizer_config.json"), config })
}

impl Settings {
    /// Tokens by role; each is a string or an object with `content`.
    pub fn special_tokens(&self) -> Result<SpecialTokens, TokenizerError> {
        let mut tokens = SpecialTokens::default();
        for role in ROLES {
            if let Some(value) = self.config.get(role).filter(|v| !v.is_null()) {
                let token = content(value).ok_or_else(|| self.bad(role, value))?;
                tokens.roles.insert(role.to_owned(), token.to_owned());
            }
        }
        // Newer releases may store a map from names to tokens here.
        match self.config.get("additional_special_tokens") {
            Some(Value::Array(list)) => {
                tokens.additional = list.iter().filter_map(content).map(str::to_owned).collect();
            }
            Some(Value::Object(map)) => {
                tokens.additional = map.values().filter_map(content).map(str::to_owned).collect();
            }
            _ => {}
        }
        Ok(tokens)
    }

    /// `(add_bos_token, add_eos_token)` for the classes that rule by these instead of by a post-processor.
    pub fn around(&self) -> Option<(bool, bool)> {
        let class = self.config.get("tokenizer_class").and_then(Value::as_str)?;
        let class = class.strip_suffix("Fast").unwrap_or(class);
        let flag = |name, default| self.config.get(name).and_then(Value::as_bool).unwrap_or(default);
        matches!(class, "LlamaTokenizer" | "CodeLlamaTokenizer" | "GemmaTokenizer")
            .then(|| (flag("add_bos_token", true), flag("add_eos_token", false)))
    }

    /// The error for a setting of the wrong form.
    fn bad(&self, field: &str, found: &Value) -> TokenizerError {
        TokenizerError::BadSetting {
            path: self.path.clone(),
            field: field.to_owned(),
            found: found.to_string(),
            expected: "a string, or an object with the string `content`",
        }
    }
}

/// The text of a token: a string, or an `AddedToken` object.
fn content(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// One id or a list of ids.
pub(super) fn id_list(value: &Value) -> Option<Vec<u32>> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(list) => list.iter().map(id).collect(),
        one => Some(vec![id(one)?]),
    }
}

//! Caption data: a JSON list, or one object a line, of images with a conversation about them.
//!
//! ```json
//! {"id": "1", "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"},
//!                                                       {"from": "gpt", "value": "A dog."}]}
//! ```
//!
//! `image` is a path, a list of paths, or missing for text alone. What is wrong is named with its line.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::{Error, Result};

/// Longest file that is read.
const MAX_BYTES: u64 = 4 << 30;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Speaker {
    /// The one who asks.
    #[serde(alias = "user")]
    Human,
    /// The model.
    #[serde(alias = "assistant")]
    Gpt,
    /// Instructions.
    System,
}

impl Serialize for Caption {
    /// As it is read: `image` is a path, a list of several, or missing.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        use serde::ser::SerializeMap;
        let mut map = serializer.serialize_map(None)?;
        if let Some(id) = &self.id {
            map.serialize_entry("id", id)?;
        }
        match self.images.as_slice() {
            [] => {}
            [one] => map.serialize_entry("image", one)?,
            several => map.serialize_entry("image", several)?,
        }
        map.serialize_entry("conversations", &self.conversations)?;
        map.end()
    }
}

/// What somebody says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// Who.
    pub from: Speaker,
    /// What; `<image>` stands for an image.
    pub value: String,
}

/// One item of caption data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caption {
    /// Its name in the file.
    pub id: Option<String>,
    /// Paths of its images.
    pub images: Vec<String>,
    /// The conversation.
    pub conversations: Vec<Turn>,
    /// The line of the file where it begins, from 1.
    pub line: usize,
}

#[derive(Deserialize)]
struct Raw {
    id: Option<Value>,
    image: Option<Images>,
    conversations: Vec<Turn>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Images {
    One(String),
    Many(Vec<String>),
}

impl Caption {
    fn parse(path: &Path, line: usize, json: &str) -> Result<Self> {
        let wrong = |reason: String| Error::DataItemInvalid { path: path.to_owned(), line, reason };
        let raw: Raw = serde_json::from_str(json).map_err(|e| {
            // Within the item serde counts lines from its beginning.
            let line = line + e.line().saturating_sub(1);
            let text = e.to_string();
            let reason = text.split(" at line ").next().unwrap_or_default().to_owned();
            Error::DataItemInvalid { path: path.to_owned(), line, reason }
        })?;
        let images = match raw.image {
            None => Vec::new(),
            Some(Images::One(image)) => vec![image],
            Some(Images::Many(images)) => images,
        };
        if images.iter().any(String::is_empty) {
            return Err(wrong("an image without a path".into()));
        }
        if !raw.conversations.iter().any(|t| t.from == Speaker::Gpt && !t.value.trim().is_empty()) {
            return Err(wrong(
                "its conversation has no turn of `gpt`, so that there is nothing to predict".into(),
            ));
        }
        let id = match raw.id {
            None | Some(Value::Null) => None,
            Some(Value::String(id)) => Some(id),
            Some(Value::Number(id)) => Some(id.to_string()),
            Some(other) => return Err(wrong(format!("`id` is {other}, expected a string or a number"))),
        };
        Ok(Self { id, images, conversations: raw.conversations, line })
    }
}

/// Reads caption data, JSON Lines or a JSON list by what the file begins with.
///
/// # Errors
/// [`Error::DataItemInvalid`] for the first item that is wrong, [`Error::NoData`] for a file without one.
pub fn read(path: &Path) -> Result<Vec<Caption>> {
    each(path)?.into_iter().collect()
}

/// [`read`], with what is wrong item by item: for those who can leave some out.
///
/// # Errors
/// A file that cannot be read, that is no JSON, or that has no item.
pub fn each(path: &Path) -> Result<Vec<Result<Caption>>> {
    let text = text(path)?;
    let items = if text.trim_start().starts_with('[') { list(path, &text)? } else { lines(path, &text) };
    if items.is_empty() {
        return Err(Error::NoData(format!("{} has no item", path.display())));
    }
    Ok(items)
}

/// The text of a data file.
pub(super) fn text(path: &Path) -> Result<String> {
    let io = |source| nics_base::Error::Io { action: "read", path: path.to_owned(), source };
    let len = std::fs::metadata(path).map_err(io)?.len();
    if len > MAX_BYTES {
        let reason = format!("{len} bytes, expected at most {MAX_BYTES}; take a part of it");
        return Err(Error::Artefact { path: path.to_owned(), reason });
    }
    Ok(std::fs::read_to_string(path).map_err(io)?)
}

fn lines(path: &Path, text: &str) -> Vec<Result<Caption>> {
    let filled = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    filled.map(|(n, line)| Caption::parse(path, n + 1, line)).collect()
}

fn list(path: &Path, text: &str) -> Result<Vec<Result<Caption>>> {
    let raw: Vec<&RawValue> = serde_json::from_str(text).map_err(|e| Error::DataItemInvalid {
        path: path.to_owned(),
        line: e.line(),
        reason: e.to_string().split(" at line ").next().unwrap_or_default().to_owned(),
    })?;
    let (mut line, mut at) = (1, 0);
    let mut items = Vec::with_capacity(raw.len());
    for item in raw {
        // The items are slices of the text, in its order.
        let begins = item.get().as_ptr() as usize - text.as_ptr() as usize;
        line += text[at..begins].matches('\n').count();
        at = begins;
        items.push(Caption::parse(path, line, item.get()));
    }
    Ok(items)
}

impl Caption {
    /// Whether an image's path contains `part`, e.g. `coco`.
    pub fn shows_image_of(&self, part: &str) -> bool {
        self.images.iter().any(|i| i.contains(part))
    }
}

/// Items of which an image's path contains `part`.
pub fn with_images_of(items: Vec<Caption>, part: &str) -> Vec<Caption> {
    items.into_iter().filter(|c| c.shows_image_of(part)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Vec<Caption>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.json");
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    const GOOD: &str = r#"{"id": 7, "image": ["a.jpg", "b.jpg"], "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}"#;

    #[test]
    fn lists_and_lines_read_alike() {
        let lines = of(&format!("{GOOD}\n\n{GOOD}\n")).unwrap();
        let list = of(&format!("[\n{GOOD},\n\n{GOOD}]")).unwrap();
        assert_eq!(lines.iter().map(|c| c.line).collect::<Vec<_>>(), [1, 3]);
        assert_eq!(list.iter().map(|c| c.line).collect::<Vec<_>>(), [2, 4]);
        assert_eq!((lines[0].images.len(), lines[0].id.as_deref()), (2, Some("7")));
        assert_eq!(with_images_of(list, "b.").len(), 2);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let error = |text: String| of(&text).unwrap_err().to_string();
        assert!(error(format!("{GOOD}\n{{\"image\": 3}}")).contains("line 2"));
        assert!(error(format!("{GOOD}\n{{\"image\": \"a\"}}")).contains("conversations"));
        let silent = GOOD.replace("\"!\"", "\" \"");
        assert!(error(format!("[{GOOD},\n\n{silent}]")).contains("line 3: its conversation has no turn"));
        assert!(error("[{\"image\": ".into()).contains("line 1"));
        assert!(error(String::new()).contains("no item"));
    }
}

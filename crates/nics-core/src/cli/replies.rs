//! The file in which a command keeps its replies, and goes on.

use std::collections::HashSet;
use std::path::Path;

use nics_base::hash;
use nics_base::jsonl::JsonlLog;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// What is there already and what is missing.
#[derive(Debug)]
pub struct Replies<R> {
    /// Where replies are appended; `None` without a file.
    pub log: Option<JsonlLog<R>>,
    /// Prompts that have a reply.
    pub done: usize,
    /// Those that have none, ascending.
    pub todo: Vec<usize>,
}

impl<R: Serialize + DeserializeOwned> Replies<R> {
    /// Opens `out`, if there is one. `of` tells to which prompt a reply is: its place, and the [hash](hash::tokens) of its ids.
    ///
    /// # Errors
    /// [`Error::Input`] for a reply to another prompt; a file that cannot be read or written.
    pub fn open(out: Option<&Path>, prompts: &[Vec<u32>], of: impl Fn(&R) -> (usize, &str)) -> Result<Self> {
        let mut done = HashSet::new();
        let mut log = None;
        if let Some(path) = out {
            let (opened, known) = JsonlLog::<R>::open(path)?;
            for reply in &known {
                let (index, prompt_hash) = of(reply);
                if prompts.get(index).is_none_or(|p| hash::tokens(p) != prompt_hash) {
                    return Err(Error::Input(format!(
                        "{} holds a reply to another prompt (index {index}): give another --out, or delete it",
                        path.display()
                    )));
                }
                done.insert(index);
            }
            log = Some(opened);
        }
        let todo = (0..prompts.len()).filter(|i| !done.contains(i)).collect();
        Ok(Self { log, done: done.len(), todo })
    }
}

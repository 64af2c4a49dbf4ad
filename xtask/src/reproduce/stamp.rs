//! What is known about a step: on what it ran, how far it got, and what came out.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Result;
use nics_base::{artefact, hash};
use serde::{Deserialize, Serialize};

/// The stamp beside a step's folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stamp {
    /// Hash of everything that the step depends on.
    pub key: String,
    /// Shards that are done, while the step is not.
    #[serde(default)]
    pub shards: Vec<usize>,
    /// Content hashes of the outputs by name; there when the step is done.
    pub outputs: Option<BTreeMap<String, String>>,
}

impl Stamp {
    /// The stamp at `path`; one that is missing or unreadable is no stamp.
    pub fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    /// Writes it, atomically.
    pub fn write(&self, path: &Path) -> Result<()> {
        Ok(artefact::write_atomic(path, serde_json::to_vec_pretty(self)?)?)
    }

    /// True when the step is done for `key` and its outputs are still what they were.
    pub fn is_fresh(&self, key: &str, dir: &Path) -> bool {
        let Some(outputs) = &self.outputs else { return false };
        self.key == key
            && outputs.iter().all(|(name, known)| hash::path(dir.join(name)).is_ok_and(|now| &now == known))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_output_or_key_is_stale() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("rows"), "1").unwrap();
        let outputs = BTreeMap::from([("rows".to_owned(), hash::bytes("1"))]);
        let stamp = Stamp { key: "k".into(), shards: vec![], outputs: Some(outputs) };
        let path = dir.path().join("stamp.json");
        stamp.write(&path).unwrap();
        let stamp = Stamp::read(&path).unwrap();
        assert!(stamp.is_fresh("k", dir.path()));
        assert!(!stamp.is_fresh("other", dir.path()));
        fs::write(dir.path().join("rows"), "2").unwrap();
        assert!(!stamp.is_fresh("k", dir.path()));
        fs::write(&path, "{ half").unwrap();
        assert_eq!(Stamp::read(&path), None);
    }
}

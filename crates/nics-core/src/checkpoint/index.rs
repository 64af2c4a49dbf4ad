//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::HashMap;
use std::fmt;
use std::path::{Component, Path};

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::CheckpointError;
use super::files::read_bounded;
use super::header::printable;

/// Longest index that is read; the largest published ones take 9 MB.
const MAX_INDEX: u64 = 16 << 20;

/// The parsed index.
pub(super) struct Index {
    /// Shard names in the order of their first mention.
    pub shards: Vec<String>,
    /// Tensor names, sorted, each with the position of its shard.
    pub keys: Vec<(String, usize)>,
}

impl Index {
    /// Reads and validates the index at `path`; the shards themselves are not looked at.
    pub fn read(path: &Path) -> Result<Self, CheckpointError> {
        let bytes = read_bounded(path, "the index", MAX_INDEX)?;
        let File { weight_map: WeightMap { shards, mut keys } } = serde_json::from_slice(&bytes)
            .map_err(|e| CheckpointError::InvalidJson { path: path.to_owned(), detail: e.to_string() })?;
        for (at, shard) in shards.iter().enumerate() {
            if !is_plain(shard) {
                let key = keys.iter().find(|(_, s)| *s == at).map_or("", |(key, _)| key);
                return Err(CheckpointError::ShardPath {
                    index: path.to_owned(),
                    shard: printable(shard),
                    key: printable(key),
                });
            }
        }
        keys.sort();
        if let Some(pair) = keys.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(CheckpointError::DuplicateKey { path: path.to_owned(), key: printable(&pair[0].0) });
        }
        Ok(Self { shards, keys })
    }

    /// A tensor that the index puts into shard number `shard`.
    pub fn example(&self, shard: usize) -> &str {
        self.keys.iter().find(|(_, s)| *s == shard).map_or("", |(key, _)| key)
    }
}

/// Whether `name` stays inside the folder that it is joined to.
pub(super) fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && !name.contains(['\\', '\0'])
        && Path::new(name).components().all(|c| matches!(c, Component::Normal(_)))
}

#[derive(Deserialize)]
struct File {
    weight_map: WeightMap,
}

struct WeightMap {
    shards: Vec<String>,
    keys: Vec<(String, usize)>,
}

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object from tensor names to shard names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut seen: HashMap<String, usize> = HashMap::new();
                let mut out = WeightMap { shards: Vec::new(), keys: Vec::new() };
                while let Some((key, shard)) = map.next_entry::<String, String>()? {
                    let at = if let Some(&at) = seen.get(&shard) {
                        at
                    } else {
                        seen.insert(shard.clone(), out.shards.len());
                        out.shards.push(shard);
                        out.shards.len() - 1
                    };
                    out.keys.push((key, at));
                }
                Ok(out)
            }
        }
        d.deserialize_map(Pairs)
    }
}

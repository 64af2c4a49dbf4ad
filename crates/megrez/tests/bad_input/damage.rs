//! Ways to damage the files of a checkpoint.

use std::path::Path;

use serde_json::{Map, Value, json};

/// The name of the weights.
pub const WEIGHTS: &str = "model.safetensors";

/// Changes the bytes of a file.
pub fn bytes(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut all = std::fs::read(path).unwrap();
    change(&mut all);
    std::fs::write(path, all).unwrap();
}

/// Changes the header of a safetensors file and leaves its data.
pub fn header(path: &Path, change: impl FnOnce(&mut Map<String, Value>)) {
    bytes(path, |all| {
        let (mut header, data) = parts(all);
        change(&mut header);
        let text = Value::Object(header).to_string();
        *all = [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &data].concat();
    });
}

/// Header and data of a safetensors file.
fn parts(all: &[u8]) -> (Map<String, Value>, Vec<u8>) {
    let len = u64::from_le_bytes(all[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&all[8..8 + len]).unwrap(), all[8 + len..].to_vec())
}

/// Makes the checkpoint in `dir` one of two shards of which the first holds every tensor, with an index that `change`
/// may change: tensor to shard.
pub fn shards(dir: &Path, change: impl FnOnce(&mut Map<String, Value>)) {
    let (header, _) = parts(&std::fs::read(dir.join(WEIGHTS)).unwrap());
    let shard = "model-00001-of-00002.safetensors";
    std::fs::rename(dir.join(WEIGHTS), dir.join(shard)).unwrap();
    let mut map: Map<String, Value> =
        header.keys().filter(|k| *k != "__metadata__").map(|k| (k.clone(), shard.into())).collect();
    change(&mut map);
    let index = json!({ "metadata": {}, "weight_map": map });
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

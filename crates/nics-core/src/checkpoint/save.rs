//! Writing a checkpoint that transformers loads.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};
use std::path::Path;

use nics_base::artefact::{AtomicDir, AtomicFile, write_atomic};
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::CheckpointError;
use super::files::open_regular;
use super::header::MAX_HEADER;

/// The shard size of transformers' `save_pretrained`.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

/// A tensor to write, with its place in a shard.
struct Item {
    name: String,
    tensor: Tensor,
    dtype: Dtype,
    bytes: u64,
}

/// Writes tensors and configuration into `dir` in the Hugging Face layout.
///
/// One `model.safetensors` when everything fits `max_shard_bytes`, otherwise shards with their index; a tensor larger than
/// that has a shard for itself. Tensors may be views, on any device, and may share memory: each is written in full. A
/// folder that does not exist appears whole or not at all. In one that exists, files are replaced one by one, the
/// configuration last, weights of an older layout are removed, and other files (a tokenizer) stay.
pub fn save(
    dir: &Path,
    tensors: impl IntoIterator<Item = (String, Tensor)>,
    config: &Value,
    max_shard_bytes: u64,
) -> Result<(), CheckpointError> {
    let refuse = |reason: String| CheckpointError::Unsavable { path: dir.to_owned(), reason };
    if !config.is_object() {
        return Err(refuse("the configuration is not a JSON object".to_owned()));
    }
    let items = items(dir, tensors)?;
    if items.is_empty() {
        return Err(refuse("there are no tensors".to_owned()));
    }
    if dir.symlink_metadata().is_ok() {
        return write_into(dir, items, config, max_shard_bytes);
    }
    let folder = AtomicDir::create(dir)?;
    write_into(folder.path(), items, config, max_shard_bytes)?;
    folder.commit()?;
    Ok(())
}

/// Writes tensors into one safetensors file that appears whole or not at all, with notes in its metadata; [`note`] reads
/// them. Equal tensors and notes give equal bytes.
///
/// # Errors
/// Names that are empty or doubled, a dtype that the format does not have, or a file that cannot be written.
pub fn save_file(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, Tensor)>,
    notes: &[(&str, &str)],
) -> Result<(), CheckpointError> {
    write_file(path, &items(path, tensors)?, notes)
}

/// A note in the metadata of a safetensors file, as [`save_file`] writes it; `None` when there is none of that name.
///
/// # Errors
/// A file that cannot be read, or is no safetensors file.
pub fn note(path: &Path, name: &str) -> Result<Option<String>, CheckpointError> {
    #[derive(Deserialize)]
    struct Header {
        #[serde(rename = "__metadata__")]
        notes: Option<HashMap<String, String>>,
    }
    let bad = |detail: String| CheckpointError::BadHeader { path: path.to_owned(), detail };
    let (mut file, len) = open_regular(path)?;
    let unreadable = |source| CheckpointError::Unreadable { path: path.to_owned(), source };
    let mut prefix = [0; 8];
    if len < 8 {
        return Err(bad(format!("its {len} bytes are no safetensors file")));
    }
    file.read_exact(&mut prefix).map_err(unreadable)?;
    let header_len = u64::from_le_bytes(prefix);
    if header_len > MAX_HEADER || header_len > len - 8 {
        return Err(bad(format!("its header of {header_len} bytes does not fit the file of {len}")));
    }
    let mut header = vec![0; header_len as usize];
    file.read_exact(&mut header).map_err(unreadable)?;
    let header: Header = serde_json::from_slice(&header).map_err(|e| bad(format!("its header: {e}")))?;
    Ok(header.notes.and_then(|mut notes| notes.remove(name)))
}

/// Tensors with what their place in a file is made from.
fn items(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, Tensor)>,
) -> Result<Vec<Item>, CheckpointError> {
    let refuse = |reason: String| CheckpointError::Unsavable { path: path.to_owned(), reason };
    let mut names = HashSet::new();
    let mut items = Vec::new();
    for (name, tensor) in tensors {
        if name.is_empty() || name == "__metadata__" || !names.insert(name.clone()) {
            return Err(refuse(format!("the tensor name {name:?} is empty, reserved or given twice")));
        }
        let kind = tensor.f_kind().map_err(|e| CheckpointError::torch(&name, &e))?;
        let Some(dtype) = dtype_of(kind) else {
            return Err(refuse(format!("tensor {name} has dtype {kind:?}, which safetensors cannot hold")));
        };
        let bytes = (tensor.numel() * kind.elt_size_in_bytes()) as u64;
        items.push(Item { name, tensor, dtype, bytes });
    }
    Ok(items)
}

fn write_into(
    dir: &Path,
    items: Vec<Item>,
    config: &Value,
    max_shard_bytes: u64,
) -> Result<(), CheckpointError> {
    let total: u64 = items.iter().map(|i| i.bytes).sum();
    let shards = split(items, max_shard_bytes);
    let mut written = HashSet::new();
    if let [only] = shards.as_slice() {
        write_file(&dir.join("model.safetensors"), only, &[])?;
        written.insert("model.safetensors".to_owned());
    } else {
        let mut weight_map = Map::new();
        for (at, shard) in shards.iter().enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", at + 1, shards.len());
            write_file(&dir.join(&name), shard, &[])?;
            weight_map.extend(shard.iter().map(|i| (i.name.clone(), Value::from(name.as_str()))));
            written.insert(name);
        }
        weight_map.sort_keys();
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_atomic(dir.join("model.safetensors.index.json"), format!("{index:#}\n"))?;
        written.insert("model.safetensors.index.json".to_owned());
    }
    remove_older(dir, &written)?;
    write_atomic(dir.join("config.json"), format!("{config:#}\n"))?;
    Ok(())
}

/// Greedy in the given order, as transformers does.
fn split(items: Vec<Item>, max_shard_bytes: u64) -> Vec<Vec<Item>> {
    let mut shards: Vec<Vec<Item>> = Vec::new();
    let mut size = 0;
    for item in items {
        match shards.last_mut() {
            Some(last) if size + item.bytes <= max_shard_bytes => {
                size += item.bytes;
                last.push(item);
            }
            _ => {
                size = item.bytes;
                shards.push(vec![item]);
            }
        }
    }
    shards
}

/// Weights of another layout would be read instead of what was just written.
fn remove_older(dir: &Path, written: &HashSet<String>) -> Result<(), CheckpointError> {
    let unreadable = |source| CheckpointError::Unreadable { path: dir.to_owned(), source };
    for entry in std::fs::read_dir(dir).map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name().to_string_lossy().into_owned();
        let is_shard = name.starts_with("model-") && name.contains("-of-") && name.ends_with(".safetensors");
        let is_weights = is_shard || name == "model.safetensors" || name == "model.safetensors.index.json";
        if is_weights && !written.contains(&name) {
            std::fs::remove_file(dir.join(&name)).map_err(|source| nics_base::Error::Io {
                action: "remove",
                path: dir.join(&name),
                source,
            })?;
        }
    }
    Ok(())
}

/// Writes one safetensors file: length, header padded with blanks to 8 bytes, data.
fn write_file(path: &Path, items: &[Item], notes: &[(&str, &str)]) -> Result<(), CheckpointError> {
    let mut items: Vec<&Item> = items.iter().collect();
    // Widest dtype first: with the padded header every element is aligned.
    items.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    let mut header = Map::new();
    let mut metadata = json!({"format": "pt"});
    for (name, note) in notes {
        metadata[*name] = Value::from(*note);
    }
    header.insert("__metadata__".to_owned(), metadata);
    let mut at = 0;
    for item in &items {
        let end = at + item.bytes;
        let entry =
            json!({"dtype": item.dtype.to_string(), "shape": item.tensor.size(), "data_offsets": [at, end]});
        header.insert(item.name.clone(), entry);
        at = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');

    let io = |source| nics_base::Error::Io { action: "write", path: path.to_owned(), source };
    let mut file = AtomicFile::create(path)?;
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
    file.write_all(&header).map_err(io)?;
    for item in items {
        let bytes = bytes_of(&item.tensor).map_err(|e| CheckpointError::torch(&item.name, &e))?;
        file.write_all(&bytes).map_err(io)?;
    }
    file.commit()?;
    Ok(())
}

/// The values in row-major order.
fn bytes_of(tensor: &Tensor) -> Result<Vec<u8>, tch::TchError> {
    let _guard = tch::no_grad_guard();
    let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
    let numel = tensor.numel();
    let mut bytes = vec![0; numel * tensor.f_kind()?.elt_size_in_bytes()];
    tensor.f_copy_data_u8(&mut bytes, numel)?;
    Ok(bytes)
}

fn dtype_of(kind: Kind) -> Option<Dtype> {
    Some(match kind {
        Kind::Uint8 => Dtype::U8,
        Kind::Int8 => Dtype::I8,
        Kind::Int16 => Dtype::I16,
        Kind::Int => Dtype::I32,
        Kind::Int64 => Dtype::I64,
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Float => Dtype::F32,
        Kind::Double => Dtype::F64,
        Kind::Bool => Dtype::BOOL,
        _ => return None,
    })
}

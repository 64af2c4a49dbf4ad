//! Files of `torch.save` (`.pt`, `.pth`, `.bin` since torch 1.6): a zip archive with a pickle and the bytes of its tensors.
//!
//! A pickle is a program, so nothing is run: what it may name and call is a short list, and everything that is not plain
//! values, containers and tensors is a [`Refusal`] that says what was asked for. Sizes are bounded before they are believed, so
//! that a small file cannot take much memory.

mod archive;
mod pickle;
mod refusal;
mod tree;

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use tch::{Kind, Tensor};

pub use refusal::Refusal;
pub use tree::{StorageKind, TensorRef, Tree};

use crate::{Error, Result};
use archive::Archive;

/// An open file.
#[derive(Debug)]
pub struct TorchFile {
    archive: Archive,
    value: Tree,
}

impl TorchFile {
    /// Opens a file and reads its value; the bytes of tensors are left where they are.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Refused`] for what is no such file, is damaged, or asks for more than values and tensors.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let refused = |refusal| Error::Refused { path: path.to_owned(), refusal };
        if !path.metadata().map_err(io)?.is_file() {
            return Err(refused(Refusal::Archive("it is not a file".into())));
        }
        let mut archive = Archive::open(File::open(path).map_err(io)?).map_err(refused)?;
        let pickle = archive.read("data.pkl").map_err(refused)?;
        let value = pickle::read(&pickle).map_err(refused)?;
        Ok(Self { archive, value })
    }

    /// What was saved.
    pub fn value(&self) -> &Tree {
        &self.value
    }

    /// The tensors of [`value`](Self::value), all of them, in the dtypes that they were saved in, on the CPU. Their names are for
    /// messages.
    ///
    /// # Errors
    /// Storages of another size than the tensors say, tensors that share values, and storages that none of these tensors is in.
    pub fn tensors(&mut self, all: &[(String, TensorRef)]) -> Result<Vec<Tensor>, Refusal> {
        check_storages(&self.archive, all)?;
        all.iter().map(|(name, tensor)| read_tensor(&mut self.archive, name, tensor)).collect()
    }
}

/// Every storage has the size that tensors say it has, tensors share no byte, and no storage lies there unused.
fn check_storages(archive: &Archive, tensors: &[(String, TensorRef)]) -> Result<(), Refusal> {
    let mut used: HashMap<&str, Vec<(u64, u64, &str)>> = HashMap::new();
    for (name, tensor) in tensors {
        let wrong = |reason: String| Refusal::Tensor { name: name.clone(), reason };
        let entry = format!("data/{}", tensor.key);
        let found = archive.size(&entry).ok_or_else(|| Refusal::MissingEntry(entry.clone()))?;
        let expected = tensor.numel.checked_mul(tensor.kind.size());
        if expected != Some(found) {
            let numel = tensor.numel;
            return Err(wrong(format!(
                "{entry} has {found} bytes, {numel} values of {:?} were promised",
                tensor.kind
            )));
        }
        used.entry(&tensor.key).or_default().push((tensor.offset, tensor.offset + tensor.elements(), name));
    }
    for ranges in used.values_mut() {
        ranges.retain(|(from, to, _)| from < to);
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            if pair[1].0 < pair[0].1 {
                let reason = format!("it shares values with {}", pair[0].2);
                return Err(Refusal::Tensor { name: pair[1].2.to_owned(), reason });
            }
        }
    }
    match archive.storages().find(|entry| !used.contains_key(&entry["data/".len()..])) {
        Some(entry) => Err(Refusal::EntryName(entry.to_owned())),
        None => Ok(()),
    }
}

fn read_tensor(archive: &mut Archive, name: &str, tensor: &TensorRef) -> Result<Tensor, Refusal> {
    let bytes = archive.read(&format!("data/{}", tensor.key))?;
    let size = tensor.kind.size();
    let bytes =
        &bytes[(tensor.offset * size) as usize..((tensor.offset + tensor.elements()) * size) as usize];
    let kind = match tensor.kind {
        StorageKind::Float => Kind::Float,
        StorageKind::BFloat16 => Kind::BFloat16,
        StorageKind::Half => Kind::Half,
        StorageKind::Long => Kind::Int64,
    };
    Tensor::f_from_data_size(bytes, &tensor.shape, kind).map_err(|e| Refusal::Tensor {
        name: name.to_owned(),
        reason: e.to_string().lines().next().unwrap_or_default().to_owned(),
    })
}

//! Files of rows: `NAME-NNNN.safetensors`, with an index that has their rows and hashes.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use nics_base::artefact::{AtomicFile, write_atomic};
use nics_base::hash;
use nics_core::checkpoint::TensorPath;
use safetensors::tensor::{Dtype, View};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::work::verify;
use crate::{Error, Result};

const FORMAT: u32 = 1;

/// A file of rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// Its name; absent when it would have no rows.
    pub file: Option<String>,
    /// Its rows.
    pub rows: u64,
    /// Its documents.
    pub documents: u64,
    /// BLAKE3 of the file; empty without one.
    pub hash: String,
    /// Records of the step before that went into it.
    pub consumed: u64,
}

/// What files there are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Index {
    format_version: u32,
    /// The files, in the order of their documents.
    pub files: Vec<ShardEntry>,
}

impl Default for Index {
    fn default() -> Self {
        Self { format_version: FORMAT, files: Vec::new() }
    }
}

impl Index {
    /// Reads an index; an absent one is empty.
    pub fn read(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Ok(Self::default());
        }
        let io = |source| nics_base::Error::Io { action: "read", path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(io)?;
        let damaged = |reason: String| Error::Damaged { path: path.to_owned(), reason };
        let index: Self = serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))?;
        if index.format_version != FORMAT {
            let found = index.format_version;
            return Err(damaged(format!("format_version is {found}, this release reads {FORMAT}")));
        }
        Ok(index)
    }

    /// Replaces the index at once.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)
            .map_err(|source| nics_base::Error::Json { what: "an index of files".into(), source })?;
        Ok(write_atomic(path, text + "\n")?)
    }

    /// Rows of all files.
    pub fn rows(&self) -> u64 {
        self.files.iter().map(|f| f.rows).sum()
    }

    /// Records of the step before that went into the files.
    pub fn consumed(&self) -> u64 {
        self.files.iter().map(|f| f.consumed).sum()
    }

    /// Documents of all files.
    pub fn documents(&self) -> u64 {
        self.files.iter().map(|f| f.documents).sum()
    }
}

/// A tensor on its way into a file: its bytes are made when they are written, one tensor at a time.
struct Bytes(Tensor, Vec<usize>, Dtype);

impl View for Bytes {
    fn dtype(&self) -> Dtype {
        self.2
    }

    fn shape(&self) -> &[usize] {
        &self.1
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        self.0.copy_data_u8(&mut bytes, self.0.numel());
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.0.numel() * self.0.kind().elt_size_in_bytes()
    }
}

/// Writes tensors into a file that appears whole or not at all, and gives its hash. Equal tensors give equal bytes.
pub fn write(path: &Path, tensors: &[(&str, Tensor)]) -> Result<String> {
    let refuse = |reason: String| Error::Input(format!("cannot write {}: {reason}", path.display()));
    let mut views = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let dtype = match tensor.kind() {
            Kind::Float => Dtype::F32,
            Kind::BFloat16 => Dtype::BF16,
            Kind::Half => Dtype::F16,
            Kind::Int64 => Dtype::I64,
            Kind::Int => Dtype::I32,
            Kind::Int8 => Dtype::I8,
            Kind::Uint8 => Dtype::U8,
            other => return Err(refuse(format!("tensor {name} is {other:?}"))),
        };
        let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
        let shape = tensor.size().iter().map(|&n| n as usize).collect();
        views.push(((*name).to_owned(), Bytes(tensor, shape, dtype)));
    }
    let file = AtomicFile::create(path)?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(metadata), file.temp_path())
        .map_err(|e| refuse(e.to_string()))?;
    let hash = hash::file(file.temp_path())?;
    file.commit()?;
    Ok(hash)
}

/// The file of a number, e.g. `features-0007.safetensors`.
pub fn file_name(stem: &str, number: usize) -> String {
    format!("{stem}-{number:04}.safetensors")
}

/// A file of rows, checked against its index and mapped into memory: tensors are read one by one.
#[derive(Debug)]
pub struct ShardFile {
    at: TensorPath,
    path: PathBuf,
}

impl ShardFile {
    /// Opens the file of an entry; `None` for one without rows.
    ///
    /// # Errors
    /// [`LabelError::ShardCorrupt`](super::LabelError::ShardCorrupt).
    pub fn open(dir: &Path, entry: &ShardEntry) -> Result<Option<Self>> {
        let Some(name) = &entry.file else { return Ok(None) };
        let path = dir.join(name);
        verify(&path, &entry.hash)?;
        Ok(Some(Self { at: TensorPath::from_file(&path)?, path }))
    }

    /// A tensor as it is stored.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        Ok(self.at.stored(name)?)
    }

    /// A column of whole numbers.
    pub fn column(&self, name: &str) -> Result<Vec<i64>> {
        Ok(Vec::try_from(self.tensor(name)?.f_to_kind(Kind::Int64)?)?)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

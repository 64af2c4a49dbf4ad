//! The files behind a checkpoint: regular files only, bounded JSON, weights mapped into memory.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde_json::{Map, Value};

use super::CheckpointError;
use super::header::{self, Entry};

/// First bytes of a git-lfs pointer, which lies in place of a file when a repository is cloned without lfs.
pub(super) const LFS_MARK: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Opens `path` when it is a regular file; a pipe would block and a folder gives a puzzling error.
pub(super) fn open_regular(path: &Path) -> Result<(File, u64), CheckpointError> {
    let unreadable = |source| CheckpointError::Unreadable { path: path.to_owned(), source };
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        let found = if metadata.is_dir() { "a folder" } else { "a pipe, socket or device" };
        return Err(CheckpointError::NotAFile { path: path.to_owned(), found });
    }
    let file = File::open(path).map_err(unreadable)?;
    Ok((file, metadata.len()))
}

/// Reads a whole text-like file of at most `limit` bytes.
pub(crate) fn read_bounded(path: &Path, what: &'static str, limit: u64) -> Result<Vec<u8>, CheckpointError> {
    let (file, len) = open_regular(path)?;
    let too_large = |found| CheckpointError::TooLarge { path: path.to_owned(), what, found, limit };
    if len > limit {
        return Err(too_large(len));
    }
    let mut bytes = Vec::with_capacity(len as usize);
    // The length may lie (a growing file, /proc): what is read is bounded as well.
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|source| CheckpointError::Unreadable { path: path.to_owned(), source })?;
    if bytes.len() as u64 > limit {
        return Err(too_large(bytes.len() as u64));
    }
    if bytes.starts_with(LFS_MARK) {
        return Err(CheckpointError::LfsPointer { path: path.to_owned() });
    }
    Ok(bytes)
}

/// Reads a JSON file whose top level is an object.
pub(crate) fn read_object(
    path: &Path,
    what: &'static str,
    limit: u64,
) -> Result<Map<String, Value>, CheckpointError> {
    let bytes = read_bounded(path, what, limit)?;
    serde_json::from_slice(&bytes)
        .map_err(|e| CheckpointError::InvalidJson { path: path.to_owned(), detail: e.to_string() })
}

/// Bytes of a tensor from which on its mapping is released after it was copied.
const RELEASED: usize = 1 << 20;

/// One weights file, mapped for as long as the checkpoint lives.
struct Mapped {
    path: PathBuf,
    file: File,
    map: Mmap,
}

/// Where a tensor lies.
struct Located {
    entry: Entry,
    file: usize,
}

/// All weights files of a checkpoint with their tensors, sorted by name.
pub(super) struct WeightFiles {
    files: Vec<Mapped>,
    tensors: Vec<Located>,
}

impl WeightFiles {
    /// Maps `paths` and validates their headers.
    pub fn open(paths: &[PathBuf]) -> Result<Self, CheckpointError> {
        let mut files = Vec::with_capacity(paths.len());
        let mut tensors = Vec::new();
        for path in paths {
            let (mapped, entries) = Mapped::open(path)?;
            tensors.extend(entries.into_iter().map(|entry| Located { entry, file: files.len() }));
            files.push(mapped);
        }
        tensors.sort_by(|a, b| a.entry.name.cmp(&b.entry.name));
        if let Some([a, b]) = tensors.windows(2).find(|pair| pair[0].entry.name == pair[1].entry.name) {
            return Err(CheckpointError::KeyInTwoShards {
                key: header::printable(&a.entry.name),
                first: files[a.file].path.clone(),
                second: files[b.file].path.clone(),
            });
        }
        Ok(Self { files, tensors })
    }

    /// Names with their entries, in the order of the names.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.tensors.iter().map(|t| &t.entry)
    }

    /// The entry of `name`.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.find(name).map(|t| &t.entry)
    }

    /// The file that holds `name`.
    pub fn path_of(&self, name: &str) -> Option<&Path> {
        self.find(name).map(|t| self.files[t.file].path.as_path())
    }

    /// The bytes of `name`, after a look whether the file still has its length.
    ///
    /// A file that shrinks between this look and the use of the bytes still raises SIGBUS; no portable guard exists.
    pub fn bytes(&self, name: &str) -> Result<Option<&[u8]>, CheckpointError> {
        let Some(located) = self.find(name) else { return Ok(None) };
        let file = &self.files[located.file];
        let now = file
            .file
            .metadata()
            .map_err(|source| CheckpointError::Unreadable { path: file.path.clone(), source })?
            .len();
        let expected = file.map.len() as u64;
        if now < expected {
            return Err(CheckpointError::Shrunk { path: file.path.clone(), found: now, expected });
        }
        Ok(Some(&file.map[located.entry.begin..located.entry.end]))
    }

    /// Lets go of the memory in which a large tensor's part of its file was mapped, once it has been copied: it is read again
    /// from the file when somebody asks. Without this, a loaded model would take its own size twice.
    pub fn release(&self, name: &str) {
        #[cfg(unix)]
        if let Some(Located { entry, file }) = self.find(name)
            && entry.end - entry.begin >= RELEASED
        {
            // SAFETY: the mapping is of a file and never written to, so that dropped pages come back with the same bytes.
            let _ = unsafe {
                self.files[*file].map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    entry.begin,
                    entry.end - entry.begin,
                )
            };
        }
    }

    /// A name that ends like `key`, or that `key` ends with: what a wrong prefix looks like.
    pub fn nearest(&self, key: &str) -> Option<&str> {
        let names = || self.tensors.iter().map(|t| t.entry.name.as_str());
        let ends = |long: &str, short: &str| {
            long.strip_suffix(short).is_some_and(|head| head.ends_with('.')) && short.contains('.')
        };
        names().find(|name| ends(name, key) || ends(key, name))
    }

    fn find(&self, name: &str) -> Option<&Located> {
        let at = self.tensors.binary_search_by(|t| t.entry.name.as_str().cmp(name)).ok()?;
        Some(&self.tensors[at])
    }
}

impl Mapped {
    fn open(path: &Path) -> Result<(Self, Vec<Entry>), CheckpointError> {
        let (file, len) = open_regular(path)?;
        if len < 8 {
            // An empty file cannot be mapped everywhere.
            header::parse(path, &vec![0; len as usize])?;
        }
        // SAFETY: the mapping is private and read-only. Rust asks that nobody changes the file meanwhile; like every
        // user of mapped weights we rely on that, and `bytes` checks the one change that is likely, a shorter file.
        let map = unsafe { Mmap::map(&file) }
            .map_err(|source| CheckpointError::Unreadable { path: path.to_owned(), source })?;
        let entries = header::parse(path, &map)?;
        Ok((Self { path: path.to_owned(), file, map }, entries))
    }
}

//! The zip archive that `torch.save` writes: a folder with `data.pkl` and `data/0`, `data/1`, …, all stored plainly.
//!
//! Nothing is unpacked and no name reaches the file system. What the archive declares is bounded before it is believed.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use zip::{CompressionMethod, ZipArchive};

use super::Refusal;

/// The largest file that is read.
const MAX_FILE: u64 = 8 << 30;
/// The most entries: some for each tensor, and a few others.
const MAX_ENTRIES: u64 = 4096;
/// The longest pickle; some hundred bytes for each tensor. Bounds what its values can take in memory.
const MAX_PICKLE: u64 = 1 << 20;
/// The largest of the small entries (version, byte order).
const MAX_SMALL: u64 = 256;

/// An open archive whose entries are known to be plain, apart from each other, and inside the file.
#[derive(Debug)]
pub struct Archive {
    zip: ZipArchive<File>,
    /// Index of each entry by its name under the archive's folder, with its size.
    entries: HashMap<String, (usize, u64)>,
}

impl Archive {
    /// Opens and checks all that can be checked without reading the entries.
    pub fn open(mut file: File) -> Result<Self, Refusal> {
        let length = file.metadata().map_err(|e| broken(&e))?.len();
        if length > MAX_FILE {
            return Err(Refusal::TooLarge { what: "the file".into(), found: length, limit: MAX_FILE });
        }
        // Before the reader makes a table of them.
        let declared = declared_entries(&mut file, length)?;
        if declared > MAX_ENTRIES {
            return Err(Refusal::Archive(format!(
                "it declares {declared} entries, expected at most {MAX_ENTRIES}"
            )));
        }
        let mut zip = ZipArchive::new(file).map_err(|e| broken(&e))?;
        let mut ranges: Vec<(u64, u64, String)> = Vec::new();
        let mut entries = HashMap::new();
        let mut folder: Option<String> = None;
        for index in 0..zip.len() {
            let entry = zip.by_index_raw(index).map_err(|e| broken(&e))?;
            let full = std::str::from_utf8(entry.name_raw())
                .map_err(|_| Refusal::EntryName(String::from_utf8_lossy(entry.name_raw()).into_owned()))?
                .to_owned();
            let (under, name) = split(&full)?;
            if *folder.get_or_insert_with(|| under.clone()) != under {
                return Err(Refusal::EntryName(full));
            }
            if entry.compression() != CompressionMethod::Stored
                || entry.encrypted()
                || entry.compressed_size() != entry.size()
            {
                return Err(Refusal::NotStored(name));
            }
            let (from, size) = (entry.data_start().unwrap_or(u64::MAX), entry.size());
            let end = from.checked_add(size).filter(|end| *end <= length);
            let Some(end) = end else {
                return Err(Refusal::Archive(format!("{name} reaches past the end of the file")));
            };
            let limit = match name.as_str() {
                "data.pkl" => MAX_PICKLE,
                name if is_storage(name) => MAX_FILE,
                _ => MAX_SMALL,
            };
            if size > limit {
                return Err(Refusal::TooLarge { what: name, found: size, limit });
            }
            ranges.push((from, end, name.clone()));
            if entries.insert(name.clone(), (index, size)).is_some() {
                return Err(Refusal::DuplicateEntry(name));
            }
        }
        // The reader keeps one entry of a name.
        if (entries.len() as u64) < declared {
            return Err(Refusal::DuplicateEntry("an entry".into()));
        }
        ranges.retain(|(from, end, _)| from < end);
        ranges.sort();
        for pair in ranges.windows(2) {
            if pair[1].0 < pair[0].1 {
                return Err(Refusal::EntriesOverlap(pair[0].2.clone(), pair[1].2.clone()));
            }
        }
        let mut archive = Self { zip, entries };
        if archive.size("byteorder").is_some() {
            let order = archive.read("byteorder")?;
            if order.trim_ascii() != b"little" {
                return Err(Refusal::ByteOrder(String::from_utf8_lossy(&order).into_owned()));
            }
        }
        Ok(archive)
    }

    /// Size of an entry, `None` when there is none.
    pub fn size(&self, name: &str) -> Option<u64> {
        self.entries.get(name).map(|(_, size)| *size)
    }

    /// Names of the storages, `data/…`.
    pub fn storages(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str).filter(|n| is_storage(n))
    }

    /// The bytes of an entry; its checksum is verified.
    pub fn read(&mut self, name: &str) -> Result<Vec<u8>, Refusal> {
        let (index, size) = *self.entries.get(name).ok_or_else(|| Refusal::MissingEntry(name.to_owned()))?;
        let entry = self.zip.by_index(index).map_err(|e| broken(&e))?;
        let mut bytes = Vec::new();
        entry
            .take(size + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| Refusal::Archive(format!("{name} cannot be read: {e}")))?;
        if bytes.len() as u64 != size {
            return Err(Refusal::Archive(format!(
                "{name} has {} bytes, its header says {size}",
                bytes.len()
            )));
        }
        Ok(bytes)
    }
}

fn broken(e: &dyn std::error::Error) -> Refusal {
    Refusal::Archive(e.to_string())
}

/// The archive's folder and the name under it, of an entry that may be in a checkpoint.
fn split(full: &str) -> Result<(String, String), Refusal> {
    let refuse = || Refusal::EntryName(full.to_owned());
    let (folder, name) = full.split_once('/').ok_or_else(refuse)?;
    let odd = |c: char| c == '\\' || c.is_control();
    let known = matches!(
        name,
        "data.pkl"
            | "version"
            | "byteorder"
            | ".format_version"
            | ".storage_alignment"
            | ".data/serialization_id"
    );
    if folder.is_empty()
        || folder == "."
        || folder == ".."
        || full.contains(odd)
        || !(known || is_storage(name))
    {
        return Err(refuse());
    }
    Ok((folder.to_owned(), name.to_owned()))
}

fn is_storage(name: &str) -> bool {
    name.strip_prefix("data/")
        .is_some_and(|key| (1..=9).contains(&key.len()) && key.bytes().all(|b| b.is_ascii_digit()))
}

/// How many entries the end of the archive declares. torch writes no comment, so the end is where it has to be.
fn declared_entries(file: &mut File, length: u64) -> Result<u64, Refusal> {
    const END: usize = 22;
    const LOCATOR: usize = 20;
    const END64: usize = 56;
    let short = || Refusal::Archive("it is too short".into());
    let mut at = |from: u64, bytes: &mut [u8]| -> Result<(), Refusal> {
        file.seek(SeekFrom::Start(from)).and_then(|_| file.read_exact(bytes)).map_err(|e| broken(&e))
    };
    let end_at = length.checked_sub(END as u64).ok_or_else(short)?;
    let mut end = [0; END];
    at(end_at, &mut end)?;
    if end[..4] != *b"PK\x05\x06" || end[20..] != [0, 0] {
        return Err(Refusal::Archive(
            "it does not end as an archive without comment does (truncated?)".into(),
        ));
    }
    let mut entries = u64::from(u16::from_le_bytes([end[10], end[11]]));
    if let Some(locator_at) = end_at.checked_sub(LOCATOR as u64) {
        let mut locator = [0; LOCATOR];
        at(locator_at, &mut locator)?;
        if locator[..4] == *b"PK\x06\x07" {
            let from = u64::from_le_bytes(locator[8..16].try_into().unwrap_or_default());
            if from.checked_add(END64 as u64).is_none_or(|to| to > locator_at) {
                return Err(Refusal::Archive("its directory lies outside of it".into()));
            }
            let mut end64 = [0; END64];
            at(from, &mut end64)?;
            if end64[..4] != *b"PK\x06\x06" {
                return Err(Refusal::Archive("its 64-bit end is not where it says".into()));
            }
            entries = entries.max(u64::from_le_bytes(end64[32..40].try_into().unwrap_or_default()));
        }
    }
    Ok(entries)
}

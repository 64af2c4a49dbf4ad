//! Append-only JSON Lines that survive `kill -9`.
//!
//! One record is one line, written by one call. A process killed in the middle leaves at most a torn last line, which
//! the next [`JsonlLog::open`] cuts off, so that a resumed run appends where the last whole record ended. A line that
//! is broken anywhere else is damage that no resume should paper over: an error with file and line.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{AtPath, Error, Result};

/// A JSON Lines file open for appending records of type `T`.
///
/// The file is locked: a second writer gets [`Error::Busy`].
#[derive(Debug)]
pub struct JsonlLog<T> {
    file: File,
    path: PathBuf,
    records: PhantomData<fn(&T)>,
}

impl<T: Serialize + DeserializeOwned> JsonlLog<T> {
    /// Opens or makes the log and returns the records that are in it.
    ///
    /// A torn last line is cut off. Missing parent folders are made.
    pub fn open(path: impl AsRef<Path>) -> Result<(Self, Vec<T>)> {
        let path = path.as_ref().to_owned();
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).at("create the folder", parent)?;
        }
        let mut options = File::options();
        let mut file = options.read(true).append(true).create(true).open(&path).at("open", &path)?;
        lock(&file, &path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).at("read", &path)?;
        let parsed = parse::<T>(&bytes, &path)?;
        if parsed.whole < bytes.len() {
            file.set_len(parsed.whole as u64).at("cut the torn last line of", &path)?;
            file.seek(SeekFrom::End(0)).at("seek in", &path)?;
        }
        if parsed.lacks_newline {
            file.write_all(b"\n").at("write", &path)?;
        }
        Ok((Self { file, path, records: PhantomData }, parsed.records))
    }

    /// Appends one record as one line.
    pub fn append(&mut self, record: &T) -> Result<()> {
        let mut line = serde_json::to_vec(record)
            .map_err(|source| Error::Json { what: format!("a record of {}", self.path.display()), source })?;
        line.push(b'\n');
        self.file.write_all(&line).and_then(|()| self.file.flush()).at("write", &self.path)
    }

    /// Forces what was appended to disk.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().at("sync", &self.path)
    }

    /// Syncs the log and renames it to `to`: the mark of a finished run for whoever looks at names alone.
    pub fn finish(self, to: impl AsRef<Path>) -> Result<()> {
        self.sync()?;
        fs::rename(&self.path, to.as_ref()).at("rename", &self.path)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Reads all records of a file. A torn last line, as a running writer may show it, is left out.
pub fn read<T: DeserializeOwned>(path: impl AsRef<Path>) -> Result<Vec<T>> {
    let path = path.as_ref();
    let bytes = fs::read(path).at("read", path)?;
    Ok(parse(&bytes, path)?.records)
}

/// Writes all records at once, atomically.
pub fn write<T: Serialize>(path: impl AsRef<Path>, records: &[T]) -> Result<()> {
    let path = path.as_ref();
    let mut bytes = Vec::new();
    for record in records {
        serde_json::to_writer(&mut bytes, record)
            .map_err(|source| Error::Json { what: format!("a record of {}", path.display()), source })?;
        bytes.push(b'\n');
    }
    crate::artefact::write_atomic(path, bytes)
}

struct Parsed<T> {
    records: Vec<T>,
    /// Bytes up to the end of the last whole record.
    whole: usize,
    /// The last whole record has no newline behind it.
    lacks_newline: bool,
}

fn parse<T: DeserializeOwned>(bytes: &[u8], path: &Path) -> Result<Parsed<T>> {
    let mut parsed = Parsed { records: Vec::new(), whole: 0, lacks_newline: false };
    for (i, line) in bytes.split_inclusive(|&b| b == b'\n').enumerate() {
        let ended = line.ends_with(b"\n");
        let text = line.trim_ascii();
        match serde_json::from_slice(text) {
            _ if ended && text.is_empty() => {}
            Ok(record) if ended => parsed.records.push(record),
            // An object or array is whole once its bracket closes (a file edited by hand); a number may go on.
            Ok(record) if matches!(text.first(), Some(b'{' | b'[')) => {
                parsed.records.push(record);
                parsed.lacks_newline = true;
            }
            Err(e) if ended => {
                let reason = format!("not a valid record: {e}; delete the line or the file to start again");
                return Err(Error::CorruptLine { path: path.to_owned(), line: i + 1, reason });
            }
            _ => break,
        }
        parsed.whole += line.len();
    }
    Ok(parsed)
}

/// Takes the writer's lock. File systems without locks are left to their users' care.
pub(crate) fn lock(file: &File, path: &Path) -> Result<()> {
    use rustix::fs::{FlockOperation, flock};
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(Error::Busy(path.to_owned())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Item {
        id: u32,
        text: String,
    }

    fn item(id: u32) -> Item {
        Item { id, text: format!("题 {id}\nsecond line") }
    }

    fn log_of(n: u32) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/log.jsonl");
        let (mut log, old) = JsonlLog::open(&path).unwrap();
        assert!(old.is_empty());
        (0..n).for_each(|i| log.append(&item(i)).unwrap());
        (dir, path)
    }

    #[test]
    fn records_come_back_in_order() {
        let (_dir, path) = log_of(3);
        let (mut log, old) = JsonlLog::open(&path).unwrap();
        assert_eq!(old, [item(0), item(1), item(2)]);
        log.append(&item(3)).unwrap();
        assert_eq!(read::<Item>(&path).unwrap().len(), 4);
    }

    #[test]
    fn a_log_cut_at_any_byte_resumes_to_the_same_file() {
        let (_dir, path) = log_of(4);
        let whole = fs::read(&path).unwrap();
        for cut in 0..=whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let (mut log, old) = JsonlLog::<Item>::open(&path).unwrap();
            (old.len() as u32..4).for_each(|i| log.append(&item(i)).unwrap());
            drop(log);
            assert_eq!(fs::read(&path).unwrap(), whole, "cut at byte {cut}");
        }
    }

    #[test]
    fn a_torn_number_is_cut_although_it_parses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("n.jsonl");
        fs::write(&path, "1\n12").unwrap();
        let (_log, old) = JsonlLog::<u32>::open(&path).unwrap();
        assert_eq!(old, [1]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n");
    }

    #[test]
    fn a_corrupt_middle_line_names_file_and_line() {
        let (_dir, path) = log_of(2);
        let mut text = fs::read_to_string(&path).unwrap();
        text.insert_str(text.find('\n').unwrap() + 1, "{\"id\": 1, \"te\n");
        fs::write(&path, &text).unwrap();
        let e = JsonlLog::<Item>::open(&path).unwrap_err().to_string();
        assert!(e.contains("log.jsonl, line 2: not a valid record"), "{e}");
        assert_eq!(fs::read_to_string(&path).unwrap(), text, "damage is left for a person to look at");
    }

    #[test]
    fn a_second_writer_is_told_so() {
        let (_dir, path) = log_of(1);
        let (_first, _) = JsonlLog::<Item>::open(&path).unwrap();
        let e = JsonlLog::<Item>::open(&path).unwrap_err();
        assert!(matches!(e, Error::Busy(_)), "{e}");
        assert_eq!(e.exit().code(), 75);
    }

    proptest::proptest! {
        /// Whatever is in the file, opening it succeeds or names a line, and a second opening finds the same.
        #[test]
        fn any_bytes_are_opened_or_refused(bytes in proptest::collection::vec(
            proptest::sample::select(b"{}[]\"12,:a\n\r \0\xff".to_vec()), 0..60)) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("log.jsonl");
            fs::write(&path, &bytes).unwrap();
            match JsonlLog::<serde_json::Value>::open(&path) {
                Ok((log, old)) => {
                    drop(log);
                    let (_log, again) = JsonlLog::<serde_json::Value>::open(&path).unwrap();
                    proptest::prop_assert_eq!(old, again);
                }
                Err(Error::CorruptLine { line, .. }) => {
                    proptest::prop_assert!(line <= bytes.split(|&b| b == b'\n').count());
                    proptest::prop_assert_eq!(fs::read(&path).unwrap(), bytes);
                }
                Err(e) => panic!("{e}"),
            }
        }
    }

    #[test]
    fn finish_renames() {
        let (dir, path) = log_of(2);
        let (log, _) = JsonlLog::<Item>::open(&path).unwrap();
        let to = dir.path().join("done.jsonl");
        log.finish(&to).unwrap();
        assert!(!path.exists());
        assert_eq!(read::<Item>(&to).unwrap().len(), 2);
    }
}

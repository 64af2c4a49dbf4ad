//! JSON Lines that are never in memory as a whole.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Result;

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> nics_base::Error {
    let path = path.to_owned();
    move |source| nics_base::Error::Io { action, path, source }
}

/// A file read record by record.
#[derive(Debug)]
pub struct Lines<T> {
    reader: BufReader<File>,
    path: PathBuf,
    line: usize,
    buffer: Vec<u8>,
    records: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Lines<T> {
    /// Opens a file at its beginning.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(io("open", path))?;
        let (reader, path) = (BufReader::with_capacity(1 << 16, file), path.to_owned());
        Ok(Self { reader, path, line: 0, buffer: Vec::new(), records: PhantomData })
    }

    /// The line of the record that was read last, from 1.
    pub fn line(&self) -> usize {
        self.line
    }
}

impl<T: DeserializeOwned> Iterator for Lines<T> {
    type Item = Result<T>;

    fn next(&mut self) -> Option<Result<T>> {
        loop {
            self.buffer.clear();
            match self.reader.read_until(b'\n', &mut self.buffer) {
                Err(e) => return Some(Err(io("read", &self.path)(e).into())),
                Ok(0) => return None,
                Ok(_) => self.line += 1,
            }
            let text = self.buffer.trim_ascii();
            if text.is_empty() {
                continue;
            }
            let (path, line) = (self.path.clone(), self.line);
            return Some(serde_json::from_slice(text).map_err(|e| {
                let reason = format!("not a valid record: {e}");
                nics_base::Error::CorruptLine { path, line, reason }.into()
            }));
        }
    }
}

/// A file that grows by whole groups of lines.
///
/// What a killed process leaves of a line is cut off when the file is opened again, and its owner cuts off what it left of
/// a group. Memory is that of one group.
#[derive(Debug)]
pub struct Log {
    file: File,
    path: PathBuf,
    lines: usize,
}

impl Log {
    /// Opens or makes the file, and cuts a torn last line off.
    pub fn open(path: &Path) -> Result<Self> {
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .append(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(io("open", path))?;
        let mut log = Self { file, path: path.to_owned(), lines: 0 };
        let (lines, end) = log.measure(usize::MAX)?;
        log.lines = lines;
        log.file.set_len(end).map_err(io("cut", path))?;
        Ok(log)
    }

    /// Whole lines.
    pub fn lines(&self) -> usize {
        self.lines
    }

    /// Whole lines of the file up to `most` of them, and where they end.
    fn measure(&self, most: usize) -> Result<(usize, u64)> {
        let file = File::open(&self.path).map_err(io("open", &self.path))?;
        let mut reader = BufReader::with_capacity(1 << 16, file);
        let (mut lines, mut end, mut at) = (0, 0, 0);
        while lines < most {
            let bytes = reader.fill_buf().map_err(io("read", &self.path))?;
            if bytes.is_empty() {
                break;
            }
            for (i, _) in bytes.iter().enumerate().filter(|(_, b)| **b == b'\n').take(most - lines) {
                lines += 1;
                end = at + i as u64 + 1;
            }
            at += bytes.len() as u64;
            let len = bytes.len();
            reader.consume(len);
        }
        Ok((lines, end))
    }

    /// Keeps the first `lines` lines.
    pub fn keep(&mut self, lines: usize) -> Result<()> {
        if lines < self.lines {
            let (kept, end) = self.measure(lines)?;
            self.file.set_len(end).map_err(io("cut", &self.path))?;
            self.lines = kept;
        }
        Ok(())
    }

    /// Appends a group of records.
    pub fn append<T: Serialize>(&mut self, records: &[T]) -> Result<()> {
        let mut bytes = Vec::new();
        for record in records {
            serde_json::to_writer(&mut bytes, record).map_err(|source| nics_base::Error::Json {
                what: format!("a record of {}", self.path.display()),
                source,
            })?;
            bytes.push(b'\n');
        }
        self.file.write_all(&bytes).map_err(io("write", &self.path))?;
        self.lines += records.len();
        Ok(())
    }

    /// Forces what was appended to disk.
    pub fn sync(&self) -> Result<()> {
        Ok(self.file.sync_data().map_err(io("sync", &self.path))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_cut_at_any_byte_is_taken_up_at_a_whole_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        let mut log = Log::open(&path).unwrap();
        log.append(&[10, 200, 3000]).unwrap();
        log.append(&[4]).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let mut log = Log::open(&path).unwrap();
            let lines = whole[..cut].split(|b| *b == b'\n').count() - 1;
            assert_eq!(log.lines(), lines);
            log.keep(2).unwrap();
            let kept: Vec<i32> = Lines::open(&path).unwrap().map(Result::unwrap).collect();
            assert_eq!(kept, [10, 200, 3000, 4][..lines.min(2)]);
            log.append(&[5]).unwrap();
            assert_eq!(log.lines(), lines.min(2) + 1);
            assert_eq!(Lines::<i32>::open(&path).unwrap().last().unwrap().unwrap(), 5);
        }
    }

    #[test]
    fn a_broken_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        std::fs::write(&path, "1\n\n{\n2\n").unwrap();
        let all: Vec<Result<i32>> = Lines::open(&path).unwrap().collect();
        assert_eq!(all.len(), 3);
        let error = all[1].as_ref().unwrap_err().to_string();
        assert!(error.contains("log.jsonl, line 3"), "{error}");
    }
}

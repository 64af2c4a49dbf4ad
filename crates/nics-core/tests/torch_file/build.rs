//! Pickles and zip archives, byte by byte, so that they can be wrong in any way, and what every reader of them owes.

use std::path::Path;
use std::time::{Duration, Instant};

/// A pickle being written.
pub struct Pickle(Vec<u8>);

/// A tensor of a dictionary.
pub type Named<'a> = (&'a str, fn(Pickle) -> Pickle);

impl Pickle {
    pub fn new() -> Self {
        Self(b"\x80\x02".to_vec())
    }

    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub fn mark(self) -> Self {
        self.raw(b"(")
    }

    pub fn tuple(self) -> Self {
        self.raw(b"t")
    }

    pub fn call(self) -> Self {
        self.raw(b"R")
    }

    pub fn text(self, text: &str) -> Self {
        self.raw(b"X").raw(&(text.len() as u32).to_le_bytes()).raw(text.as_bytes())
    }

    pub fn int(self, value: i64) -> Self {
        self.raw(b"\x8a\x08").raw(&value.to_le_bytes())
    }

    pub fn float(self, value: f64) -> Self {
        self.raw(b"G").raw(&value.to_be_bytes())
    }

    pub fn global(self, module: &str, name: &str) -> Self {
        self.raw(format!("c{module}\n{name}\n").as_bytes())
    }

    pub fn end(self) -> Vec<u8> {
        self.raw(b".").0
    }

    fn ints(self, values: &[i64]) -> Self {
        values.iter().fold(self.mark(), |p, &v| p.int(v)).tuple()
    }

    pub fn tensor(self, key: &str, numel: i64, offset: i64, size: &[i64], stride: &[i64]) -> Self {
        self.tensor_with(key, numel, offset, size, stride, |p| {
            p.global("collections", "OrderedDict").raw(b")").call()
        })
    }

    /// A tensor with hooks of one's own.
    pub fn tensor_with(
        self,
        key: &str,
        numel: i64,
        offset: i64,
        size: &[i64],
        stride: &[i64],
        hooks: fn(Self) -> Self,
    ) -> Self {
        let p = self.global("torch._utils", "_rebuild_tensor_v2").mark();
        let p =
            p.mark().text("storage").global("torch", "FloatStorage").text(key).text("cpu").int(numel).tuple();
        let p = p.raw(b"Q").int(offset).ints(size).ints(stride).raw(b"\x89");
        hooks(p).tuple().call()
    }

    /// An ordered dictionary of tensors, open at its end.
    pub fn state(self, tensors: &[Named]) -> Self {
        let p = self.global("collections", "OrderedDict").raw(b")").call().mark();
        tensors.iter().fold(p, |p, (name, tensor)| tensor(p.text(name))).raw(b"u")
    }

    /// A file of tensors by their names.
    pub fn tensors(tensors: &[Named]) -> Self {
        Self::new().state(tensors)
    }
}

/// An entry of an archive.
pub struct Entry {
    pub full: String,
    pub bytes: Vec<u8>,
    pub method: u16,
    pub flags: u16,
    /// Size when unpacked, as the headers have it.
    pub claimed: u32,
    /// Size in the archive, as the headers have it.
    pub stored: u32,
    /// Where the directory says the entry is, when that is not where it is.
    pub at: Option<u32>,
}

impl Entry {
    pub fn stored(name: &str, bytes: &[u8]) -> Self {
        let size = bytes.len() as u32;
        let (full, bytes) = (format!("saved/{name}"), bytes.to_vec());
        Self { full, bytes, method: 0, flags: 0, claimed: size, stored: size, at: None }
    }
}

/// An archive of a pickle and other entries.
pub fn checkpoint(pickle: &[u8], others: &[Entry]) -> Vec<u8> {
    let copy = |e: &Entry| Entry { full: e.full.clone(), bytes: e.bytes.clone(), ..*e };
    let mut entries = vec![Entry::stored("data.pkl", pickle)];
    entries.extend(others.iter().map(copy));
    zip(&entries)
}

pub fn zip(entries: &[Entry]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for entry in entries {
        let at = entry.at.unwrap_or(file.len() as u32);
        // Version, flags, method, time, date, checksum, sizes, lengths of name and extra field.
        let mut header = Vec::new();
        for value in [20, entry.flags, entry.method, 0, 0x21] {
            header.extend(value.to_le_bytes());
        }
        for value in [crc32(&entry.bytes), entry.stored, entry.claimed] {
            header.extend(value.to_le_bytes());
        }
        header.extend((entry.full.len() as u16).to_le_bytes());
        header.extend(0u16.to_le_bytes());
        if entry.at.is_none() {
            file.extend(b"PK\x03\x04");
            file.extend(&header);
            file.extend(entry.full.as_bytes());
            file.extend(&entry.bytes);
        }
        directory.extend(b"PK\x01\x02\x14\x00");
        directory.extend(&header);
        directory.extend([0; 10]);
        directory.extend(at.to_le_bytes());
        directory.extend(entry.full.as_bytes());
    }
    let (from, count) = (file.len() as u32, entries.len() as u16);
    let size = directory.len() as u32;
    file.extend(directory);
    file.extend(b"PK\x05\x06\x00\x00\x00\x00");
    file.extend(count.to_le_bytes());
    file.extend(count.to_le_bytes());
    file.extend(size.to_le_bytes());
    file.extend(from.to_le_bytes());
    file.extend([0, 0]);
    file
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
        }
    }
    !crc
}

/// Opens what was built as a file `name`; a refusal has to come soon and without memory for what was promised.
pub fn opened<T>(name: &str, bytes: &[u8], open: impl FnOnce(&Path) -> T) -> T {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    let (from, before) = (Instant::now(), nics_core::memory::resident());
    let result = open(&path);
    // Liveness, not speed: a bomb would take hours.
    assert!(from.elapsed() < Duration::from_secs(20));
    if let (Some(before), Some(after)) = (before, nics_core::memory::resident()) {
        assert!(after < before + (256 << 20), "{before} bytes became {after}");
    }
    result
}

/// A refusal's text has every one of these words.
pub fn has_words(what: &str, text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{what}: {text:?} lacks {word:?}");
    }
}

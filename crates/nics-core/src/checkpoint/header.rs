//! The header of a safetensors file, parsed without trust.
//!
//! A file is `length: u64 little endian | header: JSON object | data`. The header maps each name to
//! `{dtype, shape, data_offsets: [begin, end]}` relative to the data. What the `safetensors` crate accepts silently
//! (doubled names) or reports without a name (holes, overlaps) is an error of its own here, and the memory that a hostile
//! header can claim is bounded: its size, the number of tensors and their rank are limited while it is parsed.

use std::fmt;
use std::path::Path;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::CheckpointError;

/// Longest header that is read. The largest published checkpoints stay below a tenth of it.
pub(super) const MAX_HEADER: u64 = 16 << 20;
/// Most tensors in one file.
pub(super) const MAX_TENSORS: usize = 1 << 17;
/// Most axes of a tensor: libtorch's own limit.
const MAX_RANK: usize = 64;

/// A tensor of a file: dtype, shape and the byte range in the file.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// First byte, counted from the start of the file.
    pub begin: usize,
    /// Byte after the last.
    pub end: usize,
}

/// Parses and validates the header of `file`, which is the whole content of `path`.
///
/// Entries come back in the order of their bytes.
pub(super) fn parse(path: &Path, file: &[u8]) -> Result<Vec<Entry>, CheckpointError> {
    let len = file.len() as u64;
    if file.starts_with(super::files::LFS_MARK) {
        return Err(CheckpointError::LfsPointer { path: path.to_owned() });
    }
    let Some(prefix) = file.first_chunk::<8>() else {
        return Err(truncated(path, len, 8, "the length of the header"));
    };
    let header_len = u64::from_le_bytes(*prefix);
    if header_len > MAX_HEADER {
        return Err(CheckpointError::TooLarge {
            path: path.to_owned(),
            what: "the header",
            found: header_len,
            limit: MAX_HEADER,
        });
    }
    if header_len + 8 > len {
        return Err(truncated(path, len, header_len + 8, "the header"));
    }
    let data_start = header_len as usize + 8;
    let header = &file[8..data_start];
    if header.first() != Some(&b'{') {
        let detail = "its header does not start with `{`".to_owned();
        return Err(CheckpointError::BadHeader { path: path.to_owned(), detail });
    }
    let mut entries = Vec::new();
    let mut problem = None;
    let mut json = serde_json::Deserializer::from_slice(header);
    let parsed = HeaderSeed { path, entries: &mut entries, problem: &mut problem }
        .deserialize(&mut json)
        .and_then(|()| json.end());
    if let Some(problem) = problem {
        return Err(problem);
    }
    if let Err(e) = parsed {
        return Err(CheckpointError::BadHeader { path: path.to_owned(), detail: format!("its header: {e}") });
    }
    check_names(path, &entries)?;
    place(path, &mut entries, data_start, file.len() - data_start)?;
    Ok(entries)
}

fn truncated(path: &Path, found: u64, expected: u64, what: &'static str) -> CheckpointError {
    CheckpointError::Truncated { path: path.to_owned(), found, expected, what }
}

/// Refuses doubled names.
fn check_names(path: &Path, entries: &[Entry]) -> Result<(), CheckpointError> {
    let mut names: Vec<&str> = entries.iter().map(|e| e.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(CheckpointError::DuplicateKey { path: path.to_owned(), key: printable(pair[0]) }),
        None => Ok(()),
    }
}

/// Holds sizes against offsets, refuses holes and overlaps, and moves offsets from the data to the file.
fn place(
    path: &Path,
    entries: &mut [Entry],
    data_start: usize,
    data_len: usize,
) -> Result<(), CheckpointError> {
    entries.sort_by_key(|e| (e.begin, e.end));
    let mut at = 0;
    for i in 0..entries.len() {
        let e = &entries[i];
        let bad = |detail: String| CheckpointError::BadEntry {
            path: path.to_owned(),
            key: printable(&e.name),
            detail,
        };
        if e.begin > e.end {
            return Err(bad(format!("data_offsets [{}, {}] run backwards", e.begin, e.end)));
        }
        let bits = e.shape.iter().try_fold(e.dtype.bitsize(), |n, &d| n.checked_mul(d));
        let Some(bits) = bits else {
            return Err(bad(format!("shape {:?} overflows the address space", e.shape)));
        };
        if !bits.is_multiple_of(8) || bits / 8 != e.end - e.begin {
            return Err(bad(format!(
                "dtype {} and shape {:?} take {} bytes, but data_offsets [{}, {}] hold {}",
                e.dtype,
                e.shape,
                bits.div_ceil(8),
                e.begin,
                e.end,
                e.end - e.begin
            )));
        }
        let before = || if i == 0 { "the header".to_owned() } else { printable(&entries[i - 1].name) };
        if e.begin < at {
            return Err(CheckpointError::Overlap {
                path: path.to_owned(),
                key: printable(&e.name),
                other: before(),
                begin: e.begin as u64,
                end: at as u64,
            });
        }
        if e.begin > at {
            return Err(CheckpointError::Hole {
                path: path.to_owned(),
                after: before(),
                begin: at as u64,
                end: e.begin as u64,
            });
        }
        at = e.end;
    }
    if at > data_len {
        let (found, expected) =
            ((data_start + data_len) as u64, (data_start as u64).saturating_add(at as u64));
        return Err(truncated(path, found, expected, "its tensors"));
    }
    if at < data_len {
        let after = entries.last().map_or("the header".to_owned(), |e| printable(&e.name));
        return Err(CheckpointError::Hole {
            path: path.to_owned(),
            after,
            begin: at as u64,
            end: data_len as u64,
        });
    }
    for e in entries {
        e.begin += data_start;
        e.end += data_start;
    }
    Ok(())
}

/// A name as it may appear in a message: without control characters, shortened.
pub(super) fn printable(name: &str) -> String {
    let mut out: String =
        name.chars().take(120).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if name.chars().nth(120).is_some() {
        out.push('…');
    }
    out
}

/// Reads the header object into `entries`; what is wrong beyond JSON lands in `problem`.
struct HeaderSeed<'a> {
    path: &'a Path,
    entries: &'a mut Vec<Entry>,
    problem: &'a mut Option<CheckpointError>,
}

impl<'de> DeserializeSeed<'de> for HeaderSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut metadata_seen = false;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                if std::mem::replace(&mut metadata_seen, true) {
                    *self.problem =
                        Some(CheckpointError::DuplicateKey { path: self.path.to_owned(), key: name });
                    return Err(serde::de::Error::custom("doubled key"));
                }
                continue;
            }
            if self.entries.len() == MAX_TENSORS {
                *self.problem =
                    Some(CheckpointError::TooManyTensors { path: self.path.to_owned(), limit: MAX_TENSORS });
                return Err(serde::de::Error::custom("too many tensors"));
            }
            let raw: RawEntry = match map.next_value() {
                Ok(raw) => raw,
                Err(e) => {
                    *self.problem = Some(CheckpointError::BadEntry {
                        path: self.path.to_owned(),
                        key: printable(&name),
                        detail: e.to_string(),
                    });
                    return Err(e);
                }
            };
            let Some(dtype) = dtype_named(&raw.dtype) else {
                *self.problem = Some(CheckpointError::UnknownDtype {
                    path: self.path.to_owned(),
                    key: printable(&name),
                    found: printable(&raw.dtype),
                });
                return Err(serde::de::Error::custom("unknown dtype"));
            };
            let [begin, end] = raw.data_offsets;
            self.entries.push(Entry { name, dtype, shape: raw.shape.0, begin, end });
        }
        Ok(())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Shape,
    data_offsets: [usize; 2],
}

/// A shape of at most [`MAX_RANK`] axes, each within `i64`.
struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Axes;
        impl<'de> Visitor<'de> for Axes {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "a shape of at most {MAX_RANK} axes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut axes = Vec::new();
                while let Some(n) = seq.next_element::<usize>()? {
                    if axes.len() == MAX_RANK || i64::try_from(n).is_err() {
                        return Err(serde::de::Error::custom(format!(
                            "shape has more than {MAX_RANK} axes or an axis beyond 2^63"
                        )));
                    }
                    axes.push(n);
                }
                axes.shrink_to_fit();
                Ok(Shape(axes))
            }
        }
        d.deserialize_seq(Axes)
    }
}

/// The dtype written as `name`.
fn dtype_named(name: &str) -> Option<Dtype> {
    use serde::de::value::{Error, StrDeserializer};
    Dtype::deserialize(StrDeserializer::<Error>::new(name)).ok()
}

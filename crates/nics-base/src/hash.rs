//! Content hashes (BLAKE3, 64 hexadecimal digits) of bytes, files, folders and values.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::error::{AtPath, Error, Result};

/// Hash of some bytes.
pub fn bytes(bytes: impl AsRef<[u8]>) -> String {
    blake3::hash(bytes.as_ref()).to_hex().to_string()
}

/// A short hash of token ids: by it a later run knows that something was made from the same tokens.
pub fn tokens(ids: &[u32]) -> String {
    let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    bytes(ids)[..16].to_owned()
}

/// Hash of a file's contents, read as a stream.
pub fn file(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let mut hasher = blake3::Hasher::new();
    let file = File::open(path).at("open", path)?;
    hasher.update_reader(file).at("read", path)?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Hash of a folder: the sorted relative paths of its files and their contents. Empty folders, times and permissions do
/// not count; links are followed.
pub fn tree(dir: impl AsRef<Path>) -> Result<String> {
    let dir = dir.as_ref();
    let mut files = Vec::new();
    let mut ancestors = vec![dir.canonicalize().at("open", dir)?];
    list(dir, "", &mut ancestors, &mut files)?;
    files.sort();
    let mut hasher = blake3::Hasher::new();
    for (relative, path) in files {
        // Lengths in front keep `a` + `bc` apart from `ab` + `c`.
        hasher.update(&(relative.len() as u64).to_le_bytes());
        hasher.update(relative.as_bytes());
        hasher.update(file(&path)?.as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Hash of a file or a folder, whichever `path` is.
pub fn path(path: impl AsRef<Path>) -> Result<String> {
    if path.as_ref().is_dir() { tree(path) } else { file(path) }
}

/// Hash of a value's canonical JSON (see [`canonical_json`]).
pub fn value(value: &impl Serialize) -> Result<String> {
    Ok(bytes(canonical_json(value)?))
}

/// JSON without white space and with the keys of every object sorted, so that equal values give equal text.
///
/// Numbers that are not finite become `null`, as `serde_json` has it.
pub fn canonical_json(value: &impl Serialize) -> Result<String> {
    let json = |source| Error::Json { what: "a value to be hashed".into(), source };
    let value = serde_json::to_value(value).map_err(json)?;
    serde_json::to_string(&sorted(value)).map_err(json)
}

fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.into_iter().map(|(k, v)| (k, sorted(v))).collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}

/// Collects the files under `dir` as (relative path with `/`, path). `ancestors` are the real paths of the folders on
/// the way down: a link back to one of them would never end.
fn list(
    dir: &Path,
    under: &str,
    ancestors: &mut Vec<PathBuf>,
    files: &mut Vec<(String, PathBuf)>,
) -> Result<()> {
    for entry in fs::read_dir(dir).at("read", dir)? {
        let entry = entry.at("read", dir)?;
        let path = entry.path();
        let relative = format!("{under}{}", entry.file_name().to_string_lossy());
        if fs::metadata(&path).at("read", &path)?.is_dir() {
            let real = path.canonicalize().at("open", &path)?;
            if ancestors.contains(&real) {
                let source = io::Error::other("the link leads back to a folder above it");
                return Err(Error::Io { action: "hash", path, source });
            }
            ancestors.push(real);
            list(&path, &format!("{relative}/"), ancestors, files)?;
            ancestors.pop();
        } else {
            files.push((relative, path));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn known_values() {
        // BLAKE3 of the empty input, from its specification's test vectors.
        let empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
        assert_eq!(bytes(b""), empty);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("empty");
        fs::write(&path, "").unwrap();
        assert_eq!(file(&path).unwrap(), empty);
        assert_eq!(super::path(&path).unwrap(), empty);
    }

    #[test]
    fn key_order_does_not_matter_but_array_order_does() {
        let a = json!({"b": [1, 2], "a": {"y": 1, "x": 2}});
        let b = json!({"a": {"x": 2, "y": 1}, "b": [1, 2]});
        assert_eq!(value(&a).unwrap(), value(&b).unwrap());
        assert_eq!(canonical_json(&a).unwrap(), r#"{"a":{"x":2,"y":1},"b":[1,2]}"#);
        assert_ne!(value(&json!([1, 2])).unwrap(), value(&json!([2, 1])).unwrap());
    }

    #[test]
    fn a_tree_depends_on_names_and_contents_alone() {
        let make = |files: &[(&str, &str)]| {
            let dir = tempfile::tempdir().unwrap();
            for (name, text) in files {
                let path = dir.path().join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            tree(dir.path()).unwrap()
        };
        let one = make(&[("a", "1"), ("sub/b", "2")]);
        assert_eq!(one, make(&[("sub/b", "2"), ("a", "1")]));
        assert_ne!(one, make(&[("a", "1"), ("sub/b", "3")]));
        assert_ne!(one, make(&[("a", "1"), ("b", "2")]));
        assert_ne!(make(&[("a", "bc")]), make(&[("ab", "c")]));
    }

    #[cfg(unix)]
    #[test]
    fn a_link_in_a_circle_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(dir.path(), dir.path().join("again")).unwrap();
        assert!(tree(dir.path()).unwrap_err().to_string().contains("again"));
    }

    #[test]
    fn a_missing_file_is_named() {
        assert!(file("no/such/file").unwrap_err().to_string().contains("no/such/file"));
    }
}

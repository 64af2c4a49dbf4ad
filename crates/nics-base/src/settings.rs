//! Settings in TOML files: recipes, studies, tables.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{AtPath, Error, Result};

/// The most bytes of a file that is read: settings are written by hand, so a larger one is something else.
const MAX_BYTES: u64 = 16 << 20;

/// Reads a file of settings; `parse` makes them from its text and checks them, mostly with [`parse()`].
///
/// # Errors
/// [`Error::Io`] for a file that cannot be read, [`Error::Settings`] naming it and what is wrong in it.
pub fn read<T>(path: &Path, parse: impl FnOnce(&str) -> Result<T, String>) -> Result<T> {
    let mut text = String::new();
    let file = File::open(path).at("read", path)?;
    file.take(MAX_BYTES + 1).read_to_string(&mut text).at("read", path)?;
    let read = if text.len() as u64 > MAX_BYTES {
        Err(format!("it holds more than the {MAX_BYTES} bytes that are read of settings; give a TOML file"))
    } else {
        parse(&text)
    };
    read.map_err(|reason| Error::Settings { path: path.to_owned(), reason })
}

/// Settings from the text of a TOML file.
///
/// # Errors
/// The line that is wrong, what is wrong with it, and what is expected.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    toml::from_str(text).map_err(|e| e.to_string().trim_end().to_owned())
}

/// The text of a TOML file with these settings.
///
/// # Errors
/// What TOML cannot say.
pub fn text(settings: &impl Serialize) -> Result<String, String> {
    toml::to_string(settings).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Two {
        one: u32,
        two: f64,
    }

    fn checked(text: &str) -> Result<Two, String> {
        let two: Two = parse(text)?;
        if two.one > 0 { Ok(two) } else { Err("one is 0, expected at least 1".into()) }
    }

    #[test]
    fn errors_name_the_file_the_line_and_what_is_expected() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("two.toml");
        let read = |text: &[u8]| {
            std::fs::write(&path, text).unwrap();
            read(&path, checked).map_err(|e| e.to_string())
        };
        assert_eq!(read(b"one = 1\ntwo = 2.0\n"), Ok(Two { one: 1, two: 2.0 }));
        for (text, why) in [
            ("one = 1\ntwo = 2.0\nthree = 3\n", "line 3"),
            ("one = 1\ntwo = 2.0\nthree = 3\n", "expected `one` or `two`"),
            ("one = 1\n", "missing field `two`"),
            ("one = 0\ntwo = 2.0\n", "one is 0, expected at least 1"),
            ("one = \n", "line 1"),
        ] {
            let error = read(text.as_bytes()).unwrap_err();
            assert!(error.starts_with(&format!("{}: ", path.display())) && error.contains(why), "{error}");
        }
        let error = read(b"\xff").unwrap_err();
        assert!(error.contains("cannot read") && error.contains("two.toml"), "{error}");
        let error = read(&vec![b' '; MAX_BYTES as usize + 1]).unwrap_err();
        assert!(error.contains("give a TOML file"), "{error}");
        assert!(matches!(super::read(dir.path(), checked), Err(Error::Io { .. })));
        assert!(matches!(super::read(&dir.path().join("none"), checked), Err(Error::Io { .. })));
    }
}

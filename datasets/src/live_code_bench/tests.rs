//! Tests of a problem, from the forms in which files keep them.

use std::io::Read;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use flate2::read::ZlibDecoder;
use serde::Deserialize;

use super::pickled;

/// Tests of one problem that inflate to more are none: the largest are a tenth of it.
const MOST_BYTES: u64 = 1 << 30;

/// What a program is given and what it has to answer.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Test {
    /// What it reads from standard input, or its function's arguments, a line of JSON each.
    pub input: String,
    /// What it has to write, or the value to return as JSON.
    pub output: String,
    #[serde(rename = "testtype")]
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Stdin,
    Functional,
}

/// The tests of a problem, at least one: the public ones, then the private ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tests {
    tests: Vec<Test>,
    function: Option<String>,
}

impl Tests {
    /// `function` is the function that is called; without it, programs read standard input. Tests of the other kind are an
    /// error for people.
    pub(super) fn new(tests: Vec<Test>, function: Option<&str>) -> Result<Self, String> {
        let (kind, why) = match function {
            Some(_) => (Kind::Functional, "while metadata names a function"),
            None => (Kind::Stdin, "while metadata names no function"),
        };
        match tests.iter().position(|test| test.kind != kind) {
            Some(other) => Err(format!("test {} is of kind {:?} {why}", other + 1, tests[other].kind)),
            None => Ok(Self { tests, function: function.map(str::to_owned) }),
        }
    }

    /// In the order in which they are run.
    pub fn all(&self) -> &[Test] {
        &self.tests
    }

    /// The function that is called with their arguments, where it is not the whole program that is run.
    pub fn function(&self) -> Option<&str> {
        self.function.as_deref()
    }
}

/// Tests as JSON.
pub(super) fn plain(text: &str) -> Result<Vec<Test>, String> {
    serde_json::from_str(text).map_err(|e| format!("it is no list of tests in JSON: {e}"))
}

/// Tests as JSON, or as that in a pickle, deflated, in base64.
pub(super) fn packed(text: &str) -> Result<Vec<Test>, String> {
    let text = text.trim();
    if text.starts_with('[') {
        return plain(text);
    }
    let deflated = STANDARD.decode(text).map_err(|e| format!("it is neither JSON nor base64: {e}"))?;
    let mut pickle = Vec::new();
    ZlibDecoder::new(&deflated[..])
        .take(MOST_BYTES + 1)
        .read_to_end(&mut pickle)
        .map_err(|e| format!("its base64 holds no sound zlib stream: {e}"))?;
    if pickle.len() as u64 > MOST_BYTES {
        return Err(format!("it inflates to more than {MOST_BYTES} bytes"));
    }
    plain(pickled::text(&pickle).map_err(|e| format!("the pickle in it is refused: {e}"))?)
}

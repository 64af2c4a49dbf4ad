//! Reading cases and holding results against them.

use std::collections::HashMap;

use nics_core::golden::{Golden, difference};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tch::Tensor;

/// A case: its JSON and its tensors.
pub struct Case {
    pub name: String,
    pub json: Value,
    pub tensors: HashMap<String, Tensor>,
}

pub fn golden() -> Golden {
    Golden::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden"))
}

/// A case by its name: a JSON file and, where there is one, the tensors beside it.
pub fn case(name: &str) -> Case {
    let golden = golden();
    let file = format!("{name}.safetensors");
    let tensors = if golden.path(&file).exists() { golden.tensors(&file).unwrap() } else { HashMap::new() };
    Case { name: name.to_owned(), json: golden.json(&format!("{name}.json")).unwrap(), tensors }
}

impl Case {
    /// A tensor, which has to be there.
    pub fn tensor(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: no tensor {name}", self.name))
    }

    /// A field of the JSON, which has to be there.
    pub fn field<T: DeserializeOwned>(&self, name: &str) -> T {
        get(&self.json, name).unwrap_or_else(|e| panic!("{}: {name}: {e}", self.name))
    }

    /// Calls `f` with each sub-case and its number.
    pub fn each(&self, f: impl Fn(&Value, &str)) {
        let subcases: Vec<Value> = self.field("subcases");
        assert!(!subcases.is_empty());
        for sub in subcases {
            f(&sub, &sub["i"].to_string());
        }
    }
}

/// A field of a JSON object.
pub fn get<T: DeserializeOwned>(json: &Value, name: &str) -> serde_json::Result<T> {
    serde_json::from_value(json[name].clone())
}

/// Equal in shape and to the bit in value, the dtype aside.
#[track_caller]
pub fn assert_same(found: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!(found.size(), expected.size(), "{what}: shape");
    let found = found.to_kind(expected.kind());
    if !found.equal(expected) {
        let differ = found.ne_tensor(expected).nonzero();
        panic!("{what}: {} of {} values differ, first at {}", differ.size()[0], found.numel(), differ.get(0));
    }
}

/// `|found − expected| ≤ abs` everywhere.
#[track_caller]
pub fn assert_near(found: &Tensor, expected: &Tensor, abs: f64, what: &str) {
    let (off, _) = difference(found, expected).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert!(off <= abs, "{what}: off by {off}, expected at most {abs}");
}

/// The largest deviation from an expected value, relative to that value.
fn relative(found: &Tensor, expected: &Tensor) -> f64 {
    ((found - expected).abs() / expected.abs().clamp_min(1e-12)).max().double_value(&[])
}

/// Whether every value is within `most` of its expected one, relative to it.
pub fn close(found: &Tensor, expected: &Tensor, most: f64) -> bool {
    found.size() == expected.size() && relative(found, expected) <= most
}

/// Every value within `most` of its expected one, relative to it.
#[track_caller]
pub fn assert_close(found: &Tensor, expected: &Tensor, most: f64, what: &str) {
    assert_eq!(found.size(), expected.size(), "{what}: shape");
    let off = relative(found, expected);
    assert!(off <= most, "{what}: off by a factor of {off}, expected at most {most}");
}

//! Reading cases and holding results against them.

use std::collections::HashMap;

use nics_core::checkpoint::TensorPath;
use nics_core::golden::Golden;
use r2r::router::{Architecture, RouterConfig};
use serde_json::Value;
use tch::{Kind, Tensor};

/// A case: its JSON and its tensors.
pub struct Case {
    pub name: String,
    pub json: Value,
    pub tensors: HashMap<String, Tensor>,
}

pub fn golden() -> Golden {
    Golden::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden"))
}

/// All cases of a kind: a JSON file and, where there is one, the tensors beside it.
pub fn cases(kind: &str) -> Vec<Case> {
    let golden = golden();
    let names = golden.cases(kind).unwrap();
    let cases: Vec<Case> = names
        .iter()
        .filter_map(|n| n.strip_suffix(".json"))
        .map(|name| {
            let file = format!("{name}.safetensors");
            let tensors = if names.contains(&file) { golden.tensors(&file).unwrap() } else { HashMap::new() };
            Case { name: name.to_owned(), json: golden.json(&format!("{name}.json")).unwrap(), tensors }
        })
        .collect();
    assert!(!cases.is_empty(), "{kind} has no JSON");
    cases
}

impl Case {
    /// A tensor, which has to be there.
    pub fn tensor(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: no tensor {name}", self.name))
    }

    /// Tensors whose names begin with `prefix`, without it.
    pub fn under(&self, prefix: &str) -> HashMap<String, Tensor> {
        let strip =
            |(name, t): (&String, &Tensor)| Some((name.strip_prefix(prefix)?.to_owned(), t.shallow_clone()));
        self.tensors.iter().filter_map(strip).collect()
    }

    pub fn path(&self, prefix: &str) -> TensorPath {
        TensorPath::from_tensors(self.under(prefix))
    }

    /// A router's configuration from `model_type` (the main one when absent) and the arguments under `key`.
    pub fn config(&self, key: &str) -> RouterConfig {
        let name = self.json["model_type"].as_str().unwrap_or("HiddenStatesTokenLMHeadLogitsClassifier");
        RouterConfig::from_json(Architecture::from_name(name).unwrap(), self.json[key].as_object().unwrap())
            .unwrap()
    }

    pub fn number(&self, key: &str) -> f64 {
        self.json[key].as_f64().unwrap_or_else(|| panic!("{}: no number {key}", self.name))
    }
}

/// `|found - expected| <= abs + rel * |expected|` everywhere; NaN and infinities stand at the same places.
pub fn assert_close(what: &str, found: &Tensor, expected: &Tensor, abs: f64, rel: f64) {
    assert_eq!(found.size(), expected.size(), "{what}: shape");
    let (found, expected) = (floats(found), floats(expected));
    for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
        let same = (f.is_nan() && e.is_nan()) || (f.is_infinite() && f.to_bits() == e.to_bits());
        assert!(same || (f - e).abs() <= abs + rel * e.abs(), "{what}: value {i} is {f}, expected {e}");
    }
}

pub fn floats(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.to_kind(Kind::Double).flatten(0, -1)).unwrap()
}

pub fn ints(t: &Tensor) -> Vec<i64> {
    Vec::try_from(t.to_kind(Kind::Int64).flatten(0, -1)).unwrap()
}

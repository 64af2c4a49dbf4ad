//! Reading cases and holding results against them.

use std::collections::HashMap;

use nics_core::golden::Golden;
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

/// All cases that the tests run and whose name begins with `prefix`.
pub fn cases(prefix: &str) -> Vec<Case> {
    let names: Vec<&str> = crate::KINDS.run.iter().copied().filter(|n| n.starts_with(prefix)).collect();
    assert!(!names.is_empty(), "no case {prefix}");
    names.into_iter().map(case).collect()
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
        serde_json::from_value(self.json[name].clone())
            .unwrap_or_else(|e| panic!("{}: {name}: {e}", self.name))
    }
}

/// Equal to the bit in shape, dtype and values.
pub fn assert_same(found: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!(found.size(), expected.size(), "{what}: shape");
    assert_eq!(found.kind(), expected.kind(), "{what}: dtype");
    if !found.equal(expected) {
        let differ = found.ne_tensor(expected).nonzero();
        panic!("{what}: {} of {} values differ, first at {}", differ.size()[0], found.numel(), differ.get(0));
    }
}

/// `|found - expected| <= abs` everywhere; NaN stands at the same places.
pub fn assert_near(found: &Tensor, expected: &Tensor, abs: f64, what: &str) {
    assert_eq!(found.size(), expected.size(), "{what}: shape");
    let off = (found - expected).abs();
    let both = found.isnan().logical_and(&expected.isnan());
    let most = off.masked_fill(&both, 0.0).max().double_value(&[]);
    assert!(most <= abs, "{what}: off by {most}, expected at most {abs}");
}

//! Logits processors against transformers (`datasets/golden/sampling`, made by `make_sampling.py`).

use std::collections::HashSet;
use std::path::Path;

use nics_core::checkpoint::Checkpoint;
use nics_core::sampling::Sampling;
use serde::Deserialize;
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

#[derive(Deserialize)]
struct Golden {
    tolerance: f64,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    row: usize,
    context: HashSet<u32>,
    settings: Map<String, Value>,
    out: String,
    probs: String,
}

fn values(t: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(t.to_kind(Kind::Double)).unwrap()
}

#[test]
fn processors_equal_those_of_transformers() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden/sampling");
    let golden: Golden = serde_json::from_slice(&std::fs::read(dir.join("cases.json")).unwrap()).unwrap();
    // Any JSON object stands for the configuration: only the tensors are wanted.
    let fixture =
        Checkpoint::open_files(&dir.join("cases.json"), &[dir.join("sampling.safetensors")]).unwrap();
    let root = fixture.root(Device::Cpu, Kind::Float);
    assert!(golden.cases.len() >= 12);
    for case in golden.cases {
        let mut settings = case.settings.clone();
        settings.entry("temperature").or_insert(Value::from(1.0));
        let sampling: Sampling = serde_json::from_value(Value::Object(settings)).unwrap();
        sampling.validate().unwrap();
        let mut logits: Vec<f32> =
            Vec::try_from(root.stored(&format!("logits.{}", case.row)).unwrap()).unwrap();
        sampling.process(&mut logits, &case.context);
        let what = format!("row {}, {:?}", case.row, case.settings);
        let expected = values(&root.stored(&case.out).unwrap());
        for (i, (&found, expected)) in logits.iter().zip(&expected).enumerate() {
            let found = f64::from(found);
            let equal = if expected.is_finite() {
                (found - expected).abs() <= golden.tolerance * expected.abs().max(1.0)
            } else {
                !found.is_finite() && found < 0.0
            };
            assert!(equal, "{what}: id {i} has {found}, expected {expected}");
        }
        let probs = values(&Tensor::from_slice(&logits).softmax(0, Kind::Float));
        let expected = values(&root.stored(&case.probs).unwrap());
        for (found, expected) in probs.iter().zip(&expected) {
            assert!(
                (found - expected).abs() <= golden.tolerance,
                "{what}: probability {found}, expected {expected}"
            );
        }
    }
}

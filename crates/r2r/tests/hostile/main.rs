//! Checkpoints that are damaged or no router's. Each is refused with its reason, quickly and in little memory; what nics-core
//! refuses of any file of `torch.save` is in its own tests.

#[allow(dead_code, reason = "the core's tests build more kinds of damage")]
#[path = "../../../nics-core/tests/torch_file/build.rs"]
mod build;

use std::path::Path;

use build::{Entry, Named, Pickle, checkpoint, has_words, opened};
use r2r::Error;
use r2r::checkpoint::{Official, Refusal};

/// A whole checkpoint of a tiny router over two logits.
fn router_of(model_type: &str, threshold: f64, tensors: &[Named]) -> Pickle {
    let p = Pickle::new().raw(b"}(").text("model_type").text(model_type);
    let p = p.text("init_args").raw(b"}(").text("logits_size").int(2).text("hidden_dims").raw(b"](").int(2);
    let p = p.raw(b"eu").text("common_args").raw(b"}(").text("threshold").float(threshold);
    let p = p.text("input_type").raw(b"](").text("logits").raw(b"eu");
    p.text("state_dict").state(tensors).raw(b"u")
}

/// One that is in order, with one tensor `[1.5, 1.5]`.
fn sound() -> Vec<u8> {
    let bias: Named = ("logits_projection.bias", |p| p.tensor("0", 2, 0, &[2], &[1]));
    let values: Vec<u8> = [1.5f32; 2].iter().flat_map(|v| v.to_le_bytes()).collect();
    checkpoint(&router_of("LogitsClassifier", 0.5, &[bias]).end(), &[Entry::stored("data/0", &values)])
}

fn open(bytes: &[u8]) -> Result<Official, Error> {
    opened("router.pt", bytes, Official::open)
}

fn refusal(bytes: &[u8]) -> Refusal {
    match open(bytes) {
        Err(Error::Refused { refusal, path }) => {
            assert_eq!(path.file_name(), Some("router.pt".as_ref()));
            refusal
        }
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("it was read"),
    }
}

/// The refusal's text has every one of these words.
fn refused(what: &str, bytes: &[u8], words: &[&str]) {
    has_words(what, &refusal(bytes).to_string(), words);
}

#[test]
fn a_sound_one_is_read() {
    let official = open(&sound()).unwrap();
    assert_eq!(official.tensors["logits_projection.bias"].size(), [2]);
    assert_eq!(official.config.top_k(), Some(2));
}

#[test]
fn what_the_core_refuses_is_refused() {
    let p = Pickle::new().global("os", "system").mark().text("true").tuple().call().end();
    refused("a program", &checkpoint(&p, &[]), &["os.system", "nothing was run"]);
    let whole = sound();
    refused("cut short", &whole[..whole.len() / 2], &["truncated?"]);
    let shared = [
        ("logits_projection.bias", (|p| p.tensor("0", 2, 0, &[2], &[1])) as fn(Pickle) -> Pickle),
        ("logits_projection.weight", |p| p.tensor("0", 2, 1, &[1], &[1])),
    ];
    let p = router_of("LogitsClassifier", 0.5, &shared).end();
    refused("shared values", &checkpoint(&p, &[Entry::stored("data/0", &[0; 8])]), &["shares values"]);
    let error = Official::open(Path::new("/nonexistent/router.pt")).unwrap_err().to_string();
    assert!(error.contains("nonexistent"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Official::open(dir.path()), Err(Error::Refused { .. })));
}

#[test]
fn fields_that_are_missing_or_wrong() {
    let text = |p: Pickle, key: &str, value: &str| p.text(key).text(value);
    let p = Pickle::new().raw(b"}(").raw(b"u").end();
    refused("nothing", &checkpoint(&p, &[]), &["model_type", "absent"]);
    let p = text(Pickle::new().raw(b"}("), "model_type", "LogitsClassifier").raw(b"u").end();
    refused("a type alone", &checkpoint(&p, &[]), &["init_args"]);
    let p = text(Pickle::new().raw(b"}("), "surprise", "x").raw(b"u").end();
    refused("another field", &checkpoint(&p, &[]), &["surprise"]);
    let p = Pickle::new().raw(b"}(").text("model_type").int(1).raw(b"u").end();
    refused("a type that is a number", &checkpoint(&p, &[]), &["model_type", "integer"]);
    let p = text(text(Pickle::new().raw(b"}("), "model_type", "a"), "model_type", "b").raw(b"u").end();
    refused("a field twice", &checkpoint(&p, &[]), &["twice"]);
    let p = Pickle::new().raw(b"}").int(1).int(2).raw(b"s").end();
    refused("a key that is a number", &checkpoint(&p, &[]), &["no text"]);
    refused("a text at the top", &checkpoint(&Pickle::new().text("x").end(), &[]), &["dictionary"]);
    let p = Pickle::new().global("collections", "OrderedDict").end();
    refused("a function at the top", &checkpoint(&p, &[]), &["function"]);

    let named = |name: &str| router_of(name, 0.5, &[]).end();
    let error = open(&checkpoint(&named("ResNet"), &[])).unwrap_err().to_string();
    assert!(error.contains("ResNet") && error.contains("LogitsClassifier"), "{error}");
    let error = open(&checkpoint(&named("MultiHiddenStatesClassifier"), &[])).unwrap_err().to_string();
    assert!(error.contains("normalised"), "{error}");
    for threshold in [1.5, -0.1, f64::NAN, f64::INFINITY] {
        let p = router_of("LogitsClassifier", threshold, &[]).end();
        refused("a threshold", &checkpoint(&p, &[]), &["threshold"]);
    }
    // Tensors that are missing, and one that no router has.
    let official = open(&checkpoint(&named("LogitsClassifier"), &[])).unwrap();
    let error = official.router(None, r2r::router::Storage::F32, tch::Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("logits_projection.weight"), "{error}");
}

#[test]
fn random_damage_never_panics() {
    use proptest::prelude::*;
    let whole = std::fs::read(
        nics_core::golden::Golden::at(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden"))
            .path("router_ckpt.pt"),
    )
    .unwrap();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(256));
    let edits = prop::collection::vec((0..whole.len(), any::<u8>()), 1..6);
    runner
        .run(&(edits, 0..whole.len()), |(edits, cut)| {
            let mut bytes = whole.clone();
            // Most edits fall into the pickle at the beginning, where they do most.
            for (at, value) in edits {
                bytes[at % 4300] = value;
            }
            let _ = open(&bytes);
            let _ = open(&bytes[..cut]);
            Ok(())
        })
        .unwrap();
}

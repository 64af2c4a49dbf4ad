//! Tiny random checkpoints of every family, quantized in every layout, and changed in one place.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use mbq::QuantSpec;
use mbq::apply::round;
use mbq::convert::convert;
use mbq::export::{Layout, Made, export};
use mbq::language::Language;
use nics_base::interrupt::Interrupt;
use nics_core::cache::NoCache;
use nics_core::checkpoint::{Checkpoint, Origin, TensorPath, save};
use nics_core::models::{self, Batch, Input, Model};
use nics_core::seam::{Ragged, SeqId};
use nics_core::tch::{self, Device, Kind, Tensor};
use serde_json::{Value, json};

/// Families that see and, behind them, some of text alone.
pub const FAMILIES: [&str; 7] = [
    "vision/llava",
    "vision/llava-onevision",
    "vision/qwen2-vl",
    "vision/qwen2.5-vl",
    "vision/internvl2",
    "qwen2",
    "llama",
];

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden").join(family)
}

pub fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A random checkpoint of a family, stored as `kind`: as its fixture, but for sizes that words and groups of 32 divide.
pub fn model(family: &str, kind: Kind, dir: &Path) -> PathBuf {
    let mut config = read_json(&fixture(family).join("config.json"));
    let sees = family.starts_with("vision");
    let (hidden, heads) = (if sees { 32 } else { 64 }, 4);
    let text = match ["text_config", "llm_config"].into_iter().find(|part| config[part].is_object()) {
        Some(part) => &mut config[part],
        None => &mut config,
    };
    let text = text.as_object_mut().unwrap();
    for (field, size) in [
        ("hidden_size", hidden),
        ("intermediate_size", 64),
        ("num_attention_heads", heads),
        ("num_key_value_heads", heads),
        ("head_dim", hidden / heads),
    ] {
        text.insert(field.into(), json!(size));
    }
    let root = TensorPath::random(11, 0.15, Device::Cpu, kind);
    let json = config.as_object().unwrap();
    let mut model: Box<dyn Model> = if sees {
        Box::new(models::load_vlm_at(json, &root).unwrap())
    } else {
        Box::new(models::load_at(models::config(json).unwrap(), &root).unwrap())
    };
    let mut tensors = Vec::new();
    model
        .visit_parameters(&mut |key, t| {
            tensors.push((key.to_owned(), t.shallow_clone()));
            Ok(())
        })
        .unwrap();
    let to = dir.join(family.replace('/', "-"));
    save(&to, tensors, &config, u64::MAX).unwrap();
    to
}

pub fn load(checkpoint: &Checkpoint) -> Language {
    Language::load(checkpoint, Device::Cpu, models::stored_kind(checkpoint)).unwrap()
}

/// A model rounded to nearest, and written in a layout; the rounded one.
pub fn quantized(from: &Path, spec: &str, layout: Layout, to: &Path) -> Language {
    let checkpoint = Checkpoint::open_dir(from).unwrap();
    let mut model = load(&checkpoint);
    let (names, spec): (_, QuantSpec) = (model.names().unwrap(), spec.parse().unwrap());
    let rounded = round(model.decoder_mut(), &names, &spec).unwrap();
    let made = Made { method: "rtn".into(), source: Origin::of(&checkpoint).unwrap() };
    export(&mut model, &names, &rounded, &spec, &made, &checkpoint, layout, to).unwrap();
    model
}

pub fn converted(from: &Path, to: Layout, dir: &Path) -> mbq::Result<()> {
    let interrupt = Interrupt::never();
    convert(&Checkpoint::open_dir(from).unwrap(), to, dir, &interrupt, &mut |_, _| {}).map(|_| ())
}

/// Logits of some embedded rows, `[rows, vocab]`, float32.
pub fn logits(model: &mut Language, rows: usize) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    let dims = model.decoder().dims().clone();
    let values: Vec<f32> =
        (0..rows as i64 * dims.hidden).map(|i| ((i * 7919 % 1013) as f32 / 506.5 - 1.0) * 2.0).collect();
    let x = Tensor::from_slice(&values).view([rows as i64, dims.hidden]);
    let batch = Batch::new(Ragged::contiguous(&[(SeqId(0), 0, rows)]), Input::Embeds(&x));
    let model = model.model_mut();
    let hidden = model.forward(&batch, &mut NoCache::new(), None).unwrap().hidden;
    model.logits(&hidden).unwrap().to_kind(Kind::Float)
}

pub fn relative(found: &Tensor, expected: &Tensor) -> f64 {
    f64::try_from((found - expected).norm() / expected.norm()).unwrap()
}

/// The tensors of a checkpoint.
pub fn tensors(dir: &Path) -> HashMap<String, Tensor> {
    let checkpoint = Checkpoint::open_dir(dir).unwrap();
    let root = checkpoint.root(Device::Cpu, Kind::Float);
    checkpoint.names().map(|n| (n.to_owned(), root.stored(n).unwrap())).collect()
}

/// A copy of a checkpoint with something changed.
pub fn changed(from: &Path, to: &Path, change: impl FnOnce(&mut HashMap<String, Tensor>, &mut Value)) {
    let (mut all, mut config) = (tensors(from), read_json(&from.join("config.json")));
    change(&mut all, &mut config);
    save(to, all, &config, u64::MAX).unwrap();
}

/// Copies all parts of a layer's name.
pub fn layer_of(tensors: &HashMap<String, Tensor>, part: &str) -> String {
    let mut all: Vec<&str> = tensors.keys().filter_map(|n| n.strip_suffix(part)?.strip_suffix('.')).collect();
    all.sort_unstable();
    all[0].to_owned()
}

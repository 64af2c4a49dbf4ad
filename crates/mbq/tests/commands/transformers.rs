//! What is exported loads elsewhere: transformers reads our compressed-tensors directories and computes what we do.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use mbq::language::Language;
use nics_core::cache::NoCache;
use nics_core::checkpoint::{Checkpoint, DEFAULT_SHARD_BYTES, save};
use nics_core::models::{Batch, Embedded, Input, Model};
use nics_core::seam::{Ragged, SeqId};
use nics_core::tch::{Device, Kind, Tensor};
use nics_core::vision::{Media, Processor, picture};

use super::kit::run;
use crate::args;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden").join(name)
}

/// Ids, logits and pixels of one prompt, as the script reads them.
fn expected(dir: &Path, ids: &[i64], picture_file: Option<&Path>) -> HashMap<String, Tensor> {
    let _no_grad = tch::no_grad_guard();
    let checkpoint = Checkpoint::open_dir(dir).unwrap();
    let model = Language::load(&checkpoint, Device::Cpu, Kind::Float).unwrap();
    let mut all = HashMap::new();
    let (hidden, ids) = match picture_file {
        None => {
            let t = Tensor::from_slice(ids);
            let batch = Batch::new(Ragged::contiguous(&[(SeqId(0), 0, ids.len())]), Input::Ids(&t));
            (model.decoder().forward(&batch, &mut NoCache::new(), None).unwrap().hidden, ids.to_vec())
        }
        Some(file) => {
            let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
            let media = [Media::Image(picture::open(file).unwrap())];
            let prompt = Processor::open(&checkpoint).unwrap().prompt(&ids, &media).unwrap();
            all.insert("pixel_values".to_owned(), prompt.media[0].media.pixels.shallow_clone());
            let vlm = model.vlm().unwrap();
            let embedded = vlm.embed_prompt(&prompt).unwrap();
            let (rows, x) = Embedded::batch(&[(SeqId(0), &embedded)]).unwrap();
            let out = vlm.forward(&Batch::new(rows, Input::Embeds(&x)), &mut NoCache::new(), None).unwrap();
            (out.hidden, prompt.ids.iter().map(|id| i64::from(*id)).collect())
        }
    };
    all.insert("logits".to_owned(), model.decoder().logits(&hidden).unwrap());
    all.insert("ids".to_owned(), Tensor::from_slice(&ids));
    all
}

/// A copy of a checkpoint in float32: weights and scales of half precision would be rounded once more on the way, here and
/// there at other places.
fn in_float(model: &Path, to: &Path) {
    let checkpoint = Checkpoint::open_dir(model).unwrap();
    let root = checkpoint.root(Device::Cpu, Kind::Float);
    let tensors: Vec<_> =
        checkpoint.names().map(|n| (n.to_owned(), root.stored(n).unwrap().to_kind(Kind::Float))).collect();
    let mut config = serde_json::Value::Object(checkpoint.config_json().clone());
    config["dtype"] = "float32".into();
    save(to, tensors, &config, DEFAULT_SHARD_BYTES).unwrap();
    if let Some(from) = checkpoint.try_file("preprocessor_config.json").unwrap() {
        std::fs::copy(from, to.join("preprocessor_config.json")).unwrap();
    }
}

/// Needs the variable `NICS_PYTHON`: a Python with transformers from 5 on and compressed-tensors.
#[test]
#[ignore = "long: needs NICS_PYTHON"]
fn transformers_loads_a_compressed_tensors_export() {
    let python = std::env::var_os("NICS_PYTHON")
        .expect("NICS_PYTHON is to name a Python with torch, transformers 5 and compressed-tensors");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/load_export.py");
    let llava = golden("vision/llava");
    let cases = [
        (golden("qwen2"), "w4g16", vec![3i64, 141, 59, 26, 5, 35, 89, 79, 32, 38], None),
        (golden("llama"), "w8g16", vec![1, 61, 80, 33, 98, 87, 49, 89, 48, 20], None),
        (llava.clone(), "w4g16", vec![71, 84, 7, 75, 95, 26, 70, 82], Some(llava.join("wide.png"))),
    ];
    for (model, quant, ids, picture_file) in cases {
        let dir = tempfile::tempdir().unwrap();
        let name = model.display().to_string();
        let float = dir.path().join("model");
        in_float(&model, &float);
        let [dense, compressed] = ["dense", "compressed-tensors"].map(|layout| {
            let to = dir.path().join(layout);
            run(args![
                "quantize", "--model", float, "--method", "rtn", "--quant", quant, "--layout", layout,
                "--out", to
            ])
            .ok();
            to
        });
        let file = dir.path().join("expected.safetensors");
        let named: Vec<(String, Tensor)> =
            expected(&dense, &ids, picture_file.as_deref()).into_iter().collect();
        Tensor::write_safetensors(&named, &file).unwrap();
        let said =
            std::process::Command::new(&python).arg(&script).args([&compressed, &file]).output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
        println!("{name}, {quant}: {out}");
        assert!(said.status.success(), "{name}: {out}\n{err}");
    }
}

//! From one layout to ours and back: the same files. And each of them loads, and computes the same.

use std::path::Path;

use mbq::export::Layout;
use mbq::packed::open;
use mbq::stored::Stored;
use nics_core::checkpoint::Checkpoint;
use nics_core::tch::{Device, Kind, Tensor};
use serde_json::json;

use crate::kit::{changed, converted, load, logits, model, quantized, tensors};

const FILES: [&str; 2] = ["config.json", "model.safetensors"];

fn same_files(a: &Path, b: &Path) {
    for file in FILES {
        assert!(
            std::fs::read(a.join(file)).unwrap() == std::fs::read(b.join(file)).unwrap(),
            "{file} of {} and {}",
            a.display(),
            b.display()
        );
    }
}

/// Loads a checkpoint and its packed form, which compute the same, and writes the packed form back: the same files.
fn there_and_back(from: &Path, layout: Layout) {
    let (packed, back) = (from.with_extension("packed"), from.with_extension("back"));
    converted(from, Layout::Packed, &packed).unwrap();
    converted(&packed, layout, &back).unwrap();
    same_files(from, &back);
    let of = |dir: &Path| logits(&mut load(&open(Checkpoint::open_dir(dir).unwrap(), None).unwrap()), 5);
    assert!(of(from).equal(&of(&packed)), "{}", from.display());
    let written = Checkpoint::open_dir(&packed).unwrap();
    let stored = Stored::of(&written).unwrap().unwrap();
    stored.verify(&written.root(Device::Cpu, Kind::Float)).unwrap();
}

#[test]
fn every_layout() {
    for family in ["vision/internvl2", "vision/qwen2-vl", "qwen2"] {
        let dir = tempfile::tempdir().unwrap();
        for kind in [Kind::Float, Kind::BFloat16] {
            let own = dir.path().join(format!("{kind:?}"));
            std::fs::create_dir(&own).unwrap();
            let from = model(family, kind, &own);
            for (spec, layout) in [
                ("w4g32", Layout::Awq),
                ("w2g32", Layout::Gptq),
                ("w3g32", Layout::Gptq),
                ("w4row", Layout::Gptq),
                ("w8g32", Layout::Gptq),
                ("w4g32", Layout::Compressed),
                ("w8row", Layout::Compressed),
            ] {
                let to = own.join(format!("{spec}-{layout}"));
                quantized(&from, spec, layout, &to);
                there_and_back(&to, layout);
            }
        }
    }
}

/// Older forms of GPTQ and compressed-tensors, and their symmetric weights.
#[test]
fn every_form_of_zero_points() {
    let dir = tempfile::tempdir().unwrap();
    let from = model("llama", Kind::Float, dir.path());
    let gptq = dir.path().join("second");
    quantized(&from, "w3g32", Layout::Gptq, &gptq);
    let first = dir.path().join("first");
    changed(&gptq, &first, |tensors, config| {
        config["quantization_config"].as_object_mut().unwrap().remove("checkpoint_format");
        for (_, t) in tensors.iter_mut().filter(|(n, _)| n.ends_with("qzeros")) {
            *t = less_one(t, 3);
        }
    });
    there_and_back(&first, Layout::Gptq);
    let of = |dir: &Path| logits(&mut load(&open(Checkpoint::open_dir(dir).unwrap(), None).unwrap()), 5);
    assert!(of(&first).equal(&of(&gptq)));

    let compressed = dir.path().join("compressed");
    quantized(&from, "w4g32", Layout::Compressed, &compressed);
    let signed = dir.path().join("signed");
    changed(&compressed, &signed, |tensors, _| {
        for (_, t) in tensors.iter_mut().filter(|(n, _)| n.ends_with("weight_zero_point")) {
            *t = (unpacked(t, 4) - 8).to_kind(Kind::Int8);
        }
    });
    there_and_back(&signed, Layout::Compressed);
    assert!(of(&signed).equal(&of(&compressed)));

    let symmetric = dir.path().join("symmetric");
    changed(&compressed, &symmetric, |tensors, config| {
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = json!(true);
        tensors.retain(|n, _| !n.ends_with("weight_zero_point"));
    });
    there_and_back(&symmetric, Layout::Compressed);
    assert!(!of(&symmetric).equal(&of(&compressed)));
}

/// Values of a matrix of words along the rows, `[words, columns]` to `[rows, columns]`.
fn unpacked(t: &Tensor, bits: u8) -> Tensor {
    let (words, columns) = t.size2().unwrap();
    let turned = t.transpose(0, 1).contiguous();
    let all: Vec<i32> = Vec::try_from(turned.view([-1])).unwrap();
    let rows = words as usize * 32 / usize::from(bits);
    let values: Vec<i64> = all
        .chunks(words as usize)
        .flat_map(|c| {
            let words: Vec<u32> = c.iter().map(|w| w.cast_unsigned()).collect();
            mbq::layout::unstream(&words, bits, rows)
        })
        .map(i64::from)
        .collect();
    Tensor::from_slice(&values).view([columns, rows as i64]).transpose(0, 1).contiguous()
}

/// Zero points less one, in rows of words.
fn less_one(t: &Tensor, bits: u8) -> Tensor {
    let (rows, words) = t.size2().unwrap();
    let values = unpacked(&t.transpose(0, 1).contiguous(), bits).transpose(0, 1).contiguous();
    let values: Vec<i64> = Vec::try_from(values.view([-1])).unwrap();
    let mask = u8::MAX >> (8 - bits);
    let values: Vec<u8> = values.into_iter().map(|v| (v as u8).wrapping_sub(1) & mask).collect();
    let all: Vec<i32> = values
        .chunks(words as usize * 32 / usize::from(bits))
        .flat_map(|row| mbq::layout::stream(row, bits))
        .map(u32::cast_signed)
        .collect();
    Tensor::from_slice(&all).view([rows, words])
}

/// What was quantized here goes out of our own layout as it goes out directly, where scales are float16.
#[test]
fn out_of_our_own_layout() {
    let dir = tempfile::tempdir().unwrap();
    let from = model("vision/llava", Kind::Float, dir.path());
    for (spec, layout) in [("w4g32", Layout::Awq), ("w3g32", Layout::Gptq), ("w3g32", Layout::Dense)] {
        let [own, direct, out] =
            ["own", "direct", "out"].map(|n| dir.path().join(format!("{n}-{spec}-{layout}")));
        quantized(&from, spec, Layout::Packed, &own);
        quantized(&from, spec, layout, &direct);
        converted(&own, layout, &out).unwrap();
        if layout == Layout::Dense {
            // The scales of dense weights were float32.
            let (direct, out) = (tensors(&direct), tensors(&out));
            assert_eq!(direct.len(), out.len());
            assert!(out.iter().all(|(n, t)| t.allclose(&direct[n], 1e-3, 1e-6, false)));
        } else {
            same_files(&direct, &out);
        }
    }
    // Activations that are rounded have no place in other layouts.
    let own = dir.path().join("w4a8");
    quantized(&from, "w4a8", Layout::Packed, &own);
    let refused = converted(&own, Layout::Awq, &dir.path().join("awq")).unwrap_err().to_string();
    assert!(refused.contains("activations are rounded"), "{refused}");
    converted(&own, Layout::Dense, &dir.path().join("dense")).unwrap();
    for (to, says) in [(Layout::Packed, "is stored as packed already"), (Layout::Dense, "is there already")] {
        let refused =
            converted(&own, to, &dir.path().join(if to == Layout::Dense { "dense" } else { "new" }));
        assert!(refused.unwrap_err().to_string().contains(says));
    }
    assert!(
        converted(&from, Layout::Packed, &dir.path().join("new"))
            .unwrap_err()
            .to_string()
            .contains("is not quantized")
    );
}

//! From captions to a quantized checkpoint, for every family.

use std::path::Path;

use mbq::artefact::{REPORT, SCALES};
use mbq::language::Language;
use nics_core::checkpoint::Checkpoint;
use nics_core::tch::{Device, Kind};
use serde_json::Value;

use crate::args;
use crate::kit::{FAMILIES, run};

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn every_family() {
    let dir = tempfile::tempdir().unwrap();
    for family in FAMILIES {
        let (model, data) = (family.model(dir.path()), family.captions(dir.path()));
        let out = dir.path().join(format!("{}-scales", family.name));
        let calibrate = |format: &str, out: &Path| {
            run(args![
                "calibrate",
                "--model",
                model,
                "--data",
                data,
                "--samples",
                "4",
                "--quant",
                "w4g16",
                "--chunk",
                "2",
                "--format",
                format,
                "--out",
                out
            ])
        };
        let said = calibrate("plain", &out).ok();
        assert!(said.contains("4 samples of") && said.contains("image"), "{said}");
        assert!(said.contains("an error on image weighs"), "{said}");
        // Once more: nothing is searched again, and the files are the same.
        let before = [SCALES, REPORT].map(|f| std::fs::read(out.join(f)).unwrap());
        calibrate("plain", &out).ok();
        assert!(before == [SCALES, REPORT].map(|f| std::fs::read(out.join(f)).unwrap()), "{}", family.name);
        let report = json(&out.join(REPORT));
        let first = report["layers"][0][0]["linears"][0].as_str().unwrap();
        assert_eq!(first.ends_with("attention.wqkv"), family.name == "internvl2", "{first}");

        calibrate("few-shot", &dir.path().join(format!("{}-pairs", family.name))).ok();
        let shown = run(args!["inspect", out]).ok();
        assert!(shown.contains(first) && shown.contains("weights of \"image\""), "{shown}");
        let lines = run(args!["inspect", out, "--json"]).ok();
        assert!(lines.lines().all(|l| serde_json::from_str::<Value>(l).is_ok()));

        for layout in ["dense", "autoawq", "gptq", "compressed-tensors"] {
            let to = dir.path().join(format!("{}-{layout}", family.name));
            let said =
                run(args!["quantize", "--model", model, "--scales", out, "--layout", layout, "--out", to])
                    .ok();
            assert!(said.contains("of 2 decoder layers") && said.contains("w4g16"), "{said}");
            assert!(to.join("tokenizer.json").exists());
            let written = Checkpoint::open_dir(&to);
            let config = json(&to.join("config.json"));
            if layout == "dense" {
                let written = written.unwrap();
                let mut loaded = Language::load(&written, Device::Cpu, Kind::Float).unwrap();
                // The weights are those of the original no more.
                let original = Checkpoint::open_dir(&model).unwrap();
                let names = loaded.names().unwrap();
                let name = format!("{}.weight", loaded.quantized(&names)[0]);
                let of = |c: &Checkpoint| c.root(Device::Cpu, Kind::Float).stored(&name).unwrap();
                assert!(!of(&written).equal(&of(&original)));
                assert!(config["quantization_config"].is_null());
            } else {
                let quantization = &config["quantization_config"];
                let (kept, packed) = match layout {
                    "compressed-tensors" => ("ignore", "weight_packed"),
                    _ => ("modules_to_not_convert", "qweight"),
                };
                let kept = quantization[kept].as_array().unwrap();
                let sees = |n: &Value| {
                    n.as_str().unwrap().starts_with(if family.name == "qwen2-vl" {
                        "visual"
                    } else {
                        "vision"
                    })
                };
                assert!(kept.iter().any(sees), "{kept:?}");
                assert!(kept.iter().all(|n| n != first));
                let written = written.unwrap();
                assert!(written.shape(&format!("{first}.{packed}")).is_some());
                assert!(written.shape(&format!("{first}.weight")).is_none());
            }
        }
    }
}

#[test]
fn every_method() {
    let dir = tempfile::tempdir().unwrap();
    let family = &FAMILIES[2];
    let (model, data) = (family.model(dir.path()), family.captions(dir.path()));
    for (method, quant) in [
        ("mbq", "w4a8"),
        ("awq", "w3g16"),
        ("awq-full", "w4g16"),
        ("gptq", "w4g16"),
        ("smoothquant", "w8a8"),
        ("rtn", "w3row"),
    ] {
        let to = dir.path().join(method);
        let said = run(args![
            "quantize",
            "--model",
            model,
            "--method",
            method,
            "--data",
            data,
            "--samples",
            "2",
            "--quant",
            quant,
            "--out",
            to
        ])
        .ok();
        assert!(said.contains(quant), "{said}");
        Language::load(&Checkpoint::open_dir(&to).unwrap(), Device::Cpu, Kind::Float).unwrap();
    }
}

#[test]
fn texts_alone_and_between() {
    let dir = tempfile::tempdir().unwrap();
    let family = &FAMILIES[0];
    let (model, data) = (family.model(dir.path()), family.captions(dir.path()));
    let text = |n: usize| format!("{{\"text\": \"{}\"}}", "w1 w2 w3 ".repeat(n));
    let short = dir.path().join("short.jsonl");
    std::fs::write(&short, [text(100), text(120), text(90)].join("\n")).unwrap();
    let out = dir.path().join("texts");
    let said = run(args!["calibrate", "--model", model, "--texts", short, "--quant", "w4g16", "--out", out]);
    assert!(said.ok().contains("1 samples of 512 positions"));
    let long = dir.path().join("long.jsonl");
    std::fs::write(&long, [text(180), text(200)].join("\n")).unwrap();
    let out = dir.path().join("between");
    let said = run(args![
        "calibrate",
        "--model",
        model,
        "--data",
        data,
        "--texts",
        long,
        "--format",
        "interleave",
        "--samples",
        "2",
        "--quant",
        "w4g16",
        "--out",
        out
    ])
    .ok();
    assert!(said.contains("1 samples of"), "{said}");
}

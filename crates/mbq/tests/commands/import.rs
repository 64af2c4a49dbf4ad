//! Scales of the official code: files of real `torch.save` (tests/python/official_scales.py), sound ones and others.

use std::path::{Path, PathBuf};

use mbq::QuantSpec;
use mbq::artefact::{REPORT, SCALES};
use mbq::quantize::fake_quant_group;
use nics_core::checkpoint::{Checkpoint, TensorPath};
use nics_core::tch::{Device, Kind};
use serde_json::Value;

use crate::args;
use crate::kit::{FAMILIES, Ran, run};

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/official").join(name).with_extension("pt")
}

fn import(file: &Path, model: &Path, out: &Path) -> Ran {
    run(args!["import", file, "--model", model, "--quant", "w3g16", "--out", out])
}

/// What the script writes into operator `n`.
fn expected(n: usize, width: usize) -> Vec<f32> {
    (0..width).map(|i| 0.5 + ((7 * i + 3 * n) % 16) as f32 / 8.0).collect()
}

/// Scales of every dtype become those of the model, under its own names, whatever the file calls the decoder.
#[test]
fn sound_files() {
    let dir = tempfile::tempdir().unwrap();
    for (family, name) in [(0, "qwen"), (1, "half"), (2, "qwen"), (2, "half"), (3, "intern")] {
        let family = &FAMILIES[family];
        let under = dir.path().join(format!("{}-{name}", family.name));
        std::fs::create_dir(&under).unwrap();
        let (model, out) = (family.model(&under), under.join("scales"));
        let said = import(&file(name), &model, &out).ok();
        assert!(said.contains("scales of 6 operators in 2 layers, for w3g16"), "{said}");
        let report: Value = serde_json::from_slice(&std::fs::read(out.join(REPORT)).unwrap()).unwrap();
        assert_eq!(report["imported"]["file"], format!("{name}.pt"));
        assert!(report["config"].is_null() && report["data_hash"].is_null(), "{report}");
        let tensors = TensorPath::from_file(&out.join(SCALES)).unwrap();
        for n in 0..6 {
            let op = &report["layers"][n / 3][n % 3];
            assert!(op["exponent"].is_null() && op["losses"].as_array().unwrap().is_empty());
            let linears: Vec<&str> =
                op["linears"].as_array().unwrap().iter().map(|l| l.as_str().unwrap()).collect();
            let key = format!("{}|{}", op["previous"].as_str().unwrap(), linears.join(","));
            let found = Vec::<f32>::try_from(tensors.stored(&key).unwrap()).unwrap();
            assert_eq!(found, expected(n, if n % 3 == 2 { 48 } else { 32 }), "{key}");
        }
        let shown = run(args!["inspect", out]).ok();
        assert!(shown.contains(&format!("imported from {name}.pt")) && shown.lines().count() == 7, "{shown}");
        let lines = run(args!["inspect", out, "--json"]).ok();
        assert_eq!(lines.lines().count(), 6);
    }
}

/// Imported scales are folded and rounded as searched ones are.
#[test]
fn whoever_takes_scales_takes_imported_ones() {
    let dir = tempfile::tempdir().unwrap();
    let family = &FAMILIES[2];
    let (model, out) = (family.model(dir.path()), dir.path().join("scales"));
    import(&file("qwen"), &model, &out).ok();
    let scaled = dir.path().join("scaled");
    let said = run(args!["quantize", "--model", model, "--scales", out, "--out", scaled]).ok();
    assert!(said.contains("w3g16, stored as dense"), "{said}");
    // By hand: folded in float32, cast to the model's float16, rounded by group.
    let weight = |folder: &Path, name: &str| {
        let checkpoint = Checkpoint::open_dir(folder).unwrap();
        checkpoint.root(Device::Cpu, Kind::Float).stored(name).unwrap().to_kind(Kind::Float)
    };
    let tensors = TensorPath::from_file(&out.join(SCALES)).unwrap();
    let report: Value = serde_json::from_slice(&std::fs::read(out.join(REPORT)).unwrap()).unwrap();
    let op = &report["layers"][1][0];
    let (previous, q) = (op["previous"].as_str().unwrap(), op["linears"][0].as_str().unwrap());
    let linears: Vec<&str> = op["linears"].as_array().unwrap().iter().map(|l| l.as_str().unwrap()).collect();
    let s = tensors.stored(&format!("{previous}|{}", linears.join(","))).unwrap();
    let norm = weight(&scaled, &format!("{previous}.weight"));
    assert!((norm * &s).allclose(&weight(&model, &format!("{previous}.weight")), 1e-3, 1e-6, false));
    let folded = (weight(&model, &format!("{q}.weight")) * &s).to_kind(Kind::Half).to_kind(Kind::Float);
    let by_hand = fake_quant_group(&folded, &QuantSpec::weights(3, 16)).unwrap();
    assert!(weight(&scaled, &format!("{q}.weight")).allclose(&by_hand, 1e-3, 1e-6, false));
    let packed = dir.path().join("packed");
    let said = run(args!["pack", model, "--scales", out, "--out", packed]).ok();
    assert!(said.contains("14 linear layers") && said.contains("w3g16"), "{said}");
}

/// A run of the reference, whose scales were recorded, and its model, which is no checkpoint of ours: straight through the library.
#[test]
fn scales_that_the_reference_found() {
    use mbq::operators::Names;
    use nics_core::models;
    use serde_json::json;

    let golden = nics_core::golden::Golden::at(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden"));
    let at = TensorPath::from_file(&golden.path("07_llama_model.safetensors")).unwrap();
    let config = json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 61,
        "rope_theta": 1e4, "rms_norm_eps": 1e-6});
    let config = models::config(config.as_object().unwrap()).unwrap();
    let under = if at.has("model.norm.weight") { at } else { at.at("language_model") };
    let mut decoder = models::load_at(config, &under).unwrap();
    let names = Names::of(&decoder, "model.layers");
    let spec = QuantSpec::weights(3, 16);
    let scales = mbq::official::read(&file("golden"), &mut decoder, &names, spec).unwrap();
    let recorded = TensorPath::from_file(&golden.path("07_llama_w3_mae_rw.safetensors")).unwrap();
    // With as many heads for keys as for queries, values and output are scaled too.
    assert_eq!(scales.layers.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4]);
    for (i, op) in scales.layers.iter().flatten().enumerate() {
        assert!(op.scales.equal(&recorded.stored(&format!("op{i}.scales")).unwrap()), "{:?}", op.linears);
    }
}

#[test]
fn what_is_wrong_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (FAMILIES[2].model(dir.path()), dir.path().join("out"));
    for (name, says) in [
        ("nan", "mlp.up_proj: that of channel 5 is NaN, expected a positive number"),
        ("zero", "model.layers.1.mlp.up_proj: that of channel 5 is 0, expected a positive number"),
        ("width", "they have shape [16], expected [32]"),
        ("column", "they have shape [48, 1], expected [48]"),
        ("integers", "they are Int64, expected floats"),
        (
            "previous",
            "are to be folded into model.layers.0.mlp.gate_proj, expected model.layers.0.mlp.up_proj",
        ),
        ("pair", "entry 2 of its `scale` is no (previous, (linear, …), scales)"),
        ("parameter", "its pickle asks for torch._utils._rebuild_parameter"),
        ("function", "print, which is not on the list of what a checkpoint needs; nothing was run"),
        ("missing", "it has no scales of model.layers.1.mlp.down_proj"),
        ("twice", "model.layers.0.self_attn.v_proj twice"),
        ("deeper", "which are not scaled together in this model of 2 layers"),
        ("tower", "is no part of the language model"),
        ("clipped", "it holds `clip`"),
        ("smooth", "it has the field `model.layers.0.self_attn.q_proj`, expected `scale` alone"),
        ("list", "it holds a list, expected a dictionary with `scale`"),
        ("legacy", "not a sound zip archive as torch.save writes it"),
    ] {
        let said = import(&file(name), &model, &out);
        assert!(said.err.contains(&format!("{name}.pt")), "{}", said.err);
        said.refused(1, says);
        assert!(!out.exists(), "{name}");
    }
    let whole = std::fs::read(file("qwen")).unwrap();
    let cut = dir.path().join("cut.pt");
    for length in [0, 1, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&cut, &whole[..length]).unwrap();
        import(&cut, &model, &out).refused(1, "not a sound zip archive");
    }
    import(&dir.path().join("gone.pt"), &model, &out).refused(1, "gone.pt");
    import(dir.path(), &model, &out).refused(1, "it is not a file");
    // Another family's names, another family's widths.
    import(&file("intern"), &model, &out).refused(1, "it has no scales of");
    import(&file("golden"), &model, &out).refused(1, "expected [");
    // Groups that do not fit, and no specification.
    let all = args!["import", file("qwen"), "--model", model, "--out", out];
    run(all.iter().chain(&args!["--quant", "w3g128"])).refused(1, "groups of 128 weights do not divide");
    run(all).refused(2, "--quant");
    // Where scales are taken, a file is not.
    run(args!["quantize", "--model", model, "--scales", file("qwen"), "--out", out])
        .refused(1, "`mbq import` makes one of a .pt file");
    import(&file("qwen"), &model, &out).ok();
    import(&file("qwen"), &model, &out).refused(1, "is there already");
    // Scales belong to the model that they were imported for.
    let other = FAMILIES[0].model(dir.path());
    run(args!["quantize", "--model", other, "--scales", out, "--out", dir.path().join("x")])
        .refused(1, "model's architecture");
}

//! Quantized checkpoints measured as they are stored, and the commands that take one, or say why not.

use std::path::{Path, PathBuf};

use mbq::evaluation::figures::{REPORT, Report, ScoredReply};
use mbq::inventory::Inventory;
use nics_core::checkpoint::{Checkpoint, save_file};
use nics_core::tch::{Device, Kind, Tensor};
use serde_json::{Value, json};

use crate::args;
use crate::kit::{FAMILIES, Family, Ran, run};

/// What the harness puts behind a question of TextVQA.
const ENDING: &str = "\nAnswer the question using a single word or phrase.";
const QUESTIONS: [&str; 3] = ["w3 w4 w5", "w7 w8", "w40 w2 w61 w9"];

/// TextVQA with questions about the family's picture.
fn questions(family: &Family, dir: &Path) -> PathBuf {
    let to = dir.join(format!("{}-questions", family.name));
    std::fs::create_dir(&to).unwrap();
    let row = |(i, q): (usize, &&str)| {
        json!({"question_id": i, "question": q, "answers": ["w1"], "image": family.image()}).to_string()
    };
    let rows: Vec<String> = QUESTIONS.iter().enumerate().map(row).collect();
    std::fs::write(to.join("validation.jsonl"), rows.join("\n")).unwrap();
    to
}

fn eval(model: &Path, data: &Path, out: &Path, more: &[&str]) -> Ran {
    let all = args!["eval", "--model", model, "--tasks", "textvqa", "--data", data, "--out", out];
    let mut all = all.to_vec();
    all.extend(["--max-new-tokens", "6"].iter().chain(more).map(Into::into));
    run(all)
}

fn layers(out: &Path) -> Inventory {
    serde_json::from_slice::<Report>(&std::fs::read(out.join(REPORT)).unwrap()).unwrap().layers
}

fn texts(out: &Path) -> Vec<String> {
    let all: Vec<ScoredReply> = nics_base::jsonl::read(out.join("items-textvqa.jsonl")).unwrap();
    all.into_iter().map(|r| r.reply.text).collect()
}

/// The model rounded to nearest, in a layout.
fn stored(model: &Path, quant: &str, layout: &str) -> PathBuf {
    let to = model.with_extension(format!("{quant}-{layout}"));
    let all = args!["quantize", "--model", model, "--method", "rtn", "--quant", quant, "--layout", layout];
    run(all.iter().chain(&args!["--out", to])).ok();
    to
}

/// What `mbq generate` answers to the same questions, as the harness puts them: with a large letter in front.
fn answers(family: &Family, model: &Path, more: &[&str]) -> Vec<String> {
    let ask = |q: &&str| {
        let prompt = format!("W{}{ENDING}", &q[1..]);
        let all = args!["generate", "--model", model, "--image", family.image(), "--prompt", prompt];
        let mut all = all.to_vec();
        all.extend(["--greedy", "--max-new-tokens", "6", "--json"].iter().chain(more).map(Into::into));
        let line: Value = serde_json::from_str(&run(all).ok()).unwrap();
        line["text"].as_str().unwrap().to_owned()
    };
    QUESTIONS.iter().map(ask).collect()
}

/// The model in float32.
fn float32(model: &Path) {
    let checkpoint = Checkpoint::open_dir(model).unwrap();
    let root = checkpoint.root(Device::Cpu, Kind::Float);
    let tensors: Vec<(String, Tensor)> = checkpoint
        .names()
        .map(|name| (name.to_owned(), root.stored(name).unwrap().to_kind(Kind::Float)))
        .collect();
    save_file(&model.join("model.safetensors"), tensors, &[]).unwrap();
}

/// Packed weights mean those that `mbq export --to dense` writes; the layers are those that are rounded in memory.
#[test]
fn every_family_packed_as_dense_and_as_rounded_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    for family in FAMILIES {
        let (model, data) = (family.model(dir.path()), questions(&family, dir.path()));
        float32(&model);
        let at = |name: &str| dir.path().join(format!("{}-{name}", family.name));
        let checkpoint = stored(&model, "w4row", "packed");
        let (packed, simulated, dense) = (at("packed"), at("simulated"), at("dense"));
        let said = eval(&checkpoint, &data, &packed, &[]);
        assert!(!said.err.contains("nothing is quantized"), "{}", said.err);
        said.ok();
        eval(&model, &data, &simulated, &["--rtn", "w4row"]).ok();
        assert_eq!(layers(&packed), layers(&simulated), "{}", family.name);
        assert!(layers(&packed).decoder["w4row"].weights > 0);
        run(args!["export", checkpoint, "--to", "dense", "--out", at("exported")]).ok();
        let said = eval(&at("exported"), &data, &dense, &[]);
        assert!(said.err.contains("nothing is quantized"), "{}", said.err);
        said.ok();
        // Inputs in 16 bits are next to those that are not rounded.
        assert_eq!(texts(&packed), texts(&dense), "{}", family.name);
        let float = at("float");
        eval(&model, &data, &float, &[]).ok();
        assert_ne!(texts(&packed), texts(&float), "{}", family.name);
    }
}

#[test]
fn every_layout_says_what_it_is_and_answers_as_generate_does() {
    let dir = tempfile::tempdir().unwrap();
    let family = &FAMILIES[2];
    let (model, data) = (family.model(dir.path()), questions(family, dir.path()));
    for (quant, layout, more, kind) in [
        ("w4row", "packed", &[][..], "w4row"),
        ("w4row", "packed", &["--act", "8"], "w4row A8"),
        ("w4row", "autoawq", &[], "w4row"),
        ("w4row", "compressed-tensors", &[], "w4row"),
        ("w8row", "gptq", &[], "w8row"),
        // Inputs too, to widths that kernels have and have not.
        ("w4a8", "packed", &[], "w4a8"),
        ("w4a8", "packed", &["--act", "16"], "w4row"),
        ("w4a6", "packed", &[], "w4a6"),
        // Without a kernel for such groups, so that the layers are dense in memory: they are quantized nevertheless.
        ("w3g16", "packed", &[], "w3g16"),
    ] {
        let checkpoint = model.with_extension(format!("{quant}-{layout}"));
        if !checkpoint.exists() {
            stored(&model, quant, layout);
        }
        let out = dir.path().join(format!("{quant}-{layout}{}", more.concat()));
        let said = eval(&checkpoint, &data, &out, more).ok();
        assert!(said.contains(&format!("linear layers of the decoder: 14 {kind};")), "{kind}: {said}");
        let found = layers(&out);
        assert_eq!(found.decoder.keys().collect::<Vec<_>>(), [kind]);
        assert_eq!(found.elsewhere.keys().collect::<Vec<_>>(), ["dense"]);
        let variant = std::fs::read_to_string(out.join("rows.jsonl")).unwrap();
        assert!(variant.contains(&format!("\"variant\":\"{kind}\"")), "{variant}");
        assert_eq!(texts(&out), answers(family, &checkpoint, more), "{quant} {layout} {more:?}");
    }
}

/// Replies are kept by what decides them: also by the configuration of quantized weights and `--act`.
#[test]
fn replies_of_other_settings_are_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let family = &FAMILIES[2];
    let (model, data) = (family.model(dir.path()), questions(family, dir.path()));
    let checkpoint = stored(&model, "w4a8", "packed");
    let out = dir.path().join("out");
    let name = |f: std::io::Result<std::fs::DirEntry>| f.unwrap().file_name().into_string().unwrap();
    let files = || std::fs::read_dir(&out).unwrap().map(name).filter(|f| f.starts_with("textvqa-")).count();
    eval(&checkpoint, &data, &out, &[]).ok();
    let once = files();
    eval(&checkpoint, &data, &out, &[]).ok();
    assert_eq!(files(), once);
    eval(&checkpoint, &data, &out, &["--act", "16"]).ok();
    assert_eq!(files(), 2 * once);
    let path = checkpoint.join("config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let other = config.replace("\"act_bits\": 8", "\"act_bits\": 6");
    assert_ne!(config, other);
    std::fs::write(path, other).unwrap();
    eval(&checkpoint, &data, &out, &[]).ok();
    assert_eq!(files(), 3 * once);
}

#[test]
fn who_takes_a_quantized_checkpoint_and_who_says_why_not() {
    let dir = tempfile::tempdir().unwrap();
    let family = &FAMILIES[0];
    let (model, data) = (family.model(dir.path()), questions(family, dir.path()));
    let captions = family.captions(dir.path());
    let packed = stored(&model, "w4row", "packed");
    let awq = stored(&model, "w4row", "autoawq");
    let (out, scales) = (dir.path().join("out"), dir.path().join("scales"));
    let calibrate = |model: &Path| {
        let all =
            args!["calibrate", "--model", model, "--data", captions, "--samples", "2", "--quant", "w4row"];
        run(all.iter().chain(&args!["--out", scales]))
    };
    calibrate(&model).ok();
    eval(&packed, &data, &out, &["--rtn", "w4row"]).refused(1, "--rtn is about float models");
    eval(&packed, &data, &out, &["--scales", scales.to_str().unwrap()]).refused(1, "is quantized already");
    eval(&model, &data, &out, &["--act", "8"]).refused(1, "`mbq pack` makes them");
    eval(&packed, &data, &out, &["--act", "3"]).refused(2, "8, 16 or dense");

    let mend =
        "give the one that it comes from (llava); `mbq eval` and `mbq generate` take a quantized model";
    calibrate(&packed).refused(1, mend);
    calibrate(&awq).refused(1, "llava.w4row-autoawq: the weights are quantized (awq)");
    let measure = args!["sensitivity", "--model", packed, "--data", captions, "--samples", "2", "--out", out];
    run(measure).refused(1, mend);
    run(args!["quantize", "--model", packed, "--scales", scales, "--out", out]).refused(1, mend);
    run(args!["pack", packed, "--scales", scales, "--out", out]).refused(1, mend);

    // Those that need no weights.
    let prepared = |model: &Path, name: &str| {
        let to = dir.path().join(name);
        run(args!["prepare-data", "--data", captions, "--model", model, "--out", to]).ok();
        std::fs::read(to).unwrap()
    };
    assert_eq!(prepared(&model, "a.json"), prepared(&awq, "b.json"));
    let shown = run(args!["inspect", awq]).ok();
    assert!(shown.contains("autoawq: 14 linear layers of 4 bits"), "{shown}");
    run(args!["inspect", model]).refused(1, "is not quantized");
    run(args!["inspect", dir.path().join("gone")]).refused(1, "gone");
}

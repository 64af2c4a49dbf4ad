//! Lists for a calibration, from captions as they are published.

use std::path::{Path, PathBuf};

use mbq::data::order::shuffled;
use mbq::data::prepare::{Reason, Report};
use serde_json::{Value, json};

use crate::args;
use crate::kit::{FAMILIES, Ran, run};

fn pictures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden/vision")
}

/// A data set: eight usable items, and one for each reason to leave one out.
fn data(dir: &Path) -> PathBuf {
    let item = |id: usize, image: Value, asked: &str, said: &str| {
        json!({"id": format!("i{id}"), "image": image, "conversations": [
            {"from": "human", "value": asked}, {"from": "gpt", "value": said}]})
    };
    let good = |id: usize| item(id, json!("qwen2-vl/wide.png"), "<image>\nw1 w2", "w3 w4 w5");
    let mut items: Vec<Value> = (0..6).map(good).collect();
    items.push(item(6, json!(["qwen2-vl/wide.png", "llava/small.png"]), "w1 <image> <image>", "w2"));
    let mut text = item(7, Value::Null, "w1", "w2 w3");
    text.as_object_mut().unwrap().remove("image");
    items.push(text);
    items.push(item(8, json!("qwen2-vl/gone.png"), "w1", "w2"));
    items.push(item(9, json!("qwen2-vl/config.json"), "w1", "w2"));
    items.push(item(10, json!("qwen2-vl/wide.png"), "<image> <image>", "w2"));
    items.push(item(11, json!("qwen2-vl/wide.png"), "w1", " "));
    items.push(item(12, json!("llava/small.png"), "w1", &"w2 ".repeat(300)));
    let path = dir.join("data.json");
    std::fs::write(&path, serde_json::to_string_pretty(&items).unwrap()).unwrap();
    path
}

fn prepare(data: &Path, out: &Path, more: &[&str]) -> Ran {
    let mut all = args!["prepare-data", "--data", data, "--image-dir", pictures(), "--out", out].to_vec();
    all.extend(more.iter().map(Into::into));
    run(all)
}

fn written(out: &Path) -> (Vec<Value>, Report) {
    let read = |path: &Path| std::fs::read(path).unwrap();
    let list = serde_json::from_slice(&read(out)).unwrap();
    (list, serde_json::from_slice(&read(&out.with_extension("report.json"))).unwrap())
}

fn dropped(report: &Report) -> Vec<(Reason, usize)> {
    report.dropped.iter().map(|d| (d.reason, d.items)).collect()
}

#[test]
fn what_is_left_out_is_counted_and_positions_are_those_of_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let data = data(dir.path());
    let model = FAMILIES[2].model(dir.path());
    let out = dir.path().join("list.json");
    let said = prepare(&data, &out, &["--model", model.to_str().unwrap(), "--max-len", "200"]).ok();
    let (list, report) = written(&out);
    assert_eq!(
        dropped(&report),
        [
            (Reason::Invalid, 1),
            (Reason::Places, 1),
            (Reason::ImageMissing, 1),
            (Reason::ImageUnreadable, 1),
            (Reason::TooLong, 1),
        ]
    );
    assert!(said.contains("8 of 13 items taken, 1 of text alone, 1 with several images"), "{said}");
    assert!(said.contains("name an image that is not there, e.g. ") && said.contains("gone.png"), "{said}");
    assert_eq!((report.items, report.candidates, report.looked_at, report.taken), (13, 11, 11, 8));
    let positions = report.positions.unwrap();
    assert_eq!(positions["image"].items, 7);
    // The tokenizer has a token a word; Qwen2-VL's answers include the header of their turn, and its end.
    assert_eq!(positions["answer"].least, 4);
    assert!(positions["image"].most > positions["image"].least);
    // As the calibration counts them.
    let scales = dir.path().join("scales");
    let said = run(args![
        "calibrate",
        "--model",
        model,
        "--data",
        out,
        "--in-order",
        "--image-dir",
        pictures(),
        "--samples",
        "8",
        "--quant",
        "w4g16",
        "--out",
        scales
    ])
    .ok();
    let counted = format!("{} answer, {} image", positions["answer"].sum, positions["image"].sum);
    assert!(said.contains(&counted), "{said}, expected {counted}");
    // Again: the same bytes.
    let before = std::fs::read(&out).unwrap();
    prepare(&data, &out, &["--model", model.to_str().unwrap(), "--max-len", "200"]).ok();
    assert_eq!(std::fs::read(&out).unwrap(), before);
    assert_eq!(list.len(), 8);
}

#[test]
fn the_order_is_that_of_the_published_calibrations() {
    let dir = tempfile::tempdir().unwrap();
    let data = data(dir.path());
    let out = dir.path().join("list.json");
    prepare(&data, &out, &["--images-of", "qwen2", "--samples", "4"]).ok();
    let (list, report) = written(&out);
    let ids: Vec<&str> = list.iter().map(|i| i["id"].as_str().unwrap()).collect();
    // Of the candidates in the shuffled order the first four that can be used.
    let candidates = ["i0", "i1", "i2", "i3", "i4", "i5", "i6", "i8", "i9"];
    let order = shuffled(candidates.len(), 42).into_iter().map(|i| candidates[i]);
    let usable: Vec<&str> = order.filter(|id| !["i8", "i9"].contains(id)).take(4).collect();
    assert_eq!(ids, usable);
    assert_eq!(report.positions, None);
    assert!(dropped(&report).contains(&(Reason::OtherImages, 1)));
    assert!(dropped(&report).contains(&(Reason::TextAlone, 1)));
    let said = prepare(&data, &out, &["--samples", "20", "--seed", "7", "--images-only"]);
    assert!(said.err.contains("fewer than 20 items can be used"), "{}", said.err);
    assert_ne!(written(&out).0.iter().map(|i| i["id"].clone()).collect::<Vec<_>>(), ids);
}

#[test]
fn annotation_files_of_coco() {
    let dir = tempfile::tempdir().unwrap();
    let images =
        json!([{"id": 1, "file_name": "qwen2-vl/wide.png"}, {"id": 2, "file_name": "llava/small.png"}]);
    let captions = dir.path().join("captions.json");
    std::fs::write(
        &captions,
        json!({"images": images, "annotations": [
            {"id": 2, "image_id": 1, "caption": "A wide one."}, {"id": 1, "image_id": 1, "caption": "Wide."}]})
        .to_string(),
    )
    .unwrap();
    let objects = dir.path().join("instances.json");
    std::fs::write(
        &objects,
        json!({"images": images, "categories": [{"id": 3, "name": "cat"}],
            "annotations": [{"id": 1, "image_id": 2, "category_id": 3, "bbox": [0.0, 0.0, 4.0, 4.0]}]})
        .to_string(),
    )
    .unwrap();
    let out = dir.path().join("list.json");
    prepare(&captions, &out, &["--data", objects.to_str().unwrap(), "--all-captions"]).ok();
    let (list, report) = written(&out);
    let mut answers: Vec<&str> =
        list.iter().map(|i| i["conversations"][1]["value"].as_str().unwrap()).collect();
    answers.sort_unstable();
    assert_eq!(answers, ["1 cat", "Wide. A wide one."]);
    assert_eq!(dropped(&report), [(Reason::Invalid, 2)]);
    assert_eq!(report.files.len(), 2);
}

#[test]
fn what_cannot_be_prepared_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (data(dir.path()), dir.path().join("list.json"));
    prepare(&dir.path().join("gone.json"), &out, &[]).refused(1, "gone.json");
    prepare(&data, &out, &["--images-of", "sa-1b"])
        .refused(1, "none of 13 items can be used: 1 are no items, 11 show");
    prepare(&data, &out, &["--max-len", "10"]).refused(2, "--model");
    prepare(&data, &out, &["--image-dir", "/nowhere/at/all"]).refused(2, "--image-dir");
    let bad = dir.path().join("bad.json");
    std::fs::write(&bad, "[{\"image\": ").unwrap();
    prepare(&bad, &out, &[]).refused(1, "bad.json, line 1");
    let text = FAMILIES[0].model(dir.path()).join("tokenizer_config.json");
    std::fs::write(&text, "{}").unwrap();
    prepare(&data, &out, &["--model", text.parent().unwrap().to_str().unwrap()])
        .refused(1, "has no chat template");
    assert!(!out.exists(), "nothing is written");
}

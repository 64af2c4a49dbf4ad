//! Answers about images and about text, with packed, exported and dense models.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use serde_json::Value;

use crate::args;
use crate::kit::{FAMILIES, Family, run};

/// The family's model rounded, in a layout.
fn quantized(family: &Family, model: &Path, quant: &str, layout: &str) -> PathBuf {
    let to = model.with_extension(layout);
    let all = args!["quantize", "--model", model, "--method", "rtn", "--quant", quant, "--layout", layout];
    run(all.iter().chain(&args!["--out", to])).ok();
    let _ = family;
    to
}

fn answer(model: &Path, more: &[std::ffi::OsString]) -> Value {
    let all = args!["generate", "--model", model, "--greedy", "--max-new-tokens", "6", "--json"];
    let said = run(all.iter().chain(more)).ok();
    assert_eq!(said.lines().count(), 1, "{said}");
    serde_json::from_str(&said).unwrap()
}

#[test]
fn every_family() {
    let dir = tempfile::tempdir().unwrap();
    for family in FAMILIES {
        let model = family.model(dir.path());
        let packed = quantized(&family, &model, "w8row", "packed");
        let dense = quantized(&family, &model, "w8row", "dense");
        let shown = args!["--image", family.image(), "--prompt", "w3 w4 w5"];
        let found = answer(&packed, &shown);
        // Inputs in 16 bits are next to those that are not rounded.
        assert_eq!(found["tokens"], answer(&dense, &shown)["tokens"], "{}", family.name);
        assert_eq!(
            found["tokens"],
            answer(&packed, &args!["--image", family.image(), "--prompt", "w3 w4 w5", "--act", "dense"])["tokens"]
        );
        assert!(found["image_tokens"].as_u64().unwrap() > 0, "{found}");
        assert_eq!(found["finish"], "length");
        // The same picture as a URL, twice, and none.
        let bytes = std::fs::read(family.image()).unwrap();
        let url =
            format!("data:image/png;base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes));
        assert_eq!(
            answer(&packed, &args!["--image", url, "--prompt", "w3 w4 w5"])["tokens"],
            found["tokens"]
        );
        let twice =
            answer(&packed, &args!["--image", url, "--image", family.image(), "--prompt", "w3 w4 w5"]);
        let tokens = |of: &Value| of["image_tokens"].as_u64().unwrap();
        // Tiles of one image become fewer where there are several.
        assert!(
            tokens(&twice) > 0 && (family.name == "llava-onevision" || tokens(&twice) == 2 * tokens(&found)),
            "{twice}"
        );
        assert_eq!(tokens(&answer(&packed, &args!["--prompt", "w3 w4 w5"])), 0);
    }
}

#[test]
fn exported_models_and_how_answers_are_shown() {
    let dir = tempfile::tempdir().unwrap();
    let family = &FAMILIES[2];
    let model = family.model(dir.path());
    let shown = args!["--image", family.image(), "--prompt", "w3 w4 w5"];
    let packed = quantized(family, &model, "w4row", "packed");
    let expected = answer(&packed, &shown);
    for layout in ["autoawq", "compressed-tensors"] {
        let exported = dir.path().join(layout);
        run(args!["export", packed, "--to", layout, "--out", exported]).ok();
        assert_eq!(answer(&exported, &shown)["tokens"], expected["tokens"], "{layout}");
    }
    let base = args!["generate", "--model", packed, "--greedy", "--max-new-tokens", "6"];
    let said = |more: &[std::ffi::OsString]| run(base.iter().chain(&shown).chain(more)).ok();
    let text = expected["text"].as_str().unwrap();
    assert_eq!(said(&[]), format!("{text}\n"));
    assert_eq!(said(&args!["--stream"]), format!("{text}\n"));
    let lines: Vec<Value> =
        said(&args!["--stream", "--json"]).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let (last, pieces) = lines.split_last().unwrap();
    let whole: String = pieces.iter().map(|p| p["delta"].as_str().unwrap()).collect();
    assert!(pieces.len() > 1 && whole == text && last == &expected, "{lines:?}");
    // Drawn tokens are those of their seed.
    let drawn = |seed: &str| {
        answer_of(
            &packed,
            &args!["--temperature", "1.5", "--seed", seed, "--prompt", "w1 w2", "--max-new-tokens", "12"],
        )
    };
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));
    // Several prompts, each with an answer.
    let lines = dir.path().join("prompts.jsonl");
    std::fs::write(&lines, "{\"prompt\": \"w1\"}\n{\"messages\": [{\"role\": \"user\", \"content\": \"w1\"}]}\n{\"ids\": [1, 2, 3]}\n").unwrap();
    let said = run(args![
        "generate",
        "--model",
        packed,
        "--input",
        lines,
        "--greedy",
        "--max-new-tokens",
        "4",
        "--json"
    ])
    .ok();
    let said: Vec<Value> = said.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(said.len(), 3);
    assert_eq!(said[0]["tokens"], said[1]["tokens"]);
    assert_eq!(said[2]["prompt_tokens"], 3);
}

fn answer_of(model: &Path, more: &[std::ffi::OsString]) -> Value {
    let all = args!["generate", "--model", model, "--json"];
    let said = run(all.iter().chain(more)).ok();
    serde_json::from_str::<Value>(&said).unwrap()["tokens"].clone()
}

#[test]
fn what_is_wrong_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let family = &FAMILIES[0];
    let model = family.model(dir.path());
    let packed = quantized(family, &model, "w4row", "packed");
    let refused = |model: &Path, more: &[std::ffi::OsString], code: i32, says: &str| {
        run(args!["generate", "--model", model].iter().chain(more)).refused(code, says);
    };
    refused(&packed, &args![], 2, "--input");
    refused(&packed, &args!["--prompt", " "], 1, "the prompt is empty");
    refused(&packed, &args!["--prompt", "w1", "--image", "gone.png"], 1, "gone.png");
    refused(&packed, &args!["--prompt", "w1", "--image", "data:text/plain,x"], 1, "is of type `text/plain`");
    refused(
        &packed,
        &args!["--prompt", "w1", "--image", "https://example.org/a.png"],
        1,
        "images are not fetched",
    );
    let config = model.join("config.json");
    refused(&packed, &args!["--prompt", "w1", "--image", config], 1, "config.json");
    refused(&packed, &args!["--prompt", "w1", "--act", "4"], 2, "8, 16 or dense");
    refused(&model, &args!["--prompt", "w1", "--act", "8"], 1, "`mbq pack` makes them");
    refused(&packed, &args!["--prompt", "w1", "--kv", "none"], 1, "this binary knows");
    refused(&packed, &args!["--prompt", "w1", "--raw", "--image", family.image()], 2, "--raw");
    refused(&packed, &args!["--prompt", "w1", "--greedy", "--top-k", "3"], 2, "--top-k");
    refused(&dir.path().join("gone"), &args!["--prompt", "w1"], 1, "gone");
    let long = "w1 ".repeat(5000);
    refused(&packed, &args!["--prompt", long], 1, "leaves no room in the context");
    let ids = dir.path().join("ids.jsonl");
    std::fs::write(&ids, "{\"ids\": [1, 100000]}").unwrap();
    refused(&packed, &args!["--input", ids], 1, "token 100000 is outside the vocabulary");
}

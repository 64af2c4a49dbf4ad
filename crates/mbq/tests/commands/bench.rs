//! `mbq bench` on a tiny shape.

use serde_json::{Value, json};

use super::kit::run;
use crate::args;

/// The config.json of a small decoder.
fn config() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 300,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "max_position_embeddings": 512,
        "hidden_act": "silu", "torch_dtype": "bfloat16",
    })
}

#[test]
fn every_way_is_measured_and_packed_ones_are_smaller() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config().to_string()).unwrap();
    let rows = dir.path().join("rows.jsonl");
    let said = run(args![
        "bench",
        "--shape",
        dir.path(),
        "--layers",
        "1",
        "--weights",
        "bf16,w4g128,w3g128,w3row",
        "--context",
        "5",
        "--tokens",
        "2",
        "--rounds",
        "2",
        "--json",
        "--out",
        rows
    ])
    .ok();
    let lines: Vec<Value> = said.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let names: Vec<&str> = lines.iter().map(|l| l["weights"].as_str().unwrap()).collect();
    assert_eq!(names, ["bf16", "w4g128 A16", "w3g128 A16", "w3row A16"]);
    let weights = 2 * 256 * (256 + 128) + 3 * 256 * 512;
    let bytes = |line: &Value, part: &str| line["bytes"][part].as_u64().unwrap();
    assert_eq!(bytes(&lines[0], "layers"), 2 * weights);
    // A scale of two bytes and a zero of one for every group.
    assert_eq!(bytes(&lines[1], "layers"), weights / 2 + 3 * weights / 128);
    assert_eq!(bytes(&lines[2], "layers"), weights * 3 / 8 + 3 * weights / 128);
    for line in &lines {
        assert_eq!(bytes(line, "head"), 2 * 256 * 300);
        assert!(bytes(line, "rest") > 2 * 256 * 300 && bytes(line, "rest") < 2 * 256 * 320, "{line}");
        let (token, head) = (&line["token_s"]["median"], &line["head_s"]["median"]);
        assert!(head.as_f64().unwrap() > 0.0 && token.as_f64().unwrap() > head.as_f64().unwrap(), "{line}");
    }
    let rows = std::fs::read_to_string(rows).unwrap();
    assert_eq!(rows.lines().filter(|l| l.contains("tokens per second")).count(), 4);
    let shown =
        run(args!["bench", "--shape", dir.path(), "--context", "3", "--tokens", "1", "--rounds", "1"]).ok();
    assert!(shown.contains("tokens/s") && shown.contains("w3g128 A16") && shown.contains("peak"), "{shown}");

    let refused = |more: &[&str], code: i32, says: &str| {
        let all = [&["bench", "--shape", dir.path().to_str().unwrap()], more].concat();
        run(all).refused(code, says);
    };
    refused(&["--weights", "w5g128"], 2, "2, 3, 4 and 8 bits");
    refused(&["--weights", "w4a8"], 2, "groups or rows");
    refused(&["--act", "9"], 2, "8 or 16");
    refused(&["--layers", "3"], 1, "1 to 2");
    refused(&["--weights", "w4g96"], 1, "do not divide the 256 inputs of model.layers.0.self_attn.q_proj");
    run(args!["bench", "--shape", "qwen9"]).refused(1, "qwen2-7b");
}

#[test]
fn the_shape_of_a_quantized_checkpoint_is_that_of_its_model() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config();
    config["quantization_config"] = json!({"quant_method": "awq", "bits": 4, "group_size": 128});
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let flags = ["--weights", "bf16,w4row", "--context", "3", "--tokens", "1", "--rounds", "1", "--json"];
    let said = run(args!["bench", "--shape", dir.path()].into_iter().chain(flags.map(Into::into))).ok();
    assert_eq!(said.lines().count(), 2, "{said}");
}

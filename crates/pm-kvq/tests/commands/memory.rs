//! What is foretold, what is written, what is compared and measured.

use std::fmt::Write;
use std::path::Path;

use nics_datasets::adding_ring::{LINE_TOKENS, Task, problems};
use nics_datasets::word_problems::Split;
use serde_json::{Value, json};

use crate::args;
use crate::kit::*;

#[test]
fn a_plan_foretells_what_generation_does() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), "qwen2");
    let kv = "window=8,window-mode=block,shrink=layer,min-bits=4,max-len=60";
    let config = model.join("config.json");
    let plan =
        args!["plan", "--model", config, "--kv", kv, "--prompt-len", "20", "--tokens", "400", "--json"];
    let plan: Value = serde_json::from_str(&run(plan).ok()).unwrap();
    let end = plan["exhausted_at"].as_u64().unwrap();
    let write = args![
        "generate",
        "--model",
        model,
        "--input",
        prompts(dir.path(), &[20]),
        "--kv",
        kv,
        "--greedy",
        "--max-new-tokens",
        "400",
        "--json",
    ];
    let ran = run(write);
    assert!(ran.err.contains("4 bits"), "{}", ran.err);
    let reply = lines(&ran.ok()).remove(0);
    assert_eq!(reply["finish"], "cache_exhausted");
    let tokens = reply["tokens"].as_array().unwrap().len() as u64;
    // The last token is written, but its row never comes.
    assert_eq!(20 + tokens - 1, end - 1);
    assert_eq!(reply["cache"]["tokens"], json!(end - 1));
    assert_eq!(reply["cache"]["widths"], json!([4, 4]));
    // The same words for people, of every width that is reached.
    let text = run(args!["plan", "--model", model, "--kv", kv, "--prompt-len", "20", "--tokens", "400"]).ok();
    assert!(text.contains("the budget is full") && text.contains("as they are"), "{text}");
}

#[test]
fn a_plan_counts_what_fits_and_knows_presets() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256, "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0, "max_position_embeddings": 131_072, "hidden_act": "silu", "torch_dtype": "bfloat16",
    });
    let path = dir.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let plan = |more: &[&str]| -> Value {
        let mut all = args!["plan", "--model", path, "--json"].to_vec();
        all.extend(more.iter().map(Into::into));
        serde_json::from_str(&run(all).ok()).unwrap()
    };
    // The transitions of the paper's budget of 2 bits for 32,768 tokens, sink 1, window 128, prompt 150.
    let official = plan(&["--preset", "official", "--max-len", "32768", "--min-bits", "2"]);
    let group = &official["groups"][0];
    let from: Vec<(u64, u64)> = group["stages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|stage| (stage["narrowest"].as_u64().unwrap(), stage["tokens"].as_u64().unwrap()))
        .collect();
    assert_eq!(from, [(16, 150), (8, 4097), (4, 8129), (2, 16_097)]);
    assert_eq!(official["exhausted_at"], 31_985);
    assert_eq!(group["budget"], 8 * 128 * 2 * 2 * 32_768 / 8);
    // All bytes counted, the same tokens fit, in the memory that is asked for.
    let tuned = plan(&["--max-len", "32768", "--min-bits", "4", "--batch", "8", "--memory", "12GiB"]);
    assert_eq!(tuned["exhausted_at"], Value::Null);
    let (own, dense) = (tuned["sequences"].as_u64().unwrap(), tuned["dense_sequences"].as_u64().unwrap());
    assert!(own >= 10 && dense == 3, "{own} {dense}");
    assert_eq!(tuned["dense_bytes"].as_u64().unwrap(), 32 * 2 * 1024 * 2 * 32_768);
}

#[test]
fn an_unbounded_cache_writes_what_the_dense_one_writes_and_a_second_run_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (model, prompts) = (model(dir.path(), "llama"), prompts(dir.path(), &[9, 20, 14]));
    let tokens = |more: &[&str]| {
        let mut all = args![
            "generate",
            "--model",
            model,
            "--input",
            prompts,
            "--greedy",
            "--max-new-tokens",
            "40",
            "--batch",
            "2"
        ]
        .to_vec();
        all.extend(more.iter().map(Into::into));
        let ran = run(all);
        (lines(&ran.out), ran)
    };
    let of = |replies: &[Value]| replies.iter().map(|r| r["tokens"].clone()).collect::<Vec<_>>();
    let (dense, _) = tokens(&["--kv", "dense"]);
    assert_eq!(dense.len(), 3);
    let (paged, _) = tokens(&["--kv", "window=8,exact=f32"]);
    // Sums in another order come to turn a close decision of such a model sooner or later.
    let first = |replies: &[Value]| {
        replies.iter().map(|r| r["tokens"].as_array().unwrap()[..10].to_vec()).collect::<Vec<_>>()
    };
    assert_eq!(first(&paged), first(&dense));
    assert!(paged.iter().all(|r| r["cache"]["widths"].is_null() || r["cache"]["widths"] == json!([16, 16])));
    // Into a file, of which one reply is lost.
    let out = dir.path().join("replies.jsonl");
    let path = out.to_str().unwrap();
    tokens(&["--kv", "window=8,exact=f32", "--out", path]).1.ok();
    let mut all = read_lines(&out);
    all.sort_by_key(|r| r["index"].as_u64());
    assert_eq!(of(&all), of(&paged));
    nics_base::jsonl::write(&out, &all[..2]).unwrap();
    tokens(&["--kv", "window=8,exact=f32", "--out", path]).1.ok();
    assert_eq!(of(&read_lines(&out)), of(&paged));
}

#[test]
fn caches_are_compared_and_a_second_run_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (model, prompts) = (model(dir.path(), "llama"), prompts(dir.path(), &[12, 20]));
    let out = dir.path().join("out");
    let compare = || {
        run(args![
            "compare",
            "--model",
            model,
            "--input",
            prompts,
            "--greedy",
            "--max-new-tokens",
            "60",
            "--bin",
            "20",
            "--out",
            out,
            "--method",
            "rtn-4",
            "--method",
            "rtn-8",
            "--method",
            "kivi-2:tokens=8",
            "--method",
            "window=8,min-bits=16",
            "--method",
            "pm-kvq:preset=tuned,window=4,min-bits=4",
        ])
    };
    let table = compare().ok();
    assert!(table.contains("kivi-2:tokens=8") && table.contains("as much memory"), "{table}");
    let rows = read_lines(&out.join("rows.jsonl"));
    let value = |variant: &str, metric: &str| {
        let row = rows.iter().find(|r| r["variant"] == variant && r["metric"] == metric);
        row.unwrap_or_else(|| panic!("no {metric} of {variant}"))["value"].as_f64().unwrap()
    };
    assert!(value("dense", "divergence").abs() < 1e-9);
    assert!(value("dense", "same likeliest token") > 0.999);
    assert!(value("window=8,min-bits=16", "divergence") < 0.01);
    assert!(value("kivi-2:tokens=8", "divergence") > value("rtn-4", "divergence") / 10.0);
    let wide = "rtn-8";
    let tuned = "pm-kvq:preset=tuned,window=4,min-bits=4";
    assert!(value(tuned, "mean bytes") <= value(tuned, "peak bytes"));
    assert!(value(tuned, "peak bytes of codes") <= value(tuned, "peak bytes"));
    // With as much memory on average, never more.
    let equal = format!("pm-kvq at the average of {wide}");
    assert!(value(&equal, "mean bytes") <= value(wide, "mean bytes"));
    assert!(value(&equal, "divergence") < value("kivi-2:tokens=8", "divergence"));
    assert!(rows.iter().any(|r| r["metric"] == "divergence by place" && r["x"] == 40.0));
    let before = read(&out.join("items.jsonl"));
    compare().ok();
    assert_eq!(read(&out.join("items.jsonl")), before);
    // Other settings do not mix.
    let other = args![
        "compare",
        "--model",
        model,
        "--input",
        prompts,
        "--greedy",
        "--max-new-tokens",
        "61",
        "--out",
        out,
        "--method",
        "rtn-4"
    ];
    run(other).refused(1, "results of other settings");
}

#[test]
fn replies_of_every_cache_are_judged_where_the_answer_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/nano/pm-kvq-nano/seed-0");
    let input = dir.path().join("prompts.jsonl");
    let mut text = String::new();
    for problem in problems(Split::Test, 5, 3) {
        let all = problem.text(Task::Ring);
        let (prompt, answer) = all.split_at(LINE_TOKENS * 2 - 1);
        writeln!(text, "{}", json!({ "prompt": prompt, "answer": answer.trim() })).unwrap();
    }
    std::fs::write(&input, &text).unwrap();
    let out = dir.path().join("out");
    let compare = |out: &Path| {
        run(args![
            "compare",
            "--model",
            model,
            "--input",
            input,
            "--raw",
            "--greedy",
            "--dtype",
            "f32",
            "--max-new-tokens",
            "112",
            "--no-equal-average",
            "--out",
            out,
            "--method",
            "kivi-8:tokens=8,group=32",
            "--method",
            "rtn-2:group=32",
        ])
    };
    let table = compare(&out).ok();
    assert!(table.contains("3 of 3 answers right") && table.contains("0 of 3 answers right"), "{table}");
    let rows = read_lines(&out.join("rows.jsonl"));
    for (variant, share) in [("dense", 1.0), ("kivi-8:tokens=8,group=32", 1.0), ("rtn-2:group=32", 0.0)] {
        let row = rows.iter().find(|r| r["variant"] == variant && r["metric"] == "right answers").unwrap();
        assert_eq!((&row["value"], &row["n"]), (&json!(share), &json!(3)), "{variant}");
    }
    // Other answers are other results.
    std::fs::write(&input, text.replace("\"answer\":\"", "\"answer\":\"1")).unwrap();
    compare(&out).refused(1, "results of other settings");
    assert!(compare(&dir.path().join("other")).ok().contains("0 of 3 answers right"));
}

#[test]
fn decoding_is_measured_at_a_shape() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), "llama");
    let out = dir.path().join("rows.jsonl");
    let measure = args![
        "bench",
        "--random-weights",
        model,
        "--layers",
        "1",
        "--context",
        "40",
        "--tokens",
        "4",
        "--batch",
        "2",
        "--repeat",
        "1",
        "--out",
        out,
        "--json",
        "--method",
        "dense",
        "--method",
        "window=8,init=4,min-bits=4",
    ];
    let found = lines(&run(measure).ok());
    assert_eq!(found.len(), 2);
    let bytes = |n: usize| found[n]["bytes"].as_u64().unwrap();
    assert!(bytes(1) < bytes(0), "{found:?}");
    assert!(found.iter().all(|f| f["tokens_per_s"][0].as_f64().unwrap() > 0.0));
    assert_eq!(read_lines(&out).len(), 6);
}

//! Calibration: all at once and stage by stage, killed and gone on with, and what its artefacts do.

use serde_json::{Value, json};

use crate::args;
use crate::kit::*;

#[test]
fn a_killed_calibration_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (model(dir.path(), "llama"), samples(dir.path(), 12, 32));
    let all = |out: &str| {
        args![
            "calibrate",
            "all",
            "--model",
            model,
            "--data",
            data,
            "--seq-len",
            "32",
            "--effective-len",
            "128",
            "--budget",
            "24KiB",
            "--choices",
            "8,4,2",
            "--max-len",
            "64",
            "--out",
            dir.path().join(out),
        ]
    };
    let said = run(all("whole")).ok();
    assert!(said.contains("widths of the layers"), "{said}");
    // As soon as there is progress, and again somewhere later.
    let progress = dir.path().join("killed/progress.safetensors");
    let first = killed_when(command(all("killed")), || progress.exists());
    let begun = std::time::Instant::now();
    killed_when(command(all("killed")), || begun.elapsed().as_millis() > 900);
    run(all("killed")).ok();
    assert!(first, "it ended before it could be killed");
    for name in ["sensitivity.json", "allocation.json", "max_keys.safetensors", "rep_scales.safetensors"] {
        let of = |out: &str| std::fs::read(dir.path().join(out).join(name)).unwrap();
        assert!(of("whole") == of("killed"), "{name} differs");
    }
    // The artefacts are used: widths set budgets, scales change what is stored and not what is written.
    let out = dir.path().join("whole");
    let write = |more: &[std::ffi::OsString]| -> Value {
        let prompts = prompts(dir.path(), &[10]);
        let mut all = args![
            "generate",
            "--model",
            model,
            "--input",
            prompts,
            "--greedy",
            "--max-new-tokens",
            "20",
            "--json"
        ]
        .to_vec();
        all.extend_from_slice(more);
        lines(&run(all).ok()).remove(0)
    };
    let plain = write(&args!["--kv", "dense"]);
    let scaled = write(&args!["--kv", "dense", "--scales", out.join("rep_scales.safetensors")]);
    // Sums of other numbers come to turn a close decision of such a model sooner or later.
    let first = |reply: &Value| reply["tokens"].as_array().unwrap()[..5].to_vec();
    assert_eq!(first(&plain), first(&scaled));
    let bounded = write(&args!["--kv", "window=8", "--budgets", out.join("allocation.json")]);
    assert!(bounded["cache"]["bytes"].as_u64().unwrap() <= plain["cache"]["bytes"].as_u64().unwrap());
    let plan = args![
        "plan",
        "--model",
        model,
        "--kv",
        "window=8",
        "--budgets",
        out.join("allocation.json"),
        "--prompt-len",
        "9",
        "--json"
    ];
    let plan: Value = serde_json::from_str(&run(plan).ok()).unwrap();
    assert_eq!(plan["tokens"], 64);
}

#[test]
fn a_budget_that_no_width_fits_is_refused_before_anything_is_measured() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (model(dir.path(), "llama"), samples(dir.path(), 2, 16));
    let out = dir.path().join("out");
    let all = args![
        "calibrate",
        "all",
        "--model",
        model,
        "--data",
        data,
        "--seq-len",
        "16",
        "--budget",
        "1KiB",
        "--out",
        out
    ];
    run(all).refused(1, "infeasible");
    assert!(!out.join("progress.safetensors").exists());
}

#[test]
fn stages_make_what_all_makes() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (model(dir.path(), "qwen2"), samples(dir.path(), 3, 16));
    let stage = |stage: &str, out: &str, more: &[&str]| {
        let mut all = args![
            "calibrate",
            stage,
            "--model",
            model,
            "--data",
            data,
            "--seq-len",
            "16",
            "--out",
            dir.path().join(out)
        ]
        .to_vec();
        all.extend(more.iter().map(Into::into));
        run(all).ok();
    };
    stage("all", "all", &["--budget", "40KiB", "--choices", "4,2", "--max-len", "64"]);
    stage("sensitivity", "parts", &[]);
    stage("max-keys", "parts", &[]);
    let part = |name: &str| dir.path().join("parts").join(name);
    let official = args![
        "allocate",
        "--model",
        model,
        "--sensitivity",
        part("sensitivity.json"),
        "--budget",
        "40KiB",
        "--choices",
        "4,2",
        "--max-len",
        "64",
        "--budget-mode",
        "official",
        "--out",
        part("allocation.json"),
    ];
    run(official).ok();
    stage("scales", "parts", &[]);
    let json = |out: &str, name: &str| -> Value {
        serde_json::from_str(&read(&dir.path().join(out).join(name))).unwrap()
    };
    for name in ["sensitivity.json", "allocation.json"] {
        assert_eq!(json("all", name), json("parts", name), "{name}");
    }
    let scales = |out: &str| std::fs::read(dir.path().join(out).join("rep_scales.safetensors")).unwrap();
    assert!(scales("all") == scales("parts"));
    // All bytes counted, a layer takes what its tokens need at their fullest.
    let exact = args![
        "allocate",
        "--model",
        model,
        "--sensitivity",
        part("sensitivity.json"),
        "--budget",
        "1MiB",
        "--max-len",
        "300",
        "--json",
        "--out",
        part("exact.json"),
    ];
    let exact: Value = serde_json::from_str(&run(exact).ok()).unwrap();
    assert!(exact["widths"].as_array().unwrap().iter().all(|w| w == &json!(4)), "{exact}");
    let bytes = exact["bytes"][0].as_f64().unwrap();
    let codes = json("parts", "allocation.json")["bytes"][0].as_f64().unwrap() * 300.0 / 64.0;
    assert!(bytes > codes, "{bytes} {codes}");
    let little = args![
        "allocate",
        "--model",
        model,
        "--sensitivity",
        part("sensitivity.json"),
        "--budget",
        "1KiB",
        "--out",
        part("none.json"),
    ];
    run(little).refused(1, "infeasible");
    assert!(!part("none.json").exists());
}

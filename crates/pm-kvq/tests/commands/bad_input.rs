//! What is wrong is one clear line, with its exit code.

use crate::args;
use crate::kit::*;

#[test]
fn what_a_user_typed() {
    let dir = tempfile::tempdir().unwrap();
    let (model, prompts) = (model(dir.path(), "llama"), prompts(dir.path(), &[5]));
    let generate = |more: &[&str]| {
        let mut all =
            args!["generate", "--model", model, "--input", prompts, "--max-new-tokens", "3"].to_vec();
        all.extend(more.iter().map(Into::into));
        run(all)
    };
    generate(&["--kv", "kivi"]).refused(2, "kivi-4");
    generate(&["--kv", "pm-kvq:depth=3"]).refused(2, "`depth` is no setting");
    generate(&["--kv", "rtn-4", "--preset", "tuned"]).refused(2, "cannot be used with");
    generate(&["--kv", "rtn-4", "--max-len", "99"]).refused(1, "--max-len is a setting of pm-kvq");
    generate(&["--min-bits", "3"]).refused(2, "expected 2, 4, 8 or 16");
    generate(&["--min-bits", "4,2,4,2,4", "--max-len", "500"]).refused(1, "min-bits");
    generate(&["--budget", "1KiB"]).refused(1, "sink and window");
    generate(&["--kv", "q8_0+rotation+rotation"]).refused(2, "q8_0");
    generate(&["--budgets", "/nowhere/allocation.json"]).refused(1, "/nowhere/allocation.json");
    generate(&["--scales", "/nowhere/scales.safetensors"]).refused(1, "/nowhere/scales.safetensors");
    let text = args!["generate", "--model", model, "--prompt", "hello"];
    run(text).refused(1, "no tokenizer.json");
    run(args!["plan", "--model", "/nowhere", "--max-len", "9"]).refused(1, "/nowhere");
    run(args!["plan", "--model", model, "--kv", "dense"]).refused(2, "plan foretells what pm-kvq does");
    run(args!["plan", "--model", model, "--prompt-len", "500", "--tokens", "100"])
        .refused(1, "more than the 100");
    let twice = args![
        "compare",
        "--model",
        model,
        "--input",
        prompts,
        "--out",
        dir.path().join("o"),
        "--method",
        "dense"
    ];
    run(twice).refused(2, "always there");
    let effective = args![
        "calibrate",
        "max-keys",
        "--model",
        model,
        "--data",
        "x",
        "--seq-len",
        "32",
        "--effective-len",
        "70",
        "--out",
        dir.path().join("c"),
    ];
    run(effective).refused(2, "not a multiple");
    let texts =
        args!["calibrate", "max-keys", "--model", model, "--data", "x.txt", "--out", dir.path().join("c")];
    run(texts).refused(1, "x.txt");
    let code = args![
        "eval",
        "--model",
        model,
        "--bench",
        "aime",
        "--run-code",
        "--source",
        dir.path(),
        "--out",
        dir.path().join("e")
    ];
    assert_ne!(run(code).code, Some(0));
    run(args!["judge", dir.path().join("none.jsonl")]).refused(1, "none.jsonl");
    run(args!["bench"]).refused(2, "--model");
}

#[test]
fn artefacts_of_another_model() {
    let dir = tempfile::tempdir().unwrap();
    let (llama, qwen2) = (model(dir.path(), "llama"), model(dir.path(), "qwen2"));
    let out = dir.path().join("made");
    let made = args![
        "calibrate",
        "max-keys",
        "--model",
        llama,
        "--data",
        samples(dir.path(), 2, 16),
        "--seq-len",
        "16",
        "--out",
        out
    ];
    run(made).ok();
    let scales = args![
        "calibrate",
        "scales",
        "--model",
        qwen2,
        "--data",
        samples(dir.path(), 2, 16),
        "--seq-len",
        "16",
        "--bits",
        "4",
        "--max-keys",
        out.join("max_keys.safetensors"),
        "--out",
        out,
    ];
    run(scales).refused(1, "another architecture");
}

//! Bad input to the commands: each kind with its reason, and nothing made of it.

use nics_core::checkpoint::{Checkpoint, DEFAULT_SHARD_BYTES, save};
use serde_json::json;

use crate::kit::*;

#[test]
fn queries_that_make_no_sense_are_named() {
    let dir = inputs(2);
    let good = |id: &str| json!({ "id": id, "ids": prompt(0) }).to_string();
    for (lines, why) in [
        (vec![good("a"), good("a")], "line 2: the id a is there twice"),
        (vec![json!({ "id": 1, "question": " " }).to_string()], "line 1: the question of 1 is empty"),
        (vec![json!({ "id": 1, "ids": [] }).to_string()], "line 1: the prompt of 1 is empty"),
        (vec![good("a"), json!({ "id": "b" }).to_string()], "line 2: b has neither"),
        (vec![json!({ "id": "b", "ids": [1], "question": "x" }).to_string()], "b has both"),
        (vec![json!({ "id": [1], "ids": [1] }).to_string()], "expected a text or a number"),
        (vec![json!({ "id": 1, "ids": [1], "prompt": 2 }).to_string()], "unknown field `prompt`"),
        (vec![good("a"), "{\"id\": \"b".to_owned()], "line 2: not a valid record"),
        (vec![], "has no queries"),
        (vec![json!({ "id": 1, "ids": [7777] }).to_string()], "token 7777 is outside"),
    ] {
        std::fs::write(dir.path().join("queries.jsonl"), lines.join("\n")).unwrap();
        let _ = std::fs::remove_dir_all(dir.path().join("out"));
        let said = label(dir.path(), "out", "").refused();
        assert!(said.contains(why), "{said}");
        let responses = dir.path().join("out/responses.jsonl");
        assert!(!responses.exists() || read_lines(&responses).is_empty());
    }
    let mute = dir.path().join("mute");
    with_template(&mute, None);
    std::fs::write(dir.path().join("queries.jsonl"), "{\"id\": 1, \"question\": \"how?\"}").unwrap();
    let text = format!("{} --out mute-out", RUN.replace("LARGE", &mute.display().to_string()));
    assert!(say(dir.path(), &text).refused().contains("has no chat template"));
    std::fs::remove_file(dir.path().join("queries.jsonl")).unwrap();
    assert!(label(dir.path(), "out", "").refused().contains("queries.jsonl"));
}

#[test]
fn what_other_settings_made_is_refused() {
    let dir = inputs(10);
    label(dir.path(), "out", "").ok();
    let before = files(&dir.path().join("out"));
    for (flags, step, field) in [
        ("--max-new-tokens 30", "respond", "settings"),
        ("--batch 5", "respond", "settings"),
        ("--top-k 11", "prefill", "settings"),
        ("--shard-tokens 400", "prefill", "settings"),
        ("--sentences 2", "continue", "settings"),
        ("--stop-token .", "continue", "settings"),
        ("--judge rule", "judge", "judge"),
        ("--mem-limit 4GiB", "respond", "mem_limit"),
    ] {
        // A flag that is given twice is one too many, so the first is taken out.
        let name = flags.split_whitespace().next().unwrap();
        let mut words = words(RUN);
        if let Some(at) = words.iter().position(|w| w == name) {
            words.drain(at..at + 2);
        }
        let said = say(dir.path(), &format!("{} --out out {flags}", words.join(" "))).refused();
        assert!(said.contains(&format!("`{step}` of another run")) && said.contains(field), "{said}");
        assert_eq!(files(&dir.path().join("out")), before);
    }
    // Other models and other queries.
    let said =
        say(dir.path(), &RUN.replace("--small SMALL --large LARGE", "--small LARGE --large SMALL --out out"));
    assert!(said.refused().contains("`large`"));
    std::fs::write(dir.path().join("queries.jsonl"), queries(11)).unwrap();
    assert!(label(dir.path(), "out", "").refused().contains("`queries`"));
    // A step before the one that it needs.
    let said = say(dir.path(), "label build --out empty").refused();
    assert!(said.contains("`build` needs the whole of `judge`"), "{said}");
    let said = say(dir.path(), "label prefill --slm SMALL --out empty --top-k 8").refused();
    assert!(said.contains("`prefill` needs the whole of `respond`"), "{said}");
}

#[test]
fn damaged_files_are_named() {
    let dir = inputs(10);
    label(dir.path(), "whole", "").ok();
    let flip = |name: &str| {
        let folder = dir.path().join(format!("with-{name}"));
        copy(&dir.path().join("whole"), &folder);
        let path = folder.join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.len() - 9;
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        folder
    };
    for name in ["responses.jsonl", "index.json", "mismatch.jsonl", "judged.jsonl", "labels.json"] {
        flip(name);
        let said = label(dir.path(), &format!("with-{name}"), "").refused();
        assert!(said.contains(name) && said.contains("is damaged: its hash is"), "{said}");
    }
    // Files of rows, where they are read again.
    let name = "features-0000.safetensors";
    let folder = flip(name);
    edit(&folder.join("run.json"), |run| {
        for step in ["continue", "judge", "build"] {
            run["steps"].as_object_mut().unwrap().remove(step);
        }
    });
    std::fs::remove_file(folder.join("mismatch.jsonl")).unwrap();
    let said = label(dir.path(), &format!("with-{name}"), "").refused();
    assert!(said.contains(name) && said.contains("is damaged"), "{said}");
    let name = "labels-0000.safetensors";
    flip(name);
    std::fs::write(dir.path().join("router.toml"), crate::train::RECIPE).unwrap();
    let said =
        say(dir.path(), &format!("train --config router.toml --labels with-{name} --small SMALL --out r"))
            .refused();
    assert!(said.contains(name) && said.contains("is damaged"), "{said}");
    std::fs::remove_file(dir.path().join("whole/labels-0000.safetensors")).unwrap();
    let said = say(dir.path(), "train --config router.toml --labels whole --small SMALL --out r").refused();
    assert!(said.contains("that of no file"), "{said}");
    std::fs::write(dir.path().join("whole/run.json"), "{}").unwrap();
    assert!(label(dir.path(), "whole", "").refused().contains("run.json"));
}

#[test]
fn models_that_do_not_fit_are_refused() {
    let dir = inputs(4);
    // Other tokenizers.
    let other = dir.path().join("other");
    copy(&small(), &other);
    edit(&other.join("tokenizer.json"), |t| {
        let vocabulary = t["model"]["vocab"].as_object_mut().unwrap();
        let (a, b) = (vocabulary["so"].clone(), vocabulary["then"].clone());
        vocabulary.insert("so".into(), b);
        vocabulary.insert("then".into(), a);
    });
    let run = |small: &std::path::Path, large: &std::path::Path, more: &str| {
        let text =
            RUN.replace("SMALL", &small.display().to_string()).replace("LARGE", &large.display().to_string());
        say(dir.path(), &format!("{text} --out out {more}"))
    };
    let said = run(&other, &large(), "").refused();
    assert!(
        said.contains("different tokenizers") && said.contains("\"so\"") && said.contains("\"then\""),
        "{said}"
    );
    // No think tokens.
    for (role, from) in [("small", small()), ("large", large())] {
        let to = dir.path().join(format!("dull-{role}"));
        copy(&from, &to);
        let text = std::fs::read_to_string(to.join("tokenizer.json")).unwrap();
        std::fs::write(to.join("tokenizer.json"), text.replace("</think>", "</thought>")).unwrap();
    }
    let said = run(&dir.path().join("dull-small"), &dir.path().join("dull-large"), "").refused();
    assert!(said.contains("</think>"), "{said}");
    // One vocabulary, but a table that ends before it does.
    let short = dir.path().join("short");
    copy(&small(), &short);
    let checkpoint = Checkpoint::open_dir(&small()).unwrap();
    let root = checkpoint.root(tch::Device::Cpu, tch::Kind::Float);
    let tensors: Vec<(String, tch::Tensor)> = checkpoint
        .names()
        .map(|name| {
            let tensor = root.stored(name).unwrap();
            let is_table = name.contains("embed_tokens") || name.contains("lm_head");
            (name.to_owned(), if is_table { tensor.narrow(0, 0, 20) } else { tensor })
        })
        .collect();
    let mut config = serde_json::Value::Object(checkpoint.config_json().clone());
    config["vocab_size"] = 20.into();
    save(&short, tensors, &config, DEFAULT_SHARD_BYTES).unwrap();
    let said = run(&short, &large(), "--together").refused();
    assert!(said.contains("the small model has 20 tokens"), "{said}");
    std::fs::remove_dir_all(dir.path().join("out")).unwrap();
    // A model beside itself, too many logits, too little memory, no such folder.
    assert!(run(&large(), &large(), "").refused().contains("two models"));
    let said = say(dir.path(), &RUN.replace("--top-k 12", "--top-k 2000 --out logits")).refused();
    assert!(said.contains("2000 largest logits"), "{said}");
    let said = run(&small(), &large(), "--mem-limit 100MiB").refused();
    assert!(said.contains("memory limit of 100 MiB is too low"), "{said}");
    let said = run(&dir.path().join("nowhere"), &large(), "").refused();
    assert!(said.contains("nowhere"), "{said}");
    // Judges.
    std::fs::write(dir.path().join("bad.toml"), "classes = [[\"so\", \"whatever\"]]").unwrap();
    let said =
        say(dir.path(), &RUN.replace("synonyms", "bad").replace("--top-k", "--out judge --top-k")).refused();
    assert!(said.contains("\"whatever\"") && said.contains("one token"), "{said}");
    std::fs::write(dir.path().join("bad.toml"), "class = []").unwrap();
    let said =
        say(dir.path(), &RUN.replace("synonyms", "bad").replace("--top-k", "--out judge --top-k")).refused();
    assert!(said.contains("bad.toml") && said.contains("class"), "{said}");
    for judge in ["nobody", "rule:", "answer:nothing", "answer:regex=(", "answer:regex=x"] {
        let said = say(dir.path(), &RUN.replace("rule:synonyms.toml", &format!("{judge} --out x")));
        assert_eq!(said.code, Some(2), "{judge}: {}", said.stderr);
    }
    let said = {
        let mute = dir.path().join("mute");
        with_template(&mute, None);
        let text = RUN.replace("LARGE", &mute.display().to_string());
        say(dir.path(), &text.replace("rule:synonyms.toml", "large --out judge-large")).refused()
    };
    assert!(said.contains("no chat template"), "{said}");
}

#[test]
fn two_processes_do_not_share_a_folder() {
    let dir = inputs(2);
    let work =
        r2r::labels::pipeline::Work::open(&dir.path().join("out"), nics_base::shard::Shard::WHOLE).unwrap();
    let said = label(dir.path(), "out", "");
    assert_eq!(said.code, Some(75), "{}", said.stderr);
    drop(work);
    label(dir.path(), "out", "").ok();
}

//! Benchmarks in their real files, on tiny models of every family.

use std::path::{Path, PathBuf};

use mbq::evaluation::figures::{REPORT, Report, ScoredReply};
use nics_base::row::Row;
use serde_json::{Value, json};

use crate::args;
use crate::kit::{FAMILIES, Ran, command, run};

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/tests/fixtures/visual")
}

const ALL: &str = "mmmu,seedbench,seedbench-image,ocrbench,vizwiz,scienceqa,scienceqa-img,textvqa";

fn eval(model: &Path, tasks: &str, out: &Path, more: &[&str]) -> Ran {
    let mut all = args!["eval", "--model", model, "--tasks", tasks, "--data", data(), "--out", out].to_vec();
    all.extend(["--max-new-tokens", "4"].map(Into::into));
    all.extend(more.iter().map(Into::into));
    run(all)
}

fn report(out: &Path) -> Report {
    serde_json::from_slice(&std::fs::read(out.join(REPORT)).unwrap()).unwrap()
}

fn items(out: &Path, task: &str) -> Vec<ScoredReply> {
    nics_base::jsonl::read(out.join(format!("items-{task}.jsonl"))).unwrap()
}

#[test]
fn every_task_for_every_family() {
    let dir = tempfile::tempdir().unwrap();
    for family in FAMILIES {
        let model = family.model(dir.path());
        let out = dir.path().join(format!("{}-eval", family.name));
        // The tiny InternVL2 has room for one tile.
        let said = eval(&model, ALL, &out, &["--batch", "3", "--tiles", "1"]);
        assert!(said.err.contains("nothing is quantized: this measures the float model"), "{}", said.err);
        let said = said.ok();
        let report = report(&out);
        let n: Vec<u64> = report.tasks.iter().map(|t| t.all.n).collect();
        assert_eq!(n, [3, 3, 2, 3, 2, 3, 1, 2], "{said}");
        assert!(report.tasks.iter().all(|t| t.too_long == 0), "{}", family.name);
        assert!(!report.layers.is_quantized() && report.average.is_some());
        let mmmu = &report.tasks[0];
        assert_eq!(mmmu.groups.keys().collect::<Vec<_>>(), ["Accounting", "Math"]);
        assert_eq!(mmmu.disciplines.keys().collect::<Vec<_>>(), ["Business", "Science"]);
        assert_eq!((mmmu.groups["Accounting"].n, mmmu.max_new_tokens), (2, 4));
        for reply in items(&out, "mmmu") {
            let [length, images] = reply.reply.prompt;
            assert!(images > 0 && length > images && reply.reply.tokens > 0, "{reply:?}");
        }
        // The second question shows two, which LLaVA-OneVision does not cut into tiles.
        let seen: Vec<usize> = items(&out, "mmmu").iter().map(|r| r.reply.prompt[1]).collect();
        assert!(family.name == "llava-onevision" || seen[1] == 2 * seen[0], "{seen:?}");
        assert_eq!(items(&out, "scienceqa").iter().filter(|r| r.reply.prompt[1] == 0).count(), 2);
        let rows: Vec<Row> = nics_base::jsonl::read(out.join("rows.jsonl")).unwrap();
        let mean = rows.iter().find(|r| r.metric == "accuracy, mean of tasks").unwrap();
        assert!((mean.value - 100.0 * report.average.unwrap()).abs() < 1e-9);
        assert!(rows.iter().all(|r| r.method == "mbq" && r.variant == "dense" && r.unit == "%"));
    }
}

#[test]
fn prompts_that_do_not_fit_are_counted_as_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let model = FAMILIES[3].model(dir.path());
    let out = dir.path().join("out");
    let said = eval(&model, "mmmu,scienceqa", &out, &["--tiles", "12"]).ok();
    assert!(said.contains("prompts do not fit the model's context and count as wrong"), "{said}");
    let found = report(&out);
    assert!(found.tasks[0].too_long > 0);
    let long: Vec<_> = items(&out, "mmmu").into_iter().filter(|r| r.reply.finish == "too_long").collect();
    assert_eq!(long.len() as u64, found.tasks[0].too_long);
    assert!(long.iter().all(|r| r.reply.prompt[0] >= 64 && r.reply.text.is_empty() && r.scored.score < 0.5));
    // Those of text alone are answered.
    assert!(items(&out, "scienceqa").iter().any(|r| r.reply.finish != "too_long"));
}

#[test]
fn shards_batches_and_second_runs_give_the_same_replies() {
    let dir = tempfile::tempdir().unwrap();
    let model = FAMILIES[2].model(dir.path());
    let tasks = "mmmu,vizwiz";
    let whole = dir.path().join("whole");
    eval(&model, tasks, &whole, &[]).ok();
    let parts = dir.path().join("parts");
    for shard in ["1/2", "0/2"] {
        let said = eval(&model, tasks, &parts, &["--shard", shard, "--batch", "2"]);
        assert!(said.err.contains(&format!("mmmu, shard {shard}")), "{}", said.err);
        assert!(!parts.join(REPORT).exists());
    }
    eval(&model, tasks, &parts, &[]).ok();
    for task in ["mmmu", "vizwiz"] {
        assert_eq!(items(&whole, task), items(&parts, task));
    }
    assert_eq!(report(&whole), report(&parts));
    // Nothing is written anew: the replies of the second run are those of the file.
    let file = |out: &Path| {
        let all = std::fs::read_dir(out).unwrap().map(|e| e.unwrap().path());
        all.into_iter().find(|p| p.file_name().unwrap().to_str().unwrap().starts_with("vizwiz-")).unwrap()
    };
    let changed =
        std::fs::read_to_string(file(&whole)).unwrap().replacen("\"text\":\"", "\"text\":\"marked ", 1);
    std::fs::write(file(&whole), changed).unwrap();
    eval(&model, tasks, &whole, &["--json"]).ok();
    assert!(items(&whole, "vizwiz")[0].reply.text.starts_with("marked "));
    // Other settings are other files.
    eval(&model, tasks, &whole, &["--limit", "1"]).ok();
    let short = report(&whole);
    assert_eq!((short.limit, short.tasks[0].all.n), (Some(1), 1));
    assert!(!items(&whole, "vizwiz")[0].reply.text.starts_with("marked "));
}

#[test]
fn a_killed_run_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let model = FAMILIES[0].model(dir.path());
    let whole = dir.path().join("whole");
    eval(&model, "mmmu,textvqa", &whole, &[]).ok();
    let broken = dir.path().join("broken");
    let mut killed = command(
        args!["eval", "--model", model, "--tasks", "mmmu,textvqa", "--data", data(), "--out", broken]
            .to_vec(),
    )
    .args(["--max-new-tokens", "4"])
    .stdout(std::process::Stdio::null())
    .stderr(std::process::Stdio::null())
    .spawn()
    .unwrap();
    let begun = std::time::Instant::now();
    let any = || std::fs::read_dir(&broken).is_ok_and(|mut all| all.next().is_some());
    while !any() && begun.elapsed() < std::time::Duration::from_secs(60) {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    eval(&model, "mmmu,textvqa", &broken, &[]).ok();
    for task in ["mmmu", "textvqa"] {
        assert_eq!(items(&whole, task), items(&broken, task));
    }
}

#[test]
fn a_model_quantized_in_memory_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let family = &FAMILIES[1];
    let (model, captions) = (family.model(dir.path()), family.captions(dir.path()));
    let float = dir.path().join("float");
    eval(&model, "ocrbench", &float, &[]).ok();
    for (spec, name) in [("w2g16", "rtn w2g16"), ("w4a8", "rtn w4a8")] {
        let out = dir.path().join(spec);
        let said = eval(&model, "ocrbench", &out, &["--rtn", spec]);
        assert!(!said.err.contains("nothing is quantized"), "{}", said.err);
        let said = said.ok();
        // Two decoder layers of seven; tower, projector and head stay.
        assert!(said.contains(&format!("linear layers of the decoder: 14 {spec}")), "{said}");
        let report = report(&out);
        assert_eq!(report.layers.decoder[spec].layers, 14);
        assert_eq!(report.layers.elsewhere.keys().collect::<Vec<_>>(), ["dense"]);
        let rows: Vec<Row> = nics_base::jsonl::read(out.join("rows.jsonl")).unwrap();
        assert!(rows.iter().all(|r| r.variant == name));
    }
    let texts = |out: &Path| items(out, "ocrbench").into_iter().map(|r| r.reply.text).collect::<Vec<_>>();
    assert_ne!(texts(&float), texts(&dir.path().join("w2g16")));
    let scales = dir.path().join("scales");
    run(args![
        "calibrate",
        "--model",
        model,
        "--data",
        captions,
        "--samples",
        "2",
        "--quant",
        "w3g16",
        "--out",
        scales
    ])
    .ok();
    let out = dir.path().join("searched");
    let scales = scales.to_str().unwrap();
    let said = eval(&model, "ocrbench", &out, &["--scales", scales, "--variant", "mbq w3"]).ok();
    assert!(said.contains("14 w3g16"), "{said}");
    // The same as the checkpoint that `quantize` writes.
    let written = dir.path().join("written");
    run(args!["quantize", "--model", model, "--scales", scales, "--out", written]).ok();
    let again = dir.path().join("again");
    eval(&written, "ocrbench", &again, &[]).ok();
    assert_eq!(texts(&out), texts(&again));
    let other = FAMILIES[0].model(dir.path());
    eval(&other, "ocrbench", &dir.path().join("no"), &["--scales", scales])
        .refused(1, "model's architecture");
}

/// Scores by the rules, on replies that are given.
#[test]
fn replies_are_scored_by_the_rules_that_are_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let model = FAMILIES[0].model(dir.path());
    let out = dir.path().join("out");
    let tasks = "mmmu,scienceqa,ocrbench,textvqa,seedbench";
    eval(&model, tasks, &out, &[]).ok();
    let say = |task: &str, texts: &[&str]| {
        let all = std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().path());
        let file = all
            .into_iter()
            .find(|p| p.file_name().unwrap().to_str().unwrap().starts_with(&format!("{task}-")));
        let file = file.unwrap();
        let mut lines: Vec<Value> = nics_base::jsonl::read(&file).unwrap();
        for (line, text) in lines.iter_mut().zip(texts) {
            line["text"] = json!(text);
        }
        nics_base::jsonl::write(&file, &lines).unwrap();
    };
    say("mmmu", &["(B)", "no idea", "it is 0.50"]);
    say("scienceqa", &["B. a stone", "a", "B"]);
    say("ocrbench", &["it says Centre", "\\FRAC{1}{2}", "on May 1"]);
    say("textvqa", &["Dakota.", "a stop"]);
    say("seedbench", &["A.", "d", "B"]);
    let scores = |scoring: &str, more: &[&str]| {
        let all = [&["--scoring", scoring], more].concat();
        eval(&model, tasks, &out, &all).ok();
        tasks
            .split(',')
            .map(|t| items(&out, t).iter().map(|r| r.scored.score).collect::<Vec<_>>())
            .collect::<Vec<_>>()
    };
    let close = |found: Vec<Vec<f64>>, expected: [&[f64]; 5]| {
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.iter().zip(expected).all(|(f, e)| (f - e).abs() < 1e-9), "{found:?} {expected:?}");
        }
    };
    // Seven of ten people said dakota: every one has three others who agree. Of a formula the paper's harness lowered the answer.
    let people: &[f64] = &[1.0, 1.0];
    close(
        scores("2024", &[]),
        [&[1.0, 0.0, 1.0], &[0.0, 1.0, 1.0], &[1.0, 1.0, 1.0], people, &[1.0, 1.0, 0.0]],
    );
    close(
        scores("fixed", &[]),
        [&[1.0, 0.0, 1.0], &[1.0, 1.0, 1.0], &[1.0, 0.0, 1.0], people, &[1.0, 1.0, 0.0]],
    );
    let report = report(&out);
    assert_eq!(report.tasks[0].without_answer, 1);
    assert_eq!(report.tasks[4].groups["video"].n, 1);
    // By chance, of a seed: the same each time.
    let guessed = |seed: &str| {
        scores("2024", &["--guess", seed]);
        items(&out, "mmmu")[1].scored.answer.clone().unwrap()
    };
    assert_eq!(guessed("1"), guessed("1"));
    assert!(["A", "B"].contains(&guessed("2").as_str()));
}

#[test]
fn what_cannot_be_measured_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let model = FAMILIES[0].model(dir.path());
    let out = dir.path().join("out");
    eval(&model, "mmu", &out, &[]).refused(2, "no task is named `mmu`");
    eval(&model, "mmmu", &out, &["--limit", "0"]).refused(2, "at least 1");
    eval(&model, "mmmu", &out, &["--rtn", "w3g100"]).refused(1, "do not divide");
    let none = dir.path().join("none");
    let with = |tasks: &str, data: &Path| {
        run(args!["eval", "--model", model, "--tasks", tasks, "--data", data, "--out", out])
    };
    with("mmmu", &none).refused(1, "there is no such folder");
    std::fs::create_dir(&none).unwrap();
    with("mmmu", &none).refused(1, "it is empty");
    with("mmmu,vizwiz", &none).refused(1, "mmmu is expected in");
    // A row that is no question, and an image that is none.
    let row = |image: &Value| json!({"question_id": 1, "question": "?", "answers": ["a"], "image": image});
    let lines = none.join("validation.jsonl");
    std::fs::write(&lines, json!({"question": "?"}).to_string()).unwrap();
    with("textvqa", &none).refused(1, "validation.jsonl, row 1, field answers");
    std::fs::write(none.join("a.png"), "no image").unwrap();
    std::fs::write(&lines, row(&json!("a.png")).to_string()).unwrap();
    with("textvqa", &none).refused(1, "validation.jsonl, row 1, field image: ");
    std::fs::write(&lines, row(&json!("gone.png")).to_string()).unwrap();
    with("textvqa", &none).refused(1, "gone.png");
    // Data that changed under the replies.
    eval(&model, "textvqa", &out, &[]).ok();
}

//! What the steps make, held against the rules one by one.

use nics_core::cache::NoCache;
use nics_core::models::{Batch, Input, Model as _};
use nics_core::seam::{Ragged, SeqId};
use r2r::labels::pipeline::{
    Continued, Documents, Index, JudgedLine, LabelColumn, LabelSet, Lines, Response, ShardFile, documents,
};
use r2r::labels::{Document, Score, ThinkTokens, assemble, mismatches, prefill_features};
use r2r::router::{Architecture, InitArgs, RouterConfig};
use tch::{Kind, Tensor};

use crate::kit::*;

fn all<T: serde::de::DeserializeOwned>(path: &std::path::Path) -> Vec<T> {
    Lines::open(path).unwrap().map(Result::unwrap).collect()
}

/// The likeliest next token, without any cache.
fn likeliest(model: &Model, ids: &[i64]) -> i64 {
    let _guard = tch::no_grad_guard();
    let rows = Ragged::contiguous(&[(SeqId(0), 0, ids.len())]);
    let input = Tensor::from_slice(ids);
    let out =
        model.decoder.forward(&Batch::new(rows, Input::Ids(&input)), &mut NoCache::new(), None).unwrap();
    model.decoder.logits(&out.hidden).unwrap().argmax(1, false).int64_value(&[ids.len() as i64 - 1])
}

pub fn config(k: i64, hidden: i64) -> RouterConfig {
    let args = InitArgs {
        hidden_states_size: Some(hidden),
        logits_size: Some(k),
        hidden_dims: vec![16, 16],
        expansion_factor: 2,
        dropout_rate: 0.1,
        ..InitArgs::default()
    };
    RouterConfig { architecture: Architecture::HiddenTokenLogits, args }
}

#[test]
fn every_file_is_what_the_rules_make_of_the_one_before() {
    let dir = inputs(24);
    label(dir.path(), "labels", "").ok();
    let out = dir.path().join("labels");
    let (small, large) = (Model::open(&small()), Model::open(&large()));
    let think = ThinkTokens::of(&large.tokenizer).unwrap();
    let stops = {
        let task = task();
        move |id: i64| {
            let word = &task.words()[id as usize];
            [".", "!", "!!", "?", "<think>", "</think>"].contains(&word.as_str())
        }
    };
    let eos = i64::from(large.tokenizer.special_ids().eos[0]);

    // Responses: each a greedy continuation of its prompt.
    let responses: Vec<Response> = all(&out.join("responses.jsonl"));
    assert_eq!(responses.len(), 24);
    assert!(responses.iter().enumerate().all(|(i, r)| r.doc == i && r.id == format!("q{i}")));
    let thought = responses.iter().filter(|r| r.thought).count();
    assert!(thought >= 12, "the large model of the tests has not learnt to think: {thought}");
    for response in responses.iter().take(3) {
        let mut ids: Vec<i64> = response.prompt.iter().map(|&i| i64::from(i)).collect();
        for &token in &response.response {
            assert_eq!(likeliest(&large, &ids), i64::from(token));
            ids.push(i64::from(token));
        }
        assert_eq!(response.thought, ids.contains(&think.end));
    }

    // Features: what the small model computes, in files of whole documents.
    let index = Index::read(&out.join("index.json")).unwrap();
    assert!(index.files.len() > 2 && index.consumed() == 24 && index.documents() == thought as u64);
    let continued: Vec<Continued> = all(&out.join("mismatch.jsonl"));
    let judged: Vec<JudgedLine> = all(&out.join("judged.jsonl"));
    assert!(continued.len() > 20 && continued.len() == judged.len());
    assert!(judged.iter().any(|j| j.score == 0) && judged.iter().any(|j| j.score == 1));
    let labels = Index::read(&out.join("labels.json")).unwrap();
    assert_eq!(labels.consumed(), judged.len() as u64);
    let (mut seen, mut places) = (0, Vec::new());
    for (entry, labelled) in index.files.iter().zip(&labels.files) {
        let file = ShardFile::open(&out, entry).unwrap().unwrap();
        assert!(entry.rows < 300 + 100);
        let mut expected: Vec<[i64; 6]> = Vec::new();
        for document in documents(&file).unwrap() {
            let response = &responses[document.doc];
            let exact: Vec<i64> =
                response.prompt.iter().chain(&response.response).map(|&i| i64::from(i)).collect();
            assert!(response.thought && document.ids == exact);
            let features = prefill_features(&small.decoder, &exact, 12).unwrap();
            let rows =
                |name: &str| file.tensor(name).unwrap().narrow(0, document.first as i64, exact.len() as i64);
            assert!(rows("hidden").equal(&features.hidden) && rows("top_logits").equal(&features.top_logits));
            assert!(rows("top_index").to_kind(Kind::Int64).equal(&features.top_indices));
            assert_eq!(Vec::<i64>::try_from(&features.argmax).unwrap(), document.argmax);

            // Mismatches, and both continuations up to the second end of a sentence.
            let read =
                Document { tokens: &document.ids, predictions: &document.argmax, types: &document.types };
            let found = mismatches(&read, think.end, usize::MAX).unwrap();
            let mine = &continued[seen..seen + found.len()];
            for (m, line) in found.iter().zip(mine) {
                assert_eq!((line.doc, line.position), (document.doc, m.position));
                assert_eq!((line.real, line.previous, line.small), (m.real, m.previous, m.small));
                if places.len() < 12 {
                    let mut ids = document.ids[..m.position].to_vec();
                    ids.push(m.small);
                    for &token in &line.continuation {
                        assert_eq!(likeliest(&large, &ids), token);
                        ids.push(token);
                    }
                    let ends = line.continuation.iter().filter(|t| stops(**t)).count();
                    assert!(ends == 2 || (ends < 2 && likeliest(&large, &ids) == eos), "{line:?}");
                }
                places.push((line.doc, line.position));
            }

            // The rule, in words.
            let sentence = |first: i64, rest: &[i64]| -> Vec<u32> {
                let mut text = Vec::new();
                for &id in [first].iter().chain(rest) {
                    text.push(task().meaning(id as u32));
                    if stops(id) {
                        break;
                    }
                }
                text
            };
            let mut scores = Vec::new();
            for (line, verdict) in mine.iter().zip(&judged[seen..]) {
                let differ = sentence(line.small, &line.continuation) != sentence(line.real, &line.reference);
                assert_eq!((verdict.doc, verdict.position), (line.doc, line.position));
                assert_eq!(verdict.score, i64::from(differ), "{line:?}");
                scores.push(Score { position: line.position, score: verdict.score });
            }
            seen += found.len();

            // Labels of rows.
            for (row, label) in assemble(&document.types, &scores).unwrap().into_iter().flatten().enumerate()
            {
                let real = document.ids.get(row + 1).copied().unwrap_or(-1);
                let (mismatch, mask) = (i64::from(label.mismatch), i64::from(label.mask));
                let token = document.argmax[row];
                expected.push([
                    document.doc as i64,
                    row as i64,
                    real,
                    token,
                    label.divergent,
                    mismatch + 2 * mask,
                ]);
            }
        }
        assert_eq!(labelled.rows as usize, expected.len());
        if let Some(file) = ShardFile::open(&out, labelled).unwrap() {
            let column = |name: &str| file.column(name).unwrap();
            let [doc, pos, real] = ["doc", "pos", "real"].map(column);
            let [token, divergent, mismatch] = ["token", "divergent", "mismatch"].map(column);
            let mask = column("mask");
            for (i, row) in expected.iter().enumerate() {
                let found = [doc[i], pos[i], real[i], token[i], divergent[i], mismatch[i] + 2 * mask[i]];
                assert_eq!(&found, row);
            }
            assert_eq!(file.tensor("hidden").unwrap().size(), [expected.len() as i64, 16]);
        }
    }
    assert_eq!(seen, continued.len());
}

#[test]
fn steps_one_by_one_or_all_together_make_the_same_bytes() {
    let dir = inputs(20);
    label(dir.path(), "whole", "").ok();
    label(dir.path(), "together", "--together").ok();
    let batch = "--batch 4 --group 8";
    for step in [
        format!("respond --queries queries.jsonl --llm LARGE --max-new-tokens LONGEST {batch}"),
        "prefill --slm SMALL --llm LARGE --top-k 12 --shard-tokens 300".to_owned(),
        format!("continue --llm LARGE {batch}"),
        format!("judge --llm LARGE --judge rule:synonyms.toml {batch}"),
        "build".to_owned(),
    ] {
        say(dir.path(), &format!("label {step} --dtype f32 --out steps")).ok();
    }
    let whole = files(&dir.path().join("whole"));
    assert!(whole.iter().any(|(name, _)| name == "labels-0000.safetensors"), "{whole:?}");
    assert_eq!(whole, files(&dir.path().join("together")));
    assert_eq!(whole, files(&dir.path().join("steps")));
    // Once more finds everything done.
    let said = label(dir.path(), "whole", "");
    assert_eq!(said.code, Some(0));
    assert!(said.stderr.contains("rows of labels"), "{}", said.stderr);
    assert_eq!(whole, files(&dir.path().join("whole")));
}

#[test]
fn shards_make_the_labels_of_the_whole() {
    let dir = inputs(20);
    label(dir.path(), "whole", "").ok();
    label(dir.path(), "parts", "--shard 0/3").ok();
    label(dir.path(), "parts", "--shard 2/3").ok();
    let open = |folder: &str| LabelSet::open(&[dir.path().join(folder)]);
    let missing = open("parts").unwrap_err().to_string();
    assert!(missing.contains("shard-0000 to shard-0002"), "{missing}");
    label(dir.path(), "parts", "--shard 1/3").ok();
    let (whole, parts) = (open("whole").unwrap(), open("parts").unwrap());
    assert_eq!(whole.rows(), parts.rows());
    let read =
        |set: &LabelSet, documents| set.read(&config(12, 16), LabelColumn::Divergent, documents).unwrap();
    let (rows, statistics) = read(&whole, Documents::All);
    let (_, of_parts) = read(&parts, Documents::All);
    assert_eq!(statistics, of_parts);
    assert_eq!(statistics.train, rows.len() as u64);
    assert!(statistics.divergent > 0 && statistics.mismatch > statistics.divergent, "{statistics:?}");
    // The split goes by documents, whatever the folders.
    let (held_out, seed) = (0.3, 5);
    let (training, _) = read(&whole, Documents::Training { held_out, seed });
    let (rest, _) = read(&whole, Documents::HeldOut { held_out, seed });
    assert!(!rest.is_empty() && training.len() + rest.len() == rows.len());
    assert_eq!(read(&parts, Documents::HeldOut { held_out, seed }).0.len(), rest.len());
    let (_, mismatch) = whole.read(&config(12, 16), LabelColumn::Mismatch, Documents::All).unwrap();
    assert_eq!(mismatch, statistics);
    let folder = dir.path().join("whole");
    let twice = LabelSet::open(&[folder.clone(), folder]).unwrap_err().to_string();
    assert!(twice.contains("given twice"), "{twice}");
    let error = whole.read(&config(13, 16), LabelColumn::Divergent, Documents::All).unwrap_err().to_string();
    assert!(error.contains("top_k") && error.contains("12"), "{error}");
    let error = whole.read(&config(12, 8), LabelColumn::Divergent, Documents::All).unwrap_err();
    assert!(matches!(error, r2r::Error::HiddenSizeMismatch { router: 8, slm: 16 }), "{error}");
}

/// Where words are tokens, a text encoded anew is what was written.
#[test]
fn a_conversation_encoded_anew_is_the_one_that_was_written() {
    let dir = inputs(12);
    label(dir.path(), "exact", "").ok();
    label(dir.path(), "rebuilt", "--form rebuilt").ok();
    let labels = |folder: &str| -> Vec<(String, String)> {
        let mut all = files(&dir.path().join(folder));
        all.retain(|(name, _)| name.starts_with("labels-") || name.starts_with("features-"));
        all
    };
    assert!(!labels("exact").is_empty());
    assert_eq!(labels("exact"), labels("rebuilt"));
}

/// A question with the model's own template is the prompt that the model was trained on.
#[test]
fn questions_are_asked_in_the_models_own_form() {
    let dir = inputs(3);
    let queries: Vec<String> = (0..3)
        .map(|i| {
            let text = task().decode(&prompt(i)[1..]);
            serde_json::json!({ "id": i, "question": text, "type": "math" }).to_string()
        })
        .collect();
    std::fs::write(dir.path().join("asked.jsonl"), queries.join("\n")).unwrap();
    let step = "label respond --llm LARGE --max-new-tokens LONGEST --dtype f32";
    say(dir.path(), &format!("{step} --queries queries.jsonl --out given")).ok();
    say(dir.path(), &format!("{step} --queries asked.jsonl --out asked")).ok();
    let read = |folder: &str| -> Vec<Response> { all(&dir.path().join(folder).join("responses.jsonl")) };
    for (given, asked) in read("given").iter().zip(read("asked")) {
        assert_eq!((&given.prompt, &given.response), (&asked.prompt, &asked.response));
        assert!(given.question.is_none() && asked.question.is_some());
    }
}

//! Token types, stops, mismatches, labels, sentences, the judge's replies, features.

use nics_core::models::{self, Decoder};
use r2r::labels::sentences::{Window, branch, segments};
use r2r::labels::stops::{ForcedEnd, StopTokens, brackets_fit, reference_continuation};
use r2r::labels::{
    Document, Score, ThinkTokens, TokenType, assemble, judge, mismatches, prefill_features, token_types,
};
use serde_json::{Value, json};

use crate::kit::{Case, assert_close, cases, ints};

fn list(value: &Value) -> Vec<i64> {
    serde_json::from_value(value.clone()).unwrap()
}

fn array(value: &Value) -> &Vec<Value> {
    let array = value.as_array().unwrap();
    assert!(!array.is_empty());
    array
}

fn count(value: &Value) -> Option<usize> {
    usize::try_from(value.as_i64().unwrap()).ok()
}

fn think(case: &Case) -> ThinkTokens {
    ThinkTokens {
        start: case.json["think_start"].as_i64().unwrap(),
        end: case.json["think_end"].as_i64().unwrap(),
    }
}

#[test]
fn types() {
    for case in cases("token_types") {
        for row in array(&case.json["cases"]) {
            let found: Vec<i64> =
                token_types(&list(&row["ids"]), think(&case)).iter().map(|t| *t as i64).collect();
            assert_eq!(found, list(&row["types"]));
        }
    }
}

#[test]
fn stops() {
    for case in cases("stops") {
        for row in array(&case.json["brackets"]) {
            let token = row["token"].as_str().unwrap();
            assert_eq!(brackets_fit(token), row["valid"].as_bool().unwrap(), "{token:?}");
        }
        let vocabulary: Vec<&str> = array(&case.json["vocab"]).iter().map(|t| t.as_str().unwrap()).collect();
        let stops = StopTokens::of_vocabulary((0i64..).zip(vocabulary), None);
        assert_eq!(stops.ids(), list(&case.json["stop_ids"]));
        let eos = case.json["eos_id"].as_i64().unwrap();
        let sequence = list(&case.json["real_seq"]);
        for row in array(&case.json["trim_cases"]).iter().chain(array(&case.json["trim_edge"])) {
            let tokens = if row["seq"].is_null() { sequence.clone() } else { list(&row["seq"]) };
            let limit = count(&row["num_continuation"]);
            let (index, most) = (count(&row["index"]).unwrap(), count(&row["max_new_tokens"]).unwrap());
            assert_eq!(
                reference_continuation(&tokens, index, most, limit, &stops, eos),
                list(&row["tokens"]),
                "{row}"
            );
        }
        let likeliest = case.tensor("in.eosproc_logits").argmax(-1, false);
        let expected = case.tensor("out.eosproc_argmax");
        for sequence in 0..likeliest.size()[1] {
            let mut end = ForcedEnd::new(count(&case.json["num_continuation"]).unwrap(), eos);
            let found: Vec<i64> =
                ints(&likeliest.select(1, sequence)).iter().map(|&t| end.step(t, &stops)).collect();
            assert_eq!(found, ints(&expected.select(1, sequence)));
        }
    }
}

#[test]
fn mismatches_and_labels() {
    for case in cases("mismatch_and_labels") {
        let column = |name: &str| ints(case.tensor(&format!("in.{name}")));
        let (documents, tokens) = (column("data_id"), column("real_token"));
        let (predictions, kinds) = (column("SLM_predictions"), column("token_type"));
        let types: Vec<TokenType> = kinds
            .iter()
            .map(|t| [TokenType::Instruction, TokenType::Reasoning, TokenType::Response][*t as usize])
            .collect();
        let scores = ints(case.tensor("in.judge"));
        let (mut found, mut aligned) = (Vec::new(), Vec::new());
        for rows in documents.chunk_by(|a, b| a == b).scan(0, |from, chunk| {
            *from += chunk.len();
            Some(*from - chunk.len()..*from)
        }) {
            let id = documents[rows.start];
            let document = Document {
                tokens: &tokens[rows.clone()],
                predictions: &predictions[rows.clone()],
                types: &types[rows.clone()],
            };
            let max = count(&case.json["max_tokens"]).unwrap();
            let all = mismatches(&document, think(&case).end, max).unwrap();
            for m in &all {
                let [position, context, new] = [m.position, m.context, m.new_context].map(|n| n as i64);
                found.extend([id, position, m.real, m.previous, m.small, context, new]);
            }
            let judged: Vec<Score> = scores
                .chunks(3)
                .filter(|row| row[0] == id)
                .map(|row| Score { position: row[1] as usize, score: row[2] })
                .collect();
            assert_eq!(judged.is_empty(), all.is_empty());
            for (row, label) in assemble(document.types, &judged).unwrap().into_iter().flatten().enumerate() {
                let flags = [label.mismatch, label.mask].map(i64::from);
                aligned.extend([id, row as i64, label.divergent, flags[0], flags[1]]);
            }
        }
        assert_eq!(found, ints(case.tensor("out.mismatch")));
        assert_eq!(aligned, ints(case.tensor("out.aligned")));
    }
}

#[test]
fn sentences() {
    for case in cases("sentences") {
        for row in array(&case.json["segment_cases"]) {
            let found: Vec<Value> = segments(row["text"].as_str().unwrap())
                .into_iter()
                .map(|s| json!([s.text, s.start, s.end]))
                .collect();
            assert_eq!(Value::Array(found), row["segments"], "{}", row["text"]);
        }
        for row in array(&case.json["context_cases"]) {
            let window = Window {
                continuation: count(&row["num_continuation"]).unwrap(),
                previous: count(&row["previous_context"]),
                common: count(&row["common_previous_context"]),
                skip_input: row["skip_input"].as_bool().unwrap(),
            };
            let text = |key: &str| row[key].as_str().unwrap();
            let after_stop = row["is_next_context"].as_bool().unwrap();
            let found = branch(text("context"), text("pred"), text("output"), after_stop, window);
            assert_eq!(
                (found.common.as_str(), found.sentence.as_str()),
                (text("common"), text("result")),
                "{row}"
            );
        }
    }
}

#[test]
fn replies_of_the_judge() {
    for case in cases("judge_parse") {
        for row in array(&case.json["cases"]) {
            let reply = row["response"].as_str().unwrap();
            assert_eq!(judge::score(reply), row["score"].as_i64().unwrap(), "{reply:?}");
            assert_eq!(judge::strict_score(reply), row["score_strict"].as_i64().unwrap(), "{reply:?}");
        }
    }
}

/// A model of the decoding loop's case: weights under `prefix`, configuration under `key`.
pub fn decoder(case: &Case, prefix: &str, key: &str) -> Decoder {
    let mut config = case.json[key].as_object().unwrap().clone();
    let family = match config["model_type"].as_str().unwrap() {
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        other => panic!("no family {other}"),
    };
    config.insert("architectures".into(), json!([family]));
    models::load_at(models::config(&config).unwrap(), &case.path(prefix)).unwrap()
}

#[test]
fn features_of_a_text() {
    // Several sets may share one pair of models.
    let models = cases("decode_loop");
    for (case, model) in cases("prefill_features").iter().zip(models.iter().cycle()) {
        let slm = decoder(model, "slm.", "slm_config");
        let ids = ints(case.tensor("in.ids"));
        let found = prefill_features(&slm, &ids, case.json["topk"].as_i64().unwrap()).unwrap();
        assert_eq!(ints(&found.argmax), ints(case.tensor("out.argmax")));
        assert_eq!(ints(&found.top_indices), ints(case.tensor("out.top_indices")));
        let abs = case.number("tol_abs");
        assert_close("top_logits", &found.top_logits, case.tensor("out.top_logits"), abs, 0.0);
        assert_close("last_hidden", &found.hidden, case.tensor("out.last_hidden"), abs, 0.0);
    }
}

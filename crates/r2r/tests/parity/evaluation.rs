//! Answers, prompts, pass@k, shuffles.

use r2r::evaluation::{
    AnswerKind, OptionShuffle, SHUFFLE_SEED, aime, boxed, choice, fenced_code, gpqa, is_correct,
    last_fenced_code, live_code_bench, lone_letter, mmlu_pro, pass_at_k,
};
use serde_json::{Value, json};

use crate::kit::{Case, cases};

fn rows<'a>(case: &'a Case, key: &str) -> &'a Vec<Value> {
    let rows = case.json[key].as_array().unwrap();
    assert!(!rows.is_empty());
    rows
}

#[test]
fn answers() {
    for case in cases("evaluation") {
        for (key, extract) in [
            ("boxed", boxed as fn(&str) -> Option<String>),
            ("choice", choice),
            ("mmlu_pro", lone_letter),
            ("code_fenced", fenced_code),
        ] {
            for row in rows(&case, key) {
                let text = row["text"].as_str().unwrap();
                let found = extract(text);
                let (expected, there) = (&row["result"][0], row["result"][1].as_bool().unwrap());
                assert_eq!(found.is_some(), there, "{key}: {text:?}");
                if there {
                    assert_eq!(json!(found), *expected, "{key}: {text:?}");
                }
            }
        }
        for row in rows(&case, "code_lcb") {
            assert_eq!(last_fenced_code(row["text"].as_str().unwrap()), row["result"].as_str().unwrap());
        }
        for row in rows(&case, "check") {
            let kind = match row["type"].as_str().unwrap() {
                "boxed" => AnswerKind::Boxed,
                "multiple_choice" => AnswerKind::Choice,
                "mmlu-multiple-choice" => AnswerKind::LongChoice,
                "livecodebench" => AnswerKind::Program,
                other => panic!("no kind {other}"),
            };
            let found = is_correct(kind, row["pred"].as_str().unwrap(), row["gold"].as_str().unwrap());
            assert_eq!(found, row["result"].as_bool().unwrap(), "{row}");
        }
        for row in rows(&case, "pass_at_k") {
            let [n, c, k] = ["n", "c", "k"].map(|key| row[key].as_u64().unwrap());
            // The fixtures' README: 1e-9.
            assert!((pass_at_k(n, c, k) - row["result"].as_f64().unwrap()).abs() < 1e-9, "{row}");
        }
    }
}

#[test]
fn prompts_and_orders() {
    for case in cases("evaluation") {
        let text = |key: &str| case.json[key].as_str().unwrap();
        assert_eq!(gpqa("<Q>", ["<A>", "<B>", "<C>", "<D>"]), text("prompt_gpqa"));
        assert_eq!(live_code_bench("<Q>", None), text("prompt_lcb_stdin"));
        assert_eq!(live_code_bench("<Q>", Some("<CODE>")), text("prompt_lcb_starter"));
        assert_eq!(aime("<Q>"), text("prompt_aime"));
        assert_eq!(mmlu_pro("<Q>", &["o1", "o2", "o3"]), text("mmlu_question_block"));
        // What a question holds is text, whatever it looks like.
        assert!(gpqa("{{a}}", ["x", "b", "c", "d"]).contains("{{a}}"));
        let mut shuffle = OptionShuffle::new(SHUFFLE_SEED);
        for expected in rows(&case, "gpqa_option_permutations_numpy_seed42") {
            let expected: Vec<usize> = serde_json::from_value(expected.clone()).unwrap();
            assert_eq!(shuffle.permutation(expected.len()), expected);
        }
    }
}

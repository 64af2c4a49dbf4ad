//! Answers, programs, pass@k and the vote.

use pm_kvq::answers::{Judging, equal, extract, last_fenced_code, pass_at_k_percent, passes};
use serde_json::Value;

use crate::kit::{Case, cases};

fn rows<'a>(case: &'a Case, key: &str) -> &'a Vec<Value> {
    let rows = case.json[key].as_array().unwrap();
    assert!(!rows.is_empty());
    rows
}

#[test]
fn answers() {
    for case in cases("16_") {
        for row in rows(&case, "extract_answer") {
            assert_eq!(extract(row["text"].as_str().unwrap()), row["answer"].as_str().unwrap(), "{row}");
        }
        for row in rows(&case, "judge") {
            let (a, b) = (row["a"].as_str(), row["b"].as_str());
            assert_eq!(equal(Judging::Official, a, b), row["equal"].as_bool().unwrap(), "{row}");
        }
        for row in rows(&case, "extract_code") {
            assert_eq!(
                last_fenced_code(row["text"].as_str().unwrap()),
                row["code"].as_str().unwrap(),
                "{row}"
            );
        }
    }
}

#[test]
fn figures() {
    for case in cases("16_") {
        for row in rows(&case, "pass_at_k_percent") {
            let [n, c, k] = ["n", "c", "k"].map(|key| row[key].as_u64().unwrap());
            let found = pass_at_k_percent(&[(n, c)], k).unwrap();
            assert!((found - row["value"].as_f64().unwrap()).abs() < 1e-9, "{row}: {found}");
        }
        let example = &case.json["metrics_example"];
        let problems: Vec<(u64, u64)> = example["results"]
            .as_object()
            .unwrap()
            .values()
            .map(|replies| {
                let replies = replies.as_array().unwrap();
                let right = replies.iter().filter(|tests| passes(&results(tests))).count();
                (replies.len() as u64, right as u64)
            })
            .collect();
        for (name, expected) in example.as_object().unwrap() {
            let Some(k) = name.strip_prefix("pass@") else { continue };
            let found = pass_at_k_percent(&problems, k.parse().unwrap()).unwrap();
            assert!((found - expected.as_f64().unwrap()).abs() < 1e-9, "{name}: {found}");
        }
    }
}

fn results(tests: &Value) -> Vec<i64> {
    let result = |t: &Value| t.as_bool().map(i64::from).or(t.as_i64()).unwrap();
    tests.as_array().unwrap().iter().map(result).collect()
}

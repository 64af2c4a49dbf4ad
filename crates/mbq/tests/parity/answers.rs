//! Scoring rules and prompts.

use mbq::evaluation::choice::{Fallback, mmmu, science_qa, seed};
use mbq::evaluation::open::{Value as Parsed, correct, parse};
use mbq::evaluation::{Rules, ocr, prompts, vqa};
use serde_json::Value;

use crate::kit::{Case, case, get};

/// Calls `f` with each entry of a list of the case.
fn each(case: &Case, name: &str, f: impl Fn(&Value)) {
    let all: Vec<Value> = case.field(name);
    assert!(!all.is_empty());
    all.iter().for_each(f);
}

fn text(entry: &Value, name: &str) -> String {
    get(entry, name).unwrap_or_else(|e| panic!("{name} of {entry}: {e}"))
}

/// A text or a list of texts.
fn texts(value: &Value) -> Vec<String> {
    match value {
        Value::Array(_) => serde_json::from_value(value.clone()).unwrap(),
        other => vec![other.as_str().unwrap().to_owned()],
    }
}

#[test]
fn visual_questions() {
    let case = case("14_eval_answers");
    each(&case, "vqa_normalize", |e| assert_eq!(vqa::normalize(&text(e, "input")), text(e, "output"), "{e}"));
    each(&case, "vqa_accuracy", |e| {
        let found = vqa::accuracy(&text(e, "pred"), &texts(&e["answers"]));
        assert!((found - e["exact_match"].as_f64().unwrap()).abs() < f64::EPSILON, "{e}: {found}");
    });
    let table = crate::kit::case("14_vqa_contractions");
    let expected = table.json["contractions"].as_object().unwrap();
    for (from, to) in expected {
        assert_eq!(vqa::contraction(from), to.as_str(), "{from}");
    }
    assert_eq!(vqa::contractions().count(), expected.len());
}

#[test]
fn choices() {
    let case = case("14_eval_answers");
    each(&case, "mmmu_multi_choice", |e| {
        let found = mmmu(&text(e, "response"), &texts(&e["options"]), Fallback::Wrong);
        assert_eq!(found.map(String::from).as_deref(), e["parsed"].as_str(), "{e}");
    });
    each(&case, "seed", |e| {
        assert_eq!(seed(&text(e, "response"), &text(e, "answer")), e["correct"].as_bool().unwrap(), "{e}");
    });
    // The right answer is the one that counts as it is.
    let all: Vec<Value> = case.field("scienceqa");
    let right = all.iter().find(|e| e["score_2024_12"] == 1.0).unwrap();
    let letter = text(right, "response").chars().next().unwrap();
    each(&case, "scienceqa", |e| {
        for (key, rules) in [("score_2024_12", Rules::Paper), ("score_2026_08", Rules::Mended)] {
            let found = science_qa(&text(e, "response"), letter, rules);
            assert_eq!(found, e[key].as_f64().unwrap() > 0.5, "{key} {e}");
        }
    });
}

#[test]
fn open_answers() {
    let case = case("14_eval_answers");
    each(&case, "mmmu_open", |e| {
        let found = parse(&text(e, "response"));
        let mut shown: Vec<String> = found
            .iter()
            .map(|v| match v {
                Parsed::Number(n) => format!("{n:?}"),
                Parsed::Text(t) => t.clone(),
            })
            .collect();
        let expected = e["parsed"].as_array().unwrap().iter();
        let mut expected: Vec<String> =
            expected.map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned)).collect();
        shown.sort();
        expected.sort();
        assert_eq!(shown, expected, "{e}");
        assert_eq!(correct(&found, &texts(&e["gold"])), e["correct"].as_bool().unwrap(), "{e}");
    });
}

#[test]
fn text_in_images() {
    let case = case("14_eval_answers");
    each(&case, "ocrbench", |e| {
        for (key, rules) in [("score_2024_12", Rules::Paper), ("score_2026_08", Rules::Mended)] {
            let found = ocr::contains(&text(e, "response"), &texts(&e["answer"]), &text(e, "dataset"), rules);
            assert_eq!(i64::from(found), e[key].as_i64().unwrap(), "{key} {e}");
        }
    });
}

/// Options in a prompt, `A. red`.
fn options(prompt: &str) -> Vec<&str> {
    prompt
        .lines()
        .filter(|l| l.as_bytes().first().is_some_and(u8::is_ascii_uppercase) && l[1..].starts_with(". "))
        .map(|l| &l[3..])
        .collect()
}

#[test]
fn questions() {
    let case = case("14_eval_answers");
    let prompt = |name: &str| text(&case.json["prompts"], name);
    let question = |prompt: &str| prompt.lines().next().unwrap().to_owned();
    let none: [&str; 0] = [];

    let p = prompt("mmmu_mc");
    assert_eq!(prompts::mmmu(&question(&p), &options(&p)), p);
    // What TextVQA and VizWiz capitalise.
    let small = question(&p);
    assert_eq!(prompts::viz_wiz(&small), prompt("vizwiz"));
    assert_eq!(prompts::text_vqa(&small), prompt("textvqa"));
    let p = prompt("mmmu_open");
    assert_eq!(prompts::mmmu(&question(&p), &none), p);
    let p = prompt("seed");
    assert_eq!(prompts::seed(&question(&p), &options(&p)), p);
    let p = prompt("scienceqa_nohint");
    assert_eq!(prompts::science_qa("", &question(&p), &options(&p)), p);
    let hinted = prompt("scienceqa");
    let hint = question(&hinted).strip_prefix("Context: ").unwrap().to_owned();
    assert_eq!(prompts::science_qa(&hint, &question(&p), &options(&p)), hinted);
}

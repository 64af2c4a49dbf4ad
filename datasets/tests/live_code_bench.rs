//! LiveCodeBench in a tiny copy of its files, and in files that are wrong.

use std::io::Write as _;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::write::ZlibEncoder;
use nics_base::hub::Source;
use nics_datasets::live_code_bench::{Problem, Window, day, load, load_file};
use serde_json::{Value, json};

fn fixtures() -> Source {
    Source::folder(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/live-code-bench"))
}

fn ids(problems: &[Problem]) -> Vec<&str> {
    problems.iter().map(|p| p.id.as_str()).collect()
}

#[test]
fn problems_of_a_release_with_their_tests() {
    let found = load(&fixtures(), &"v1_v2".parse().unwrap(), Window::default()).unwrap();
    assert_eq!(ids(&found), ["101", "102", "201", "202"]);
    let [sum, longest, half, scale] = &found[..] else { unreachable!() };
    assert_eq!(
        (sum.platform.as_str(), sum.difficulty.as_str(), sum.title.as_str()),
        ("atcoder", "easy", "Sum of a line")
    );
    assert_eq!((&sum.starter, &sum.function, sum.date), (&None, &None, day("2024-08-03").unwrap()));
    assert!(longest.starter.as_ref().unwrap().starts_with("class Solution:\n    def longestWord"));
    // Public before private; packed and plain private ones.
    let pairs = |problem: &Problem| -> Vec<(String, String)> {
        let tests = problem.tests().unwrap();
        assert_eq!(tests.function(), problem.function.as_deref());
        tests.all().iter().map(|t| (t.input.clone(), t.output.clone())).collect()
    };
    let owned = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
        pairs.iter().map(|&(a, b)| (a.into(), b.into())).collect()
    };
    assert_eq!(pairs(sum), owned(&[("1 2 3\n", "6\n"), ("10\n", "10\n"), ("-4 4\n", "0\n")]));
    assert_eq!(
        pairs(longest),
        owned(&[("[\"ab\", \"abc\"]", "\"abc\""), ("[\"ü\"]", "\"ü\""), ("[\"b\", \"a\"]", "\"b\"")])
    );
    assert_eq!(pairs(half), owned(&[("3\n", "1.5\n"), ("4\n", "2\n")]));
    assert_eq!(pairs(scale).len(), 3);
    assert_eq!(ids(&load(&fixtures(), &"v2".parse().unwrap(), Window::default()).unwrap()), ["201", "202"]);
}

#[test]
fn a_window_of_days_holds_both_its_ends() {
    let within = |from: Option<&str>, to: Option<&str>| {
        let window = Window { from: from.map(|d| day(d).unwrap()), to: to.map(|d| day(d).unwrap()) };
        load(&fixtures(), &"release_v2".parse().unwrap(), window)
            .map(|found| found.into_iter().map(|p| p.id).collect::<Vec<_>>())
    };
    assert_eq!(within(Some("2024-09-14"), Some("2025-01-04")).unwrap(), ["102", "201"]);
    assert_eq!(within(None, Some("2024-08-31")).unwrap(), ["101"]);
    assert_eq!(within(Some("2025-02-01"), None).unwrap(), ["202"]);
    let none = within(Some("2026-01-01"), None).unwrap_err().to_string();
    assert!(none.contains("problems from 2026-01-01 to any day"), "{none}");
}

#[test]
fn a_release_that_is_not_there_is_named() {
    let missing = load(&fixtures(), &"v2_v3".parse().unwrap(), Window::default()).unwrap_err().to_string();
    assert!(missing.contains("test3.jsonl"), "{missing}");
}

/// A sound line.
fn line() -> Value {
    json!({
        "question_id": "1", "question_content": "Do.", "contest_date": "2024-08-03T00:00:00",
        "public_test_cases": r#"[{"input": "1", "output": "1", "testtype": "stdin"}]"#,
        "private_test_cases": "[]", "metadata": "{}", "starter_code": "",
    })
}

/// The first error of reading the line behind a blank one, and of its tests.
fn error(text: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("own.jsonl");
    std::fs::write(&path, format!("\n{text}\n")).unwrap();
    let error = match load_file(&path, Window::default()) {
        Ok(found) => found[0].tests().unwrap_err().to_string(),
        Err(error) => error.to_string(),
    };
    assert!(error.contains("own.jsonl"), "{error}");
    error
}

fn deflated(bytes: &[u8]) -> String {
    let mut encoder = ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    STANDARD.encode(encoder.finish().unwrap())
}

#[test]
fn what_is_wrong_is_named_with_line_and_field() {
    let changed = |field: &str, value: Value| {
        let mut line = line();
        line[field] = value;
        error(&line.to_string())
    };
    let pickle_of_a_call =
        b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94.";
    let functional = r#"[{"input": "1", "output": "1", "testtype": "functional"}]"#;
    for (field, value, reason) in [
        ("question_id", Value::Null, "there is no such field; the row has"),
        ("question_content", json!(" "), "it is empty"),
        ("question_content", json!([]), "found a list, expected a text"),
        ("contest_date", json!("soon"), "\"soon\" is no day, expected one such as 2024-08-01"),
        ("starter_code", json!(1), "found a number, expected a text"),
        ("metadata", json!("{"), "it is no JSON"),
        ("metadata", json!("[]"), "found a list, expected an object"),
        (
            "metadata",
            json!(r#"{"func_name": "a b"}"#),
            "func_name is \"a b\", expected the name of a function",
        ),
        ("metadata", json!(r#"{"func_name": 3}"#), "func_name is 3"),
        ("public_test_cases", Value::Null, "there is no such field"),
        ("public_test_cases", json!("{}"), "it is no list of tests in JSON"),
        ("public_test_cases", json!(r#"[{"input": "1"}]"#), "missing field `output`"),
        (
            "public_test_cases",
            json!(functional),
            "test 1 is of kind Functional while metadata names no function",
        ),
        (
            "public_test_cases",
            json!(functional.replace("functional", "psychic")),
            "unknown variant `psychic`",
        ),
        ("public_test_cases", json!("[]"), "there is not a single test"),
        ("private_test_cases", json!("*"), "it is neither JSON nor base64"),
        ("private_test_cases", json!(STANDARD.encode("not deflated")), "no sound zlib stream"),
        (
            "private_test_cases",
            json!(deflated(b"[]")),
            "the pickle in it is refused: it has instruction 0x5b at byte 0",
        ),
        ("private_test_cases", json!(deflated(pickle_of_a_call)), "nothing was run"),
        ("private_test_cases", json!(deflated(b"\x80\x04\x8c\x02{}\x94.")), "it is no list of tests in JSON"),
    ] {
        let found = changed(field, value);
        assert!(found.contains(reason) && found.contains("row 2, field") && found.contains(field), "{found}");
    }
    // A stream that ends too early.
    let whole = deflated(b"\x80\x04\x8c\x02[]\x94.");
    let cut = STANDARD.encode(&STANDARD.decode(whole).unwrap()[..8]);
    assert!(changed("private_test_cases", json!(cut)).contains("zlib"));
    assert!(error("{").contains("line 2"));
    assert!(error("3").contains("line 2: found a number, expected an object"));
    assert!(error("").contains("has no rows"));
}

#[test]
fn what_inflates_beyond_bounds_is_refused_without_the_memory() {
    // A gigabyte of zeros and one more, in a megabyte.
    let mut encoder = ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    let zeros = vec![0; 1 << 20];
    for _ in 0..1024 {
        encoder.write_all(&zeros).unwrap();
    }
    encoder.write_all(b"1").unwrap();
    let mut line = line();
    line["private_test_cases"] = json!(STANDARD.encode(encoder.finish().unwrap()));
    let found = error(&line.to_string());
    assert!(found.contains("it inflates to more than 1073741824 bytes"), "{found}");
}

#[test]
fn a_file_that_changed_under_a_problem_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("own.jsonl");
    let mut other = line();
    other["question_id"] = json!("2");
    std::fs::write(&path, format!("{}\n", line())).unwrap();
    let problem = &load_file(&path, Window::default()).unwrap()[0];
    assert_eq!(problem.tests().unwrap().all().len(), 1);
    std::fs::write(&path, format!("{other}\n")).unwrap();
    let changed = problem.tests().unwrap_err().to_string();
    assert!(changed.contains("line 1 is no longer problem 1: the file has changed"), "{changed}");
}

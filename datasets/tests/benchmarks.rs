//! The loaders on tiny copies of the layouts that the benchmarks are found in, and on files that are wrong.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use nics_base::hub::Source;
use nics_datasets::word_problems::{Split, generate};
use nics_datasets::{Arithmetic, Benchmark, Choice, DatasetError, Part, arithmetic, gsm8k};

fn fixture(name: &str) -> Source {
    Source::folder(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name))
}

/// A folder with one file in it.
fn folder(file: &str, text: impl AsRef<[u8]>) -> (tempfile::TempDir, Source) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(file);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
    let source = Source::folder(dir.path());
    (dir, source)
}

#[test]
fn gsm8k_is_the_same_from_both_layouts() {
    let hub = gsm8k(&fixture("gsm8k-hub"), Part::Test).unwrap();
    assert_eq!(hub.len(), 3, "two shards");
    let golds: Vec<_> = hub.iter().map(|p| p.gold).collect();
    assert_eq!(golds, [36.0, 1_250_000.0, -4.0]);
    assert_eq!(hub[2].id, "gsm8k/test/2");
    assert_eq!(hub[0].question, "A box holds 12 pens. How many pens do 3 boxes hold?");
    assert!(hub[0].answer.ends_with("#### 36"));
    assert_eq!(gsm8k(&fixture("gsm8k-plain"), Part::Test).unwrap(), hub);
}

#[test]
fn word_problems_are_read_back_from_a_file() {
    let problems: Vec<_> = generate(Split::Test, 20, 0).collect();
    let lines: Vec<_> = problems.iter().map(|p| serde_json::to_string(p).unwrap()).collect();
    let (dir, _) = folder("p.jsonl", lines.join("\n"));
    let read = arithmetic(&dir.path().join("p.jsonl"), "p").unwrap();
    let direct: Vec<Arithmetic> = problems.into_iter().map(Into::into).collect();
    assert_eq!(read, direct);
}

#[test]
fn mmlu_is_the_same_from_three_layouts() {
    let whole = Benchmark::Mmlu.load(&fixture("mmlu-hub"), Part::Test, &[]).unwrap();
    let questions: Vec<_> = whole.iter().map(|c| (c.subject.as_str(), c.answer, c.options.len())).collect();
    assert_eq!(questions, [("anatomy", 0, 4), ("anatomy", 2, 4), ("astronomy", 1, 4)]);
    assert_eq!(whole[2].question, "Which planet is nearest to the Sun?");
    assert_eq!(whole[1].options, ["Liver", "Lung", "Heart", "Skin"]);
    for layout in ["mmlu-subjects", "mmlu-csv"] {
        let source = fixture(layout);
        let apart = Benchmark::Mmlu.load(&source, Part::Test, &[]).unwrap();
        let strip = |c: &Choice| Choice { id: String::new(), ..c.clone() };
        assert_eq!(apart.iter().map(strip).collect::<Vec<_>>(), whole.iter().map(strip).collect::<Vec<_>>());
        assert_eq!(apart[1].id, "mmlu/anatomy/test/1");
        assert_eq!(Benchmark::Mmlu.subjects(&source, Part::Test).unwrap(), ["anatomy", "astronomy"]);
    }
    assert_eq!(Benchmark::Mmlu.subjects(&fixture("mmlu-hub"), Part::Test).unwrap(), ["anatomy", "astronomy"]);
    let one = Benchmark::Mmlu.load(&fixture("mmlu-hub"), Part::Test, &["astronomy".into()]).unwrap();
    assert_eq!(one, whole[2..]);
    assert_eq!(Benchmark::Mmlu.load(&fixture("mmlu-hub"), Part::Dev, &[]).unwrap().len(), 1);
}

#[test]
fn ceval_is_the_same_from_both_layouts() {
    let hub = Benchmark::Ceval.load(&fixture("ceval-hub"), Part::Validation, &["logic".into()]).unwrap();
    assert_eq!(hub.len(), 2);
    assert_eq!((hub[0].answer, hub[1].answer), (2, 0));
    assert_eq!(hub[0].options, ["4", "6", "7", "9"], "numbers are options too");
    assert_eq!(hub[0].id, "ceval/logic/validation/0");
    assert_eq!(Benchmark::Ceval.load(&fixture("ceval-csv"), Part::Validation, &[]).unwrap(), hub);
    assert_eq!(
        Benchmark::Ceval.load(&fixture("ceval-csv"), Part::Dev, &[]).unwrap()[0].question,
        hub[0].question
    );
}

#[test]
fn cevals_secret_answers_are_told() {
    let error = Benchmark::Ceval.load(&fixture("ceval-hub"), Part::Test, &[]).unwrap_err();
    assert!(matches!(error, DatasetError::BadField { row: 1, .. }));
    let text = error.to_string();
    assert!(text.contains("field answer: it is empty") && text.contains("use val"), "{text}");
}

#[test]
fn cmmlu_is_the_same_from_three_layouts() {
    let csv = Benchmark::Cmmlu.load(&fixture("cmmlu-csv"), Part::Test, &[]).unwrap();
    assert_eq!(csv.len(), 2);
    assert_eq!(csv[1].question, "水的沸点,在标准大气压下,是？", "a quoted comma");
    assert_eq!((csv[0].answer, csv[1].answer), (0, 2));
    for layout in ["cmmlu-convert", "cmmlu-jsonl"] {
        assert_eq!(Benchmark::Cmmlu.load(&fixture(layout), Part::Test, &[]).unwrap(), csv, "{layout}");
    }
}

#[test]
fn what_is_not_there_is_told_with_what_is() {
    let text = |r: Result<Vec<Choice>, DatasetError>| r.unwrap_err().to_string();
    let missing = text(Benchmark::Mmlu.load(&fixture("mmlu-subjects"), Part::Test, &["law".into()]));
    assert!(missing.contains("the split test of law") && missing.contains("anatomy, astronomy"), "{missing}");
    let missing = text(Benchmark::Mmlu.load(&fixture("mmlu-hub"), Part::Test, &["law".into()]));
    assert!(missing.contains("the split test of law"), "{missing}");
    let missing = text(Benchmark::Mmlu.load(&fixture("mmlu-subjects"), Part::Dev, &[]));
    assert!(missing.contains("the split dev") && missing.contains("it has the splits test"), "{missing}");
    let (_dir, archive) = folder("cmmlu_v1_0_1.zip", "PK");
    let missing = text(Benchmark::Cmmlu.load(&archive, Part::Test, &[]));
    assert!(missing.contains("cmmlu_v1_0_1.zip") && missing.contains("@refs/convert/parquet"), "{missing}");
    let empty = tempfile::tempdir().unwrap();
    let missing = text(Benchmark::Cmmlu.load(&Source::folder(empty.path()), Part::Test, &[]));
    assert!(missing.contains("it is empty"), "{missing}");
    let missing = gsm8k(&fixture("gsm8k-plain"), Part::Train).unwrap_err().to_string();
    assert!(missing.contains("the split train; it has the splits test"), "{missing}");
}

#[test]
fn two_copies_of_a_subject_are_refused() {
    let (dir, source) = folder("logic/test.jsonl", "{}");
    fs::write(dir.path().join("logic/test-00000-of-00001.parquet"), "").unwrap();
    let error = Benchmark::Ceval.load(&source, Part::Test, &[]).unwrap_err();
    assert!(matches!(error, DatasetError::Ambiguous { .. }), "{error}");
    let (dir, source) = folder("test.jsonl", "{}");
    fs::create_dir(dir.path().join("data")).unwrap();
    fs::write(dir.path().join("data/test.jsonl"), "{}").unwrap();
    assert!(matches!(gsm8k(&source, Part::Test).unwrap_err(), DatasetError::Ambiguous { .. }));
}

#[test]
fn a_wrong_row_is_named_with_file_row_and_field() {
    let good = r#"{"question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"}"#;
    let cases = [
        (
            r#"{"question": "q", "A": "1", "B": "2", "C": "3", "answer": "B"}"#,
            "field D: there is no such field; the row has",
        ),
        (
            r#"{"question": " ", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"}"#,
            "field question: it is empty",
        ),
        (
            r#"{"question": ["q"], "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"}"#,
            "found a list, expected a text",
        ),
        (
            r#"{"question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "E"}"#,
            "expected a letter from A to D or an index from 0 to 3",
        ),
        (
            r#"{"question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": 4}"#,
            "found 4, expected a letter",
        ),
        (r#"{"question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": -1}"#, "found -1"),
        (
            r#"{"question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": null}"#,
            "field answer or Answer",
        ),
        (r#"{"question": "q", "choices": ["1"], "answer": 0}"#, "expected a list of 2 to 10 texts"),
        (r#"{"question": "q", "choices": "1234", "answer": 0}"#, "expected a list of 2 to 10 texts"),
        (r#"{"question": "q", "choices": ["1", null], "answer": 0}"#, "found nothing among the options"),
    ];
    for (row, says) in cases {
        let (dir, source) = folder("logic/val.jsonl", format!("{good}\n{row}\n"));
        let error = Benchmark::Ceval.load(&source, Part::Validation, &[]).unwrap_err();
        assert!(matches!(error, DatasetError::BadField { row: 2, .. }), "{row}: {error}");
        let text = error.to_string();
        let path: PathBuf = dir.path().join("logic/val.jsonl");
        assert!(
            text.starts_with(&format!("{}, row 2, field ", path.display())) && text.contains(says),
            "{text}"
        );
    }
    for (row, says) in [
        (r#"{"question": "q", "answer": "so it is 4"}"#, "it has no line `#### <number>`"),
        (r#"{"question": "q", "answer": "x\n#### four"}"#, "found `four` after ####, expected a number"),
        (r#"{"question": "q", "answer": "x\n#### inf"}"#, "found `inf`"),
    ] {
        let (_dir, source) = folder("test.jsonl", row);
        let text = gsm8k(&source, Part::Test).unwrap_err().to_string();
        assert!(text.contains("test.jsonl, row 1, field answer") && text.contains(says), "{text}");
    }
    let (_dir, source) = folder("test.jsonl", r#"{"question": "q", "choices": ["1", "2"], "answer": 0}"#);
    let text = Benchmark::Mmlu.load(&source, Part::Test, &[]).unwrap_err().to_string();
    assert!(text.contains("field subject: there is no such field"), "{text}");
}

#[test]
fn a_file_that_is_no_table_is_told() {
    for (file, bytes, says) in [
        ("test.jsonl", &b"{\"question\""[..], "is not readable as JSONL: line 1"),
        ("test.jsonl", b"[1, 2]", "line 1: found a list, expected an object"),
        ("test.jsonl", b"\xff\xfe", "is not readable as JSONL: line 1"),
        ("test.jsonl", b"\n\n", "has no rows"),
        ("test.csv", b"a,b\n1,2\n", "its first line names none of the columns question"),
        ("test.csv", b"question,answer\n1\n", "is not readable as CSV"),
        ("test.parquet", b"PAR1", "is not readable as parquet"),
        ("test.parquet", b"", "is not readable as parquet"),
    ] {
        let (_dir, source) = folder(file, bytes);
        let text = gsm8k(&source, Part::Test).unwrap_err().to_string();
        assert!(text.contains(file) && text.contains(says), "{text}");
    }
}

#[test]
fn a_damaged_parquet_file_is_an_error_and_no_panic() {
    let good =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mmlu-hub/all/test-00000-of-00001.parquet");
    let good = fs::read(good).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("test.parquet");
    let source = Source::folder(dir.path());
    let load = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        catch_unwind(AssertUnwindSafe(|| Benchmark::Mmlu.load(&source, Part::Test, &[])))
    };
    for length in 0..good.len() {
        assert!(load(&good[..length]).expect("a panic").is_err(), "truncated to {length} bytes");
    }
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x55;
        // Some bytes do not matter, so this may load; it must only not panic.
        drop(load(&bad).unwrap_or_else(|_| panic!("byte {at} changed")));
    }
}

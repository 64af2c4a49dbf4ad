//! Benchmarks of reasoning in tiny copies of their layouts, and in files that are wrong.

use std::fs;

use nics_base::hub::Source;
use nics_datasets::{Reasoned, Reasoning};

fn load(which: Reasoning, files: &[(&str, &str)]) -> Result<Vec<Reasoned>, String> {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    which.load(&Source::folder(dir.path())).map_err(|e| e.to_string())
}

#[test]
fn aime_prefers_the_training_split_and_keeps_answers_as_text() {
    let train = r#"{"ID": "2024-I-1", "Problem": "Find $n$.", "Answer": 33}"#;
    let test = r#"{"ID": "other", "Problem": "Not this.", "Answer": "1"}"#;
    let found = load(Reasoning::Aime, &[("data/train.jsonl", train), ("data/test.jsonl", test)]).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].id.as_str(), found[0].answer.as_str()), ("2024-I-1", "33"));
    assert_eq!(load(Reasoning::Aime, &[("test.jsonl", test)]).unwrap()[0].question, "Not this.");
}

#[test]
fn gpqa_is_read_from_its_subset_with_the_right_option_first() {
    let csv = "Record ID,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,Subdomain\n\
               rec1,Which?,\" right \",w1,w2,w3,Physics\n";
    let found = load(Reasoning::GpqaDiamond, &[("gpqa_diamond.csv", csv), ("gpqa_main.csv", csv)]).unwrap();
    assert_eq!(found[0].options, ["right", "w1", "w2", "w3"]);
    assert_eq!((found[0].answer.as_str(), found[0].subject.as_str()), ("A", "Physics"));
    let none = load(Reasoning::GpqaDiamond, &[("gpqa_main.csv", csv)]).unwrap_err();
    assert!(none.contains("gpqa_diamond"), "{none}");
}

#[test]
fn mmlu_takes_letters_and_numbers_and_drops_what_fills_up() {
    let pro = r#"{"question_id": 7, "question": "2+2?", "options": ["3", "4", "N/A"], "answer": "B", "category": "math"}"#;
    let redux = r#"{"question": "2+2?", "choices": ["3", "4"], "answer": 1, "subject": "math"}"#;
    let pro = load(Reasoning::MmluPro, &[("test.jsonl", pro)]).unwrap();
    let redux = load(Reasoning::MmluRedux, &[("test.jsonl", redux)]).unwrap();
    assert_eq!((pro[0].id.as_str(), redux[0].id.as_str()), ("7", "mmlu-redux/0"));
    for found in [&pro[0], &redux[0]] {
        assert_eq!((found.options.len(), found.answer.as_str(), found.subject.as_str()), (2, "B", "math"));
    }
}

#[test]
fn what_is_no_question_is_refused_with_its_row_and_field() {
    let cases = [
        (r#"{"question": "q", "options": ["a", "b"], "answer": "C"}"#, "answer"),
        (r#"{"question": "q", "options": ["a", "b"], "answer": -1}"#, "answer"),
        (r#"{"question": "q", "options": ["a"], "answer": "A"}"#, "options"),
        (r#"{"question": "q", "options": "a", "answer": "A"}"#, "options"),
        (r#"{"question": "q", "options": ["a", ["b"]], "answer": "A"}"#, "options"),
        (r#"{"question": " ", "options": ["a", "b"], "answer": "A"}"#, "question"),
        (r#"{"options": ["a", "b"], "answer": "A"}"#, "question"),
    ];
    for (line, field) in cases {
        let said = load(Reasoning::MmluPro, &[("test.jsonl", line)]).unwrap_err();
        assert!(said.contains("row 1") && said.contains(field), "{line}: {said}");
    }
    let said = load(Reasoning::Aime, &[("readme.txt", "")]).unwrap_err();
    assert!(said.contains("test"), "{said}");
    assert!("aime".parse::<Reasoning>().is_ok());
    assert!("AIME-9".parse::<Reasoning>().unwrap_err().contains("gpqa-diamond"));
}

//! Questions about images, read from tiny copies of the benchmarks' files, and from files that are wrong.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use nics_base::hub::Source;
use nics_datasets::{DatasetError, Gold, Part, Picture, Visual, VisualQuestion, VisualSet};
use serde_json::{Value, json};

fn home() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/visual")
}

fn load(of: Visual) -> VisualSet {
    let repository = of.hub_id().rsplit('/').next().unwrap();
    of.load(&Source::folder(home().join(repository)), of.part()).unwrap()
}

/// What a question's images are, by the first bytes of their files.
fn kinds(set: &mut VisualSet, question: &VisualQuestion) -> Vec<&'static str> {
    let kind = |picture: Picture| match picture {
        Picture::Bytes(bytes) if bytes.starts_with(b"\x89PNG") => "png",
        Picture::Bytes(bytes) if bytes.starts_with(b"\xff\xd8") => "jpeg",
        other => panic!("{other:?}"),
    };
    set.images(question).unwrap().into_iter().map(kind).collect()
}

fn option(n: usize) -> Gold {
    Gold::Option(n)
}

fn texts(all: &[&str]) -> Gold {
    Gold::Texts(all.iter().map(|t| (*t).to_owned()).collect())
}

#[test]
fn mmmu_is_the_same_whole_and_by_subject() {
    let mut set = load(Visual::Mmmu);
    let all = set.questions.clone();
    let found: Vec<_> = all.iter().map(|q| (q.id.as_str(), q.group.as_str(), q.gold.clone())).collect();
    assert_eq!(
        found,
        [
            ("mmmu/validation_Accounting_1", "Accounting", option(1)),
            ("mmmu/validation_Accounting_2", "Accounting", option(0)),
            ("mmmu/validation_Math_1", "Math", texts(&["0.5"])),
        ]
    );
    assert_eq!(all[0].options, ["$6", "$7", "it's $8", "$9"]);
    assert!(all[2].options.is_empty());
    assert_eq!(all.iter().map(|q| kinds(&mut set, q).len()).collect::<Vec<_>>(), [1, 2, 1]);
    // By number, whatever order the text names them in; asked again, and backwards.
    let [Picture::Bytes(first), Picture::Bytes(_)] = &set.images(&all[1]).unwrap()[..] else { panic!() };
    let source = Source::folder(home().join("mmmu-subjects"));
    let mut apart = Visual::Mmmu.load(&source, Part::Validation).unwrap();
    let same: Vec<_> = apart.questions.iter().map(|q| (&q.id, &q.group, &q.gold)).collect();
    assert_eq!(same, all.iter().map(|q| (&q.id, &q.group, &q.gold)).collect::<Vec<_>>());
    let again = apart.questions[1].clone();
    assert_eq!(apart.images(&again).unwrap()[0], Picture::Bytes(first.clone()));
    assert_eq!(
        Visual::Mmmu.load(&Source::folder(home().join("MMMU")), Part::Dev).unwrap().questions.len(),
        1
    );
}

#[test]
fn seed_bench_over_its_shards_and_its_images_alone() {
    let mut all = load(Visual::SeedBench);
    let questions = all.questions.clone();
    let found: Vec<_> = questions.iter().map(|q| (q.id.as_str(), q.group.as_str(), q.gold.clone())).collect();
    assert_eq!(
        found,
        [
            ("seedbench/101669", "image", option(0)),
            ("seedbench/103", "image", option(3)),
            ("seedbench/v1", "video", option(2)),
        ]
    );
    assert_eq!(questions[0].options, ["One", "Two", "Three", "Four"]);
    assert_eq!(kinds(&mut all, &questions[2]), ["jpeg", "jpeg"], "the frames of a video");
    assert_eq!(kinds(&mut all, &questions[0]), ["jpeg"], "back in the first shard");
    assert_eq!(load(Visual::SeedBenchImage).questions.len(), 2);
}

#[test]
fn ocr_bench() {
    let mut set = load(Visual::OcrBench);
    let questions = set.questions.clone();
    assert_eq!(questions[0].question, "what is written in the image?", "as it is asked: trimmed");
    assert_eq!((questions[1].origin.as_str(), questions[1].id.as_str()), ("HME100k", "ocrbench/1"));
    assert_eq!(questions[2].gold, texts(&["1 May", "May 1"]));
    assert_eq!(questions[2].group, "Key Information Extraction");
    assert_eq!(kinds(&mut set, &questions[2]), ["png"]);
}

#[test]
fn answers_of_several_people() {
    let mut set = load(Visual::VizWiz);
    let question = set.questions[1].clone();
    assert_eq!(
        (question.group.as_str(), question.id.as_str()),
        ("unanswerable", "vizwiz/VizWiz_val_00000001")
    );
    assert!(matches!(&question.gold, Gold::Texts(all) if all.len() == 10));
    assert_eq!(kinds(&mut set, &question), ["jpeg"]);
    let set = load(Visual::TextVqa);
    assert_eq!(set.questions[0].id, "textvqa/34602");
    assert!(matches!(&set.questions[0].gold, Gold::Texts(all) if all[2] == "dakota digital"));
    let secret = Visual::VizWiz.load(&Source::folder(home().join("VizWiz-VQA")), Part::Test).err().unwrap();
    assert!(
        secret.to_string().contains("row 1, field answers: the answers of the test split are not public")
    );
}

#[test]
fn science_qa_with_and_without_images() {
    let mut set = load(Visual::ScienceQa);
    let questions = set.questions.clone();
    let found: Vec<_> = questions.iter().map(|q| (q.gold.clone(), q.hint.as_str(), q.shows())).collect();
    assert_eq!(
        found,
        [
            (option(1), "", false),
            (option(0), "Look at the map.", true),
            (option(1), "It ends with a dot.", false)
        ]
    );
    assert!(set.images(&questions[0]).unwrap().is_empty());
    assert_eq!(kinds(&mut set, &questions[1]), ["png"]);
    let images = load(Visual::ScienceQaImg);
    assert_eq!(images.questions.len(), 1);
    assert_eq!(images.questions[0].question, questions[1].question);
    // Where there is the whole alone, those with an image are taken from it.
    let dir = tempfile::tempdir().unwrap();
    let file = "ScienceQA-FULL/test-00000-of-00001.parquet";
    fs::create_dir(dir.path().join("ScienceQA-FULL")).unwrap();
    fs::copy(home().join("ScienceQA").join(file), dir.path().join(file)).unwrap();
    let from_whole = Visual::ScienceQaImg.load(&Source::folder(dir.path()), Part::Test).unwrap();
    assert_eq!(from_whole.questions.len(), 1);
    assert_eq!(from_whole.questions[0].hint, "Look at the map.");
}

/// A folder with one file of lines.
fn lines(rows: &[Value]) -> (tempfile::TempDir, Source) {
    let dir = tempfile::tempdir().unwrap();
    let text: Vec<String> = rows.iter().map(Value::to_string).collect();
    for split in ["test", "validation"] {
        fs::write(dir.path().join(format!("{split}.jsonl")), text.join("\n")).unwrap();
    }
    let source = Source::folder(dir.path());
    (dir, source)
}

#[test]
fn lines_name_their_images_by_path() {
    let row = json!({"question_id": 7, "question": "?", "answers": ["a", "a", "b"], "image": "photos/7.png"});
    let (dir, source) = lines(std::slice::from_ref(&row));
    let mut set = Visual::TextVqa.load(&source, Part::Validation).unwrap();
    let question = set.questions[0].clone();
    assert_eq!(question.id, "textvqa/7");
    assert_eq!(set.images(&question).unwrap(), [Picture::File(dir.path().join("photos/7.png"))]);
    let bad = set.bad_image(&question, 0, &"no image").to_string();
    assert!(bad.ends_with("validation.jsonl, row 1, field image: no image"), "{bad}");
}

#[test]
fn a_wrong_row_is_named_with_file_row_and_field() {
    let with = |base: &Value, changes: &Value| {
        let mut row = base.as_object().unwrap().clone();
        for (key, value) in changes.as_object().unwrap() {
            if value.is_null() {
                row.remove(key);
            } else {
                row.insert(key.clone(), value.clone());
            }
        }
        Value::Object(row)
    };
    let mmmu = json!({"id": "validation_Art_1", "question": "<image 1>?", "options": "['a', 'b']", "answer": "A",
        "question_type": "multiple-choice", "image_1": "a.png"});
    let seed = json!({"question_id": 1, "question": "?", "choice_a": "a", "choice_b": "b", "choice_c": "c",
        "choice_d": "d", "answer": "A", "data_type": "image", "image": ["a.png"]});
    let ocr =
        json!({"question": "?", "question_type": "t", "dataset": "d", "answer": ["a"], "image": "a.png"});
    let people = json!({"question_id": 1, "question": "?", "answers": ["a"], "image": "a.png"});
    let science = json!({"question": "?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": "a.png"});
    for (of, base, changes, field, says) in [
        (Visual::Mmmu, &mmmu, json!({"options": "('a',)"}), "options", "not a Python list of texts: no `[`"),
        (Visual::Mmmu, &mmmu, json!({"options": 3}), "options", "found a number"),
        (Visual::Mmmu, &mmmu, json!({"answer": "C"}), "answer", "found \"C\", expected a letter from A to B"),
        (Visual::Mmmu, &mmmu, json!({"answer": "?"}), "answer", "there is no answer"),
        (
            Visual::Mmmu,
            &mmmu,
            json!({"question_type": "essay"}),
            "question_type",
            "expected multiple-choice or open",
        ),
        (
            Visual::Mmmu,
            &mmmu,
            json!({"question": "<image 2>"}),
            "image_2",
            "shows <image 2>, which is not there",
        ),
        (Visual::Mmmu, &mmmu, json!({"options": "['<image 9>', 'b']"}), "image_9", "<image 9>"),
        (Visual::Mmmu, &mmmu, json!({"id": null}), "id", "there is no such field"),
        (Visual::SeedBench, &seed, json!({"answer": "E"}), "answer", "a letter from A to D"),
        (Visual::SeedBench, &seed, json!({"choice_c": null}), "choice_c", "there is no such field"),
        (Visual::SeedBench, &seed, json!({"data_type": "sound"}), "data_type", "expected image or video"),
        (Visual::SeedBench, &seed, json!({"image": []}), "image", "there is no image"),
        (Visual::OcrBench, &ocr, json!({"answer": []}), "answer", "found a list, expected a text"),
        (
            Visual::OcrBench,
            &ocr,
            json!({"answer": [1]}),
            "answer",
            "found a number, expected a list of texts",
        ),
        (Visual::OcrBench, &ocr, json!({"dataset": null}), "dataset", "there is no such field"),
        (Visual::TextVqa, &people, json!({"answers": ["", " "]}), "answers", "there is no answer"),
        (
            Visual::VizWiz,
            &people,
            json!({"answers": "a"}),
            "answers",
            "found a text, expected a list of texts",
        ),
        (Visual::TextVqa, &people, json!({"image": null}), "image", "there is no image"),
        (
            Visual::ScienceQa,
            &science,
            json!({"answer": 2}),
            "answer",
            "found 2, expected an index from 0 to 1",
        ),
        (Visual::ScienceQa, &science, json!({"answer": -1}), "answer", "found -1"),
        (Visual::ScienceQa, &science, json!({"choices": []}), "choices", "0 of them"),
    ] {
        let (dir, source) = lines(&[base.clone(), with(base, &changes)]);
        let error = of.load(&source, of.part()).err().unwrap_or_else(|| panic!("{of} {changes}"));
        assert!(matches!(error, DatasetError::BadField { row: 2, .. }), "{changes}: {error}");
        let text = error.to_string();
        let file = dir.path().join(format!("{}.jsonl", of.part()));
        let at = format!("{}, row 2, field {field}: ", file.display());
        assert!(text.starts_with(&at) && text.contains(says), "{changes}: {text}");
    }
}

#[test]
fn what_is_not_there_is_told() {
    let text =
        |of: Visual, folder: &Path, part| of.load(&Source::folder(folder), part).err().unwrap().to_string();
    let none = text(Visual::Mmmu, &home().join("MMMU"), Part::Test);
    assert!(none.contains("the split test") && none.contains("it has the splits dev, validation"), "{none}");
    let empty = tempfile::tempdir().unwrap();
    assert!(text(Visual::OcrBench, empty.path(), Part::Test).contains("it is empty"));
    // Another benchmark's file.
    let other = text(Visual::OcrBench, &home().join("SEED-Bench"), Part::Test);
    assert!(other.contains("row 1, field"), "{other}");
}

#[test]
fn an_image_that_is_not_there_is_told_when_it_is_asked_for() {
    let row = json!({"question_id": 7, "question": "?", "answers": ["a"], "image": {"bytes": "x"}});
    let (_dir, source) = lines(&[row]);
    let mut set = Visual::TextVqa.load(&source, Part::Validation).unwrap();
    let question = set.questions[0].clone();
    let error = set.images(&question).unwrap_err().to_string();
    assert!(error.contains("validation.jsonl, row 1, field image: an image without a path"), "{error}");
}

#[test]
fn a_damaged_parquet_file_is_an_error_and_no_panic() {
    let good = fs::read(home().join("SEED-Bench/data/test-00000-of-00002.parquet")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("test.parquet");
    let source = Source::folder(dir.path());
    // All of it: the questions, then their images.
    let read = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        catch_unwind(AssertUnwindSafe(|| -> Result<(), DatasetError> {
            let mut set = Visual::SeedBench.load(&source, Part::Test)?;
            for question in set.questions.clone() {
                set.images(&question)?;
            }
            Ok(())
        }))
    };
    assert!(read(&good).unwrap().is_ok());
    for length in (0..good.len()).step_by(97) {
        assert!(read(&good[..length]).expect("a panic").is_err(), "truncated to {length} bytes");
    }
    for at in (0..good.len()).step_by(7) {
        let mut bad = good.clone();
        bad[at] ^= 0x55;
        // Some bytes do not matter, so this may load; it must only not panic.
        drop(read(&bad).unwrap_or_else(|_| panic!("byte {at} changed")));
    }
}

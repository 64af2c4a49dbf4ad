//! Every way in which a checkpoint can be wrong is an error of its own that names file, key, found and expected.

use std::path::Path;
use std::time::{Duration, Instant};

use nics_core::checkpoint::{Checkpoint, CheckpointError, TensorPath};
use proptest::prelude::*;
use serde_json::{Value, json};
use tch::{Device, Kind};
use tempfile::TempDir;

/// A safetensors file of the given header text and data.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.extend(data);
    out
}

fn one(dtype: &str, shape: &str, begin: u64, end: u64) -> String {
    format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}}}"#)
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// A folder with a configuration and the given files.
fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("config.json"),
        r#"{"architectures":["LlamaForCausalLM"],"hidden_size":4}"#,
    )
    .unwrap();
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

/// The error of opening `dir`, which must come at once.
fn error(dir: &Path) -> CheckpointError {
    let start = Instant::now();
    let e = Checkpoint::open_dir(dir).expect_err("the checkpoint is wrong");
    assert!(start.elapsed() < Duration::from_secs(1), "{e} took {:?}", start.elapsed());
    e
}

/// Opens a folder whose only weights file is `bytes` and returns the message without the folder's path.
fn weights_error(bytes: &[u8]) -> (CheckpointError, String) {
    let dir = folder(&[("model.safetensors", bytes)]);
    let e = error(dir.path());
    let text = e.to_string().replace(&dir.path().display().to_string(), "DIR");
    (e, text)
}

macro_rules! assert_error {
    ($pair:expr, $variant:pat, $text:expr) => {{
        let (e, text) = $pair;
        assert!(matches!(e, $variant), "{e:?}");
        assert_eq!(text, $text);
    }};
}

fn shown(dir: &TempDir) -> (CheckpointError, String) {
    let e = error(dir.path());
    let text = e.to_string().replace(&dir.path().display().to_string(), "DIR");
    (e, text)
}

#[test]
fn a_folder_that_is_not_there() {
    let e = Checkpoint::open_dir(Path::new("no/such/folder")).unwrap_err();
    assert!(matches!(e, CheckpointError::FolderMissing { .. }));
    assert_eq!(
        e.to_string(),
        "no/such/folder is not a folder: give a folder with config.json and weights, or a hub id org/name[@revision]"
    );
}

#[test]
fn configurations() {
    let dir = tempfile::tempdir().unwrap();
    assert_error!(
        shown(&dir),
        CheckpointError::ConfigMissing { .. },
        "DIR has no config.json: it is not a checkpoint in the Hugging Face layout"
    );
    let config = dir.path().join("config.json");
    std::fs::write(&config, "{\"hidden_size\": }").unwrap();
    assert_error!(
        shown(&dir),
        CheckpointError::InvalidJson { .. },
        "DIR/config.json is not valid JSON of the expected form: expected value at line 1 column 17"
    );
    std::fs::write(&config, "[1]").unwrap();
    let (e, text) = shown(&dir);
    assert!(matches!(e, CheckpointError::InvalidJson { .. }) && text.contains("expected a map"), "{text}");
    std::fs::write(&config, "[".repeat(100_000)).unwrap();
    assert!(matches!(error(dir.path()), CheckpointError::InvalidJson { .. }));
    std::fs::write(&config, vec![b' '; 5 << 20]).unwrap();
    assert_error!(
        shown(&dir),
        CheckpointError::TooLarge { .. },
        "DIR/config.json: the configuration takes 5242880 bytes, more than the 4194304 that are read"
    );
    std::fs::remove_file(&config).unwrap();
    std::fs::create_dir(&config).unwrap();
    assert_error!(
        shown(&dir),
        CheckpointError::NotAFile { .. },
        "DIR/config.json is a folder, expected a regular file"
    );
}

#[test]
fn fields_of_the_configuration() {
    #[derive(Debug, serde::Deserialize)]
    struct Scaling {
        #[expect(dead_code)]
        factor: f64,
    }
    #[derive(Debug, serde::Deserialize)]
    struct Config {
        #[expect(dead_code)]
        hidden_size: usize,
        #[expect(dead_code)]
        rope_scaling: Option<Scaling>,
    }
    let weights = file(&one("F32", "[1]", 0, 4), &floats(&[1.0]));
    let dir = folder(&[("model.safetensors", &weights)]);
    let read = |config: Value| {
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let checkpoint = Checkpoint::open_dir(dir.path()).unwrap();
        checkpoint
            .config::<Config>()
            .map(|_| ())
            .map_err(|e| e.to_string().replace(&dir.path().display().to_string(), "DIR"))
    };
    assert_eq!(read(json!({"hidden_size": 4, "rope_scaling": {"factor": 2}})), Ok(()));
    assert_eq!(read(json!({})).unwrap_err(), "DIR/config.json lacks the field hidden_size");
    assert_eq!(
        read(json!({"hidden_size": 4, "rope_scaling": {}})).unwrap_err(),
        "DIR/config.json lacks the field rope_scaling.factor"
    );
    assert_eq!(
        read(json!({"hidden_size": "big"})).unwrap_err(),
        "DIR/config.json: the field hidden_size is wrong: invalid type: string \"big\", expected usize"
    );
    assert_eq!(
        read(json!({"hidden_size": -4})).unwrap_err(),
        "DIR/config.json: the field hidden_size is wrong: invalid value: integer `-4`, expected usize"
    );
    let checkpoint = Checkpoint::open_dir(dir.path()).unwrap();
    let e = checkpoint.architecture().unwrap_err();
    assert!(matches!(&e, CheckpointError::MissingField { field, .. } if field == "architectures"), "{e}");
    std::fs::write(dir.path().join("config.json"), r#"{"architectures": "Llama"}"#).unwrap();
    let e = Checkpoint::open_dir(dir.path()).unwrap().architecture().unwrap_err().to_string();
    assert!(e.ends_with("found \"Llama\", expected a list with the name of the model class"), "{e}");
}

#[test]
fn no_weights() {
    assert_error!(
        shown(&folder(&[])),
        CheckpointError::NoWeights { .. },
        "DIR has no weights: expected model.safetensors, or model.safetensors.index.json with its shards"
    );
    let (e, text) = shown(&folder(&[("pytorch_model.bin", b"PK")]));
    assert!(matches!(e, CheckpointError::PickledWeights { .. }));
    assert!(
        text.starts_with("DIR/pytorch_model.bin is a Python pickle, which is not read; convert it"),
        "{text}"
    );
}

#[test]
fn what_is_not_a_weights_file() {
    assert_error!(
        weights_error(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"),
        CheckpointError::LfsPointer { .. },
        "DIR/model.safetensors is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder"
    );
    let dir = folder(&[]);
    std::fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert_error!(
        shown(&dir),
        CheckpointError::NotAFile { .. },
        "DIR/model.safetensors is a folder, expected a regular file"
    );
    #[cfg(unix)]
    {
        let dir = folder(&[]);
        std::os::unix::fs::symlink("gone", dir.path().join("model.safetensors")).unwrap();
        let (e, text) = shown(&dir);
        assert!(matches!(e, CheckpointError::Unreadable { .. }));
        assert!(text.starts_with("cannot read DIR/model.safetensors: No such file"), "{text}");
        // A pipe would block for ever.
        let dir = folder(&[]);
        let pipe = dir.path().join("model.safetensors");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        assert!(shown(&dir).1.contains("is a pipe, socket or device"));
    }
}

#[cfg(unix)]
#[test]
fn a_file_without_read_permission() {
    use std::os::unix::fs::PermissionsExt;
    let dir = folder(&[("model.safetensors", &file(&one("F32", "[1]", 0, 4), &floats(&[1.0])))]);
    let path = dir.path().join("model.safetensors");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
    if std::fs::File::open(&path).is_ok() {
        eprintln!("this user reads every file; the refusal of the system cannot be provoked");
        return;
    }
    let (e, text) = shown(&dir);
    assert!(matches!(e, CheckpointError::Unreadable { .. }));
    assert!(text.starts_with("cannot read DIR/model.safetensors: Permission denied"), "{text}");
}

#[test]
fn lengths_and_truncation() {
    assert_error!(
        weights_error(b""),
        CheckpointError::Truncated { .. },
        "DIR/model.safetensors is truncated: 0 bytes, expected 8 (the length of the header); download it again"
    );
    assert_error!(
        weights_error(&(1u64 << 63).to_le_bytes()),
        CheckpointError::TooLarge { .. },
        "DIR/model.safetensors: the header takes 9223372036854775808 bytes, more than the 16777216 that are read"
    );
    assert_error!(
        weights_error(&[100, 0, 0, 0, 0, 0, 0, 0, b'{']),
        CheckpointError::Truncated { .. },
        "DIR/model.safetensors is truncated: 9 bytes, expected 108 (the header); download it again"
    );
    let whole = file(&one("F32", "[2]", 0, 8), &floats(&[1.0, 2.0]));
    assert_error!(
        weights_error(&whole[..whole.len() - 3]),
        CheckpointError::Truncated { .. },
        format!(
            "DIR/model.safetensors is truncated: {} bytes, expected {} (its tensors); download it again",
            whole.len() - 3,
            whole.len()
        )
    );
}

#[test]
fn headers() {
    assert_error!(
        weights_error(&file("[]", b"")),
        CheckpointError::BadHeader { .. },
        "DIR/model.safetensors is not a safetensors file: its header does not start with `{`"
    );
    let (e, text) = weights_error(&file("{\"w\":", b""));
    assert!(matches!(e, CheckpointError::BadEntry { .. } | CheckpointError::BadHeader { .. }), "{text}");
    let (e, text) = weights_error(&file("{\"\u{1}", b""));
    assert!(matches!(e, CheckpointError::BadHeader { .. }), "{text}");
    assert_error!(
        weights_error(&file(&one("Q4", "[1]", 0, 4), &floats(&[1.0]))),
        CheckpointError::UnknownDtype { .. },
        "DIR/model.safetensors: tensor w has the unknown dtype \"Q4\", expected one of F64, F32, F16, BF16, I64, ..."
    );
    let twice = r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    assert_error!(
        weights_error(&file(twice, b"ab")),
        CheckpointError::DuplicateKey { .. },
        "DIR/model.safetensors: the key w occurs twice"
    );
    for (header, detail) in [
        (one("F32", "[2]", 0, 4), "dtype F32 and shape [2] take 8 bytes, but data_offsets [0, 4] hold 4"),
        (one("F32", "[1]", 4, 0), "data_offsets [4, 0] run backwards"),
        (one("F4", "[1]", 0, 1), "dtype F4 and shape [1] take 1 bytes, but data_offsets [0, 1] hold 1"),
        (
            one("F32", "[4294967296,4294967296]", 0, 4),
            "shape [4294967296, 4294967296] overflows the address space",
        ),
    ] {
        assert_error!(
            weights_error(&file(&header, &floats(&[1.0]))),
            CheckpointError::BadEntry { .. },
            format!("DIR/model.safetensors: the entry of tensor w is wrong: {detail}")
        );
    }
    for header in [
        one("F32", "[-1]", 0, 4),
        one("F32", "[1.5]", 0, 4),
        one("F32", "\"1\"", 0, 4),
        one("F32", &format!("[{}1]", "1,".repeat(100_000)), 0, 4),
        r#"{"w":{"dtype":"F32","shape":[1]}}"#.to_owned(),
        r#"{"w":7}"#.to_owned(),
    ] {
        let (e, text) = weights_error(&file(&header, &floats(&[1.0])));
        assert!(
            matches!(e, CheckpointError::BadEntry { .. }) && text.contains("tensor w is wrong"),
            "{text}"
        );
    }
}

#[test]
fn overlaps_and_holes() {
    let two = |a: (u64, u64), b: (u64, u64)| {
        format!(
            r#"{{"a":{{"dtype":"U8","shape":[{}],"data_offsets":[{},{}]}},"b":{{"dtype":"U8","shape":[{}],"data_offsets":[{},{}]}}}}"#,
            a.1 - a.0,
            a.0,
            a.1,
            b.1 - b.0,
            b.0,
            b.1
        )
    };
    assert_error!(
        weights_error(&file(&two((0, 4), (2, 6)), b"abcdef")),
        CheckpointError::Overlap { .. },
        "DIR/model.safetensors: tensor b begins at byte 2 but a ends at 4: the two overlap"
    );
    assert_error!(
        weights_error(&file(&two((0, 2), (4, 6)), b"abcdef")),
        CheckpointError::Hole { .. },
        "DIR/model.safetensors: bytes 2..4 of the data belong to no tensor (after a)"
    );
    assert_error!(
        weights_error(&file(&two((0, 2), (2, 4)), b"abcdef")),
        CheckpointError::Hole { .. },
        "DIR/model.safetensors: bytes 4..6 of the data belong to no tensor (after b)"
    );
    assert_error!(
        weights_error(&file(&two((1, 2), (2, 6)), b"abcdef")),
        CheckpointError::Hole { .. },
        "DIR/model.safetensors: bytes 0..1 of the data belong to no tensor (after the header)"
    );
}

#[test]
fn indices_and_shards() {
    let w = file(&one("F32", "[1]", 0, 4), &floats(&[1.0]));
    let index = |map: &str| format!(r#"{{"metadata":{{}},"weight_map":{map}}}"#);
    let opened = |map: &str, shards: &[&str]| {
        let index = index(map);
        let mut files = vec![("model.safetensors.index.json", index.as_bytes())];
        files.extend(shards.iter().map(|name| (*name, w.as_slice())));
        shown(&folder(&files))
    };
    assert_error!(
        opened(r#"{"w":"a.safetensors"}"#, &[]),
        CheckpointError::ShardMissing { .. },
        "DIR/model.safetensors.index.json puts w into a.safetensors, which is not there: download the shard"
    );
    for escape in ["../a.safetensors", "/etc/passwd", "x/../../a", "", "..", "a\\\\b"] {
        let (e, text) = opened(&format!(r#"{{"w":"{escape}"}}"#), &["a.safetensors"]);
        assert!(matches!(e, CheckpointError::ShardPath { .. }), "{escape}: {text}");
        assert!(text.ends_with("a shard is a plain file name beside the index; refused"), "{text}");
    }
    assert_error!(
        opened(r#"{"w":"a.safetensors","v":"a.safetensors"}"#, &["a.safetensors"]),
        CheckpointError::KeyNotInShard { .. },
        "DIR/model.safetensors.index.json puts v into a.safetensors, but that file does not hold it"
    );
    assert_error!(
        opened(r#"{"w":"a.safetensors","x":"b.safetensors"}"#, &["a.safetensors", "b.safetensors"]),
        CheckpointError::KeyInTwoShards { .. },
        "tensor w is both in DIR/a.safetensors and in DIR/b.safetensors: which one is meant is undefined"
    );
    assert_error!(
        opened(r#"{"w":"a.safetensors","w":"a.safetensors"}"#, &["a.safetensors"]),
        CheckpointError::DuplicateKey { .. },
        "DIR/model.safetensors.index.json: the key w occurs twice"
    );
    let (e, text) = opened(r#"{"w":7}"#, &["a.safetensors"]);
    assert!(
        matches!(e, CheckpointError::InvalidJson { .. }) && text.contains("invalid type: integer `7`"),
        "{text}"
    );
    assert!(matches!(opened("{}", &[]).0, CheckpointError::NoWeights { .. }));
    let (e, text) = shown(&folder(&[("model.safetensors.index.json", b"{}")]));
    assert!(
        matches!(e, CheckpointError::InvalidJson { .. }) && text.contains("missing field `weight_map`"),
        "{text}"
    );
}

fn root(header: &str, data: &[u8]) -> (TempDir, TensorPath) {
    let dir = folder(&[("model.safetensors", &file(header, data))]);
    let root = Checkpoint::open_dir(dir.path()).unwrap().root(Device::Cpu, Kind::Float);
    (dir, root)
}

fn read_error(dir: &TempDir, root: &TensorPath, name: &str, shape: &[i64]) -> (CheckpointError, String) {
    let e = root.tensor(name, shape).unwrap_err();
    let text = e.to_string().replace(&dir.path().display().to_string(), "DIR");
    (e, text)
}

#[test]
fn tensors_that_do_not_fit() {
    let header = r#"{"llm.model.norm.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"q":{"dtype":"I8","shape":[2],"data_offsets":[8,10]}}"#;
    let mut data = floats(&[1.0, 2.0]);
    data.extend([1, 2]);
    let (dir, root) = root(header, &data);
    assert_error!(
        read_error(&dir, &root.at("model.norm"), "weight", &[2]),
        CheckpointError::MissingTensor { .. },
        "DIR has no tensor model.norm.weight; the nearest name is llm.model.norm.weight"
    );
    let layer = root.at("layers.7").because("config.json (num_hidden_layers 8)");
    assert_error!(
        read_error(&dir, &layer, "weight", &[2]),
        CheckpointError::MissingTensor { .. },
        "DIR has no tensor layers.7.weight, which config.json (num_hidden_layers 8) asks for"
    );
    let norm = root.at("llm.model").at("norm").because("config.json (hidden_size 3)");
    assert_error!(
        read_error(&dir, &norm, "weight", &[3]),
        CheckpointError::WrongShape { .. },
        "llm.model.norm.weight in DIR/model.safetensors has shape [2], but config.json (hidden_size 3) asks for [3]"
    );
    assert_error!(
        read_error(&dir, &root, "q", &[2]),
        CheckpointError::WrongDtype { .. },
        "q in DIR/model.safetensors has dtype I8, expected one of F32, BF16, F16, F64 (integer and 8-bit weights are \
         quantized and need the method that packed them)"
    );
    let e = root.tensor_as("llm.model.norm.weight", &[2], Kind::Int64).unwrap_err();
    assert!(
        e.to_string().ends_with("has dtype F32, expected an integer dtype (I64, I32, I16, I8, U8, BOOL)"),
        "{e}"
    );
    assert_eq!(Vec::<i64>::try_from(root.tensor_as("q", &[2], Kind::Int64).unwrap()).unwrap(), [1, 2]);
}

#[test]
fn values_that_are_not_finite() {
    let (dir, root) = root(&one("F32", "[2,2]", 0, 16), &floats(&[1.0, 1e6, f32::NAN, f32::INFINITY]));
    assert_error!(
        read_error(&dir, &root, "w", &[2, 2]),
        CheckpointError::NotFinite { count: 2, total: 4, first: 2, .. },
        "w in DIR/model.safetensors has 2 of 4 values that are not finite, the first at flat index 2"
    );
    let data = floats(&[1.0, 1e6, -2.0, 0.0]);
    std::fs::write(dir.path().join("model.safetensors"), file(&one("F32", "[2,2]", 0, 16), &data)).unwrap();
    let root = Checkpoint::open_dir(dir.path()).unwrap().root(Device::Cpu, Kind::Half);
    assert_error!(
        read_error(&dir, &root, "w", &[2, 2]),
        CheckpointError::NotFinite { count: 1, first: 1, .. },
        "w in DIR/model.safetensors has 1 of 4 values that are not finite in Half, the first at flat index 1"
    );
}

#[test]
fn a_file_that_shrinks_while_it_is_open() {
    let bytes = file(&one("F32", "[2]", 0, 8), &floats(&[1.0, 2.0]));
    let dir = folder(&[("model.safetensors", &bytes)]);
    let checkpoint = Checkpoint::open_dir(dir.path()).unwrap();
    let path = dir.path().join("model.safetensors");
    std::fs::File::options().write(true).open(&path).unwrap().set_len(20).unwrap();
    let e = checkpoint.root(Device::Cpu, Kind::Float).tensor("w", &[2]).unwrap_err();
    assert!(matches!(e, CheckpointError::Shrunk { found: 20, .. }), "{e}");
    assert!(matches!(checkpoint.weights_hash(), Err(CheckpointError::Shrunk { .. })));
}

#[test]
fn file_names_stay_inside() {
    let dir = folder(&[("model.safetensors", &file(&one("U8", "[1]", 0, 1), b"a"))]);
    let checkpoint = Checkpoint::open_dir(dir.path()).unwrap();
    assert!(checkpoint.try_file("tokenizer.json").unwrap().is_none());
    let e = checkpoint.file("tokenizer.json").unwrap_err().to_string();
    assert!(e.ends_with("has no tokenizer.json"), "{e}");
    for name in ["../x", "/etc/passwd", ""] {
        assert!(matches!(checkpoint.file(name), Err(CheckpointError::FileName { .. })), "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Bytes of a sound file are changed, dropped or added anywhere: an error or sound tensors, never a panic.
    #[test]
    fn mutated_files_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..3), 1..6),
    ) {
        let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]}}"#;
        let mut bytes = file(header, &[0; 14]);
        for (at, value, what) in edits {
            let at = at.index(bytes.len());
            match what {
                0 => bytes[at] = value,
                1 => { bytes.remove(at); }
                _ => bytes.insert(at, value),
            }
        }
        let dir = folder(&[("model.safetensors", &bytes)]);
        if let Ok(checkpoint) = Checkpoint::open_dir(dir.path()) {
            let root = checkpoint.root(Device::Cpu, Kind::Float);
            let names: Vec<String> = checkpoint.names().map(str::to_owned).collect();
            for name in names {
                let shape: Vec<i64> = checkpoint.shape(&name).unwrap().iter().map(|&d| d as i64).collect();
                let _ = root.tensor(&name, &shape);
                let _ = root.stored(&name);
            }
        }
    }

    /// The same for the index.
    #[test]
    fn mutated_indices_never_panic(at in any::<prop::sample::Index>(), value in any::<u8>()) {
        let mut index = br#"{"metadata":{"total_size":4},"weight_map":{"w":"a.safetensors"}}"#.to_vec();
        let at = at.index(index.len());
        index[at] = value;
        let w = file(&one("F32", "[1]", 0, 4), &floats(&[1.0]));
        let dir = folder(&[("model.safetensors.index.json", &index), ("a.safetensors", &w)]);
        let _ = Checkpoint::open_dir(dir.path());
    }

    /// Any shape and dtype asked of a checkpoint gives a tensor or an error.
    #[test]
    fn wrong_requests_never_panic(shape in prop::collection::vec(-2i64..5, 0..4), kind in 0usize..8) {
        let kinds = [Kind::Float, Kind::Half, Kind::Int64, Kind::Bool, Kind::ComplexFloat, Kind::QInt8, Kind::Double, Kind::Uint8];
        let (_dir, root) = root(&one("F32", "[2,3]", 0, 24), &floats(&[0.5; 6]));
        let got = root.tensor_as("w", &shape, kinds[kind]);
        let float = matches!(kinds[kind], Kind::Float | Kind::Half | Kind::Double);
        prop_assert_eq!(got.is_ok(), shape == [2, 3] && float);
    }
}

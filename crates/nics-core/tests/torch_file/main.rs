//! Files of `torch.save` that are damaged or mean harm. Each is refused with its reason, quickly and in little memory.

mod build;

use std::path::Path;

use build::{Entry, Pickle, checkpoint, has_words, opened, zip};
use nics_core::Error;
use nics_core::checkpoint::torch_file::{Refusal, StorageKind, TensorRef, TorchFile, Tree};
use tch::{Kind, Tensor};

/// The tensors of a file that holds a dictionary of them.
fn tensors(path: &Path) -> nics_core::Result<Vec<(String, Tensor)>> {
    let mut file = TorchFile::open(path)?;
    let Tree::Dict(items) = file.value().clone() else { return Ok(Vec::new()) };
    let tensor = |(name, value)| if let Tree::Tensor(t) = value { Some((name, t)) } else { None };
    let all: Vec<(String, TensorRef)> = items.into_iter().filter_map(tensor).collect();
    let read = file.tensors(&all).map_err(|refusal| Error::Refused { path: path.to_owned(), refusal })?;
    Ok(all.into_iter().map(|(name, _)| name).zip(read).collect())
}

/// A file that is in order, with one tensor `[1.5, 1.5]`.
fn sound() -> Vec<u8> {
    let pickle = Pickle::tensors(&[("bias", |p| p.tensor("0", 2, 0, &[2], &[1]))]).end();
    let values: Vec<u8> = [1.5f32; 2].iter().flat_map(|v| v.to_le_bytes()).collect();
    checkpoint(&pickle, &[Entry::stored("data/0", &values), Entry::stored("byteorder", b"little")])
}

fn open(bytes: &[u8]) -> Result<Vec<(String, Tensor)>, Error> {
    opened("saved.pt", bytes, tensors)
}

fn refusal(bytes: &[u8]) -> Refusal {
    match open(bytes) {
        Err(Error::Refused { refusal, path }) => {
            assert_eq!(path.file_name(), Some("saved.pt".as_ref()));
            refusal
        }
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("it was read"),
    }
}

/// The refusal's text has every one of these words.
fn refused(what: &str, bytes: &[u8], words: &[&str]) {
    has_words(what, &refusal(bytes).to_string(), words);
}

#[test]
fn a_sound_one_is_read() {
    let found = open(&sound()).unwrap();
    let [(name, tensor)] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!((name.as_str(), tensor.kind(), tensor.size()), ("bias", Kind::Float, vec![2]));
    assert_eq!(Vec::<f32>::try_from(tensor).unwrap(), [1.5; 2]);
}

/// Values of every kind, as `torch.save` writes them.
#[test]
fn values_are_read_as_they_are() {
    let p = Pickle::new().raw(b"}(").text("a").int(-3).text("b").float(0.5).text("c").raw(b"\x88");
    let p = p.text("d").raw(b"N").text("e").raw(b"](").text("x").mark().int(1).tuple().raw(b"e").text("f");
    let p = p.global("torch", "float16").text("g").tensor("0", 2, 1, &[1, 1], &[1, 1]).raw(b"u").end();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("saved.pt");
    std::fs::write(&path, checkpoint(&p, &[Entry::stored("data/0", &[0; 8])])).unwrap();
    let tensor =
        TensorRef { key: "0".into(), kind: StorageKind::Float, numel: 2, offset: 1, shape: vec![1, 1] };
    let expected = [
        ("a", Tree::Int(-3)),
        ("b", Tree::Float(0.5)),
        ("c", Tree::Bool(true)),
        ("d", Tree::None),
        ("e", Tree::List(vec![Tree::Text("x".into()), Tree::List(vec![Tree::Int(1)])])),
        ("f", Tree::None),
        ("g", Tree::Tensor(tensor)),
    ];
    let expected = expected.map(|(name, value)| (name.to_owned(), value));
    assert_eq!(TorchFile::open(&path).unwrap().value(), &Tree::Dict(expected.into()));
}

#[test]
fn pickles_that_run_code() {
    let marker = std::env::temp_dir().join(format!("torch-file-{}", std::process::id()));
    let command = format!("touch {}", marker.display());
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("__builtin__", "getattr"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch._utils", "_rebuild_tensor_v3"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch", "os.system"),
        ("collections", "OrderedDict.fromkeys"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("torch", "DoubleStorage"),
        ("torch.storage", "_load_from_bytes"),
    ] {
        let p = Pickle::new().global(module, name).mark().text(&command).tuple().call().end();
        refused(name, &checkpoint(&p, &[]), &[module, name, "nothing was run"]);
    }
    assert!(!marker.exists());
}

#[test]
fn allowed_names_with_other_arguments() {
    let dict = || Pickle::new().global("collections", "OrderedDict");
    refused(
        "OrderedDict of something",
        &checkpoint(&dict().mark().text("x").tuple().call().end(), &[]),
        &["OrderedDict with arguments"],
    );
    let p = Pickle::new().global("torch", "FloatStorage").raw(b")").call().end();
    refused("a storage type called", &checkpoint(&p, &[]), &["storage type"]);
    let p = Pickle::new().global("torch", "float32").raw(b")").call().end();
    refused("a dtype called", &checkpoint(&p, &[]), &["dtype"]);
    let p = Pickle::new().text("os").raw(b")").call().end();
    refused("a text called", &checkpoint(&p, &[]), &["no function"]);
    let p = Pickle::new().global("torch._utils", "_rebuild_tensor_v2").raw(b")").call().end();
    refused("no arguments", &checkpoint(&p, &[]), &["_rebuild_tensor_v2", "other arguments"]);
    // A state for something else than a state dict.
    let p = Pickle::new().raw(b"]}b").end();
    refused("the state of a list", &checkpoint(&p, &[]), &["state"]);
    let p = Pickle::new().raw(b"}}b").end();
    refused("the state of a plain dictionary", &checkpoint(&p, &[]), &["state"]);
    // Backward hooks are functions.
    let p = Pickle::new().tensor_with("0", 4, 0, &[4], &[1], |p| p.raw(b"}").text("hook").int(1).raw(b"s"));
    refused("hooks", &checkpoint(&p.end(), &[]), &["backward hooks"]);
}

#[test]
fn instructions_that_torch_does_not_write() {
    for (name, code) in [
        ("INST", &b"ios\nsystem\n"[..]),
        ("OBJ", b"(o"),
        ("NEWOBJ", b"\x81"),
        ("NEWOBJ_EX", b"\x92"),
        ("STACK_GLOBAL", b"\x93"),
        ("EXT1", b"\x82\x01"),
        ("EXT4", b"\x84\x01\x00\x00\x00"),
        ("PERSID", b"P0\n"),
        ("BYTEARRAY8", b"\x96\x00\x00\x00\x00\x00\x00\x00\x10"),
        ("FRAME", b"\x95\x00\x00\x00\x00\x00\x00\x00\x00"),
        ("LONG4", b"\x8b\xff\xff\xff\x7f"),
        ("INT", b"I1\n"),
        ("STRING", b"S'x'\n"),
        ("EMPTY_SET", b"\x8f"),
        ("DUP", b"N2"),
        ("POP", b"N0"),
    ] {
        match refusal(&checkpoint(&Pickle::new().raw(code).end(), &[])) {
            Refusal::Opcode { .. } => {}
            other => panic!("{name}: {other}"),
        }
    }
    refused("protocol 4", &checkpoint(b"\x80\x04N.", &[]), &["protocol 2"]);
    refused("no protocol", &checkpoint(b"N.", &[]), &["protocol 2"]);
}

#[test]
fn pickles_that_break_off_or_contradict_themselves() {
    for (name, code, word) in [
        ("empty", &b""[..], "protocol 2"),
        ("no end", b"\x80\x02N", "too early"),
        ("text past the end", b"\x80\x02X\xff\xff\xff\xff", "too early"),
        ("name without end", b"\x80\x02cos", "no end"),
        ("text that is none", b"\x80\x02X\x02\x00\x00\x00\xff\xfe.", "UTF-8"),
        ("pop of nothing", b"\x80\x02.", "empty"),
        ("two values", b"\x80\x02NN.", "more than one value"),
        ("rest behind the end", b"\x80\x02N.N", "more than one value"),
        ("open mark", b"\x80\x02N(.", "empty"),
        ("no mark", b"\x80\x02t.", "no mark"),
        ("tuple across a mark", b"\x80\x02N(\x85.", "too short"),
        ("nothing remembered", b"\x80\x02h\x07.", "remembered"),
        ("remember nothing", b"\x80\x02q\x00.", "nothing to remember"),
        ("append to an integer", b"\x80\x02K\x01Na.", "list"),
        ("odd items", b"\x80\x02}(Nu.", "no value"),
        ("huge integer", b"\x80\x02\x8a\xff", "64 bits"),
    ] {
        refused(name, &checkpoint(code, &[]), &[word]);
    }
    let whole = sound();
    for cut in [0, 1, 21, 100, whole.len() / 2, whole.len() - 1] {
        assert!(matches!(refusal(&whole[..cut]), Refusal::Archive(_)), "cut at {cut}");
    }
}

#[test]
fn bombs() {
    // Each tuple holds the one before twice: 2^40 values from some hundred bytes.
    let mut p = Pickle::new().text("x").raw(b"q\x00");
    for i in 0..40u8 {
        p = p.raw(b"h").raw(&[i]).raw(b"\x86q").raw(&[i + 1]);
    }
    refused("doubled tuples", &checkpoint(&p.end(), &[]), &["values"]);
    // One long text a hundred thousand times.
    let mut p = Pickle::new().raw(b"](").text(&"a".repeat(1 << 19)).raw(b"q\x00");
    for _ in 0..200_000 {
        p = p.raw(b"h\x00");
    }
    refused("a repeated text", &checkpoint(&p.raw(b"e").end(), &[]), &["more than"]);
    // A list in itself.
    let p = Pickle::new().raw(b"]q\x00h\x00a").end();
    refused("a list in itself", &checkpoint(&p, &[]), &["nested"]);
    let deep = Pickle::new().raw(&b"]".repeat(5000)).raw(&b"a".repeat(4999)).end();
    refused("deep nesting", &checkpoint(&deep, &[]), &["nested"]);
    // A pickle larger than any that is read.
    let long = Pickle::new().raw(&b"N".repeat((1 << 20) + 1)).end();
    refused("a long pickle", &checkpoint(&long, &[]), &["data.pkl", "more than"]);
}

#[test]
fn tensors_that_do_not_fit_their_storages() {
    let with = |p: Pickle, storage: &[u8]| checkpoint(&p.end(), &[Entry::stored("data/0", storage)]);
    let one = |tensor: fn(Pickle) -> Pickle| Pickle::tensors(&[("bias", tensor)]);
    let bytes = [0u8; 8];
    refused(
        "too few bytes",
        &with(one(|p| p.tensor("0", 4, 0, &[4], &[1])), &bytes),
        &["8 bytes", "4 values"],
    );
    refused(
        "too many bytes",
        &with(one(|p| p.tensor("0", 1, 0, &[1], &[1])), &bytes),
        &["8 bytes", "1 values"],
    );
    refused("past the end", &with(one(|p| p.tensor("0", 2, 1, &[2], &[1])), &bytes), &["2 elements from 1"]);
    refused(
        "negative offset",
        &with(one(|p| p.tensor("0", 2, -1, &[2], &[1])), &bytes),
        &["negative offset"],
    );
    refused("negative size", &with(one(|p| p.tensor("0", 2, 0, &[-2], &[1])), &bytes), &["size"]);
    refused("negative count", &with(one(|p| p.tensor("0", -2, 0, &[2], &[1])), &bytes), &["negative size"]);
    refused("a view of one value", &with(one(|p| p.tensor("0", 2, 0, &[1 << 40], &[0])), &bytes), &["view"]);
    refused("a transposed view", &with(one(|p| p.tensor("0", 4, 0, &[2, 2], &[1, 2])), &[0; 16]), &["view"]);
    let huge = one(|p| p.tensor("0", i64::MAX, 0, &[1 << 40, 1 << 40], &[1 << 40, 1]));
    refused("a size beyond 64 bits", &with(huge, &bytes), &["64 bits"]);
    let huge = one(|p| p.tensor("0", 1 << 62, 0, &[1 << 62], &[1]));
    refused("a storage of 2^64 bytes", &with(huge, &bytes), &["8 bytes"]);
    refused("a missing storage", &with(one(|p| p.tensor("7", 2, 0, &[2], &[1])), &bytes), &["data/7"]);
    refused("a storage by name", &with(one(|p| p.tensor("../x", 2, 0, &[2], &[1])), &bytes), &["no number"]);
    let many = one(|p| p.tensor("0", 2, 0, &[1, 1, 1, 1, 1, 1, 1, 1, 2], &[2, 2, 2, 2, 2, 2, 2, 2, 1]));
    refused("many axes", &with(many, &bytes), &["size"]);
    let shared = Pickle::tensors(&[
        ("bias", |p: Pickle| p.tensor("0", 2, 0, &[2], &[1])),
        ("weight", |p: Pickle| p.tensor("0", 2, 1, &[1], &[1])),
    ]);
    refused("shared values", &with(shared, &bytes), &["shares values"]);
    let unused = one(|p| p.tensor("0", 2, 0, &[2], &[1])).end();
    let entries = [Entry::stored("data/0", &bytes), Entry::stored("data/1", &bytes)];
    refused("an unused storage", &checkpoint(&unused, &entries), &["data/1"]);
}

#[test]
fn values_that_are_no_tree() {
    let p = Pickle::new().raw(b"}").text("a").int(1).raw(b"s").text("a").int(2).raw(b"s").end();
    refused("a field twice", &checkpoint(&p, &[]), &["twice"]);
    let p = Pickle::new().raw(b"}").int(1).int(2).raw(b"s").end();
    refused("a key that is a number", &checkpoint(&p, &[]), &["no text"]);
    let p = Pickle::new().global("collections", "OrderedDict").end();
    refused("a function at the top", &checkpoint(&p, &[]), &["function"]);
}

#[test]
fn archives_with_tricks() {
    let pickle = Pickle::tensors(&[]).end();
    let main = || Entry::stored("data.pkl", &pickle);
    for name in [
        "../evil",
        "/etc/passwd",
        "data\\0",
        "data/../../x",
        "data/0x",
        "data/",
        "code/run.py",
        "data/00000000001",
    ] {
        refused(name, &checkpoint(&pickle, &[Entry::stored(name, b"x")]), &["no part"]);
    }
    for folder in ["..", ".", "", "a\\b", "a\u{1}b"] {
        let archive = zip(&[Entry { full: format!("{folder}/data.pkl"), ..main() }]);
        refused(folder, &archive, &["no part"]);
    }
    let two = zip(&[main(), Entry { full: "other/data/0".into(), ..Entry::stored("data/0", b"x") }]);
    refused("two folders", &two, &["no part"]);
    refused("no pickle", &zip(&[Entry::stored("version", b"3\n")]), &["data.pkl"]);
    refused("twice", &zip(&[main(), main()]), &["twice"]);
    refused("big-endian", &checkpoint(&pickle, &[Entry::stored("byteorder", b"big")]), &["byte order"]);
    refused("a long version", &checkpoint(&pickle, &[Entry::stored("version", &[b'3'; 4096])]), &["version"]);
    // 4 GiB that a few bytes unpack to.
    let bomb = Entry { method: 8, claimed: u32::MAX - 1, ..Entry::stored("data/0", b"\x01\x00\x00\xff\xff") };
    refused("compressed", &checkpoint(&pickle, &[bomb]), &["compressed"]);
    let locked = Entry { flags: 1, ..Entry::stored("data/0", b"secret") };
    refused("encrypted", &checkpoint(&pickle, &[locked]), &["encrypted"]);
    let long = Entry { claimed: 1 << 30, stored: 1 << 30, ..Entry::stored("data/0", b"x") };
    refused("longer than the file", &checkpoint(&pickle, &[long]), &["past the end"]);
    let shared = zip(&[main(), Entry { at: Some(0), ..Entry::stored("data/0", &pickle) }]);
    assert!(matches!(
        refusal(&shared),
        Refusal::EntriesOverlap(..) | Refusal::Archive(_) | Refusal::EntryName(_)
    ));
    let mut damaged = sound();
    let at = damaged.windows(4).position(|w| w == 1.5f32.to_le_bytes()).unwrap();
    damaged[at] ^= 1;
    refused("a flipped bit", &damaged, &["data/"]);
    // An archive whose end declares more entries than anybody would hold.
    let mut many = sound();
    let end = many.len() - 22;
    many[end + 8..end + 12].fill(0xfe);
    refused("65,278 entries", &many, &["65278 entries"]);
    let mut commented = sound();
    let len = commented.len();
    commented[len - 2..].copy_from_slice(&[4, 0]);
    commented.extend(b"note");
    assert!(matches!(refusal(&commented), Refusal::Archive(_)));
    refused("text", b"this is no archive, but it is longer than the end of one", &["archive"]);
    let error = TorchFile::open(Path::new("/nonexistent/saved.pt")).unwrap_err().to_string();
    assert!(error.contains("nonexistent"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(TorchFile::open(dir.path()), Err(Error::Refused { .. })));
}

#[test]
fn random_damage_never_panics() {
    use proptest::prelude::*;
    let whole = sound();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(256));
    let edits = prop::collection::vec((0..whole.len(), any::<u8>()), 1..6);
    runner
        .run(&(edits, 0..whole.len()), |(edits, cut)| {
            let mut bytes = whole.clone();
            for (at, value) in edits {
                bytes[at] = value;
            }
            let _ = open(&bytes);
            let _ = open(&bytes[..cut]);
            Ok(())
        })
        .unwrap();
}

//! Hostile sizes take neither time nor memory. A binary of its own: the peak of a process counts all of its threads.

use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use nics_core::checkpoint::{Checkpoint, CheckpointError};
use tch::{Device, Kind};

/// Peak memory of this process in KiB since the last [`reset_peak`], where the system tells it.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or("0");
    line.trim().trim_end_matches(" kB").parse().unwrap_or(0)
}

fn reset_peak() {
    // Linux; elsewhere the peak reads zero and only the time is checked.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Runs `open` and holds it to one second and 64 MiB.
fn frugal<T>(what: &str, open: impl FnOnce() -> T) -> T {
    reset_peak();
    let (before, start) = (peak_kib(), Instant::now());
    let result = open();
    let (took, extra) = (start.elapsed(), peak_kib().saturating_sub(before));
    assert!(took < Duration::from_secs(1), "{what} took {took:?}");
    assert!(extra < 64 << 10, "{what} took {extra} KiB");
    result
}

fn write_weights(dir: &Path, header: &str) {
    std::fs::write(dir.join("config.json"), "{}").unwrap();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    std::fs::write(dir.join("model.safetensors"), bytes).unwrap();
}

/// A header of `n` empty tensors.
fn many(n: usize) -> String {
    let mut header = String::from("{");
    for i in 0..n {
        let comma = if i > 0 { "," } else { "" };
        write!(header, r#"{comma}"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#).unwrap();
    }
    header + "}"
}

#[test]
fn hostile_sizes_take_neither_time_nor_memory() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let error = |what: &str| frugal(what, || Checkpoint::open_dir(dir)).expect_err(what);

    write_weights(dir, &many(1_000_000));
    assert!(matches!(error("a million tensors"), CheckpointError::TooLarge { .. }));
    write_weights(dir, &many(250_000));
    assert!(matches!(error("as many tensors as fit a header"), CheckpointError::TooManyTensors { .. }));

    write_weights(dir, &many(100_000));
    let checkpoint = frugal("as many as are read", || Checkpoint::open_dir(dir)).unwrap();
    let root = checkpoint.root(Device::Cpu, Kind::Float).at("model.layers.999999");
    let e = frugal("a missing name among them", || root.tensor("weight", &[4])).unwrap_err();
    assert!(matches!(e, CheckpointError::MissingTensor { .. }));

    let deep = "[".repeat(15 << 20);
    write_weights(dir, &format!(r#"{{"w":{{"dtype":"U8","shape":{deep}"#));
    assert!(matches!(error("a deep header"), CheckpointError::BadEntry { .. }));
    write_weights(dir, &format!(r#"{{"__metadata__":{deep}"#));
    assert!(matches!(error("deep metadata"), CheckpointError::BadHeader { .. }));
    let long = "x".repeat(15 << 20);
    write_weights(dir, &format!(r#"{{"{long}":{{"dtype":"{long}"#));
    error("a long name");

    std::fs::remove_file(dir.join("model.safetensors")).unwrap();
    let mut keys = String::from(r#"{"weight_map":{"#);
    for i in 0..1_000_000 {
        write!(keys, r#""{i}":"{i}","#).unwrap();
    }
    keys += r#""x":"x"}}"#;
    std::fs::write(dir.join("model.safetensors.index.json"), &keys).unwrap();
    assert!(matches!(error("an index of a million keys"), CheckpointError::TooLarge { .. }));
    let mut keys = String::from(r#"{"weight_map":{"#);
    for i in 0..600_000 {
        write!(keys, r#""layers.{i}":"a","#).unwrap();
    }
    keys += r#""x":"x"}}"#;
    std::fs::write(dir.join("model.safetensors.index.json"), &keys).unwrap();
    assert!(matches!(error("a long index"), CheckpointError::ShardMissing { .. }));
}

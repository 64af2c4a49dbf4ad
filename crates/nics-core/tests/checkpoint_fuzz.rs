//! Random damage to every file of a checkpoint for a minute each: an error or a checkpoint, never a panic, and bounded
//! memory.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nics_core::checkpoint::{Checkpoint, save};
use nics_core::template::{ChatTemplate, Message, RenderOptions};
use nics_core::tokenizer::Tokenizer;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind};

const SEED: u64 = 1;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden").join(name)
}

/// Pieces that structure the files: putting one in the wrong place reaches further than random bytes.
const PIECES: [&str; 16] = [
    "{",
    "}",
    "[",
    "]",
    "\"",
    ",",
    ":",
    "null",
    "-1",
    "1e309",
    "18446744073709551615",
    "\\ud800",
    "{% if %}",
    "{{",
    "F32",
    "../",
];

/// Changes, removes, doubles or inserts a few bytes; the first few hundred, where headers are, more often.
fn damage(bytes: &mut Vec<u8>, rng: &mut ChaCha8Rng) {
    for _ in 0..rng.random_range(1..6) {
        let reach = if rng.random_bool(0.5) { bytes.len().min(600) } else { bytes.len() };
        if reach == 0 {
            return;
        }
        let at = rng.random_range(0..reach);
        match rng.random_range(0..5) {
            0 => bytes[at] = rng.random(),
            1 => drop(bytes.drain(at..(at + rng.random_range(1..40)).min(bytes.len()))),
            2 => {
                let piece = PIECES[rng.random_range(0..PIECES.len())];
                bytes.splice(at..at, piece.bytes());
            }
            3 => bytes.truncate(at),
            _ => {
                let copy = bytes[at..(at + rng.random_range(1..200)).min(bytes.len())].to_vec();
                bytes.splice(at..at, copy);
            }
        }
    }
}

/// Everything that a program does with a checkpoint before it computes.
fn use_it(dir: &Path) {
    let Ok(checkpoint) = Checkpoint::open_dir(dir) else { return };
    let root = checkpoint.root(Device::Cpu, Kind::Float);
    for name in checkpoint.names() {
        let shape: Vec<i64> = checkpoint.shape(name).unwrap_or_default().iter().map(|&d| d as i64).collect();
        let _ = root.tensor(name, &shape);
    }
    let _ =
        (checkpoint.architecture().is_ok(), checkpoint.generation_config().is_ok(), checkpoint.arch_hash());
    if let Ok(tokenizer) = Tokenizer::from_checkpoint(&checkpoint)
        && let Ok(ids) = tokenizer.encode("你好 <|turn_end|> the end", true)
    {
        let mut stream = tokenizer.decode_stream(true);
        let _ = ids.iter().try_for_each(|&id| stream.push(id).map(|_| ()));
        let _ = stream.finish();
    }
    if let Ok(Some(template)) = ChatTemplate::from_checkpoint(&checkpoint) {
        let _ = template.render(&[Message::new("user", "Hi")], &RenderOptions::default());
    }
}

fn fuzz(seconds: u64) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let source = Checkpoint::open_dir(&golden("megrez")).unwrap();
    let root = source.root(Device::Cpu, Kind::BFloat16);
    let few = ["model.norm.weight", "model.layers.0.self_attn.k_proj.weight"];
    let tensors = few.map(|name| (name.to_owned(), root.stored(name).unwrap()));
    save(dir, tensors, &serde_json::Value::Object(source.config_json().clone()), 1).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(source.file(name).unwrap(), dir.join(name)).unwrap();
    }
    std::panic::set_hook(Box::new(|_| ())); // The tokenizers crate's own panics are caught and become errors.
    let mut names: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    names.sort();
    assert_eq!(names.len(), 7);
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    for path in names {
        let sound = std::fs::read(&path).unwrap();
        let start = Instant::now();
        let mut rounds = 0;
        while start.elapsed() < Duration::from_secs(seconds) || rounds < 20 {
            let mut bytes = sound.clone();
            damage(&mut bytes, &mut rng);
            std::fs::write(&path, &bytes).unwrap();
            if std::panic::catch_unwind(|| use_it(dir)).is_err() {
                let kept =
                    std::env::temp_dir().join(format!("damaged-{}", path.file_name().unwrap().display()));
                std::fs::write(&kept, &bytes).unwrap();
                let _ = std::panic::take_hook();
                panic!("round {rounds} of seed {SEED} panicked; the file is kept as {}", kept.display());
            }
            rounds += 1;
        }
        std::fs::write(&path, &sound).unwrap();
        eprintln!("{}: {rounds} rounds", path.file_name().unwrap().display());
    }
    let _ = std::panic::take_hook();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or("0 kB").trim();
    let peak: u64 = peak.trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 512 << 10, "{peak} KiB");
}

#[test]
fn a_damaged_file_is_an_error() {
    fuzz(0);
}

#[test]
#[ignore = "long"]
fn a_damaged_file_is_an_error_for_a_minute_each() {
    fuzz(60);
}

//! The `megrez` binary and the tiny random checkpoint that the tests of the command line share.
#![allow(dead_code)] // Each test binary uses a part of it.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// How long a process may take before a test takes it for hung. No claim about speed: a busy machine is slow.
const LIVENESS: Duration = Duration::from_secs(120);

/// How a process ended.
#[derive(Debug)]
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Run {
    /// The standard output of a process that has to have succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self.stdout
    }
}

/// The tiny random checkpoint in Megrez layout: 3 layers of width 64, 320 tokens, a context of 256.
pub fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden/megrez")
}

/// The small local copies of benchmarks that the crate of datasets is tested with.
pub fn dataset(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/tests/fixtures").join(name)
}

/// A copy of the tiny checkpoint, to be changed.
pub fn copy() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let files = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"];
    for name in files.into_iter().chain(["tokenizer_config.json"]) {
        std::fs::copy(golden().join(name), dir.path().join(name)).unwrap();
    }
    dir
}

/// Changes a JSON file.
pub fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

/// A copy of the tiny checkpoint that takes `context` tokens.
pub fn with_context(context: usize) -> TempDir {
    let dir = copy();
    edit(&dir.path().join("config.json"), |c| c["max_position_embeddings"] = context.into());
    dir
}

/// The lines of a JSON Lines file or output.
pub fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub fn read_lines(path: &Path) -> Vec<Value> {
    lines(&std::fs::read_to_string(path).unwrap())
}

/// A command of the binary on one thread, blind to what the environment says about shards, the hub and logging.
pub fn megrez<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_megrez"));
    let foreign = ["SLURM_", "JOB_COMPLETION", "NICS_", "HF_", "HUGGING", "TRANSFORMERS_", "RUST_BACKTRACE"];
    for (name, _) in std::env::vars_os() {
        if foreign.iter().any(|f| name.to_string_lossy().starts_with(f)) {
            command.env_remove(name);
        }
    }
    command.args(args).env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
    command
}

/// Runs a command to its end, with `input` on its standard input.
pub fn run_with(mut command: Command, input: &str) -> Run {
    let start = Instant::now();
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_owned();
    // A process that ends early does not read all of it.
    let writer = thread::spawn(move || drop(stdin.write_all(input.as_bytes())));
    let (stdout, stderr) = (drain(child.stdout.take()), drain(child.stderr.take()));
    let code = wait(&mut child, start + LIVENESS);
    let took = start.elapsed();
    writer.join().unwrap();
    Run { code, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap(), took }
}

/// Runs `megrez` with these arguments.
pub fn run<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Run {
    run_with(megrez(args), "")
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    let mut pipe = pipe.unwrap();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).unwrap();
        String::from_utf8(bytes).unwrap()
    })
}

fn wait(child: &mut Child, deadline: Instant) -> Option<i32> {
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the process hangs");
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Arguments as strings, from anything that shows itself as one.
#[macro_export]
macro_rules! args {
    ($($arg:expr),* $(,)?) => { [$($crate::support::text(&$arg)),*] };
}

/// A path or a text as an argument.
pub fn text(arg: &(impl AsRef<OsStr> + ?Sized)) -> std::ffi::OsString {
    arg.as_ref().to_owned()
}

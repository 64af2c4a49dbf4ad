//! The `pm-kvq` binary on the tiny golden models.

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// No claim about speed: a busy machine is slow.
const LIVENESS: Duration = Duration::from_secs(300);

/// How a process ended.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ran {
    /// The standard output of what has to have succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.err);
        self.out
    }

    /// The one line of what has to have failed with a code.
    #[track_caller]
    pub fn refused(self, code: i32, says: &str) {
        assert_eq!(self.code, Some(code), "{}", self.err);
        assert!(self.err.contains(says), "{says:?} is not in: {}", self.err);
        let errors = self.err.lines().filter(|line| line.starts_with("error:")).count();
        assert_eq!(errors, 1, "{}", self.err);
    }
}

pub fn command<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pm-kvq"));
    let foreign = ["SLURM_", "JOB_COMPLETION", "NICS_", "HF_", "RUST_BACKTRACE"];
    for (name, _) in std::env::vars_os() {
        if foreign.iter().any(|f| name.to_string_lossy().starts_with(f)) {
            command.env_remove(name);
        }
    }
    command.args(args).env("OMP_NUM_THREADS", "1").env("HF_HUB_OFFLINE", "1").stdin(Stdio::null());
    command
}

pub fn run<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Ran {
    let ran = command(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: ran.status.code(), out: text(ran.stdout), err: text(ran.stderr) }
}

/// Starts a command and kills it as soon as `ready` holds; whether it was killed before its end.
pub fn killed_when(mut command: Command, ready: impl Fn() -> bool) -> bool {
    let mut child: Child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + LIVENESS;
    loop {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        if ready() {
            child.kill().unwrap();
            child.wait().unwrap();
            return true;
        }
        assert!(Instant::now() < deadline, "the process hangs");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// A checkpoint folder of a golden model: without a tokenizer, so that prompts are token ids.
pub fn model(dir: &Path, name: &str) -> PathBuf {
    let to = dir.join(name);
    std::fs::create_dir(&to).unwrap();
    std::fs::copy(golden(&format!("model_{name}.json")), to.join("config.json")).unwrap();
    std::fs::copy(golden(&format!("model_{name}.safetensors")), to.join("model.safetensors")).unwrap();
    to
}

/// A checkpoint with tokenizer and chat template, whose heads have 8 channels; room for 1,024 tokens.
pub fn talker(dir: &Path) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden/megrez");
    let to = dir.join("talker");
    std::fs::create_dir(&to).unwrap();
    for name in ["generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
    config["max_position_embeddings"] = json!(1024);
    std::fs::write(to.join("config.json"), config.to_string()).unwrap();
    to
}

/// Prompts of these lengths as token ids.
pub fn prompts(dir: &Path, lens: &[usize]) -> PathBuf {
    let path = dir.join("prompts.jsonl");
    let line = |(n, len): (usize, &usize)| {
        let ids: Vec<usize> = (0..*len).map(|i| 1 + (i * 7 + n * 5) % 60).collect();
        json!({ "ids": ids }).to_string()
    };
    std::fs::write(&path, lens.iter().enumerate().map(line).collect::<Vec<_>>().join("\n")).unwrap();
    path
}

/// Token ids to calibrate with.
pub fn samples(dir: &Path, n: i64, len: i64) -> PathBuf {
    let path = dir.join("calib.safetensors");
    let ids = tch::Tensor::arange(n * len, (tch::Kind::Int64, tch::Device::Cpu));
    let ids = ((&ids * &ids + ids * 3).remainder(60) + 1).view([n, len]);
    tch::Tensor::write_safetensors(&[("input_ids", ids)], &path).unwrap();
    path
}

pub fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub fn read_lines(path: &Path) -> Vec<Value> {
    lines(&read(path))
}

pub fn read(path: &Path) -> String {
    let mut text = String::new();
    std::fs::File::open(path).unwrap().read_to_string(&mut text).unwrap();
    text
}

/// Arguments as strings, from anything that shows itself as one.
#[macro_export]
macro_rules! args {
    ($($arg:expr),* $(,)?) => { [$(std::ffi::OsString::from(AsRef::<std::ffi::OsStr>::as_ref(&$arg))),*] };
}

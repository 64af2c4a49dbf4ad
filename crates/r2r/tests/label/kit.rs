//! A pair of tiny models that can think, queries for it, and the binary.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use nics_base::interrupt::Interrupt;
use nics_core::checkpoint::Checkpoint;
use nics_core::models::{self, Decoder};
use nics_core::tokenizer::Tokenizer;
use nics_core::train::Workshop;
use nics_datasets::ring;
use nics_datasets::word_problems::Split;
use r2r::nano::{Recipe, RingTask};
use serde_json::{Value, json};
use tch::{Device, Kind};

/// Both models of arithmetic modulo 5, trained until the large one has learnt the form of a response.
const RECIPE: &str = r"
    modulus = 5
    seeds = [3]
    validation = 4
    [models.small]
    config = { hidden_size = 16, intermediate_size = 16, num_hidden_layers = 1, num_attention_heads = 2, num_key_value_heads = 1, head_dim = 8 }
    batch = 16
    embedding_std = 0.5
    train = { steps = 60, lr = 4e-3, warmup = 10, save_every = 60, log_every = 60 }
    [models.large]
    config = { hidden_size = 32, intermediate_size = 64, num_hidden_layers = 2, num_attention_heads = 2, num_key_value_heads = 2, head_dim = 16 }
    batch = 32
    embedding_std = 0.5
    train = { steps = 150, lr = 6e-3, warmup = 10, save_every = 150, log_every = 150 }
";

pub const MODULUS: u32 = 5;
/// More tokens than a response has.
pub const LONGEST: &str = "56";

/// The folder of the pair: `small` and `large`. Trained once, and kept between runs of the tests.
pub fn pair() -> &'static Path {
    static PAIR: OnceLock<PathBuf> = OnceLock::new();
    PAIR.get_or_init(|| {
        let name = format!("label-pair-{}", &nics_base::hash::bytes(RECIPE)[..12]);
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&root).unwrap();
        let recipe = root.join("recipe.toml");
        std::fs::write(&recipe, RECIPE).unwrap();
        let recipe = Recipe::read(&recipe).unwrap();
        let out = root.join("pairs");
        let never = Interrupt::never();
        let (state, device) = (&root.join("state"), Device::Cpu);
        let workshop = Workshop { state, out: &out, device, interrupt: &never };
        r2r::nano::train(&recipe, &workshop, &mut |_, _, _| {}).unwrap();
        out.join("seed-3")
    })
}

pub fn small() -> PathBuf {
    pair().join("small")
}

pub fn large() -> PathBuf {
    pair().join("large")
}

pub fn task() -> RingTask {
    RingTask::new(MODULUS).unwrap()
}

pub fn prompt(index: u64) -> Vec<u32> {
    let task = task();
    task.encode(&task.ring().problem(Split::Train, 1, index).prompt()).unwrap()
}

/// Lines of `queries.jsonl`.
pub fn queries(n: u64) -> String {
    let mut text = String::new();
    for i in 0..n {
        let line = json!({ "id": format!("q{i}"), "ids": prompt(i), "source": "ring", "type": "math" });
        writeln!(text, "{line}").unwrap();
    }
    text
}

/// The table of synonyms of the task.
pub fn table() -> String {
    let list = |words: &[&str]| serde_json::to_string(words).unwrap();
    format!(
        "classes = [{}, {}, {}]\n",
        list(&ring::CONNECTIVES),
        list(&ring::SEPARATORS),
        list(&ring::CLOSINGS)
    )
}

/// A folder with `queries.jsonl` and `synonyms.toml`.
pub fn inputs(n: u64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("queries.jsonl"), queries(n)).unwrap();
    std::fs::write(dir.path().join("synonyms.toml"), table()).unwrap();
    dir
}

/// A loaded model.
pub struct Model {
    pub decoder: Decoder,
    pub tokenizer: Tokenizer,
}

impl Model {
    pub fn open(dir: &Path) -> Self {
        let checkpoint = Checkpoint::open_dir(dir).unwrap();
        Self {
            decoder: models::load(&checkpoint, Device::Cpu, Kind::Float).unwrap(),
            tokenizer: Tokenizer::from_checkpoint(&checkpoint).unwrap(),
        }
    }
}

/// How a process ended.
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self.stdout
    }

    /// The message of a run that has to have failed.
    #[track_caller]
    pub fn refused(self) -> String {
        assert_eq!(self.code, Some(1), "{}{}", self.stdout, self.stderr);
        self.stderr
    }
}

/// The binary in `dir`, on one thread, blind to what the environment says about shards, the hub and keys.
pub fn command<A: AsRef<OsStr>>(dir: &Path, args: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_r2r"));
    let foreign = ["SLURM_", "JOB_COMPLETION", "NICS_", "HF_", "R2R_", "RUST_BACKTRACE"];
    for (name, _) in std::env::vars_os() {
        if foreign.iter().any(|f| name.to_string_lossy().starts_with(f)) {
            command.env_remove(name);
        }
    }
    command.current_dir(dir).args(args).env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
    command
}

pub fn r2r(dir: &Path, args: &[&str]) -> Run {
    let output = command(dir, args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// A copy of a model, to be changed.
pub fn copy(of: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(of).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

/// Changes a JSON file.
pub fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, format!("{json:#}\n")).unwrap();
}

/// A copy of the large model with this chat template, or without any.
pub fn with_template(to: &Path, template: Option<&str>) {
    copy(&large(), to);
    edit(&to.join("tokenizer_config.json"), |settings| match template {
        Some(template) => settings["chat_template"] = template.into(),
        None => drop(settings.as_object_mut().unwrap().remove("chat_template")),
    });
    let _ = std::fs::remove_file(to.join("chat_template.jinja"));
}

/// Words of a command with `SMALL` and `LARGE` for the models.
pub fn words(text: &str) -> Vec<String> {
    text.split_whitespace()
        .map(|word| match word {
            "SMALL" => small().display().to_string(),
            "LARGE" => large().display().to_string(),
            "LONGEST" => LONGEST.into(),
            word => word.to_owned(),
        })
        .collect()
}

/// Runs a command that is given as in [`words`].
pub fn say(dir: &Path, text: &str) -> Run {
    let words = words(text);
    r2r(dir, &words.iter().map(String::as_str).collect::<Vec<_>>())
}

/// The whole pipeline with the rule for a judge.
pub const RUN: &str = "label run --queries queries.jsonl --small SMALL --large LARGE --judge rule:synonyms.toml \
    --dtype f32 --max-new-tokens LONGEST --top-k 12 --shard-tokens 300 --batch 4 --group 8";

/// Makes labels in `dir/OUT` with [`RUN`] and further flags.
pub fn label(dir: &Path, out: &str, more: &str) -> Run {
    say(dir, &format!("{RUN} --out {out} {more}"))
}

pub fn read_lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Name and hash of every file of a folder and below, the lock aside.
pub fn files(dir: &Path) -> Vec<(String, String)> {
    let mut all = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.file_name() != Some(OsStr::new(".lock")) {
                let name = path.strip_prefix(dir).unwrap().display().to_string();
                all.push((name, nics_base::hash::file(&path).unwrap()));
            }
        }
    }
    all.sort();
    all
}

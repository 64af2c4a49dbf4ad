//! One step with one seed: is it up to date, and if not, run it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nics_base::exit::Exit;
use nics_base::hash;
use nics_base::interrupt::Interrupt;
use nics_base::row::{self, Row};
use nics_base::shard::{self, Shard, ShardName};
use serde_json::json;

use super::plan::{Plan, Step, fill, of_seed};
use super::stamp::Stamp;
use crate::process::{Usage, ended, run_logged, shown};
use crate::workspace::Workspace;

/// How often a command is run that ends with "try again".
const ATTEMPTS: u32 = 3;
/// Raised when the meaning of a stamp's key changes.
const KEY_FORMAT: u32 = 1;

/// A binary that steps run.
pub enum Binary {
    /// Where it is, and the hash of its contents.
    Built { path: PathBuf, hash: String },
    /// Why there is none.
    Failed(String),
}

impl Binary {
    /// Looks at a binary that was built.
    pub fn built(path: PathBuf) -> Result<Self> {
        let hash = hash::file(&path)?;
        Ok(Self::Built { path, hash })
    }
}

/// How a step ended.
pub enum Outcome {
    /// Nothing had to be done.
    Fresh,
    /// It ran.
    Done(Usage),
    /// It ran and failed, or could not start.
    Failed(String),
    /// A step that it needs failed.
    Skipped(String),
}

impl Outcome {
    /// True when the step's outputs can be used.
    pub fn is_good(&self) -> bool {
        matches!(self, Self::Fresh | Self::Done(_))
    }

    /// What a step that ran took.
    pub fn usage(&self) -> Option<Usage> {
        if let Self::Done(usage) = self { Some(*usage) } else { None }
    }
}

/// One step with one of its seeds.
pub struct Unit<'a> {
    pub ws: &'a Workspace,
    pub plan: &'a Plan,
    pub step: &'a Step,
    pub seed: Option<u64>,
    /// The folder of the plan.
    pub base: &'a Path,
}

/// What to start: a program and the words before the step's own.
struct Program {
    words: Vec<String>,
    /// Hash of a binary of ours; programs of the system are taken by name.
    hash: Option<String>,
}

impl Unit<'_> {
    /// Names the step's folder, log and stamp.
    pub fn id(&self) -> String {
        folder_name(&self.step.name, self.seed)
    }

    fn dir(&self) -> PathBuf {
        self.base.join(self.id())
    }

    fn log(&self) -> PathBuf {
        self.base.join(format!("{}.log", self.id()))
    }

    fn stamp(&self) -> PathBuf {
        self.base.join(format!("{}.json", self.id()))
    }

    /// Runs the step unless it is up to date. An error is an interrupt or a fault of this machine; what is wrong with
    /// the step is its outcome.
    pub fn bring_up_to_date(
        &self,
        binaries: &BTreeMap<(String, String), Binary>,
        resume: bool,
        interrupt: &Interrupt,
    ) -> Result<Outcome> {
        let program = match self.program(binaries) {
            Ok(program) => program,
            Err(e) => return Ok(Outcome::Failed(format!("{e:#}"))),
        };
        let key = match self.key(&program) {
            Ok(key) => key,
            Err(e) => return Ok(Outcome::Failed(format!("{e:#}"))),
        };
        let stamp = Stamp::read(&self.stamp());
        if stamp.as_ref().is_some_and(|s| s.is_fresh(&key, &self.dir())) {
            return Ok(Outcome::Fresh);
        }
        let partial = stamp.filter(|s| resume && s.key == key && s.outputs.is_none());
        let stamp = match partial {
            Some(partial) => partial,
            None => self.begin(key)?,
        };
        fs::create_dir_all(self.dir()).with_context(|| format!("cannot make {}", self.dir().display()))?;
        match self.run(&program, stamp, interrupt) {
            Ok(usage) => Ok(Outcome::Done(usage)),
            Err(e) => {
                interrupt.check()?;
                Ok(Outcome::Failed(format!("{e:#}\nits log is {}", self.log().display())))
            }
        }
    }

    /// The rows of a step that is done.
    pub fn rows(&self) -> Result<Vec<Row>> {
        let Some(name) = &self.step.rows else { return Ok(Vec::new()) };
        let mut rows = row::read(self.dir().join(name))?;
        for row in &mut rows {
            // A binary need not know in which experiment it runs.
            if row.preset.is_empty() {
                row.preset.clone_from(&self.plan.preset);
            }
        }
        Ok(rows)
    }

    fn program(&self, binaries: &BTreeMap<(String, String), Binary>) -> Result<Program> {
        if let Some(command) = &self.step.command {
            return Ok(Program { words: command.clone(), hash: None });
        }
        let package = self.step.package.clone().context("the step has no package")?;
        let binary = self.step.binary.clone().unwrap_or_else(|| package.clone());
        match binaries.get(&(package, binary)).context("the binary was not built")? {
            Binary::Built { path, hash } => {
                let mut words = vec![escape(&path.to_string_lossy())];
                words.extend(self.step.args.iter().cloned());
                Ok(Program { words, hash: Some(hash.clone()) })
            }
            Binary::Failed(why) => bail!("its binary could not be built: {why}"),
        }
    }

    /// Hash of what the result depends on: the step as written, inputs and binary by content. Places play no role, so
    /// that a moved folder stays fresh.
    fn key(&self, program: &Program) -> Result<String> {
        let mut inputs = BTreeMap::new();
        for (template, path) in self.step.inputs.iter().zip(self.inputs()?) {
            if !path.exists() {
                bail!("its input {} is missing", self.ws.show(&path));
            }
            inputs.insert(template, hash::path(&path)?);
        }
        // How many shards run at a time is no part of the result.
        let step = Step { parallel: None, ..self.step.clone() };
        let parts = json!({
            "format": KEY_FORMAT, "step": step, "seed": self.seed, "preset": self.plan.preset,
            "inputs": inputs, "binary": program.hash,
        });
        Ok(hash::value(&parts)?)
    }

    /// Removes what is there and leaves a stamp that says "begun".
    fn begin(&self, key: String) -> Result<Stamp> {
        // The stamp goes first: whatever happens now, nobody takes the folder for a finished one.
        remove(&self.stamp(), |p| fs::remove_file(p))?;
        remove(&self.dir(), |p| fs::remove_dir_all(p))?;
        remove(&self.log(), |p| fs::remove_file(p))?;
        let stamp = Stamp { key, shards: Vec::new(), outputs: None };
        stamp.write(&self.stamp())?;
        Ok(stamp)
    }

    fn run(&self, program: &Program, stamp: Stamp, interrupt: &Interrupt) -> Result<Usage> {
        let usage = match self.step.shards {
            None => self.run_once(program, None, interrupt)?,
            Some(count) => self.run_shards(program, count, &stamp, interrupt)?,
        };
        let mut outputs = BTreeMap::new();
        for name in self.step.outputs.iter().chain(&self.step.rows) {
            let path = self.dir().join(name);
            if !path.exists() {
                bail!("it ended well but left no {name}");
            }
            outputs.insert(name.clone(), hash::path(&path)?);
        }
        self.rows()?;
        Stamp { shards: Vec::new(), outputs: Some(outputs), ..stamp }.write(&self.stamp())?;
        Ok(usage)
    }

    /// Runs the command, again if it asks for that.
    fn run_once(&self, program: &Program, part: Option<Shard>, interrupt: &Interrupt) -> Result<Usage> {
        let mut prefix = format!("{}/{}", self.plan.method, self.id());
        if let Some(part) = part {
            prefix = format!("{prefix} {part}");
        }
        for attempt in 1..=ATTEMPTS {
            let mut command = self.command(program, part)?;
            let (status, usage) = run_logged(&mut command, &prefix, &self.log(), interrupt)?;
            if status.success() {
                return Ok(usage);
            }
            if attempt == ATTEMPTS || status.code() != Some(Exit::TryAgain.code().into()) {
                bail!("{} ({})", shown(&command), ended(status));
            }
            eprintln!("[{prefix}] asks to try again: attempt {} of {ATTEMPTS}", attempt + 1);
            for _ in 0..attempt * 10 {
                interrupt.check()?;
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        bail!("it was never run")
    }

    /// Runs the shards that are not done yet, then merges what they wrote.
    fn run_shards(
        &self,
        program: &Program,
        count: usize,
        stamp: &Stamp,
        interrupt: &Interrupt,
    ) -> Result<Usage> {
        let todo: Vec<usize> = (0..count).filter(|i| !stamp.shards.contains(i)).collect();
        let next = AtomicUsize::new(0);
        let progress = Mutex::new((stamp.clone(), Usage::default(), None));
        let work = || {
            loop {
                let Some(&index) = todo.get(next.fetch_add(1, Ordering::Relaxed)) else { return };
                let outcome = Shard::new(index, count)
                    .map_err(Into::into)
                    .and_then(|s| self.run_once(program, Some(s), interrupt));
                let mut progress = progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let (stamp, total, failure) = &mut *progress;
                let outcome = outcome.and_then(|usage| {
                    total.wall += usage.wall;
                    total.peak_bytes = total.peak_bytes.max(usage.peak_bytes);
                    stamp.shards.push(index);
                    stamp.write(&self.stamp())
                });
                if let Err(e) = outcome {
                    failure.get_or_insert(e);
                }
                if failure.is_some() {
                    return;
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..self.step.parallel.unwrap_or(1).min(todo.len()) {
                scope.spawn(work);
            }
        });
        let (_, usage, failure) = progress.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(e) = failure {
            return Err(e);
        }
        self.merge()?;
        Ok(usage)
    }

    /// Merges each group of shard files in the folder.
    fn merge(&self) -> Result<()> {
        let dir = self.dir();
        let mut groups: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))? {
            let path = entry?.path();
            if let Some(name) = path.file_name().and_then(|n| n.to_str()).and_then(ShardName::parse) {
                groups.entry(name.stem).or_default().push(path);
            }
        }
        for (stem, mut files) in groups {
            files.sort();
            shard::merge(&files, dir.join(format!("{stem}.jsonl")))?;
        }
        Ok(())
    }

    fn command(&self, program: &Program, part: Option<Shard>) -> Result<Command> {
        let inputs = self.inputs()?;
        let filled = |word: &String| {
            fill(word, |name| {
                if let Some(i) = name.strip_prefix("inputs.") {
                    return Some(inputs.get(i.parse::<usize>().ok()?)?.to_string_lossy().into_owned());
                }
                self.value(name, part)
            })
        };
        let words: Vec<String> = program.words.iter().map(filled).collect::<Result<_>>()?;
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).current_dir(&self.ws.root);
        Ok(command)
    }

    /// The paths of the inputs.
    fn inputs(&self) -> Result<Vec<PathBuf>> {
        let path = |input: &String| Ok(self.ws.root.join(fill(input, |name| self.value(name, None))?));
        self.step.inputs.iter().map(path).collect()
    }

    /// The value of a placeholder, other than inputs.
    fn value(&self, name: &str, part: Option<Shard>) -> Option<String> {
        let shown = |path: PathBuf| path.to_string_lossy().into_owned();
        if let Some(step) = name.strip_prefix("dir:") {
            let (step, named) = of_seed(step);
            let other = self.plan.steps.iter().find(|s| s.name == step)?;
            let seed = named.or(self.seed.filter(|_| other.seeds.is_some()));
            return Some(shown(self.base.join(folder_name(step, seed))));
        }
        if let Some(i) = name.strip_prefix("outputs.") {
            return Some(shown(self.dir().join(self.step.outputs.get(i.parse::<usize>().ok()?)?)));
        }
        match name {
            "root" => Some(shown(self.ws.root.clone())),
            "dir" => Some(shown(self.dir())),
            "preset" => Some(self.plan.preset.clone()),
            "seed" => self.seed.map(|s| s.to_string()),
            "shard" => part.map(|p| p.to_string()),
            "shard_index" => part.map(|p| p.index().to_string()),
            "shard_count" => part.map(|p| p.count().to_string()),
            _ => None,
        }
    }
}

fn folder_name(step: &str, seed: Option<u64>) -> String {
    seed.map_or_else(|| step.to_owned(), |seed| format!("{step}.seed-{seed}"))
}

/// A path as a template that stands for itself.
fn escape(text: &str) -> String {
    text.replace('{', "{{").replace('}', "}}")
}

fn remove(path: &Path, with: impl Fn(&Path) -> std::io::Result<()>) -> Result<()> {
    match with(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

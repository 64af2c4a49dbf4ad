//! The folder in which labels are made: which step was run with which settings, and what it made.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use nics_base::artefact::write_atomic;
use nics_base::hash;
use nics_base::interrupt::Interrupt;
use nics_base::shard::Shard;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::LabelError;
use crate::{Error, Result};

/// The name of the record of a folder's steps.
pub const RUN_FILE: &str = "run.json";
const FORMAT: u32 = 1;

/// The steps, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// The large model answers.
    Respond,
    /// The small model reads along.
    Prefill,
    /// Where they differ, the large model continues.
    Continue,
    /// A judge compares.
    Judge,
    /// Its word becomes the labels of rows.
    Build,
}

impl Step {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Respond, Self::Prefill, Self::Continue, Self::Judge, Self::Build];

    /// Its name on the command line and in `run.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Respond => "respond",
            Self::Prefill => "prefill",
            Self::Continue => "continue",
            Self::Judge => "judge",
            Self::Build => "build",
        }
    }

    /// The file that says what it made.
    pub fn file(self) -> &'static str {
        match self {
            Self::Respond => "responses.jsonl",
            Self::Prefill => "index.json",
            Self::Continue => "mismatch.jsonl",
            Self::Judge => "judged.jsonl",
            Self::Build => "labels.json",
        }
    }

    fn before(self) -> Option<Self> {
        Self::ALL.into_iter().take_while(|s| *s != self).last()
    }
}

/// What a step's entry says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepRecord {
    /// All that its result depends on beside the step before.
    pub settings: Value,
    /// Hash of the settings and of the step before.
    pub hash: String,
    /// Set once it is done.
    #[serde(default)]
    pub done: Option<Done>,
}

/// What a step made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Done {
    /// Lines, or rows.
    pub records: u64,
    /// BLAKE3 of its file.
    pub hash: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RunFile {
    format_version: u32,
    shard: String,
    steps: BTreeMap<String, StepRecord>,
}

/// Hears how far a step is: done, of how many.
pub type Report<'a> = &'a mut dyn FnMut(Step, u64, u64);

/// What a run does beside its work.
#[derive(Default)]
pub struct Watch<'a> {
    /// Asks it to stop: what was made is kept.
    pub interrupt: Interrupt,
    /// Hears of progress.
    pub progress: Option<Report<'a>>,
}

impl Watch<'_> {
    pub(super) fn at(&mut self, step: Step, done: usize, all: usize) {
        if let Some(report) = &mut self.progress {
            report(step, done as u64, all as u64);
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        Ok(self.interrupt.check()?)
    }
}

/// A folder of labels being made, held by one process at a time.
#[derive(Debug)]
pub struct Work {
    dir: PathBuf,
    shard: Shard,
    run: RunFile,
    /// Unlocked when it is dropped, and when the process ends.
    _lock: File,
}

impl Work {
    /// Opens or makes the folder of a shard below `out`: `out` itself for the whole work, else `shard-I-of-N` in it.
    ///
    /// # Errors
    /// `Busy` while another process works in it, [`Error::Damaged`] for a `run.json` that does not parse.
    pub fn open(out: &Path, shard: Shard) -> Result<Self> {
        let dir = if shard.is_whole() {
            out.to_owned()
        } else {
            out.join(format!("shard-{:04}-of-{:04}", shard.index(), shard.count()))
        };
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| nics_base::Error::Io { action, path, source }
        };
        std::fs::create_dir_all(&dir).map_err(io("create the folder", &dir))?;
        let lock_path = dir.join(".lock");
        let lock = File::options().create(true).truncate(false).write(true).open(&lock_path);
        let lock = lock.map_err(io("open", &lock_path))?;
        // File systems without locks are left to their users' care.
        if matches!(lock.try_lock(), Err(std::fs::TryLockError::WouldBlock)) {
            return Err(nics_base::Error::Busy(dir).into());
        }
        let path = dir.join(RUN_FILE);
        let run = if path.exists() {
            read(&path)?
        } else {
            RunFile { format_version: FORMAT, shard: shard.to_string(), steps: BTreeMap::new() }
        };
        if run.shard != shard.to_string() {
            return Err(LabelError::OtherConfiguration {
                dir,
                step: Step::Respond.name(),
                field: "shard".into(),
                found: run.shard,
                expected: shard.to_string(),
            }
            .into());
        }
        Ok(Self { dir, shard, run, _lock: lock })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Which part of the queries is worked on.
    pub fn shard(&self) -> Shard {
        self.shard
    }

    /// The path of a file in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The path of a step's file.
    pub fn file(&self, step: Step) -> PathBuf {
        self.dir.join(step.file())
    }

    /// What is known of a step.
    pub fn record(&self, step: Step) -> Option<&StepRecord> {
        self.run.steps.get(step.name())
    }

    /// What a step made, once it is done.
    pub fn done(&self, step: Step) -> Option<&Done> {
        self.record(step)?.done.as_ref()
    }

    /// Begins or takes up a step with these settings. `true` when it is done already.
    ///
    /// # Errors
    /// [`LabelError::NotDone`] before the step before is done, [`LabelError::OtherConfiguration`] where the folder holds
    /// the step with other settings, [`LabelError::ShardCorrupt`] where the file of this step or the one before is not what
    /// was written.
    pub fn begin(&mut self, step: Step, settings: Value) -> Result<bool> {
        let mut before = String::new();
        if let Some(needs) = step.before() {
            let missing =
                || LabelError::NotDone { dir: self.dir.clone(), step: step.name(), needs: needs.name() };
            let record = self.record(needs).filter(|r| r.done.is_some()).ok_or_else(missing)?;
            before.clone_from(&record.hash);
            self.verify(needs)?;
        }
        let identity = serde_json::json!({ "step": step.name(), "settings": settings, "before": before });
        let hash = hash::value(&identity)?;
        if let Some(record) = self.record(step) {
            if record.hash != hash {
                let (field, found, expected) = difference(&record.settings, &settings);
                let dir = self.dir.clone();
                let error = LabelError::OtherConfiguration { dir, step: step.name(), field, found, expected };
                return Err(error.into());
            }
            if record.done.is_some() {
                self.verify(step)?;
                return Ok(true);
            }
            return Ok(false);
        }
        self.run.steps.insert(step.name().into(), StepRecord { settings, hash, done: None });
        self.save()?;
        Ok(false)
    }

    /// Ends a step, whose file is complete.
    pub fn end(&mut self, step: Step, records: u64) -> Result<()> {
        let hash = hash::file(self.file(step))?;
        if let Some(record) = self.run.steps.get_mut(step.name()) {
            record.done = Some(Done { records, hash });
        }
        self.save()
    }

    fn verify(&self, step: Step) -> Result<()> {
        let Some(done) = self.done(step) else { return Ok(()) };
        verify(&self.file(step), &done.hash)
    }

    fn save(&self) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.run)
            .map_err(|source| nics_base::Error::Json { what: RUN_FILE.into(), source })?;
        Ok(write_atomic(self.dir.join(RUN_FILE), text + "\n")?)
    }
}

/// Whether a file is what was written.
pub(super) fn verify(path: &Path, expected: &str) -> Result<()> {
    let found = if path.is_file() { hash::file(path)? } else { "that of no file".to_owned() };
    if found == expected {
        return Ok(());
    }
    let (path, expected) = (path.to_owned(), expected.to_owned());
    Err(LabelError::ShardCorrupt { path, found, expected }.into())
}

fn read(path: &Path) -> Result<RunFile> {
    let damaged = |reason: String| Error::Damaged { path: path.to_owned(), reason };
    let text = std::fs::read_to_string(path).map_err(|source| nics_base::Error::Io {
        action: "read",
        path: path.to_owned(),
        source,
    })?;
    let run: RunFile = serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))?;
    if run.format_version != FORMAT {
        let found = run.format_version;
        return Err(damaged(format!("format_version is {found}, this release reads {FORMAT}")));
    }
    Ok(run)
}

/// A folder's steps without its lock, for whoever reads labels: settings and what was made, by the step's name.
pub(super) fn records(dir: &Path) -> Result<BTreeMap<String, StepRecord>> {
    Ok(read(&dir.join(RUN_FILE))?.steps)
}

/// The first setting that differs; when none does, it is the step before that does.
fn difference(there: &Value, now: &Value) -> (String, String, String) {
    let (Value::Object(there), Value::Object(now)) = (there, now) else {
        return ("settings".into(), there.to_string(), now.to_string());
    };
    let keys = now.keys().chain(there.keys());
    let differs = keys.into_iter().find(|key| there.get(*key) != now.get(*key));
    match differs {
        None => ("input".into(), "another step's".into(), "this one's".into()),
        Some(key) => {
            let show = |v: Option<&Value>| match v {
                None => "absent".to_owned(),
                Some(v) => {
                    let text = v.to_string();
                    if text.chars().count() > 120 {
                        format!("{}...", text.chars().take(120).collect::<String>())
                    } else {
                        text
                    }
                }
            };
            (format!("`{key}`"), show(there.get(key)), show(now.get(key)))
        }
    }
}

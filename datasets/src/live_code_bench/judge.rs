//! Whether a program passes a problem's tests.

use std::ffi::OsString;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use nics_base::interrupt::Interrupt;
use nics_base::sandbox::{End, Limits, Ran, Run, Sandbox, SandboxError};
use serde::{Deserialize, Serialize};

use super::compare;
use super::python::Python;
use super::tests::{Test, Tests};

const HARNESS: &str = include_str!("harness.py");
const PROBE: &str = include_str!("probe.py");
/// Neither site packages of the user nor compiled files; equal hashes in every run; no threads of numerical libraries.
const FLAGS: [&str; 5] = ["-s", "-B", "-X", "utf8", "-c"];
const ENVIRONMENT: [(&str, &str); 3] =
    [("PYTHONHASHSEED", "0"), ("OPENBLAS_NUM_THREADS", "1"), ("OMP_NUM_THREADS", "1")];
/// What is kept of an error's message.
const MOST_CHARS: usize = 200;

/// Why a program is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// The reply holds no program.
    NoProgram,
    /// Another answer than the expected one.
    WrongAnswer,
    /// It ended with an error; what it said last.
    Error(String),
    /// A signal ended it.
    Crash(i32),
    /// It took longer than it may.
    Slow,
    /// It wrote more than it may.
    TooMuchOutput,
    /// It had more threads than it may.
    TooManyThreads,
}

/// What became of a program. Tests behind the first one that fails are not run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Tests that it passed.
    pub passed: usize,
    /// Tests that there are.
    pub tests: usize,
    /// Why it failed the next one.
    pub fault: Option<Fault>,
}

impl Verdict {
    /// Whether it passed all of them.
    pub fn correct(&self) -> bool {
        self.fault.is_none()
    }
}

/// Why programs cannot be judged here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JudgeError {
    /// There is no interpreter of that name.
    #[error("{} is no Python that programs could be run with: {reason}", named.display())]
    Python {
        /// What was named.
        named: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Programs could not be held to their limits.
    #[error("programs are not run here: under its limits one could still {0}")]
    Open(String),
    /// The sandbox failed.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// Somebody asked to stop.
    #[error("no further program is run")]
    Stopped(#[source] nics_base::Error),
    /// A program's folder cannot be made.
    #[error("cannot make a folder for a program")]
    Folder(#[source] std::io::Error),
}

/// Runs Python programs on tests, each in a process of its own under limits.
#[derive(Debug)]
pub struct Judge {
    sandbox: Sandbox,
    python: Python,
}

impl Judge {
    /// With an interpreter, by its path or its name on `PATH`. Tries whether a program here can do what it must not.
    ///
    /// # Errors
    /// No interpreter, no sandbox on this system, or one that does not hold.
    pub fn open(python: &Path, limits: Limits) -> Result<Self, JudgeError> {
        let sandbox = Sandbox::new(limits)?;
        let judge = Self { sandbox, python: Python::find(python)? };
        let folder = folder("")?;
        let ran = judge.run(PROBE, None, folder.path(), b"")?;
        let said = String::from_utf8_lossy(&ran.stdout);
        match said.lines().collect::<Vec<_>>()[..] {
            ["done"] if ran.end == End::Exited(0) => Ok(judge),
            [.., "done"] => Err(JudgeError::Open(said.lines().next().unwrap_or_default().to_owned())),
            _ => Err(JudgeError::Python {
                named: python.to_owned(),
                reason: format!("under limits it ends with {:?}: {}", ran.end, last_line(&ran.stderr)),
            }),
        }
    }

    /// What a verdict depends on beside program and tests, for logs.
    pub fn settings(&self) -> String {
        let Limits { seconds, memory, output, threads } = self.sandbox.limits();
        format!(
            "Python {}, {seconds} s, {memory} bytes of memory, {output} of output, {threads} threads",
            self.python.version
        )
    }

    /// Runs a program on tests until one fails.
    ///
    /// # Errors
    /// Where programs cannot be run at all; what is wrong with this one is in the verdict.
    pub fn judge(&self, program: &str, tests: &Tests) -> Result<Verdict, JudgeError> {
        self.judge_until(&Interrupt::never(), program, tests)
    }

    /// As [`judge`](Self::judge), given up before the next test when somebody asks to stop.
    fn judge_until(
        &self,
        interrupt: &Interrupt,
        program: &str,
        tests: &Tests,
    ) -> Result<Verdict, JudgeError> {
        let all = tests.all();
        let mut verdict = Verdict { passed: 0, tests: all.len(), fault: None };
        if program.trim().is_empty() {
            verdict.fault = Some(Fault::NoProgram);
            return Ok(verdict);
        }
        let folder = folder(program)?;
        for test in all {
            interrupt.check().map_err(JudgeError::Stopped)?;
            let ran = self.run(HARNESS, tests.function(), folder.path(), test.input.as_bytes())?;
            verdict.fault = fault(&ran, test, tests.function().is_some());
            if verdict.fault.is_some() {
                break;
            }
            verdict.passed += 1;
        }
        Ok(verdict)
    }

    /// Judges many programs on `workers` threads: `work(n)` gives the `n`th and its tests, `each` is told the verdicts as
    /// they come, and says whether to go on. Several at a time slow each other down where there are not as many processors.
    ///
    /// # Errors
    /// The first of `work`, of a program that cannot be run, or of `each`; [`JudgeError::Stopped`] soon after the interrupt.
    pub fn judge_all<E: From<JudgeError> + Send>(
        &self,
        count: usize,
        workers: NonZero<usize>,
        interrupt: &Interrupt,
        work: impl Fn(usize) -> Result<(String, Tests), E> + Sync,
        mut each: impl FnMut(usize, Verdict) -> Result<(), E>,
    ) -> Result<(), E> {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let (send, verdicts) = mpsc::sync_channel(0);
            for _ in 0..workers.get().min(count) {
                let (send, next, work) = (send.clone(), &next, &work);
                scope.spawn(move || {
                    loop {
                        let n = next.fetch_add(1, Ordering::Relaxed);
                        if n >= count {
                            return;
                        }
                        let verdict = work(n)
                            .and_then(|(program, tests)| Ok(self.judge_until(interrupt, &program, &tests)?));
                        // Nobody listens any more once something went wrong.
                        if send.send((n, verdict)).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(send);
            verdicts.into_iter().try_for_each(|(n, verdict)| each(n, verdict?))
        })
    }

    fn run(
        &self,
        script: &str,
        function: Option<&str>,
        folder: &Path,
        input: &[u8],
    ) -> Result<Ran, SandboxError> {
        let args: Vec<OsString> =
            FLAGS.iter().copied().chain([script]).chain(function).map(OsString::from).collect();
        self.sandbox.run(&Run {
            program: &self.python.program,
            args: &args,
            env: &ENVIRONMENT,
            folder,
            reads: &self.python.places,
            input,
        })
    }
}

/// A folder that holds the program.
fn folder(program: &str) -> Result<tempfile::TempDir, JudgeError> {
    let made = || {
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join("program.py"), program)?;
        Ok(folder)
    };
    made().map_err(JudgeError::Folder)
}

fn fault(ran: &Ran, test: &Test, functional: bool) -> Option<Fault> {
    match ran.end {
        End::Exited(0) => {
            let said = String::from_utf8_lossy(&ran.stdout);
            let right = if functional {
                compare::values(&said, &test.output)
            } else {
                compare::lines(&said, &test.output)
            };
            (!right).then_some(Fault::WrongAnswer)
        }
        End::Exited(_) => Some(Fault::Error(last_line(&ran.stderr))),
        End::Crashed(signal) => Some(Fault::Crash(signal)),
        End::Slow => Some(Fault::Slow),
        End::TooMuchOutput => Some(Fault::TooMuchOutput),
        End::TooManyThreads => Some(Fault::TooManyThreads),
    }
}

/// What Python says last is the error itself.
fn last_line(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let last = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    last.trim().chars().filter(|c| !c.is_control()).take(MOST_CHARS).collect()
}

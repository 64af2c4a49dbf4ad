//! Other people's programs, run so that they can compute and print and nothing else.
//!
//! A program in the [`Sandbox`] reads its standard input, computes within limits on time and memory, and writes to two pipes.
//! It cannot make, change or delete a file, open a socket, start a process, signal one, or leave anything behind: the kernel
//! refuses every system call that is not on a short list (a seccomp filter, which needs no privileges and holds inside
//! containers too). Since it can start no process, ending it is ending all of it. Its environment is empty but for what the
//! caller names, it has no terminal, and as root it has none of root's powers.
//!
//! It reads the system's libraries, its own files and what the caller names, where the kernel has Landlock
//! ([`Sandbox::confines_reads`]); elsewhere it reads what its user may, and there is nowhere that it could send it.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use nics_base::sandbox::{End, Limits, Run, Sandbox};
//!
//! let sandbox = Sandbox::new(Limits::default())?;
//! let ran = sandbox.run(&Run {
//!     program: Path::new("/usr/bin/python3"),
//!     args: &["-c".into(), "print(6 * 7)".into()],
//!     env: &[],
//!     folder: Path::new("/tmp"),
//!     reads: &[],
//!     input: b"",
//! })?;
//! assert_eq!((ran.end, &ran.stdout[..]), (End::Exited(0), &b"42\n"[..]));
//! # Ok::<(), nics_base::sandbox::SandboxError>(())
//! ```
//!
//! It exists on Linux, on x86-64 and AArch64. Elsewhere [`Sandbox::new`] says so, and nothing is run.

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
#[path = "sandbox/linux.rs"]
mod wall;
#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
#[path = "sandbox/elsewhere.rs"]
mod wall;

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod calls;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod reads;

use std::ffi::OsString;
use std::io::{self, Read, Seek, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What a program may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Seconds on the clock, and of computing over all its threads.
    pub seconds: u64,
    /// Bytes of address space.
    pub memory: u64,
    /// Bytes that it may write to its standard output.
    pub output: usize,
    /// Threads at a time.
    pub threads: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { seconds: 6, memory: 2 << 30, output: 16 << 20, threads: 64 }
    }
}

/// How a program came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By itself, with this exit code.
    Exited(i32),
    /// By this signal, not ours: a crash.
    Crashed(i32),
    /// It took longer than it may.
    Slow,
    /// It wrote more than it may.
    TooMuchOutput,
    /// It had more threads than it may.
    TooManyThreads,
}

/// A program that has ended.
#[derive(Debug, Clone)]
pub struct Ran {
    /// How.
    pub end: End,
    /// Its standard output, at most [`Limits::output`] bytes.
    pub stdout: Vec<u8>,
    /// The last few kilobytes of its standard error.
    pub stderr: Vec<u8>,
    /// From its start to its end.
    pub took: Duration,
}

/// What to run.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a> {
    /// The program's file. One that starts another program to do the work (a script, a shim) only fails in here.
    pub program: &'a Path,
    /// Its arguments.
    pub args: &'a [OsString],
    /// All of its environment.
    pub env: &'a [(&'a str, &'a str)],
    /// Where it runs. It can write there no more than elsewhere.
    pub folder: &'a Path,
    /// What it may read beside its file, its folder and the system's libraries: files, and folders with all below.
    pub reads: &'a [PathBuf],
    /// Its standard input.
    pub input: &'a [u8],
}

/// Why a program could not be run in the sandbox; how a program fails there is an [`End`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// There is no sandbox here.
    #[error(
        "programs of others are run on Linux alone, on x86-64 or AArch64, where the kernel can confine them: {0}"
    )]
    Unsupported(String),
    /// The program did not start.
    #[error("cannot start {} under its limits", program.display())]
    Start {
        /// Its file.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The operating system failed at something around it.
    #[error("cannot {action} for a program under limits")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Runs programs under limits. It holds no state of theirs and can be used by several threads at once.
#[derive(Debug)]
pub struct Sandbox {
    limits: Limits,
    wall: wall::Wall,
}

/// How often a running program is looked at.
const GLANCE: Duration = Duration::from_millis(5);
/// How much of what a program writes to standard error is kept.
const STDERR_TAIL: usize = 8 << 10;

impl Sandbox {
    /// Prepares the limits.
    ///
    /// # Errors
    /// [`SandboxError::Unsupported`] where the kernel cannot enforce them.
    pub fn new(limits: Limits) -> Result<Self, SandboxError> {
        Ok(Self { limits, wall: wall::Wall::new()? })
    }

    /// The limits of every run.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Whether this kernel keeps a program from reading other files than [`Run`] says.
    pub fn confines_reads(&self) -> bool {
        self.wall.confines_reads()
    }

    /// Runs a program to its end, which comes within its limit of time.
    ///
    /// # Errors
    /// Where it cannot be run at all. What it does wrong by itself is in [`Ran::end`].
    pub fn run(&self, run: &Run) -> Result<Ran, SandboxError> {
        let io = |action| move |source| SandboxError::Io { action, source };
        // A file rather than a pipe: nobody has to feed it while the program runs.
        let mut input = wall::unnamed().map_err(io("make a file of its input"))?;
        input.write_all(run.input).and_then(|()| input.rewind()).map_err(io("write its input"))?;
        let mut command = Command::new(run.program);
        command.args(run.args).current_dir(run.folder).env_clear().envs(run.env.iter().copied());
        command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped());
        let reads = [run.program, run.folder].into_iter().chain(run.reads.iter().map(PathBuf::as_path));
        self.wall.confine(&mut command, self.limits, reads).map_err(io("name what may be read"))?;
        let begun = Instant::now();
        let mut child = command
            .spawn()
            .map_err(|source| SandboxError::Start { program: run.program.to_owned(), source })?;
        let (out, err) = (child.stdout.take(), child.stderr.take());
        let mut child = Guard(child);
        let written = Arc::new(AtomicUsize::new(0));
        let stdout = drain(out, Keep::First(self.limits.output), Arc::clone(&written));
        let stderr = drain(err, Keep::Last(STDERR_TAIL), Arc::default());
        let end = self.watch(&mut child.0, begun, &written).map_err(io("wait"))?;
        let took = begun.elapsed();
        drop(child);
        let (stdout, stderr) = (joined(stdout), joined(stderr));
        // It may have written its last megabytes between two glances.
        let end = if written.load(Ordering::Relaxed) > self.limits.output { End::TooMuchOutput } else { end };
        Ok(Ran { end, stdout, stderr, took })
    }

    fn watch(&self, child: &mut Child, begun: Instant, written: &AtomicUsize) -> io::Result<End> {
        let wall = Duration::from_secs(self.limits.seconds);
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(how(status));
            }
            if begun.elapsed() >= wall {
                return Ok(End::Slow);
            }
            if written.load(Ordering::Relaxed) > self.limits.output {
                return Ok(End::TooMuchOutput);
            }
            if wall::threads(child.id()) > self.limits.threads {
                return Ok(End::TooManyThreads);
            }
            std::thread::sleep(GLANCE);
        }
    }
}

fn how(status: ExitStatus) -> End {
    match (status.code(), status.signal()) {
        (Some(code), _) => End::Exited(code),
        // The signal of the limit on computing.
        (None, Some(signal)) if signal == wall::SIGXCPU => End::Slow,
        (None, signal) => End::Crashed(signal.unwrap_or(0)),
    }
}

/// A child that does not outlive the call, however that ends.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // Neither can fail in a way that matters: it has ended, or it cannot be had.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[derive(Clone, Copy)]
enum Keep {
    First(usize),
    Last(usize),
}

/// Reads a pipe to its end, so that its writer never waits, and keeps a part. Counts what came in `seen`.
fn drain(
    pipe: Option<impl Read + Send + 'static>,
    keep: Keep,
    seen: Arc<AtomicUsize>,
) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let (mut kept, mut piece) = (Vec::new(), vec![0; 64 << 10]);
        let Some(mut pipe) = pipe else { return kept };
        loop {
            let n = match pipe.read(&mut piece) {
                Ok(0) => return kept,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return kept,
            };
            seen.fetch_add(n, Ordering::Relaxed);
            match keep {
                Keep::First(most) => kept.extend_from_slice(&piece[..n.min(most - kept.len())]),
                Keep::Last(most) => {
                    kept.extend_from_slice(&piece[..n]);
                    let over = kept.len().saturating_sub(most);
                    kept.drain(..over);
                }
            }
        }
    })
}

fn joined(reader: JoinHandle<Vec<u8>>) -> Vec<u8> {
    reader.join().unwrap_or_default()
}

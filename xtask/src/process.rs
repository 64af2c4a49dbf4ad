//! Child processes: their output, their end, and what becomes of them when somebody interrupts us.
//!
//! A child runs in a process group of its own, so that a Ctrl-C on the terminal reaches xtask alone, which passes on
//! exactly one SIGINT: our binaries take a second one as "stop at once". When xtask itself is killed, Linux kills the
//! child with it; nothing goes on writing behind the back of the next run.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nics_base::interrupt::Interrupt;
use rustix::process::{Pid, Signal, kill_process_group};

/// How long an interrupted child may take to save its work.
const GRACE: Duration = Duration::from_secs(60);

/// What a child used.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    /// From start to end.
    pub wall: Duration,
    /// Largest resident memory in bytes, looked at ten times a second; 0 where the system does not tell.
    pub peak_bytes: u64,
}

/// Runs a child on our own stdout and stderr.
pub fn run(command: &mut Command, interrupt: &Interrupt) -> Result<ExitStatus> {
    let child = start(command.stdin(Stdio::null()))?;
    Ok(wait(child, interrupt)?.0)
}

/// As [`run`], with any end but success being an error that shows the command.
pub fn run_ok(command: &mut Command, interrupt: &Interrupt) -> Result<()> {
    let status = run(command, interrupt)?;
    if !status.success() {
        bail!("{} ({})", shown(command), ended(status));
    }
    Ok(())
}

/// Runs a child with its output copied line by line into `log` and, with `prefix` in front, to stderr.
pub fn run_logged(
    command: &mut Command,
    prefix: &str,
    log: &Path,
    interrupt: &Interrupt,
) -> Result<(ExitStatus, Usage)> {
    let file = File::options().append(true).create(true).open(log);
    let file = Arc::new(Mutex::new(file.with_context(|| format!("cannot write {}", log.display()))?));
    write_line(&file, format!("$ {}", shown(command)).as_bytes());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // The child's stderr is no terminal here: ask its progress bars for lines instead.
    command.env("NICS_PROGRESS", "lines");
    let mut child = start(command)?;
    let mut readers = Vec::new();
    if let Some(out) = child.stdout.take() {
        readers.push(copy_lines(out, prefix.to_owned(), Arc::clone(&file)));
    }
    if let Some(err) = child.stderr.take() {
        readers.push(copy_lines(err, prefix.to_owned(), Arc::clone(&file)));
    }
    let (status, usage) = wait(child, interrupt)?;
    for reader in readers {
        let _ = reader.join();
    }
    write_line(&file, format!("[{} after {:.1} s]", ended(status), usage.wall.as_secs_f64()).as_bytes());
    Ok((status, usage))
}

fn copy_lines(
    from: impl Read + Send + 'static,
    prefix: String,
    log: Arc<Mutex<File>>,
) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        for line in BufReader::new(from).split(b'\n') {
            let Ok(line) = line else { break };
            write_line(&log, &line);
            eprintln!("[{prefix}] {}", String::from_utf8_lossy(&line));
        }
    })
}

/// A log that cannot be written (a full disk) must not end the child: its own writes will say so.
fn write_line(log: &Mutex<File>, line: &[u8]) {
    let mut file = log.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = file.write_all(&[line, b"\n"].concat());
}

/// Starts a child in its own process group, bound to die with us.
pub fn start(command: &mut Command) -> Result<Child> {
    command.process_group(0);
    #[cfg(target_os = "linux")]
    let parent = rustix::process::getpid();
    #[cfg(target_os = "linux")]
    // SAFETY: the closure runs between fork and exec and makes two system calls, which allocate nothing.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            // Killed between fork and here, we would have been told of no death.
            if rustix::process::getppid() == Some(parent) {
                Ok(())
            } else {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        });
    }
    command.spawn().with_context(|| format!("cannot start {}", shown(command)))
}

/// Waits for the end; passes an interrupt on and gives the child time to save its work.
pub fn wait(mut child: Child, interrupt: &Interrupt) -> Result<(ExitStatus, Usage)> {
    let started = Instant::now();
    let mut usage = Usage::default();
    let mut told: Option<Instant> = None;
    let mut pause = Duration::from_millis(5);
    loop {
        if let Some(status) = child.try_wait()? {
            usage.wall = started.elapsed();
            interrupt.check()?;
            return Ok((status, usage));
        }
        usage.peak_bytes = usage.peak_bytes.max(peak_memory(child.id()));
        let pid = Pid::from_child(&child);
        match told {
            None if interrupt.requested() => {
                let _ = kill_process_group(pid, Signal::INT);
                told = Some(Instant::now());
            }
            Some(when) if when.elapsed() > GRACE => {
                let _ = kill_process_group(pid, Signal::KILL);
            }
            _ => {}
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// The high-water mark of a process' memory in bytes.
fn peak_memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// A command as one would type it.
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let quoted = words.map(|word| {
        let word = word.to_string_lossy();
        let plain = |c: char| c.is_alphanumeric() || "-_./=:,+@%".contains(c);
        if !word.is_empty() && word.chars().all(plain) {
            word.into_owned()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

/// `exit code 3`, `killed by signal 9`.
pub fn ended(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "unknown end".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_shown_as_typed() {
        let mut command = Command::new("megrez");
        command.args(["eval", "--out", "a b", "", "it's"]);
        assert_eq!(shown(&command), r"megrez eval --out 'a b' '' 'it'\''s'");
    }

    #[test]
    fn output_is_logged_and_the_end_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo err >&2; exit 3"]);
        let (status, usage) = run_logged(&mut command, "t", &log, &Interrupt::never()).unwrap();
        assert_eq!(ended(status), "exit code 3");
        assert!(usage.wall > Duration::ZERO);
        let text = std::fs::read_to_string(log).unwrap();
        for line in ["$ sh -c ", "\nout\n", "\nerr\n", "[exit code 3 after "] {
            assert!(text.contains(line), "{text}");
        }
    }

    #[test]
    fn an_interrupt_reaches_the_child_as_sigint() {
        let dir = tempfile::tempdir().unwrap();
        let saved = dir.path().join("saved");
        let mut command = Command::new("sh");
        let script = format!("trap 'echo x > {}; exit 0' INT; while :; do sleep 0.05; done", saved.display());
        command.args(["-c", &script]);
        let interrupt = Interrupt::never();
        let asker = interrupt.clone();
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(300));
            asker.request();
        });
        let e = run(&mut command, &interrupt).unwrap_err();
        assert_eq!(nics_base::cli::exit_of(&e), nics_base::exit::Exit::Interrupted);
        assert!(saved.exists(), "the child had time to save");
    }
}

//! Command-line pieces that mean the same in every binary, and the edge of `main`.
//!
//! A binary flattens the groups that it needs and hands its work to [`main_exit`]:
//!
//! ```no_run
//! use clap::Parser;
//! use nics_base::cli::{LogArgs, SeedArg, main_exit};
//!
//! #[derive(Parser)]
//! struct Args {
//!     #[command(flatten)]
//!     seed: SeedArg,
//!     #[command(flatten)]
//!     log: LogArgs,
//! }
//!
//! fn main() -> std::process::ExitCode {
//!     let args = Args::parse();
//!     args.log.init();
//!     main_exit(|| {
//!         println!("seed {}", args.seed.seed);
//!         Ok(())
//!     })
//! }
//! ```

mod measured;

use std::any::Any;
use std::io::{self, IsTerminal};
use std::num::NonZero;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use clap::{ArgAction, Args};
use tracing_subscriber::EnvFilter;

use crate::error::{Error, Result};
use crate::exit::{Exit, TryAgain, Usage};
use crate::shard::Shard;

pub use crate::size::Size;

/// `--seed`.
#[derive(Debug, Clone, Args)]
pub struct SeedArg {
    /// Seed of everything random; the same seed gives the same result
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

/// `--out`.
#[derive(Debug, Clone, Args)]
pub struct OutArg {
    /// Where the result goes: a file or a folder, replaced as a whole
    #[arg(long, short, value_name = "PATH")]
    pub out: Option<PathBuf>,
}

/// `--json`.
#[derive(Debug, Clone, Args)]
pub struct JsonArg {
    /// Print JSON Lines instead of text for people
    #[arg(long)]
    pub json: bool,
}

/// `--shard`.
#[derive(Debug, Clone, Args)]
pub struct ShardArg {
    /// Do only part INDEX (from 0) of COUNT; default: what Slurm or Kubernetes assigned, else everything
    #[arg(long, value_name = "INDEX/COUNT")]
    pub shard: Option<Shard>,
}

impl ShardArg {
    /// The flag, or what the batch system assigned, or all of the work.
    pub fn resolve(&self) -> Result<Shard> {
        match self.shard {
            Some(shard) => Ok(shard),
            None => Ok(Shard::from_env()?.unwrap_or(Shard::WHOLE)),
        }
    }
}

/// `--run-code` and what goes with it.
#[derive(Debug, Clone, Args)]
pub struct CodeArgs {
    /// Run the programs that a model wrote, each in a process under limits on time, memory, files and network
    #[arg(long)]
    pub run_code: bool,
    /// The Python that runs them: a path, or a name on PATH
    #[arg(long, value_name = "PATH", default_value = "python3")]
    pub python: PathBuf,
    /// Programs that run at a time; default: one for every two processors
    #[arg(long, value_name = "N")]
    pub code_jobs: Option<NonZero<usize>>,
}

impl CodeArgs {
    /// Programs that run at a time. Twice as many would share processors and could be too slow for their time limit.
    pub fn jobs(&self) -> NonZero<usize> {
        let processors = || std::thread::available_parallelism().map_or(1, NonZero::get);
        self.code_jobs.unwrap_or_else(|| NonZero::new(processors() / 2).unwrap_or(NonZero::<usize>::MIN))
    }
}

/// The API key in an environment variable; empty is none. Keys come from files and variables, never from the command
/// line, where other users of the machine see them.
pub fn env_key(variable: &str) -> Option<String> {
    std::env::var(variable).ok().map(|key| key.trim().to_owned()).filter(|key| !key.is_empty())
}

/// The folder of a training run's state: what is `given`, else `out` with `.training` behind its name.
pub fn training_state(given: Option<&Path>, out: &Path) -> PathBuf {
    given.map_or_else(
        || {
            let mut name = out.as_os_str().to_owned();
            name.push(".training");
            name.into()
        },
        Path::to_owned,
    )
}

/// `SEED=FOLDER`, for flags that name a folder of each seed.
///
/// # Errors
/// A text for clap.
pub fn seeded(text: &str) -> std::result::Result<(u64, PathBuf), String> {
    let (seed, folder) = text.split_once('=').ok_or("expected SEED=FOLDER")?;
    let seed = seed.parse().map_err(|_| format!("`{seed}` is no seed; expected SEED=FOLDER"))?;
    if folder.is_empty() {
        Err("the folder is empty; expected SEED=FOLDER".into())
    } else {
        Ok((seed, folder.into()))
    }
}

/// A whole number from 1 on, for flags that count something.
///
/// # Errors
/// A text for clap.
pub fn at_least_one(s: &str) -> std::result::Result<usize, String> {
    match s.parse() {
        Ok(0) => Err("expected at least 1".into()),
        Ok(n) => Ok(n),
        Err(e) => Err(format!("{e}")),
    }
}

/// `--quiet` and `-v`.
#[derive(Debug, Clone, Default, Args)]
pub struct LogArgs {
    /// Only errors, no progress
    #[arg(long, short, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// More messages on stderr: -v info, -vv debug, -vvv trace; NICS_LOG takes a filter such as `nics_core=debug`
    #[arg(long, short, global = true, action = ArgAction::Count)]
    pub verbose: u8,
}

impl LogArgs {
    /// Sends log messages to stderr. The variable `NICS_LOG` wins over the flags. A second call changes nothing.
    pub fn init(&self) {
        let level = match (self.quiet, self.verbose) {
            (true, _) => "error",
            (false, 0) => "warn",
            (false, 1) => "info",
            (false, 2) => "debug",
            (false, _) => "trace",
        };
        let filter = std::env::var("NICS_LOG").ok().filter(|f| !f.is_empty());
        let filter = EnvFilter::builder().parse_lossy(filter.as_deref().unwrap_or(level));
        let _ = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(io::stderr)
            .with_ansi(io::stderr().is_terminal())
            .without_time()
            .with_target(self.verbose > 1)
            .try_init();
    }
}

/// Runs the work of a binary and turns how it ended into an exit code.
///
/// An error is printed as `error: ...` with its causes and ends with the [`Exit`] that it asks for. A panic becomes an
/// error line too (`RUST_BACKTRACE=1` shows where it came from). A reader that closed our stdout (`| head`) is no
/// error.
pub fn main_exit(work: impl FnOnce() -> anyhow::Result<()>) -> ExitCode {
    let place = quiet_panics();
    let outcome = panic::catch_unwind(AssertUnwindSafe(work));
    match outcome {
        Ok(Ok(())) => Exit::Ok.into(),
        Ok(Err(e)) if is_closed_stdout(&e) => Exit::Ok.into(),
        Ok(Err(e)) => {
            eprintln!("error: {}", chain(&e));
            exit_of(&e).into()
        }
        Err(payload) => {
            let message = panic_message(payload.as_ref());
            if is_closed_pipe_panic(&message) {
                return Exit::Ok.into();
            }
            let place = place.lock().unwrap_or_else(PoisonError::into_inner).take();
            let place = place.map(|p| format!(" at {p}")).unwrap_or_default();
            eprintln!(
                "error: internal error{place}: {message}\n       this is a defect of the program, please report it"
            );
            Exit::Error.into()
        }
    }
}

/// Keeps panics from printing by themselves, unless a backtrace is asked for, and remembers where one happened.
fn quiet_panics() -> Arc<Mutex<Option<String>>> {
    let place = Arc::new(Mutex::new(None));
    let seen = Arc::clone(&place);
    let default = panic::take_hook();
    let main_thread = std::thread::current().id();
    panic::set_hook(Box::new(move |info| {
        *seen.lock().unwrap_or_else(PoisonError::into_inner) = info.location().map(ToString::to_string);
        if is_closed_pipe_panic(&panic_message(info.payload())) {
            return;
        }
        // Panics of other threads reach nobody else.
        if std::env::var_os("RUST_BACKTRACE").is_some_and(|v| v != "0")
            || std::thread::current().id() != main_thread
        {
            default(info);
        }
    }));
    place
}

/// What `println!` says when the reader of stdout is gone.
fn is_closed_pipe_panic(message: &str) -> bool {
    message.contains("failed printing to stdout") && message.contains("Broken pipe")
}

/// The message of a caught panic.
pub fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "unknown panic".to_owned())
}

/// Message and causes, on one line while that is readable; a cause that its parent's message repeats is left out.
pub fn chain(error: &anyhow::Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if parts.last().is_none_or(|last| !last.contains(&text)) {
            parts.push(text);
        }
    }
    let one = parts.join(": ");
    if one.len() <= 160 && !one.contains('\n') {
        return one;
    }
    parts.join("\n  because: ").replace('\n', "\n       ")
}

/// The exit code that an error or one of its causes asks for.
pub fn exit_of(error: &anyhow::Error) -> Exit {
    if error.downcast_ref::<TryAgain>().is_some() {
        return Exit::TryAgain;
    }
    if error.downcast_ref::<Usage>().is_some() {
        return Exit::Usage;
    }
    let asked = error.chain().find_map(|cause| {
        if cause.is::<TryAgain>() {
            return Some(Exit::TryAgain);
        }
        if cause.is::<Usage>() {
            return Some(Exit::Usage);
        }
        cause.downcast_ref::<Error>().map(Error::exit)
    });
    asked.unwrap_or(Exit::Error)
}

/// An error that is nothing but a closed pipe comes from writing to stdout; any other pipe's error has a context.
fn is_closed_stdout(error: &anyhow::Error) -> bool {
    error.chain().count() == 1
        && error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct All {
        #[command(flatten)]
        seed: SeedArg,
        #[command(flatten)]
        out: OutArg,
        #[command(flatten)]
        json: JsonArg,
        #[command(flatten)]
        shard: ShardArg,
        #[command(flatten)]
        code: CodeArgs,
        #[command(flatten)]
        log: LogArgs,
    }

    #[test]
    fn the_groups_fit_together() {
        use clap::CommandFactory;
        All::command().debug_assert();
        let args = All::parse_from(["x", "--seed", "7", "-o", "a", "--json", "--shard", "1/4", "-vv"]);
        assert_eq!((args.seed.seed, args.json.json, args.log.verbose), (7, true, 2));
        assert!(
            !args.code.run_code && args.code.python == Path::new("python3") && args.code.jobs().get() >= 1
        );
        assert_eq!(args.shard.resolve().unwrap(), Shard::new(1, 4).unwrap());
        assert_eq!(args.out.out, Some("a".into()));
        let e = All::try_parse_from(["x", "--shard", "4/4"]).unwrap_err().to_string();
        assert!(e.contains("the last of 4 is 3/4"), "{e}");
        assert!(All::try_parse_from(["x", "-q", "-v"]).is_err());
    }

    #[test]
    fn errors_ask_for_exit_codes_through_any_context() {
        let wrap = |e: anyhow::Error| exit_of(&e.context("one").context("two"));
        assert_eq!(wrap(anyhow!("plain")), Exit::Error);
        assert_eq!(wrap(Error::Interrupted.into()), Exit::Interrupted);
        assert_eq!(wrap(Error::Busy("x".into()).into()), Exit::TryAgain);
        assert_eq!(wrap(TryAgain("the hub is down".into()).into()), Exit::TryAgain);
        assert_eq!(wrap(Usage("no such metric".into()).into()), Exit::Usage);
        let as_context = Err::<(), _>(io::Error::other("x")).context(TryAgain("y".into())).unwrap_err();
        assert_eq!(exit_of(&as_context), Exit::TryAgain);
    }

    #[test]
    fn causes_are_printed_once() {
        let e =
            anyhow!("no space left").context("cannot write a.bin").context("saving the checkpoint failed");
        assert_eq!(chain(&e), "saving the checkpoint failed: cannot write a.bin: no space left");
        let repeated = anyhow!("no space left").context("cannot write a.bin: no space left");
        assert_eq!(chain(&repeated), "cannot write a.bin: no space left");
        let long = anyhow!("b".repeat(100)).context("a".repeat(100));
        assert_eq!(chain(&long).lines().count(), 2);
    }

    #[test]
    fn a_panic_becomes_an_exit_code() {
        let code = main_exit(|| panic!("index out of range"));
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::from(1)));
        let _ = panic::take_hook();
    }

    #[test]
    fn only_a_bare_closed_pipe_is_quiet() {
        let closed = || io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(is_closed_stdout(&closed().into()));
        let child = Err::<(), _>(closed()).context("writing to ffmpeg").unwrap_err();
        assert!(!is_closed_stdout(&child));
    }
}

//! Wrong input of every kind: the command ends with its exit code and one error that names the thing, soon and without a
//! panic. `cargo test -p megrez --test bad_input -- --nocapture` prints the messages as a table.

mod checkpoints;
mod commands;
mod damage;
#[path = "../support/mod.rs"]
mod support;

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use support::{Run, run_with};

/// One wrong input.
struct Case {
    /// What is wrong, in the table's words.
    what: &'static str,
    /// The exit code that tells a batch system what to do.
    code: i32,
    /// What the message has to name.
    words: Vec<&'static str>,
    /// Puts the input into an empty folder and gives the command, which runs in that folder.
    prepare: Box<dyn Fn(&Path) -> Command + Send + Sync>,
}

/// What no user should ever read.
const INTERNAL: [&str; 6] =
    ["panicked", "internal error", "libtorch:", "stack trace", "c10::", "RUST_BACKTRACE"];

/// The error in `stderr`, on one line; the reason why it is none, otherwise.
fn error_of(stderr: &str) -> Result<String, String> {
    if let Some(word) = INTERNAL.iter().find(|word| stderr.contains(*word)) {
        return Err(format!("speaks of `{word}`"));
    }
    // Warnings may come before, and clap's advice after.
    let mut lines = stderr.lines().skip_while(|line| line.trim_start().starts_with("WARN"));
    let first = lines.next().and_then(|line| line.strip_prefix("error: "));
    let Some(first) = first else { return Err("does not begin with `error: `".into()) };
    let more: Vec<&str> = lines.take_while(|line| !line.is_empty()).map(str::trim).collect();
    if more.iter().any(|line| line.starts_with("error: ")) {
        return Err("has several errors".into());
    }
    Ok([&[first], more.as_slice()].concat().join(" "))
}

/// Runs a case in a folder of its own.
fn ran(case: &Case) -> Run {
    let dir = tempfile::tempdir().unwrap();
    let mut command = (case.prepare)(dir.path());
    command.current_dir(dir.path());
    let mut run = run_with(command, "");
    run.stderr = run.stderr.replace(&format!("{}/", dir.path().display()), "");
    run
}

/// What is wrong with how a case ended.
fn complaints(case: &Case, run: &Run) -> Vec<String> {
    let mut wrong = Vec::new();
    match error_of(&run.stderr) {
        Err(why) => wrong.push(why),
        Ok(message) => {
            let missing = case.words.iter().filter(|word| !message.contains(*word));
            wrong.extend(missing.map(|word| format!("the message does not say `{word}`")));
        }
    }
    if run.code != Some(case.code) {
        wrong.push(format!("exit code {:?} instead of {}", run.code, case.code));
    }
    if !run.stdout.is_empty() {
        wrong.push(format!("prints {:?}", run.stdout));
    }
    wrong
}

#[test]
fn every_wrong_input_gets_one_error_that_names_it() {
    let cases: Vec<Case> = checkpoints::all().into_iter().chain(commands::all()).collect();
    let next = AtomicUsize::new(0);
    let runs: Vec<OnceLock<Run>> = cases.iter().map(|_| OnceLock::new()).collect();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = cases.get(i) else { return };
                    runs[i].set(ran(case)).unwrap();
                }
            });
        }
    });
    let mut failures = Vec::new();
    let mut slowest = (0.0, "");
    println!("\n| input | message | exit code | seconds |\n|---|---|---|---|");
    for (case, run) in cases.iter().zip(&runs) {
        let run = run.get().unwrap();
        let seconds = run.took.as_secs_f64();
        if seconds > slowest.0 {
            slowest = (seconds, case.what);
        }
        let message = error_of(&run.stderr).unwrap_or_default().replace('|', "\\|");
        println!("| {} | {message} | {} | {seconds:.2} |", case.what, case.code);
        let wrong = complaints(case, run);
        if !wrong.is_empty() {
            failures.push(format!("{}: {}\n{}", case.what, wrong.join("; "), run.stderr));
        }
    }
    println!("\n{} inputs; the slowest took {:.2} s ({})", cases.len(), slowest.0, slowest.1);
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

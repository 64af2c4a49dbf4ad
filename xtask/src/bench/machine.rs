//! What a benchmark has to know of the machine: threads, processor, load, read bandwidth.

use std::env;
use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nics_base::interrupt::Interrupt;

use crate::process::{ended, shown, start, wait};

/// Threads for every contender: `OMP_NUM_THREADS`, else `SLURM_CPUS_PER_TASK`, else the processors of this process.
pub fn threads() -> usize {
    let set = |name| env::var(name).ok().and_then(|v: String| v.split(',').next()?.trim().parse().ok());
    ["OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"]
        .into_iter()
        .filter_map(set)
        .find(|n| (1..=4096).contains(n))
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
}

/// The processor's name, where the system tells it.
pub fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("model name"));
    let name = line.and_then(|l| l.split_once(':')).map(|(_, name)| name.trim().to_owned());
    name.filter(|n| !n.is_empty()).unwrap_or_else(|| env::consts::ARCH.to_owned())
}

/// The three load averages, where the system tells them.
pub fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let three: Vec<&str> = text.split_whitespace().take(3).collect();
    if three.is_empty() { "unknown".to_owned() } else { three.join(" ") }
}

/// Whether others have used a quarter of the processors in the last minute.
pub fn is_busy(threads: usize) -> bool {
    load().split(' ').next().and_then(|l| l.parse::<f64>().ok()).is_some_and(|l| l > 0.25 * threads as f64)
}

/// Runs the command that prints the read bandwidth in bytes a second.
///
/// The suites' program does it, since it is built in release: this one is not, and would measure its own slowness.
pub fn bandwidth(mut command: Command, interrupt: &Interrupt) -> Result<f64> {
    let mut child = start(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
    let mut out = child.stdout.take().context("no stdout")?;
    // One line: it fits the pipe, whoever reads it.
    let (status, _) = wait(child, interrupt)?;
    let mut text = String::new();
    std::io::Read::read_to_string(&mut out, &mut text)?;
    if !status.success() {
        bail!("{} ({})", shown(&command), ended(status));
    }
    let found = text.trim().parse().ok().filter(|b: &f64| b.is_finite() && *b > 0.0);
    found.with_context(|| format!("{} printed {text:?}, expected bytes a second", shown(&command)))
}

//! `cargo xtask bench`: the suites of `benches/`, their figures beside the read bandwidth of the machine.
//!
//! The suites are one program, built in release and run once for each suite, so that no suite finds the memory of another.
//! They append what they measured to a file ([`figure::Case`]); everything that is computed from it is computed here.

#[path = "../../benches/suites/figure.rs"]
mod figure;
mod machine;
mod table;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nics_base::interrupt::Interrupt;
use nics_base::row::{self, Row};
use nics_base::{exit, jsonl};

use crate::workspace::{Workspace, which};
use crate::{cargo, process};
use figure::Case;

/// The suites, in the order in which they run.
const SUITES: [&str; 10] = [
    "decode",
    "prefill",
    "serve",
    "gemv",
    "packed",
    "packed-decode",
    "packed-cuda",
    "attention",
    "route",
    "pages",
];

/// Flags of `cargo xtask bench`.
#[derive(clap::Args)]
pub struct Args {
    /// Only cases whose name contains this, e.g. decode/bf16 or "batch 16", or ends with it, e.g. 'rows 1$'
    filter: Option<String>,
    /// Where the result rows go; default: target/bench/rows.jsonl
    #[arg(long, value_name = "FILE")]
    rows: Option<PathBuf>,
    /// More peers: python is transformers, in the Python that NICS_PYTHON names (with torch and transformers)
    #[arg(long, value_name = "PEERS")]
    peers: Option<MorePeers>,
    /// The main cases alone, in a few minutes
    #[arg(long)]
    quick: bool,
    /// Tiny shapes, in seconds: tests the benchmarks themselves
    #[arg(long, hide = true, conflicts_with = "quick")]
    miniature: bool,
}

/// Peers that need something beyond this workspace.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum MorePeers {
    Python,
}

/// Runs the suites and writes their rows.
pub fn bench(ws: &Workspace, args: &Args, interrupt: &Interrupt) -> Result<()> {
    let python = python(args.peers)?;
    let threads = machine::threads();
    let program = cargo::build_bench(ws, "nics-benches", "suites", interrupt)?;
    let folder = cargo::target_folder(&program)?.join("bench");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let cases_file = folder.join("cases.jsonl");
    if cases_file.exists() {
        fs::remove_file(&cases_file).with_context(|| format!("cannot remove {}", cases_file.display()))?;
    }
    let command = |suite: &str| {
        let mut command = Command::new(&program);
        command.args(["--bench", "--suite", suite]);
        command.args(args.quick.then_some("--quick")).args(args.miniature.then_some("--miniature"));
        command.current_dir(ws.root.join("benches"));
        command.env("OMP_NUM_THREADS", threads.to_string()).env("RAYON_NUM_THREADS", threads.to_string());
        command.env(figure::OUT, &cases_file);
        if let Some(home) = folder.parent() {
            command.env("CRITERION_HOME", home.join("criterion"));
        }
        match &python {
            Some(python) => command.env("NICS_PYTHON", python),
            None => command.env_remove("NICS_PYTHON"),
        };
        command
    };

    let cpu = machine::processor();
    println!("{cpu}, {threads} threads; load average before: {}", machine::load());
    if machine::is_busy(threads) {
        eprintln!(
            "warning: other programs keep this machine busy; figures will be worse and wider than they should be"
        );
    }
    let bandwidth = || machine::bandwidth(command("bandwidth"), interrupt);
    let mut bandwidths = vec![bandwidth()?];
    println!("read bandwidth: {:.2} GB/s", bandwidths[0] / 1e9);
    for suite in SUITES {
        let mut command = command(suite);
        command.args(&args.filter);
        process::run_ok(&mut command, interrupt)?;
        bandwidths.push(bandwidth()?);
    }
    if !cases_file.exists() {
        let filter = args.filter.as_deref().unwrap_or_default();
        bail!(exit::Usage(format!(
            "no case has {filter:?} in its name; names are like decode/bf16/batch 1/context 2048, the suites are {}",
            SUITES.join(", ")
        )));
    }
    let cases: Vec<Case> = jsonl::read(&cases_file)?;
    report(&cases, &bandwidths, args, &cpu, &folder)
}

/// Prints all figures and writes their rows.
fn report(cases: &[Case], bandwidths: &[f64], args: &Args, cpu: &str, folder: &Path) -> Result<()> {
    // The limit is what the memory can do, so the best that was seen.
    let limit = bandwidths.iter().copied().fold(0.0, f64::max);
    println!();
    println!("Medians, with quartiles in brackets; a peer that took 2.00 times ours is half as fast.");
    for case in cases {
        print!("{}", table::text(case, limit));
    }
    let shown: Vec<String> = bandwidths.iter().map(|b| format!("{:.2}", b / 1e9)).collect();
    let lowest = bandwidths.iter().copied().fold(f64::INFINITY, f64::min);
    println!();
    println!("read bandwidth before, between and after the suites: {} GB/s", shown.join(", "));
    println!("load average after: {}", machine::load());
    if lowest < 0.9 * limit {
        println!(
            "the machine was not quiet: its bandwidth fell to {:.0} % of the best",
            100.0 * lowest / limit
        );
    }
    let preset = match (args.quick, args.miniature) {
        (true, _) => "quick",
        (_, true) => "miniature",
        _ => "",
    };
    let mut rows: Vec<Row> = cases.iter().flat_map(|case| table::rows(case, limit, preset, cpu)).collect();
    rows.push(table::bandwidth_row(bandwidths, cpu));
    let file = args.rows.clone().unwrap_or_else(|| folder.join("rows.jsonl"));
    row::write(&file, &rows)?;
    println!("{} rows in {}", rows.len(), file.display());
    Ok(())
}

/// The Python of the peers that need one.
fn python(peers: Option<MorePeers>) -> Result<Option<PathBuf>> {
    let named = std::env::var_os("NICS_PYTHON").filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(named) = named {
        // The suites run in another folder.
        return match which(&[&named.to_string_lossy()]) {
            Some(found) => Ok(Some(std::path::absolute(found)?)),
            None => bail!("NICS_PYTHON is {}, which is no program", named.display()),
        };
    }
    match peers {
        None => Ok(None),
        Some(MorePeers::Python) => match which(&["python3", "python"]) {
            Some(found) => Ok(Some(found)),
            None => bail!("--peers python: there is no python3 on PATH; name one with NICS_PYTHON"),
        },
    }
}

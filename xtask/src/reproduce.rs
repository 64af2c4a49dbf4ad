//! `cargo xtask reproduce`: runs experiments and reports their rows.
//!
//! Everything lies under the output folder: `METHOD/PRESET/STEP/` is the folder that a step works in, beside it
//! `STEP.log` and the stamp `STEP.json`; `METHOD/PRESET/rows.jsonl` are the rows of all finished steps;
//! `report.md` and `report.html` at the top are rendered from those. A step with seeds is there once for each, as
//! `STEP.seed-N`.
//!
//! A step is done when its stamp says so, when nothing that it depends on has changed since (inputs, arguments,
//! binary, all by content), and when its outputs are what they were. Anything else starts clean, or, with `--resume`
//! and unchanged dependencies, goes on with what an interrupted run left in the folder.

mod plan;
mod stamp;
mod step;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nics_base::interrupt::Interrupt;
use nics_base::report::Report;
use nics_base::row::{self, Row};
use nics_base::{Error, artefact};
use rustix::fs::{FlockOperation, flock};

use crate::cargo;
use crate::setup::{self, Kind};
use crate::workspace::Workspace;
use plan::Plan;
pub use plan::fill;
use step::{Binary, Outcome, Unit};

/// The flags of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Methods to reproduce; default: every crate that has the preset
    #[arg(value_name = "METHOD")]
    pub methods: Vec<String>,
    /// Which experiment file: `nano` runs in minutes on a CPU, `paper` needs the paper's hardware
    #[arg(long, default_value = "nano")]
    pub preset: String,
    /// Where results go; default: reports/ in the workspace
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Continue steps that an interrupted run left half done, instead of starting those clean
    #[arg(long)]
    pub resume: bool,
    /// Print and write (profile.md) time and peak memory of each step that ran
    #[arg(long)]
    pub profile: bool,
}

/// Runs what is missing or stale, then renders the report.
pub fn reproduce(ws: &Workspace, args: &Args, interrupt: &Interrupt) -> Result<()> {
    let plans = plans(ws, args)?;
    let out = args.out.clone().unwrap_or_else(|| ws.root.join("reports"));
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    // Steps run in the workspace root, wherever this command was typed.
    let out = out.canonicalize()?;
    let _lock = lock(&out)?;
    let binaries = build(ws, &plans, interrupt)?;
    let mut results = Vec::new();
    for plan in &plans {
        let base = out.join(&plan.method).join(&plan.preset);
        results.extend(run_plan(ws, plan, &base, &binaries, args.resume, interrupt)?);
    }
    render(&out)?;
    if args.profile {
        let table = profile(&results);
        artefact::write_atomic(out.join("profile.md"), &table)?;
        eprint!("{table}");
    }
    summary(&results, &out)
}

/// Renders the report of a folder again, from the rows in it.
pub fn render(dir: &Path) -> Result<()> {
    let files = row_files(dir)?;
    let mut rows: Vec<Row> = Vec::new();
    for file in &files {
        rows.extend(row::read(file)?);
    }
    Report::render("nics: results", &rows)?.write(dir)?;
    eprintln!("report of {} rows: {}", rows.len(), dir.join("report.html").display());
    Ok(())
}

/// `rows.jsonl` of the folder, of its methods and of their presets, sorted.
fn row_files(dir: &Path) -> Result<Vec<PathBuf>> {
    fn look(dir: &Path, depth: usize, found: &mut Vec<PathBuf>) -> io::Result<()> {
        let file = dir.join("rows.jsonl");
        if file.is_file() {
            found.push(file);
        }
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if depth > 0 && path.is_dir() {
                look(&path, depth - 1, found)?;
            }
        }
        Ok(())
    }
    let mut found = Vec::new();
    look(dir, 2, &mut found).with_context(|| format!("cannot read {}", dir.display()))?;
    if found.is_empty() {
        bail!(
            "there is no rows.jsonl in {} (nor in METHOD/PRESET/ below it); expected the folder that \
             `cargo xtask reproduce --out` wrote",
            dir.display()
        );
    }
    found.sort();
    Ok(found)
}

fn plans(ws: &Workspace, args: &Args) -> Result<Vec<Plan>> {
    let packages: BTreeSet<String> = ws.packages()?.into_keys().collect();
    let mut available = BTreeMap::new();
    for folder in ws.crates()? {
        let file = folder.join("experiments").join(format!("{}.toml", args.preset));
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if file.is_file() {
            available.insert(name, file);
        }
    }
    let known = || available.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
    if available.is_empty() {
        bail!("no crate has experiments/{}.toml; presets are `nano` and `paper`", args.preset);
    }
    let mut chosen: Vec<String> = args.methods.clone();
    if chosen.is_empty() {
        chosen = available.keys().cloned().collect();
    }
    let mut seen = BTreeSet::new();
    chosen.retain(|m| seen.insert(m.clone()));
    let read = |method: &String| {
        let file = available.get(method).with_context(|| {
            format!("{method:?} has no experiments/{}.toml; methods that do: {}", args.preset, known())
        })?;
        plan::read(file, method, &args.preset, &packages)
    };
    chosen.iter().map(read).collect()
}

/// Keeps two runs out of one folder.
fn lock(out: &Path) -> Result<File> {
    let path = out.join(".lock");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(Error::Busy(out.to_owned()).into()),
        _ => Ok(file),
    }
}

/// Builds every binary that the plans name, a package once with all features asked of it. A build that fails is the
/// failure of its steps.
fn build(
    ws: &Workspace,
    plans: &[Plan],
    interrupt: &Interrupt,
) -> Result<BTreeMap<(String, String), Binary>> {
    let mut wanted: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
    let mut features: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for step in plans.iter().flat_map(|p| &p.steps) {
        if let Some(package) = &step.package {
            let binary = step.binary.as_ref().unwrap_or(package);
            wanted.entry((package.clone(), binary.clone())).or_default();
            features.entry(package.clone()).or_default().extend(step.features.iter().cloned());
        }
    }
    if !wanted.is_empty() {
        setup::setup(ws, Kind::Cpu, false, interrupt)?;
    }
    let mut built = BTreeMap::new();
    for (package, binary) in wanted.into_keys() {
        eprintln!("building {binary}");
        let features: Vec<String> = features[&package].iter().cloned().collect();
        let outcome = match cargo::build(ws, &package, &binary, &features, interrupt) {
            Ok(path) => Binary::built(path)?,
            Err(e) => {
                interrupt.check()?;
                Binary::Failed(format!("{e:#}"))
            }
        };
        built.insert((package, binary), outcome);
    }
    Ok(built)
}

/// A step of some plan and how it ended.
struct Ran {
    name: String,
    outcome: Outcome,
}

fn run_plan(
    ws: &Workspace,
    plan: &Plan,
    base: &Path,
    binaries: &BTreeMap<(String, String), Binary>,
    resume: bool,
    interrupt: &Interrupt,
) -> Result<Vec<Ran>> {
    fs::create_dir_all(base).with_context(|| format!("cannot make {}", base.display()))?;
    let mut usable: BTreeSet<String> = BTreeSet::new();
    let mut ran = Vec::new();
    let mut rows: Vec<Row> = Vec::new();
    for (i, step) in plan.steps.iter().enumerate() {
        let missing: Vec<String> = step.needs()?.into_iter().filter(|n| !usable.contains(n)).collect();
        let seeds: Vec<Option<u64>> =
            step.seeds.as_ref().map_or_else(|| vec![None], |s| s.iter().copied().map(Some).collect());
        let mut all_good = true;
        for seed in seeds {
            interrupt.check()?;
            let unit = Unit { ws, plan, step, seed, base };
            let name = format!("{}/{}", plan.method, unit.id());
            let outcome = if missing.is_empty() {
                eprintln!("step {} of {}: {name}", i + 1, plan.steps.len());
                unit.bring_up_to_date(binaries, resume, interrupt)?
            } else {
                Outcome::Skipped(format!("needs {}", missing.join(", ")))
            };
            match &outcome {
                Outcome::Fresh => eprintln!("  up to date"),
                Outcome::Done(usage) => eprintln!("  done in {:.1} s", usage.wall.as_secs_f64()),
                Outcome::Failed(why) => eprintln!("  FAILED: {why}"),
                Outcome::Skipped(why) => {
                    eprintln!("step {} of {}: {name} skipped: {why}", i + 1, plan.steps.len());
                }
            }
            if outcome.is_good() {
                rows.extend(unit.rows()?);
            } else {
                all_good = false;
            }
            ran.push(Ran { name, outcome });
        }
        if all_good {
            usable.insert(step.name.clone());
        }
    }
    row::write(base.join("rows.jsonl"), &rows)?;
    Ok(ran)
}

fn profile(results: &[Ran]) -> String {
    let mut table = String::from("| step | wall (s) | peak memory (MiB) |\n|---|---:|---:|\n");
    for ran in results {
        if let Some(usage) = ran.outcome.usage() {
            let mib = usage.peak_bytes / (1 << 20);
            let _ = writeln!(table, "| {} | {:.1} | {mib} |", ran.name, usage.wall.as_secs_f64());
        }
    }
    table
}

/// One line a failure, and an error when there is one.
fn summary(results: &[Ran], out: &Path) -> Result<()> {
    let count = |f: fn(&Outcome) -> bool| results.iter().filter(|r| f(&r.outcome)).count();
    let (done, fresh) = (count(|o| matches!(o, Outcome::Done(_))), count(|o| matches!(o, Outcome::Fresh)));
    let (failed, skipped) =
        (count(|o| matches!(o, Outcome::Failed(_))), count(|o| matches!(o, Outcome::Skipped(_))));
    let seconds: f64 = results.iter().filter_map(|r| r.outcome.usage()).map(|u| u.wall.as_secs_f64()).sum();
    println!(
        "{done} steps done in {seconds:.1} s, {fresh} up to date, {failed} failed, {skipped} skipped; report in {}",
        out.display()
    );
    if failed == 0 {
        return Ok(());
    }
    let lines = results.iter().filter_map(|r| match &r.outcome {
        Outcome::Failed(why) => Some(format!("{}: {why}", r.name)),
        _ => None,
    });
    bail!("{failed} of {} steps failed\n{}", results.len(), lines.collect::<Vec<_>>().join("\n"))
}

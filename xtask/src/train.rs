//! `cargo xtask train NAME`: trains a reference checkpoint again, as its experiment file says.
//!
//! `crates/<method>/experiments/train-NAME.toml`:
//!
//! ```toml
//! package = "megrez"                                # `binary` defaults to it; `features` are optional
//! args = ["train", "--out", "{out}"]                # {out}: the folder below; {root}: the workspace
//! out = "datasets/nano/megrez-text"                 # default: datasets/nano/NAME
//! inputs = []                                       # optional: what has to be there
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nics_base::interrupt::Interrupt;
use serde::Deserialize;

use crate::cargo;
use crate::process::run_ok;
use crate::reproduce::fill;
use crate::setup::{self, Kind};
use crate::workspace::Workspace;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Training {
    package: String,
    binary: Option<String>,
    #[serde(default)]
    features: Vec<String>,
    args: Vec<String>,
    out: Option<String>,
    #[serde(default)]
    inputs: Vec<String>,
}

/// Builds the binary and runs its training; `extra` goes behind the file's arguments.
pub fn train(ws: &Workspace, name: &str, extra: &[String], interrupt: &Interrupt) -> Result<()> {
    let files = files(ws)?;
    let Some(file) = files.get(name) else {
        let known: Vec<_> = files.keys().map(String::as_str).collect();
        bail!(
            "there is no training called {name:?} (crates/*/experiments/train-{name}.toml); there are: {}",
            known.join(", ")
        );
    };
    let training = read(ws, file)?;
    for input in &training.inputs {
        if !ws.root.join(input).exists() {
            bail!("{} needs {input}, which is not there", file.display());
        }
    }
    let out = ws.root.join(training.out.unwrap_or_else(|| format!("datasets/nano/{name}")));
    let value = |placeholder: &str| match placeholder {
        "out" => Some(out.to_string_lossy().into_owned()),
        "root" => Some(ws.root.to_string_lossy().into_owned()),
        _ => None,
    };
    let mut args = Vec::new();
    for arg in &training.args {
        args.push(fill(arg, value).with_context(|| format!("{} is not a valid training", file.display()))?);
    }
    setup::setup(ws, Kind::Cpu, false, interrupt)?;
    let binary = training.binary.as_ref().unwrap_or(&training.package);
    let program = cargo::build(ws, &training.package, binary, &training.features, interrupt)?;
    run_ok(Command::new(program).args(args).args(extra).current_dir(&ws.root), interrupt)
}

fn read(ws: &Workspace, file: &Path) -> Result<Training> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let training: Training =
        toml::from_str(&text).with_context(|| format!("{} is not a valid training", file.display()))?;
    if !ws.packages()?.contains_key(&training.package) {
        bail!("{} names package {:?}, which is not in the workspace", file.display(), training.package);
    }
    Ok(training)
}

/// The experiment files of all trainings, by name.
fn files(ws: &Workspace) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    for folder in ws.crates()? {
        for entry in fs::read_dir(folder.join("experiments")).into_iter().flatten().flatten() {
            let path = entry.path();
            let file = entry.file_name().to_string_lossy().into_owned();
            let Some(name) = file.strip_prefix("train-").and_then(|n| n.strip_suffix(".toml")) else {
                continue;
            };
            if let Some(other) = found.insert(name.to_owned(), path.clone()) {
                bail!("two trainings are called {name}: {} and {}", other.display(), path.display());
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trainings_of_this_workspace_are_valid() {
        let ws = Workspace::locate(None).unwrap();
        for file in files(&ws).unwrap().values() {
            read(&ws, file).unwrap_or_else(|e| panic!("{e:#}"));
        }
    }
}

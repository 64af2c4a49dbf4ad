//! What an experiment file says: `crates/<method>/experiments/<preset>.toml`.
//!
//! ```toml
//! [[step]]
//! name = "eval"                                    # unique in the file; also the name of the step's folder
//! package = "megrez"                               # built with --release; `binary` defaults to it
//! features = []                                    # optional; a package is built once, with the features of all steps
//! args = ["eval", "--model", "{inputs.0}", "--seed", "{seed}", "--shard", "{shard}", "--out", "{dir}"]
//! inputs = ["datasets/nano/megrez-text"]           # files and folders, from the workspace root
//! outputs = ["items.jsonl"]                        # optional: files and folders, from the step's folder
//! rows = "rows.jsonl"                              # optional: an output that holds result rows
//! seeds = [0, 1, 2]                                # optional: the step runs once for each
//! shards = 4                                       # optional: the step runs once for each shard, then they are merged
//! parallel = 2                                     # optional: how many shards at a time; default 1
//!
//! [[step]]
//! name = "plot"
//! command = ["sh", "-c", "…"]                      # instead of package: any program
//! inputs = ["{dir:eval}/items.jsonl"]              # makes `eval` run first
//! after = ["other"]                                # further steps that have to be done first
//! ```
//!
//! A step runs in the workspace root. In `args`, `command` and `inputs` stand: `{root}` the workspace; `{dir}` the
//! step's own folder; `{dir:STEP}` that of another step (of the same seed), `{dir:STEP.seed-N}` that of a named seed;
//! `{inputs.N}`, `{outputs.N}` a path of the lists; `{seed}`; `{shard}` (`0/4`), `{shard_index}`, `{shard_count}`;
//! `{preset}`. `{{` and `}}` are braces.
//!
//! With `shards`, every group of finished shard files that the runs leave in the step's folder
//! (`NAME-CONFIG.INDEX-of-COUNT.jsonl`) is merged into `NAME.jsonl` there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// All steps of one method and preset.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "step", default)]
    steps: Vec<Step>,
}

/// One step, as written.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    pub name: String,
    pub package: Option<String>,
    pub binary: Option<String>,
    #[serde(default)]
    pub features: Vec<String>,
    #[serde(default)]
    pub args: Vec<String>,
    pub command: Option<Vec<String>>,
    #[serde(default)]
    pub inputs: Vec<String>,
    #[serde(default)]
    pub outputs: Vec<String>,
    pub rows: Option<String>,
    #[serde(default)]
    pub after: Vec<String>,
    pub seeds: Option<Vec<u64>>,
    pub shards: Option<usize>,
    pub parallel: Option<usize>,
}

/// The steps of a file in an order in which they can run.
#[derive(Debug, Clone)]
pub struct Plan {
    pub method: String,
    pub preset: String,
    pub steps: Vec<Step>,
}

impl Step {
    /// The names of the steps that this one needs.
    pub fn needs(&self) -> Result<BTreeSet<String>> {
        let mut needs = self.reads()?;
        needs.extend(self.after.iter().cloned());
        Ok(needs)
    }

    /// The names of the steps whose folder this one uses.
    fn reads(&self) -> Result<BTreeSet<String>> {
        Ok(self.folders()?.into_iter().map(|(step, _)| step).collect())
    }

    /// The steps whose folder this one uses, each with the seed that is named.
    fn folders(&self) -> Result<BTreeSet<(String, Option<u64>)>> {
        let mut folders = BTreeSet::new();
        for text in self.templates() {
            for part in parse(text)? {
                if let Part::Placeholder(name) = part
                    && let Some(step) = name.strip_prefix("dir:")
                {
                    let (step, seed) = of_seed(step);
                    folders.insert((step.to_owned(), seed));
                }
            }
        }
        Ok(folders)
    }

    fn templates(&self) -> impl Iterator<Item = &String> {
        self.inputs.iter().chain(&self.args).chain(self.command.iter().flatten())
    }
}

/// Reads and checks an experiment file. `packages` are the names of the workspace's members.
pub fn read(path: &Path, method: &str, preset: &str, packages: &BTreeSet<String>) -> Result<Plan> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    check(&text, packages)
        .map(|steps| Plan { method: method.to_owned(), preset: preset.to_owned(), steps })
        .with_context(|| format!("{} is not a valid experiment", path.display()))
}

fn check(text: &str, packages: &BTreeSet<String>) -> Result<Vec<Step>> {
    let file: File = toml::from_str(text)?;
    if file.steps.is_empty() {
        bail!("it has no [[step]]");
    }
    let mut by_name: BTreeMap<&str, &Step> = BTreeMap::new();
    for step in &file.steps {
        if by_name.insert(&step.name, step).is_some() {
            bail!("two steps are called {:?}", step.name);
        }
    }
    for step in &file.steps {
        check_step(step, &by_name, packages).with_context(|| format!("step {:?}", step.name))?;
    }
    in_order(&file.steps)
}

fn check_step(step: &Step, all: &BTreeMap<&str, &Step>, packages: &BTreeSet<String>) -> Result<()> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if step.name.is_empty() || !step.name.chars().all(word) {
        bail!("a name is made of letters, digits, - and _, since it names a folder");
    }
    match (&step.package, &step.command) {
        (Some(_), Some(_)) => bail!("it has both package and command; expected one of them"),
        (None, None) => bail!("it has neither package nor command; expected one of them"),
        (Some(package), None) if !packages.contains(package) => {
            let known: Vec<_> = packages.iter().map(String::as_str).collect();
            bail!("package {package:?} is not in the workspace; its members are {}", known.join(", "));
        }
        (None, Some(command)) if command.is_empty() => bail!("command is empty"),
        (None, Some(_)) if step.binary.is_some() || !step.features.is_empty() || !step.args.is_empty() => {
            bail!("binary, features and args belong to a package; a command has them in itself");
        }
        _ => {}
    }
    for output in step.outputs.iter().chain(&step.rows) {
        let inside = Path::new(output).components().all(|c| matches!(c, Component::Normal(_)));
        if output.is_empty() || !inside {
            bail!("output {output:?} must be a path inside of the step's folder");
        }
    }
    if step.shards == Some(0) || step.parallel == Some(0) {
        bail!("shards and parallel count from 1");
    }
    if step.parallel.is_some() && step.shards.is_none() {
        bail!("parallel says how many shards run at a time, but there are no shards");
    }
    if let Some(seeds) = &step.seeds
        && (seeds.is_empty() || seeds.iter().collect::<BTreeSet<_>>().len() != seeds.len())
    {
        bail!("seeds must be a list of different numbers");
    }
    for text in step.templates() {
        for part in parse(text)? {
            if let Part::Placeholder(name) = part {
                check_placeholder(step, name).with_context(|| format!("{text:?}"))?;
            }
        }
    }
    for input in &step.inputs {
        if input.contains("{inputs.") {
            bail!("input {input:?} refers to the inputs themselves");
        }
    }
    for need in step.needs()? {
        if !all.contains_key(need.as_str()) {
            bail!("it needs step {need:?}, which the file does not have")
        }
    }
    for (name, seed) in step.folders()? {
        let Some(other) = all.get(name.as_str()) else { continue };
        match (seed, &other.seeds) {
            (Some(seed), Some(seeds)) if seeds.contains(&seed) => {}
            (Some(seed), _) => {
                bail!("it uses the folder of {name:?} of seed {seed}, which that step does not have")
            }
            (None, seeds) if seeds.is_none() || *seeds == step.seeds => {}
            (None, _) => bail!(
                "it uses the folder of {name:?}, which has one for each of its seeds; give both the same seeds, or name \
                 one as {{dir:{name}.seed-N}}"
            ),
        }
    }
    Ok(())
}

fn check_placeholder(step: &Step, name: &str) -> Result<()> {
    let entry = |of: &str, list: &[String]| match name.strip_prefix(of)?.parse::<usize>() {
        Ok(i) if i < list.len() => Some(Ok(())),
        _ => Some(Err(anyhow::anyhow!("{{{name}}} is not in the list, which has {} entries", list.len()))),
    };
    if let Some(result) = entry("inputs.", &step.inputs).or_else(|| entry("outputs.", &step.outputs)) {
        return result;
    }
    match name {
        "root" | "dir" | "preset" => Ok(()),
        "seed" if step.seeds.is_some() => Ok(()),
        "seed" => bail!("{{seed}} is used, but the step has no seeds"),
        "shard" | "shard_index" | "shard_count" if step.shards.is_some() => Ok(()),
        "shard" | "shard_index" | "shard_count" => bail!("{{{name}}} is used, but the step has no shards"),
        _ if name.strip_prefix("dir:").is_some_and(|s| !s.is_empty()) => Ok(()),
        _ => bail!("{{{name}}} means nothing; write {{{{ and }}}} for braces"),
    }
}

/// The steps, each behind those that it needs, otherwise as written.
fn in_order(steps: &[Step]) -> Result<Vec<Step>> {
    let mut left: Vec<&Step> = steps.iter().collect();
    let mut ordered: Vec<Step> = Vec::new();
    while !left.is_empty() {
        let mut ready = None;
        for (i, step) in left.iter().enumerate() {
            if step.needs()?.iter().all(|n| ordered.iter().any(|o| &o.name == n)) {
                ready = Some(i);
                break;
            }
        }
        let Some(i) = ready else {
            let names: Vec<_> = left.iter().map(|s| s.name.as_str()).collect();
            bail!("steps wait for each other in a circle: {}", names.join(", "));
        };
        ordered.push(left.remove(i).clone());
    }
    Ok(ordered)
}

/// `STEP.seed-N` apart; a step's name has no dot.
pub fn of_seed(step: &str) -> (&str, Option<u64>) {
    match step.split_once(".seed-").map(|(name, seed)| (name, seed.parse().ok())) {
        Some((name, Some(seed))) => (name, Some(seed)),
        _ => (step, None),
    }
}

/// A piece of a template.
enum Part<'a> {
    Text(&'a str),
    Placeholder(&'a str),
}

fn parse(template: &str) -> Result<Vec<Part<'_>>> {
    let mut parts = Vec::new();
    let mut rest = template;
    while let Some(at) = rest.find(['{', '}']) {
        parts.push(Part::Text(&rest[..at]));
        let brace = &rest[at..];
        if brace.starts_with("{{") || brace.starts_with("}}") {
            parts.push(Part::Text(&brace[..1]));
            rest = &brace[2..];
        } else if let Some(end) = brace.find('}').filter(|_| brace.starts_with('{')) {
            parts.push(Part::Placeholder(&brace[1..end]));
            rest = &brace[end + 1..];
        } else {
            bail!("{template:?} has a single brace; write {{{{ and }}}} for braces");
        }
    }
    parts.push(Part::Text(rest));
    Ok(parts)
}

/// Puts values in the place of placeholders.
pub fn fill(template: &str, value: impl Fn(&str) -> Option<String>) -> Result<String> {
    let mut filled = String::new();
    for part in parse(template)? {
        match part {
            Part::Text(text) => filled += text,
            Part::Placeholder(name) => {
                filled +=
                    &value(name).with_context(|| format!("{template:?}: {{{name}}} has no value here"))?;
            }
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packages() -> BTreeSet<String> {
        ["megrez".to_owned()].into()
    }

    fn step(name: &str, more: &str) -> String {
        format!("[[step]]\nname = {name:?}\ncommand = [\"true\"]\noutputs = [\"o\"]\n{more}\n")
    }

    #[test]
    fn steps_come_in_an_order_that_works() {
        let text = step("c", "after = [\"a\"]\ninputs = [\"{dir:b.seed-3}/o\"]")
            + &step("b", "seeds = [1, 3]")
            + &step("a", "");
        let names: Vec<_> = check(&text, &packages()).unwrap().into_iter().map(|s| s.name).collect();
        assert_eq!(names, ["b", "a", "c"]);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, why) in [
            (String::new(), "no [[step]]"),
            (step("a", "") + &step("a", ""), "two steps are called \"a\""),
            (step("a/b", ""), "a name is made of letters"),
            (step("a", "input = [\"x\"]"), "unknown field `input`"),
            (step("a", "package = \"megrez\""), "both package and command"),
            ("[[step]]\nname = \"a\"\noutputs = [\"o\"]".into(), "neither package nor command"),
            ("[[step]]\nname = \"a\"\npackage = \"nope\"\noutputs = [\"o\"]".into(), "members are megrez"),
            (step("a", "args = [\"x\"]"), "belong to a package"),
            (step("a", "after = [\"b\"]"), "needs step \"b\", which the file does not have"),
            (step("a", "after = [\"b\"]") + &step("b", "after = [\"a\"]"), "in a circle: a, b"),
            (step("a", "inputs = [\"{dir:a}\"]"), "in a circle: a"),
            (step("a", "inputs = [\"{what}\"]"), "{what} means nothing"),
            (step("a", "inputs = [\"{dir\"]"), "single brace"),
            (step("a", "inputs = [\"{seed}\"]"), "no seeds"),
            (step("a", "inputs = [\"{shard}\"]"), "no shards"),
            (step("a", "inputs = [\"{outputs.1}\"]"), "has 1 entries"),
            (step("a", "shards = 0"), "count from 1"),
            (step("a", "parallel = 2"), "there are no shards"),
            (step("a", "seeds = [1, 1]"), "different numbers"),
            (step("a", "rows = \"../rows.jsonl\""), "inside of the step's folder"),
            (step("a", "seeds = [1]") + &step("b", "inputs = [\"{dir:a}\"]"), "give both the same seeds"),
            (step("a", "seeds = [1]") + &step("b", "inputs = [\"{dir:a.seed-2}\"]"), "\"a\" of seed 2"),
            (step("a", "") + &step("b", "inputs = [\"{dir:a.seed-0}\"]"), "\"a\" of seed 0"),
            (step("a", "seeds = [1]") + &step("b", "inputs = [\"{dir:a.seed-x}\"]"), "step \"a.seed-x\""),
        ] {
            let e = format!("{:#}", check(&text, &packages()).unwrap_err());
            assert!(e.contains(why), "expected {why:?} in {e}\n{text}");
        }
    }

    #[test]
    fn the_experiments_of_this_workspace_are_valid() {
        let ws = crate::workspace::Workspace::locate(None).unwrap();
        let packages = ws.packages().unwrap().into_keys().collect();
        for folder in ws.crates().unwrap() {
            for entry in fs::read_dir(folder.join("experiments")).into_iter().flatten() {
                let path = entry.unwrap().path();
                let name = path.file_stem().unwrap().to_string_lossy().into_owned();
                let toml = path.extension().is_some_and(|e| e == "toml");
                if toml && !name.starts_with("train-") {
                    read(&path, "method", &name, &packages).unwrap_or_else(|e| panic!("{e:#}"));
                }
            }
        }
    }

    #[test]
    fn placeholders_are_filled() {
        let filled = fill("{{x}} {seed}/{dir}", |name| Some(name.to_uppercase())).unwrap();
        assert_eq!(filled, "{x} SEED/DIR");
        assert!(fill("{seed}", |_| None).is_err());
    }
}

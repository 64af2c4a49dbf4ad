//! Invariants about who depends on whom, from `cargo metadata` and `cargo tree`.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Crates that are no methods: what methods are built on, and the tools around them.
const SHARED: [&str; 7] =
    ["nics-base", "nics-benches", "nics-core", "nics-cuda", "nics-datasets", "nics-kernels", "xtask"];

/// The methods of the project, those to come included: the core must not know their names.
const METHODS: [&str; 10] = [
    "r2r",
    "pm-kvq",
    "mbq",
    "framefusion",
    "ditfastattn",
    "vgdfr",
    "dlfr-vae",
    "ecar",
    "megrez",
    "agentsociety",
];

fn cargo(args: &[&str]) -> String {
    let output =
        Command::new(env!("CARGO")).args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// xtask builds without libtorch, or it could not set libtorch up.
#[test]
fn xtask_does_not_link_libtorch() {
    let tree = cargo(&[
        "tree",
        "--package",
        "xtask",
        "--edges",
        "normal,build,dev",
        "--prefix",
        "none",
        "--offline",
    ]);
    let names: Vec<&str> = tree.lines().filter_map(|l| l.split_whitespace().next()).collect();
    assert!(names.contains(&"nics-base"), "the tree is not xtask's:\n{tree}");
    for forbidden in ["tch", "torch-sys", "nics-core"] {
        assert!(!names.contains(&forbidden), "xtask depends on {forbidden}:\n{tree}");
    }
}

/// Shared crates depend on no method; a method's library depends on another method at most behind a feature
/// `with-<method>` of its binary, that is, optionally.
#[test]
fn methods_stand_apart() {
    let metadata: Value =
        serde_json::from_str(&cargo(&["metadata", "--no-deps", "--format-version", "1", "--offline"]))
            .unwrap();
    let packages: BTreeMap<&str, &Value> =
        metadata["packages"].as_array().unwrap().iter().map(|p| (p["name"].as_str().unwrap(), p)).collect();
    assert!(packages.contains_key("nics-core"));
    for (name, package) in &packages {
        for dependency in package["dependencies"].as_array().unwrap() {
            let other = dependency["name"].as_str().unwrap();
            if !packages.contains_key(other) || SHARED.contains(&other) {
                continue;
            }
            // The benchmarks measure methods; nothing depends on them.
            let measures = *name == "nics-benches" && dependency["kind"] == "dev";
            assert!(!SHARED.contains(name) || measures, "{name} depends on the method {other}");
            assert!(
                dependency["optional"].as_bool().unwrap() || dependency["kind"] == "dev",
                "{name} depends on {other} without a feature"
            );
        }
    }
}

/// No source file of the core names a method.
#[test]
fn the_core_names_no_method() {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/nics-core/src")];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            files += 1;
            let text = std::fs::read_to_string(&path).unwrap().to_lowercase();
            for (number, line) in text.lines().enumerate() {
                let words: Vec<&str> = line.split(|c: char| !c.is_alphanumeric() && c != '-').collect();
                for method in METHODS {
                    let named = words.contains(&method);
                    assert!(!named, "{}:{}: names the method {method}: {line}", path.display(), number + 1);
                }
            }
        }
    }
    assert!(files > 20, "the sources of the core were not found");
}

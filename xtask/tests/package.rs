//! Steps and trainings that name a package: it is built with cargo, and a changed binary makes its steps stale.

mod support;

use std::fs;
use std::process::Command;

use support::{Sandbox, VERSION_HEADER, ends_with, lines, own_libtorch, with_compiler};

/// A binary that notes its run and writes one row with `VALUE`.
const MAIN: &str = r##"
use std::{env::args, fs};
fn main() {
    let dir = args().nth(1).unwrap();
    let seen = fs::read_to_string("ran").unwrap_or_default();
    fs::write("ran", seen + &args().skip(2).collect::<Vec<_>>().join(" ") + "\n").unwrap();
    fs::create_dir_all(&dir).unwrap();
    let row = r#"{"method": "fake", "metric": "m", "value": VALUE}"#;
    fs::write(format!("{dir}/rows.jsonl"), format!("{row}\n")).unwrap();
}
"##;

/// A workspace of one crate without dependencies, on a machine with a libtorch of the user's.
fn workspace() -> Sandbox {
    let sandbox = Sandbox::new();
    with_compiler(&sandbox, "2.11.0 6");
    own_libtorch(&sandbox, VERSION_HEADER);
    sandbox.write("ws/Cargo.toml", "[workspace]\nresolver = \"3\"\nmembers = [\"crates/*\"]\n");
    sandbox.write(
        "ws/crates/fake/Cargo.toml",
        "[package]\nname = \"fake\"\nedition = \"2024\"\n[features]\nextra = []\n",
    );
    value(&sandbox, "1");
    sandbox.write(
        "ws/crates/fake/experiments/nano.toml",
        "[[step]]\nname = \"run\"\npackage = \"fake\"\nfeatures = [\"extra\"]\nargs = [\"{dir}\", \"{{x}}\", \"{preset}\"]\n\
         rows = \"rows.jsonl\"\n[[step]]\nname = \"other\"\ncommand = [\"true\"]\n",
    );
    sandbox.write(
        "ws/crates/fake/experiments/train-tiny.toml",
        "package = \"fake\"\nargs = [\"{out}\", \"training\"]\n",
    );
    sandbox
}

fn value(sandbox: &Sandbox, value: &str) {
    sandbox.write("ws/crates/fake/src/main.rs", &MAIN.replace("VALUE", value));
}

fn xtask(sandbox: &Sandbox, args: &[&str]) -> Command {
    let mut command = sandbox.xtask(args);
    let path = std::env::var("PATH").unwrap();
    command.env("PATH", format!("{}:{path}", sandbox.path("bin").display()));
    command.env("LIBTORCH", sandbox.path("own")).env("CARGO_TARGET_DIR", sandbox.path("target"));
    command
}

#[test]
fn a_changed_binary_makes_its_steps_stale() {
    let sandbox = workspace();
    let ran = sandbox.path("ws/ran");
    ends_with(&mut xtask(&sandbox, &["reproduce"]), 0);
    assert_eq!(fs::read_to_string(&ran).unwrap(), "{x} nano\n");
    ends_with(&mut xtask(&sandbox, &["reproduce"]), 0);
    assert_eq!(lines(&ran), 1);
    value(&sandbox, "2");
    ends_with(&mut xtask(&sandbox, &["reproduce"]), 0);
    assert_eq!(lines(&ran), 2);
    let rows = nics_base::row::read(sandbox.path("ws/reports/fake/nano/rows.jsonl")).unwrap();
    assert_eq!((rows[0].value.to_bits(), rows[0].preset.as_str()), (2.0_f64.to_bits(), "nano"));
}

#[test]
fn a_binary_that_does_not_build_fails_its_steps_alone() {
    let sandbox = workspace();
    fs::write(sandbox.path("ws/crates/fake/src/main.rs"), "fn main() { nonsense }").unwrap();
    let e = ends_with(&mut xtask(&sandbox, &["reproduce"]), 1);
    assert!(e.contains("its binary could not be built: cargo build --release --package fake"), "{e}");
    assert!(e.contains("error: 1 of 2 steps failed"), "{e}");
}

#[test]
fn a_training_gets_its_folder_and_more_arguments() {
    let sandbox = workspace();
    ends_with(&mut xtask(&sandbox, &["train", "tiny", "--", "--steps", "3"]), 0);
    assert!(sandbox.path("ws/datasets/nano/tiny/rows.jsonl").exists());
    assert_eq!(fs::read_to_string(sandbox.path("ws/ran")).unwrap(), "training --steps 3\n");
}

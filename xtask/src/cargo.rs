//! Commands that are cargo's, with set-up in front: `check`, `test`, `install`, and building programs.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nics_base::interrupt::Interrupt;
use serde::Deserialize;

use crate::doctor;
use crate::process::{ended, run, run_ok, shown, start, wait};
use crate::setup;
use crate::workspace::Workspace;

/// `cargo` in the workspace, the one that runs us if there is one.
fn cargo(ws: &Workspace) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(&ws.root);
    // Cargo sets these for `cargo xtask`; build scripts of other packages must not see xtask's.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") || text == "CARGO_BIN_NAME" {
            command.env_remove(&name);
        }
    }
    command
}

/// Tests that compile CUDA sources when they know an NVRTC; without a GPU that is what can be held of them. Of the whole
/// workspace, so that dependencies are built with the features that the tests need as well, once.
const NVRTC_TESTS: [&[&str]; 3] = [
    &["test", "--workspace", "--test", "nvrtc"],
    &["test", "--workspace", "--test", "packed", "nvrtc"],
    &["test", "--workspace", "--test", "device", "nvrtc"],
];

/// Formatting, lints, documentation, CUDA sources, and dependencies where cargo-deny is installed. Runs all and names what
/// failed.
pub fn check(ws: &Workspace, interrupt: &Interrupt) -> Result<()> {
    let mut failed = Vec::new();
    // Named by `NICS_NVRTC`, it has to be there: the tests then fail rather than pass without it.
    let nvrtc = setup::nvrtc(ws, interrupt);
    let mut step = |args: &[&str], docs: bool| -> Result<()> {
        let mut command = cargo(ws);
        command.args(args);
        if docs {
            command.env("RUSTDOCFLAGS", "-D warnings");
        }
        if let Ok(folder) = &nvrtc {
            command.env("NICS_NVRTC", folder);
        }
        eprintln!("$ {}", shown_short(&command));
        if !run(&mut command, interrupt)?.success() {
            failed.push(shown_short(&command));
        }
        Ok(())
    };
    step(&["fmt", "--all", "--check"], false)?;
    step(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], false)?;
    step(&["doc", "--no-deps", "--workspace"], true)?;
    if nvrtc.is_ok() {
        for test in NVRTC_TESTS {
            step(test, false)?;
        }
    }
    let deny = cargo(ws).args(["deny", "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if deny.is_ok_and(|s| s.success()) {
        step(&["deny", "check"], false)?;
    } else {
        eprintln!(
            "cargo-deny is not installed: licences and advisories were not checked (`cargo install cargo-deny`)"
        );
    }
    if let Err(e) = nvrtc {
        interrupt.check()?;
        failed.push(format!("CUDA sources were not compiled: {e:#}"));
    }
    if !failed.is_empty() {
        bail!("{} of the checks failed: {}", failed.len(), failed.join("; "));
    }
    eprintln!("all checks passed");
    Ok(())
}

/// How names of tests begin that need a GPU.
const ON_A_GPU: &str = "on_a_gpu";

/// Features with which a binary takes in another method, `CRATE/with-METHOD`: their tests are the workspace's, too.
fn composed(ws: &Workspace) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Manifest {
        #[serde(default)]
        features: BTreeMap<String, toml::Value>,
    }
    let mut found = Vec::new();
    for (name, folder) in ws.packages()? {
        let manifest = folder.join("Cargo.toml");
        let text =
            fs::read_to_string(&manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
        let parsed: Manifest =
            toml::from_str(&text).with_context(|| format!("cannot read {}", manifest.display()))?;
        let with = parsed.features.into_keys().filter(|feature| feature.starts_with("with-"));
        found.extend(with.map(|feature| format!("{name}/{feature}")));
    }
    Ok(found)
}

/// The tests of the workspace; `long` adds those marked `#[ignore]`.
pub fn test(ws: &Workspace, long: bool, interrupt: &Interrupt) -> Result<()> {
    let mut command = cargo(ws);
    command.args(["test", "--workspace"]);
    let composed = composed(ws)?;
    if !composed.is_empty() {
        command.args(["--features", &composed.join(",")]);
    }
    if long {
        command.args(["--", "--include-ignored"]);
        if !doctor::has_cuda(ws) {
            eprintln!(
                "without an NVIDIA driver and `cargo xtask setup --cuda` the tests on a GPU are not run"
            );
            command.args(["--skip", ON_A_GPU]);
        }
    }
    if env::var_os("OMP_NUM_THREADS").is_none() {
        // Tests run side by side: threads of their own would only wait for each other.
        command.env("OMP_NUM_THREADS", "1");
    }
    run_ok(&mut command, interrupt)
}

/// The folder of a crate of the workspace.
pub fn crate_folder(ws: &Workspace, name: &str) -> Result<PathBuf> {
    let mut packages = ws.packages()?;
    packages.remove(name).with_context(|| {
        let names: Vec<_> = packages.keys().map(String::as_str).collect();
        format!("there is no crate {name:?}; the crates are: {}", names.join(", "))
    })
}

/// `cargo install`, with the place of libtorch written into the binary: outside of the workspace nothing else would
/// tell it.
pub fn install(ws: &Workspace, folder: &Path, interrupt: &Interrupt) -> Result<()> {
    let lib = ws
        .libtorch()
        .join("lib")
        .canonicalize()
        .context("libtorch is not set up; run `cargo xtask setup`")?;
    let rpath = toml::Value::String(format!("link-arg=-Wl,-rpath,{}", lib.display()));
    let target = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    let mut command = cargo(ws);
    command.args(["install", "--locked", "--path"]).arg(folder);
    command.args(["--config", &format!("target.{target}.rustflags=[\"-C\", {rpath}]")]);
    run_ok(&mut command, interrupt)
}

/// Builds a release binary and says where it is.
pub fn build(
    ws: &Workspace,
    package: &str,
    binary: &str,
    features: &[String],
    interrupt: &Interrupt,
) -> Result<PathBuf> {
    let mut command = cargo(ws);
    command.args(["build", "--release", "--package", package, "--bin", binary]);
    if !features.is_empty() {
        command.args(["--features", &features.join(",")]);
    }
    built(command, binary, interrupt)
}

/// Builds a benchmark in release and says where it is.
pub fn build_bench(ws: &Workspace, package: &str, bench: &str, interrupt: &Interrupt) -> Result<PathBuf> {
    let mut command = cargo(ws);
    command.args(["bench", "--no-run", "--package", package, "--bench", bench]);
    built(command, bench, interrupt)
}

/// The target folder in which a program of release or of a benchmark was built.
pub fn target_folder(program: &Path) -> Result<&Path> {
    let release = program.ancestors().find(|p| p.ends_with("release"));
    release
        .and_then(Path::parent)
        .with_context(|| format!("{} is not in a release folder", program.display()))
}

/// Runs a cargo command that builds one program.
fn built(mut command: Command, program: &str, interrupt: &Interrupt) -> Result<PathBuf> {
    command.args(["--message-format", "json-render-diagnostics"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = start(&mut command)?;
    let messages = child.stdout.take().context("cargo has no stdout")?;
    let reader = std::thread::spawn(move || executable(messages));
    let (status, _) = wait(child, interrupt)?;
    let found = reader.join().ok().flatten();
    if !status.success() {
        bail!("{} ({})", shown_short(&command), ended(status));
    }
    found.with_context(|| format!("{} built no program {program}", shown_short(&command)))
}

/// The last executable that cargo's messages name.
fn executable(messages: impl std::io::Read) -> Option<PathBuf> {
    #[derive(Deserialize)]
    struct Message {
        executable: Option<PathBuf>,
    }
    let lines = std::io::BufRead::lines(std::io::BufReader::new(messages)).map_while(Result::ok);
    lines.filter_map(|l| serde_json::from_str::<Message>(&l).ok()?.executable).last()
}

/// A cargo command without the path of cargo itself.
fn shown_short(command: &Command) -> String {
    let text = shown(command);
    let program = command.get_program().to_string_lossy().into_owned();
    text.replacen(&program, &Path::new("cargo").display().to_string(), 1)
}

//! `cargo xtask doctor`: what this machine has, and what to mend.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::setup::{self, Kind, SERIES};
use crate::workspace::{Workspace, free_bytes, gigabytes, which};

/// How a finding reads.
enum State {
    Good,
    /// Worth knowing; the build works without.
    Note,
    /// The build cannot work.
    Bad,
}

/// Prints the findings. An error when the build cannot work.
pub fn doctor(ws: &Workspace) -> Result<()> {
    // Without libtorch yet, the space to download it is not optional.
    let to_download =
        setup::version_of(&ws.libtorch()).is_none() && matches!(setup::own_libtorch(ws), Ok(None));
    let findings = [
        libtorch(ws),
        compiler(ws),
        python(ws),
        cuda(ws),
        tool("cargo-deny", "dependency licences and advisories are not checked; `cargo install cargo-deny`"),
        tool("ffmpeg", "videos can be neither read nor written as MP4; install ffmpeg"),
        cache(ws),
        huggingface_cache(),
        disk("workspace", &ws.root, 5_000_000_000, State::Note),
        disk("cache", &ws.cache, 1_300_000_000, if to_download { State::Bad } else { State::Note }),
    ];
    let mut bad = 0;
    for (name, state, text) in findings {
        let mark = match state {
            State::Good => "ok  ",
            State::Note => "note",
            State::Bad => {
                bad += 1;
                "MEND"
            }
        };
        println!("{mark}  {name:<18} {text}");
    }
    if bad > 0 {
        bail!("the build cannot work before the {bad} finding(s) marked MEND are mended");
    }
    println!("the build can work");
    Ok(())
}

type Finding = (String, State, String);

fn found(name: &str, state: State, text: impl Into<String>) -> Finding {
    (name.to_owned(), state, text.into())
}

fn libtorch(ws: &Workspace) -> Finding {
    let own = match setup::own_libtorch(ws) {
        Ok(own) => own,
        Err(e) => return found("libtorch", State::Bad, format!("{e:#}")),
    };
    let whose = if own.is_some() { "yours, by LIBTORCH" } else { "set up here" };
    let folder = own.unwrap_or_else(|| ws.libtorch());
    let real = folder.canonicalize().unwrap_or_else(|_| folder.clone());
    match setup::version_of(&folder) {
        None if folder.exists() => {
            found("libtorch", State::Bad, format!("{} is none; `cargo xtask setup --force`", real.display()))
        }
        // Not a fault: every command of xtask that builds sets up first, if it has the tools.
        None => found("libtorch", State::Note, "not set up yet; `cargo xtask setup`"),
        Some(version) if version.starts_with(SERIES) => {
            let verified = if setup::ready(&folder, Kind::Cpu) { ", verified" } else { "" };
            found("libtorch", State::Good, format!("{version} at {} ({whose}{verified})", real.display()))
        }
        Some(version) => {
            let text = format!("{version} at {} ({whose}), but {SERIES}.x is needed", real.display());
            found("libtorch", State::Bad, format!("{text}; unset LIBTORCH and run `cargo xtask setup`"))
        }
    }
}

fn compiler(_: &Workspace) -> Finding {
    match setup::compiler() {
        Ok(path) => found("C++ compiler", State::Good, format!("{} ({})", path.display(), first_line(&path))),
        Err(e) => found("C++ compiler", State::Bad, format!("{e:#}")),
    }
}

fn python(ws: &Workspace) -> Finding {
    match setup::find_python() {
        Ok(path) => {
            found("Python with pip", State::Good, format!("{} ({})", path.display(), first_line(&path)))
        }
        Err(_) if setup::version_of(&ws.libtorch()).is_some() => {
            found("Python with pip", State::Note, "none; only needed to download libtorch, which is there")
        }
        Err(e) => found("Python with pip", State::Bad, format!("{e:#}")),
    }
}

/// Whether there is a driver of NVIDIA's, and a libtorch that can use it.
pub fn has_cuda(ws: &Workspace) -> bool {
    driver().is_some() && has_libtorch_cuda(ws)
}

fn has_libtorch_cuda(ws: &Workspace) -> bool {
    ws.libtorch().join("lib/libtorch_cuda.so").exists()
}

fn driver() -> Option<PathBuf> {
    ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib/wsl/lib"]
        .map(|dir| Path::new(dir).join("libcuda.so.1"))
        .into_iter()
        .find(|p| p.exists())
}

fn cuda(ws: &Workspace) -> Finding {
    let library = has_libtorch_cuda(ws);
    let card = which(&["nvidia-smi"]).and_then(|smi| {
        let query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"];
        let output = Command::new(smi).args(query).output().ok().filter(|o| o.status.success())?;
        let text = String::from_utf8_lossy(&output.stdout).trim().replace('\n', "; ");
        (!text.is_empty()).then_some(text)
    });
    let card = card.or_else(|| driver().map(|d| format!("driver {}", d.display())));
    match (card, library) {
        (Some(card), true) => found("CUDA", State::Good, format!("{card}; libtorch has CUDA")),
        (Some(card), false) => {
            found("CUDA", State::Note, format!("{card}; to use it: `cargo xtask setup --cuda` (5 GB)"))
        }
        (None, true) => {
            found("CUDA", State::Note, "libtorch has CUDA, but no NVIDIA driver was found; CPU only")
        }
        (None, false) => found("CUDA", State::Note, "no NVIDIA driver found; CPU only"),
    }
}

fn tool(name: &str, without: &str) -> Finding {
    match which(&[name]) {
        Some(path) => found(name, State::Good, path.display().to_string()),
        None => found(name, State::Note, format!("not installed: {without}")),
    }
}

fn cache(ws: &Workspace) -> Finding {
    let held: Vec<String> = std::fs::read_dir(&ws.cache)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("libtorch-"))
        .collect();
    let held = if held.is_empty() { "empty".to_owned() } else { held.join(", ") };
    found("cache", State::Good, format!("{} ({held})", ws.cache.display()))
}

fn huggingface_cache() -> Finding {
    let home = |tail: &str| env::var("HOME").map(|h| format!("{h}/{tail}")).unwrap_or_default();
    let dir = env::var("HF_HOME").unwrap_or_else(|_| home(".cache/huggingface"));
    let offline = env::var("HF_HUB_OFFLINE").is_ok_and(|v| v != "0" && !v.is_empty());
    let offline = if offline { "; HF_HUB_OFFLINE is set: only what is there can be used" } else { "" };
    let state = if Path::new(&dir).exists() { "" } else { " (not there yet)" };
    found("Hugging Face cache", State::Good, format!("{dir}{state}{offline}"))
}

fn disk(what: &str, dir: &Path, wanted: u64, short: State) -> Finding {
    let name = format!("disk, {what}");
    match free_bytes(dir) {
        Some(free) if free < wanted => found(
            &name,
            short,
            format!(
                "{} free at {}; builds and set-up want {}",
                gigabytes(free),
                dir.display(),
                gigabytes(wanted)
            ),
        ),
        Some(free) => found(&name, State::Good, format!("{} free at {}", gigabytes(free), dir.display())),
        None => found(&name, State::Note, "the system does not tell"),
    }
}

/// The first line of `PROGRAM --version`.
fn first_line(program: &Path) -> String {
    let output = Command::new(program).arg("--version").output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or("unknown version").to_owned()
}

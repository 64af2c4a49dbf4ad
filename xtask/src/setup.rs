//! `cargo xtask setup`: libtorch in the user's cache, linked into the workspace as `.libtorch`.
//!
//! Order of preference: a libtorch of the user's own (`LIBTORCH`, or `LIBTORCH_USE_PYTORCH=1`), which is verified and
//! linked, never changed; what the link already leads to; what the cache has; a download from the Python package
//! index. A folder enters the cache by one rename, after a program was linked against it and ran. Set-ups of several
//! workspaces or terminals take turns.

mod download;
mod verify;

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nics_base::artefact::{AtomicDir, write_atomic};
use nics_base::hash;
use nics_base::interrupt::Interrupt;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::workspace::Workspace;

pub use download::find_python;
pub use verify::{compiler, version_of};

/// What `tch` is built for; another minor version has another C++ interface.
pub const VERSION: &str = "2.11.0";
/// The part of it that has to match.
pub const SERIES: &str = "2.11";
/// Says that a folder was verified, and as what.
const STAMP: &str = ".nics-verified.json";

/// Which libtorch to set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The libraries that a CPU needs: half a gigabyte.
    Cpu,
    /// Everything, with NVIDIA's libraries: five gigabytes.
    Cuda,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

/// Written into (or, for a user's own libtorch, kept in the cache about) a verified folder.
#[derive(Debug, Serialize, Deserialize, PartialEq)]
struct Stamp {
    version: String,
    kind: Kind,
    /// Size and time of `libtorch_cpu.so`: a folder changed since is verified again.
    library: (u64, u64),
}

/// Makes `.libtorch` lead to a verified libtorch. Returns at once when it does already.
pub fn setup(ws: &Workspace, kind: Kind, force: bool, interrupt: &Interrupt) -> Result<()> {
    if let Some(own) = own_libtorch(ws)? {
        return adopt(ws, &own, force, interrupt);
    }
    let link = ws.libtorch();
    if !force && ready(&link, kind) {
        return Ok(());
    }
    if link.is_dir() && !link.is_symlink() {
        if force {
            bail!(
                "{} is a folder, not a link that set-up made; remove it to let set-up download",
                link.display()
            );
        }
        return adopt(ws, &link, false, interrupt);
    }
    supported_platform()?;
    let compiler = compiler()?;
    let _turn = take_turn(&ws.cache, interrupt)?;
    let folder = ws.cache.join(format!("libtorch-{VERSION}-{}", kind.name()));
    if force || !ready(&folder, kind) {
        install(ws, kind, &folder, &compiler, interrupt)?;
    }
    relink(&link, &folder)?;
    println!("libtorch {VERSION} ({}) is ready: {} -> {}", kind.name(), ws.show(&link), folder.display());
    Ok(())
}

/// The libtorch that the user named, if they did.
///
/// `.cargo/config.toml` sets `LIBTORCH` to our own link for every process that cargo starts; that is nobody's choice.
pub fn own_libtorch(ws: &Workspace) -> Result<Option<PathBuf>> {
    if env::var("LIBTORCH_USE_PYTORCH").is_ok_and(|v| v == "1") {
        return download::pytorch_of_python().map(Some);
    }
    let Some(own) = env::var_os("LIBTORCH").filter(|v| !v.is_empty()).map(PathBuf::from) else {
        return Ok(None);
    };
    let own = std::path::absolute(&own)?;
    let is_our_link = own.file_name() == ws.libtorch().file_name()
        && own.parent().and_then(|p| p.canonicalize().ok()).as_ref() == Some(&ws.root);
    Ok((!is_our_link).then_some(own))
}

/// Verifies a libtorch that is the user's, and links it so that built binaries find it at run time too.
fn adopt(ws: &Workspace, own: &Path, force: bool, interrupt: &Interrupt) -> Result<()> {
    if !own.is_dir() {
        bail!(
            "LIBTORCH is {}, which is no folder; correct it, or unset it to let set-up download one",
            own.display()
        );
    }
    let record =
        ws.cache.join("verified").join(format!("{}.json", hash::bytes(own.as_os_str().as_encoded_bytes())));
    let known = fs::read(&record).ok().and_then(|b| serde_json::from_slice::<Stamp>(&b).ok());
    let current = stamp_of(own);
    if force || current.is_none() || known != current {
        verify::verify(own, &compiler()?, interrupt)?;
        let stamp = stamp_of(own).context("libtorch vanished while it was verified")?;
        write_atomic(&record, serde_json::to_vec_pretty(&stamp)?)?;
        println!("libtorch at {} works", own.display());
    }
    let link = ws.libtorch();
    if own != link && link.canonicalize().ok() != Some(own.canonicalize()?) {
        if link.is_dir() && !link.is_symlink() {
            bail!(
                "{} is a folder, but LIBTORCH is {}: built binaries would load the former; remove the folder",
                link.display(),
                own.display()
            );
        }
        relink(&link, own)?;
    }
    Ok(())
}

/// True when `folder` holds a libtorch that we verified, good for `kind`, and unchanged since.
pub fn ready(folder: &Path, kind: Kind) -> bool {
    let known = fs::read(folder.join(STAMP)).ok().and_then(|b| serde_json::from_slice::<Stamp>(&b).ok());
    let Some(known) = known else { return false };
    let enough = known.kind == kind || known.kind == Kind::Cuda;
    enough && stamp_of(folder).is_some_and(|s| s == known)
}

/// What a stamp of the folder would say now; `None` when there is no libtorch of ours in it.
fn stamp_of(folder: &Path) -> Option<Stamp> {
    let version = version_of(folder)?;
    let meta = fs::metadata(folder.join("lib/libtorch_cpu.so")).ok()?;
    let time = meta.modified().ok()?.duration_since(std::time::UNIX_EPOCH).ok()?.as_secs();
    let kind = if folder.join("lib/libtorch_cuda.so").exists() { Kind::Cuda } else { Kind::Cpu };
    Some(Stamp { version, kind, library: (meta.len(), time) })
}

/// Downloads into a temporary folder of the cache, verifies there, and renames into place.
fn install(ws: &Workspace, kind: Kind, folder: &Path, compiler: &Path, interrupt: &Interrupt) -> Result<()> {
    let python = find_python()?;
    download::check_space(&ws.cache, kind)?;
    fs::create_dir_all(&ws.cache).with_context(|| format!("cannot make {}", ws.cache.display()))?;
    clean_leftovers(&ws.cache);
    let fresh = AtomicDir::create(folder)?;
    download::fill(&python, kind, &ws.cache.join(download::WHEELS), fresh.path(), interrupt)?;
    eprintln!("verifying libtorch: a small program is compiled, linked and run");
    verify::verify(fresh.path(), compiler, interrupt)?;
    let stamp = stamp_of(fresh.path()).context("the downloaded libtorch is incomplete")?;
    write_atomic(fresh.path().join(STAMP), serde_json::to_vec_pretty(&stamp)?)?;
    fresh.commit()?;
    let _ = fs::remove_dir_all(ws.cache.join(download::WHEELS));
    Ok(())
}

/// The folder of NVRTC, which compiles CUDA kernels: the one that `NICS_NVRTC` names, the one of a full libtorch, or one of the
/// cache, filled by a download where it has to be.
pub fn nvrtc(ws: &Workspace, interrupt: &Interrupt) -> Result<PathBuf> {
    if let Some(own) = env::var_os("NICS_NVRTC").filter(|v| !v.is_empty()) {
        return Ok(std::path::absolute(own)?);
    }
    let (library, requirement) = download::NVRTC;
    let of_torch = ws.libtorch().join("site/nvidia/cu13/lib");
    let folder = ws.cache.join(requirement.replace("==", "-"));
    let has = |folder: &Path| folder.join(library).exists();
    if has(&of_torch) {
        return Ok(of_torch);
    }
    if has(&folder) {
        return Ok(folder);
    }
    supported_platform()?;
    let python = find_python()?;
    let _turn = take_turn(&ws.cache, interrupt)?;
    if !has(&folder) {
        download::check_bytes(&ws.cache, download::NVRTC_SPACE)?;
        let fresh = AtomicDir::create(&folder)?;
        let wheels = ws.cache.join(download::WHEELS);
        download::fill_nvrtc(&python, &wheels, fresh.path(), interrupt)?;
        fresh.commit()?;
        let _ = fs::remove_dir_all(wheels);
    }
    Ok(folder)
}

/// Removes what a killed set-up left half done. Called while holding the lock, so nobody is working there.
fn clean_leftovers(cache: &Path) {
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(".libtorch-") && name.ends_with(".tmp") {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// The cache's lock, held until the file is dropped (also by `kill -9`).
fn take_turn(cache: &Path, interrupt: &Interrupt) -> Result<File> {
    fs::create_dir_all(cache).with_context(|| format!("cannot make the cache folder {}", cache.display()))?;
    let path = cache.join("setup.lock");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut waiting = false;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if !waiting {
                    eprintln!("another set-up is at work; waiting for it");
                    waiting = true;
                }
                interrupt.check()?;
                std::thread::sleep(Duration::from_millis(200));
            }
            // A file system without locks: two set-ups still only rename whole folders.
            _ => return Ok(file),
        }
    }
}

/// Points the link at `folder` in one step.
fn relink(link: &Path, folder: &Path) -> Result<()> {
    let temp = link.with_file_name(format!(".libtorch.{}.tmp", std::process::id()));
    let _ = fs::remove_file(&temp);
    std::os::unix::fs::symlink(folder, &temp)
        .and_then(|()| fs::rename(&temp, link))
        .with_context(|| format!("cannot link {} to {}", link.display(), folder.display()))
}

fn supported_platform() -> Result<()> {
    let (os, arch) = (env::consts::OS, env::consts::ARCH);
    if os == "linux" && matches!(arch, "x86_64" | "aarch64") && cfg!(not(target_env = "musl")) {
        return Ok(());
    }
    bail!(
        "set-up downloads libtorch for Linux with glibc on x86_64 and aarch64, and this is {os} on {arch}; \
         install libtorch {SERIES} yourself and point LIBTORCH at it, or LIBTORCH_USE_PYTORCH=1 at an installed torch"
    )
}

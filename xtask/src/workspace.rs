//! Where things are: the workspace, the user's cache, the crates.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nics_base::artefact::cache_dir;
use serde::Deserialize;

/// The workspace and the user's cache directory.
#[derive(Debug, Clone)]
pub struct Workspace {
    /// Folder of the workspace's `Cargo.toml`.
    pub root: PathBuf,
    /// Where libtorch is kept for all workspaces of this user.
    pub cache: PathBuf,
}

impl Workspace {
    /// Finds both. `root` overrides the folder that xtask belongs to.
    pub fn locate(root: Option<PathBuf>) -> Result<Self> {
        // Cargo sets the variable for `cargo xtask`; a copy of the binary run by hand knows where it was built.
        let own = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let root = root.unwrap_or_else(|| Path::new(&own).join(".."));
        let root = root.canonicalize().with_context(|| format!("no workspace at {}", root.display()))?;
        let cache = cache_dir().context("no place for a cache: set HOME or NICS_CACHE")?;
        Ok(Self { root, cache })
    }

    /// The link to libtorch that `.cargo/config.toml` names.
    pub fn libtorch(&self) -> PathBuf {
        self.root.join(".libtorch")
    }

    /// The manifests of all members, by package name.
    pub fn packages(&self) -> Result<BTreeMap<String, PathBuf>> {
        let mut found = BTreeMap::new();
        let mut folders: Vec<PathBuf> = vec![self.root.join("datasets"), self.root.join("xtask")];
        folders.extend(self.crates()?);
        for folder in folders {
            let manifest = folder.join("Cargo.toml");
            let Ok(text) = fs::read_to_string(&manifest) else { continue };
            let parsed: Manifest =
                toml::from_str(&text).with_context(|| format!("cannot read {}", manifest.display()))?;
            found.insert(parsed.package.name, folder);
        }
        Ok(found)
    }

    /// The folders under `crates/`, sorted.
    pub fn crates(&self) -> Result<Vec<PathBuf>> {
        let dir = self.root.join("crates");
        let entries = fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
        let mut folders: Vec<_> = entries.flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect();
        folders.sort();
        Ok(folders)
    }

    /// A path of the user's: absolute, or relative to where they stand.
    pub fn show<'a>(&self, path: &'a Path) -> std::path::Display<'a> {
        path.strip_prefix(&self.root).unwrap_or(path).display()
    }
}

#[derive(Deserialize)]
struct Manifest {
    package: Package,
}

#[derive(Deserialize)]
struct Package {
    name: String,
}

/// The first of `names` that is an executable file on `PATH` (or a path itself).
pub fn which(names: &[&str]) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    names.iter().find_map(|name| {
        if name.contains('/') {
            return is_executable(Path::new(name)).then(|| PathBuf::from(name));
        }
        env::split_paths(&path).map(|dir| dir.join(name)).find(|p| is_executable(p))
    })
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Free bytes for this user on the file system of `dir` or of its nearest parent that exists.
pub fn free_bytes(dir: &Path) -> Option<u64> {
    let existing = dir.ancestors().find(|p| p.exists())?;
    let stat = rustix::fs::statvfs(existing).ok()?;
    Some(stat.f_bavail * stat.f_frsize)
}

/// `1.3 GB`.
pub fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

//! Files and folders that appear whole or not at all.
//!
//! A writer works in a hidden sibling (`.NAME.xxxxxx.tmp`), which is synced and then renamed over the target. A reader
//! sees the old artefact or the new one, also after `kill -9` or a full disk. A writer holds a lock on its sibling, so what
//! a killed one leaves behind is known, and removed by the next writer of the same target; where the file system has no
//! locks, once it is a day old.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use tempfile::{NamedTempFile, TempDir};

use crate::error::{AtPath, Error, Result};

/// Without locks a killed writer's leftovers are removed after this long; a live writer is assumed to touch its file more
/// often.
const STALE: Duration = Duration::from_secs(24 * 60 * 60);

/// Where what can be fetched or made again is kept for all runs of this user: `$NICS_CACHE`, or `nics` in
/// `$XDG_CACHE_HOME`, or `~/.cache/nics`; `None` when no variable says where.
pub fn cache_dir() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let dir = match (set("NICS_CACHE"), set("XDG_CACHE_HOME"), set("HOME")) {
        (Some(dir), _, _) => dir,
        (_, Some(dir), _) => dir.join("nics"),
        (_, _, home) => home?.join(".cache/nics"),
    };
    std::path::absolute(dir).ok()
}

/// Writes `bytes` to `path` so that `path` holds either what it held before or all of `bytes`.
///
/// Missing parent folders are made.
pub fn write_atomic(path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> Result<()> {
    let mut file = AtomicFile::create(path.as_ref())?;
    file.write_all(bytes.as_ref()).at("write", path.as_ref())?;
    file.commit()
}

/// A file that replaces its target when it is [committed](AtomicFile::commit), and vanishes when it is dropped before.
#[derive(Debug)]
pub struct AtomicFile {
    temp: NamedTempFile,
    path: PathBuf,
}

impl AtomicFile {
    /// Starts a new version of `path`. Missing parent folders are made.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (parent, prefix) = place(path)?;
        loop {
            let temp = named(&prefix).tempfile_in(&parent).at("create a temporary file beside", path)?;
            hold(temp.as_file());
            // Whoever cleans up may have come between the two.
            if temp.path().exists() {
                return Ok(Self { temp, path: path.to_owned() });
            }
        }
    }

    /// The file being written, for writers that need a `File` (memory maps, `set_len`).
    pub fn file_mut(&mut self) -> &mut File {
        self.temp.as_file_mut()
    }

    /// Where the bytes are until [`commit`](Self::commit), for writers that take a path.
    ///
    /// Such a writer must write into this file rather than replace it.
    pub fn temp_path(&self) -> &Path {
        self.temp.path()
    }

    /// Syncs the bytes to disk and renames the file over its target.
    pub fn commit(self) -> Result<()> {
        self.temp.as_file().sync_all().at("sync", self.temp.path())?;
        self.temp.persist(&self.path).map_err(|e| e.error).at("replace", &self.path)?;
        sync_parent(&self.path)
    }
}

impl Write for AtomicFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.temp.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.temp.flush()
    }
}

/// The right to write, while it lives, what belongs to a file of this name: a second one gets [`Error::Busy`], also in
/// another process. The file stays; the right goes with the process, however that ends.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code)] File);

impl Lock {
    /// Takes the right of `path`. Missing parent folders are made.
    pub fn take(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        place(path)?;
        let file = File::options().create(true).append(true).open(path).at("open", path)?;
        crate::jsonl::lock(&file, path)?;
        Ok(Self(file))
    }
}

/// A folder that replaces its target when it is [committed](AtomicDir::commit), and vanishes when it is dropped before.
#[derive(Debug)]
pub struct AtomicDir {
    temp: TempDir,
    path: PathBuf,
    /// Says that the folder has a living writer.
    _held: Option<File>,
}

impl AtomicDir {
    /// Starts a new version of the folder `path`. Missing parent folders are made.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (parent, prefix) = place(path)?;
        loop {
            let temp = named_dir(&prefix).tempdir_in(&parent).at("create a temporary folder beside", path)?;
            let held = File::open(temp.path()).ok().inspect(hold);
            if temp.path().exists() {
                return Ok(Self { temp, path: path.to_owned(), _held: held });
            }
        }
    }

    /// The folder to fill.
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Syncs every file and puts the folder in the place of its target; an older folder there is removed.
    ///
    /// Where the file system can exchange two names (Linux, most local file systems) there is no moment without a
    /// folder at the target. Elsewhere the old one is moved aside first, and moved back if the new one cannot follow.
    pub fn commit(self) -> Result<()> {
        sync_tree(self.temp.path())?;
        let (parent, prefix) = place(&self.path)?;
        if fs::symlink_metadata(&self.path).is_err() {
            let temp = self.temp.keep();
            fs::rename(&temp, &self.path)
                .inspect_err(|_| drop(fs::remove_dir_all(&temp)))
                .at("create", &self.path)?;
        } else if exchange(self.temp.path(), &self.path) {
            // The old folder now carries the temporary name and goes with it.
            drop(self.temp);
        } else {
            let aside =
                named_dir(&prefix).tempdir_in(&parent).at("create a temporary folder beside", &self.path)?;
            let old = aside.path().join("old");
            fs::rename(&self.path, &old).at("move aside", &self.path)?;
            if let Err(e) = fs::rename(self.temp.path(), &self.path) {
                fs::rename(&old, &self.path).at("move back", &self.path)?;
                return Err(Error::Io { action: "replace", path: self.path, source: e });
            }
        }
        sync_parent(&self.path)
    }
}

/// Parent folder (made if missing) and the name of `path`, with stale temporaries of the same name removed.
fn place(path: &Path) -> Result<(PathBuf, OsString)> {
    let Some(name) = path.file_name() else {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "the path names no file");
        return Err(Error::Io { action: "write", path: path.to_owned(), source });
    };
    let parent = match path.parent() {
        Some(p) if p != Path::new("") => p.to_owned(),
        _ => PathBuf::from("."),
    };
    fs::create_dir_all(&parent).at("create the folder", &parent)?;
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(".");
    remove_stale(&parent, &prefix);
    Ok((parent, prefix))
}

/// Says that a temporary has a living writer. File systems without locks go without.
fn hold(temp: &File) {
    let _ = flock(temp, FlockOperation::LockExclusive);
}

/// Whether the writer of a temporary is gone. The lock that this takes goes with the file that is returned: until then
/// nobody else takes the temporary for abandoned, nor for their own.
fn abandoned(temp: &Path, meta: &fs::Metadata) -> Option<File> {
    let file = File::open(temp).ok()?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Some(file),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => None,
        Err(_) => {
            let age = meta.modified().ok()?.elapsed().ok()?;
            (age > STALE).then_some(file)
        }
    }
}

/// Best effort: another process may be doing the same.
fn remove_stale(parent: &Path, prefix: &OsString) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let bytes = name.as_encoded_bytes();
        if !(bytes.starts_with(prefix.as_encoded_bytes()) && bytes.ends_with(b".tmp")) {
            continue;
        }
        let Ok(meta) = entry.metadata() else { continue };
        let path = entry.path();
        if let Some(_held) = abandoned(&path, &meta) {
            let _ = if meta.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
    }
}

/// Names `PREFIXxxxxxx.tmp`, with the permissions that a plain `File::create` would give.
fn named(prefix: &OsString) -> tempfile::Builder<'_, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix).suffix(".tmp");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder
}

/// As [`named`], for folders.
fn named_dir(prefix: &OsString) -> tempfile::Builder<'_, 'static> {
    let mut builder = named(prefix);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    builder
}

/// Swaps two names in one step; false where the system or file system cannot.
fn exchange(a: &Path, b: &Path) -> bool {
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).is_ok()
    }
    #[cfg(not(any(target_os = "linux", target_os = "macos")))]
    {
        let _ = (a, b);
        false
    }
}

fn sync_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).at("read", dir)? {
        let path = entry.at("read", dir)?.path();
        let meta = fs::symlink_metadata(&path).at("read", &path)?;
        if meta.is_dir() {
            sync_tree(&path)?;
        } else if meta.is_file() {
            File::open(&path).and_then(|f| f.sync_all()).at("sync", &path)?;
        }
    }
    sync_dir(dir)
}

fn sync_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(p) if p != Path::new("") => sync_dir(p),
        _ => sync_dir(Path::new(".")),
    }
}

/// Makes a rename inside `dir` durable. Some file systems cannot sync folders, which is no error of ours.
fn sync_dir(dir: &Path) -> Result<()> {
    let handle = File::open(dir).at("open", dir)?;
    let _ = handle.sync_all();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_whole_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/config.json");
        write_atomic(&path, "one").unwrap();
        write_atomic(&path, "two").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "two");
        assert_eq!(names(path.parent().unwrap()), ["config.json"]);
    }

    #[test]
    fn a_dropped_file_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        write_atomic(&path, "old").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"half of the new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        drop(file);
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(names(dir.path()), ["a.txt"]);
    }

    #[cfg(unix)]
    #[test]
    fn permissions_are_those_of_a_plain_file() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        File::create(dir.path().join("plain")).unwrap();
        write_atomic(dir.path().join("ours"), "x").unwrap();
        let mode = |name| fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
        assert_eq!(mode("ours"), mode("plain"));
    }

    #[test]
    fn a_folder_replaces_an_older_one() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("checkpoint");
        for version in ["first", "second"] {
            let new = AtomicDir::create(&target).unwrap();
            fs::create_dir(new.path().join("sub")).unwrap();
            fs::write(new.path().join(version), version).unwrap();
            new.commit().unwrap();
        }
        assert_eq!(names(&target), ["second", "sub"]);
        assert_eq!(names(dir.path()), ["checkpoint"]);
    }

    #[test]
    fn a_reader_never_finds_the_folder_missing() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("checkpoint");
        let write = |n: u32| {
            let new = AtomicDir::create(&target).unwrap();
            fs::write(new.path().join("n"), n.to_string()).unwrap();
            new.commit().unwrap();
        };
        write(0);
        if !exchange(&target, &target) {
            eprintln!("this file system cannot exchange names; the fallback has a gap by nature");
            return;
        }
        let done = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                (1..50).for_each(write);
                done.store(true, Ordering::Relaxed);
            });
            while !done.load(Ordering::Relaxed) {
                assert!(target.is_dir());
            }
        });
        assert_eq!(fs::read_to_string(target.join("n")).unwrap(), "49");
    }

    #[test]
    fn a_folder_dropped_before_commit_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        let new = AtomicDir::create(&target).unwrap();
        fs::write(new.path().join("x"), "x").unwrap();
        drop(new);
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn leftovers_of_a_killed_writer_go_and_those_of_a_living_one_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        let folder = dir.path().join("made");
        for killed in [".a.txt.k1ll3d.tmp", ".b.txt.k1ll3d.tmp"] {
            fs::write(dir.path().join(killed), "half").unwrap();
        }
        fs::create_dir(dir.path().join(".made.k1ll3d.tmp")).unwrap();
        fs::write(dir.path().join(".made.k1ll3d.tmp/x"), "half").unwrap();

        let mut living = AtomicFile::create(&path).unwrap();
        let living_folder = AtomicDir::create(&folder).unwrap();
        fs::write(living_folder.path().join("x"), "whole").unwrap();
        write_atomic(&path, "second").unwrap();
        AtomicDir::create(&folder).unwrap().commit().unwrap();
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        let mut expected =
            vec![".b.txt.k1ll3d.tmp".to_owned(), name(living.temp_path()), name(living_folder.path())];
        expected.extend(["a.txt", "made"].map(String::from));
        expected.sort();
        assert_eq!(names(dir.path()), expected);

        living.write_all(b"first").unwrap();
        living.commit().unwrap();
        living_folder.commit().unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), "first");
        assert_eq!(fs::read_to_string(folder.join("x")).unwrap(), "whole");
        assert_eq!(names(dir.path()), [".b.txt.k1ll3d.tmp", "a.txt", "made"]);
    }

    #[test]
    fn a_lock_is_held_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/.lock");
        let first = Lock::take(&path).unwrap();
        assert!(matches!(Lock::take(&path), Err(Error::Busy(_))));
        drop(first);
        Lock::take(&path).unwrap();
    }

    #[test]
    fn a_path_without_a_name_is_an_error() {
        let e = write_atomic("/", "x").unwrap_err();
        assert!(e.to_string().contains("cannot write /"), "{e}");
    }
}

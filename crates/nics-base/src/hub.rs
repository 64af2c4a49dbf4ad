//! Hugging Face hub ids to local files.
//!
//! A model or dataset argument is a folder, or an id `org/name[@revision]` whose files are fetched into the cache that
//! the Python libraries share (layout and names from the `hf-hub` crate). The variables of those libraries mean here
//! what they mean there: `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN` and the token file, `HF_HUB_OFFLINE`,
//! `HF_HUB_ETAG_TIMEOUT`, `HF_HUB_DOWNLOAD_TIMEOUT`.
//!
//! ```no_run
//! use nics_base::hub::Hub;
//!
//! let model = Hub::from_env().resolve_model("Infinigence/Megrez-3B-Instruct")?;
//! let config = model.file("config.json")?;
//! let generation = model.try_file("generation_config.json")?; // None where the model has none
//! # Ok::<(), nics_base::hub::HubError>(())
//! ```
//!
//! Transfers are our own: those of `hf-hub` have no time limit, know nothing of `HF_HUB_OFFLINE`, trust the names that
//! a server sends, and do not compare what arrived with what was announced. A file that is in the cache is used as it
//! is, without asking the hub whether a newer one exists.

mod error;
mod transfer;

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use hf_hub::{Cache, Repo, RepoType};

pub use error::HubError;

const ENDPOINT: &str = "https://huggingface.co";
const REVISION: &str = "main";

/// Where files come from: an endpoint, a cache folder, a token.
#[derive(Clone)]
pub struct Hub {
    endpoint: String,
    cache: Cache,
    token: Option<String>,
    offline: bool,
    /// Longest wait for a connection, and for the head of an answer.
    patience: Duration,
    /// Longest wait between two pieces of a body.
    stall: Duration,
}

// By hand: a token does not belong in logs.
impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub")
            .field("endpoint", &self.endpoint)
            .field("cache", self.cache.path())
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

impl Hub {
    /// The hub as the environment describes it.
    pub fn from_env() -> Self {
        Self::from_vars(|name| std::env::var(name).ok())
    }

    /// The hub as `var` describes it; a variable that is empty counts as unset.
    pub fn from_vars(var: impl Fn(&str) -> Option<String>) -> Self {
        let var = |name: &str| var(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        let user = var("HOME").map_or_else(|| PathBuf::from("."), PathBuf::from);
        let expand = |path: String| match path.strip_prefix("~/") {
            Some(rest) => user.join(rest),
            None => PathBuf::from(path),
        };
        let caches = var("XDG_CACHE_HOME").map_or_else(|| user.join(".cache"), expand);
        let home = var("HF_HOME").map_or_else(|| caches.join("huggingface"), expand);
        let cache = var("HF_HUB_CACHE").or_else(|| var("HUGGINGFACE_HUB_CACHE")).map(expand);
        let token = var("HF_TOKEN").or_else(|| var("HUGGING_FACE_HUB_TOKEN")).or_else(|| {
            let file = var("HF_TOKEN_PATH").map_or_else(|| home.join("token"), expand);
            let text = std::fs::read_to_string(file).ok()?;
            Some(text.trim().to_owned()).filter(|t| !t.is_empty())
        });
        let on = |name: &str| {
            var(name).is_some_and(|v| matches!(v.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
        };
        let seconds = |name: &str, default| {
            let given =
                var(name).and_then(|v| v.parse::<f64>().ok()).filter(|s| (0.001..=86_400.0).contains(s));
            Duration::from_secs_f64(given.unwrap_or(default))
        };
        Self {
            endpoint: var("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into()).trim_end_matches('/').to_owned(),
            cache: Cache::new(cache.unwrap_or_else(|| home.join("hub"))),
            token,
            offline: on("HF_HUB_OFFLINE") || on("TRANSFORMERS_OFFLINE"),
            patience: seconds("HF_HUB_ETAG_TIMEOUT", 10.0),
            stall: seconds("HF_HUB_DOWNLOAD_TIMEOUT", 30.0),
        }
    }

    /// The folder that downloaded files are kept in.
    pub fn cache_dir(&self) -> &Path {
        self.cache.path()
    }

    /// Whether only cached files may be used.
    pub fn is_offline(&self) -> bool {
        self.offline
    }

    /// A model: a folder, or a hub id `org/name[@revision]`. Fetches nothing yet.
    pub fn resolve_model(&self, arg: &str) -> Result<Source, HubError> {
        self.resolve(arg, RepoType::Model)
    }

    /// A dataset: a folder, or a hub id `org/name[@revision]`. Fetches nothing yet.
    pub fn resolve_dataset(&self, arg: &str) -> Result<Source, HubError> {
        self.resolve(arg, RepoType::Dataset)
    }

    fn resolve(&self, arg: &str, kind: RepoType) -> Result<Source, HubError> {
        let path = Path::new(arg);
        if path.is_dir() {
            return Ok(Source::folder(path));
        }
        let refuse = |reason| Err(HubError::BadArgument { arg: arg.into(), reason });
        if arg.is_empty() {
            return refuse("it is empty");
        }
        if path.is_file() {
            return refuse("it is a file; give the folder that holds it");
        }
        let (id, revision) = arg.split_once('@').unwrap_or((arg, REVISION));
        if id.starts_with(['.', '/', '~']) || id.matches('/').count() != 1 {
            return refuse("there is no such folder, and a hub id has the form org/name");
        }
        if !id.split('/').all(is_id_part) || id.len() > 96 || id.contains("--") || id.contains("..") {
            return refuse(
                "there is no such folder, and a hub id has only letters, digits, `-`, `_` and `.`",
            );
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
        if !revision.chars().all(plain) || revision.split('/').any(|p| matches!(p, "" | "." | "..")) {
            return refuse("its revision is not the name of a branch or tag, nor a commit");
        }
        if !self.endpoint.starts_with("http://") && !self.endpoint.starts_with("https://") {
            return Err(HubError::BadEndpoint { endpoint: self.endpoint.as_str().into() });
        }
        let repo = Repo::with_revision(id.to_owned(), kind, revision.to_owned());
        Ok(Source(Place::Hub(Box::new(Remote { hub: self.clone(), id: id.to_owned(), repo }))))
    }
}

/// A part of an id: starts and ends with a letter, digit or underscore.
fn is_id_part(part: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    part.starts_with(word) && part.ends_with(word) && part.chars().all(|c| word(c) || c == '-' || c == '.')
}

/// A model or dataset whose files can be asked for by name.
#[derive(Debug, Clone)]
pub struct Source(Place);

#[derive(Debug, Clone)]
enum Place {
    Folder(PathBuf),
    Hub(Box<Remote>),
}

/// A repository of the hub at a revision.
#[derive(Debug, Clone)]
struct Remote {
    hub: Hub,
    id: String,
    repo: Repo,
}

impl Source {
    /// The files of a folder.
    pub fn folder(path: impl Into<PathBuf>) -> Self {
        Self(Place::Folder(path.into()))
    }

    /// The folder, or the id with its revision where that is not `main`.
    pub fn name(&self) -> String {
        match &self.0 {
            Place::Folder(path) => path.display().to_string(),
            Place::Hub(remote) if remote.repo.revision() == REVISION => remote.id.clone(),
            Place::Hub(remote) => format!("{}@{}", remote.id, remote.repo.revision()),
        }
    }

    /// The folder itself, where the source is one.
    pub fn as_folder(&self) -> Option<&Path> {
        match &self.0 {
            Place::Folder(path) => Some(path),
            Place::Hub(_) => None,
        }
    }

    /// The local path of file `name` (`/` between folders), fetched if need be.
    ///
    /// # Errors
    /// [`HubError::NotInFolder`] or [`HubError::NotInRepo`] where there is no such file; every other variant for what
    /// keeps us from knowing.
    pub fn file(&self, name: &str) -> Result<PathBuf, HubError> {
        check_name(name)?;
        match &self.0 {
            Place::Folder(folder) => {
                let path = folder.join(name);
                if path.is_file() {
                    return Ok(path);
                }
                Err(HubError::NotInFolder { folder: folder.as_path().into(), file: name.into() })
            }
            Place::Hub(remote) => remote.file(name),
        }
    }

    /// As [`file`](Self::file), but `None` where there is no such file.
    ///
    /// Offline, a file that is not in the cache counts as absent if other files of the same revision are there.
    pub fn try_file(&self, name: &str) -> Result<Option<PathBuf>, HubError> {
        match self.file(name) {
            Ok(path) => Ok(Some(path)),
            Err(
                HubError::NotInFolder { .. }
                | HubError::NotInRepo { .. }
                | HubError::Offline { revision_cached: true, .. },
            ) => Ok(None),
            Err(other) => Err(other),
        }
    }

    /// The names of all files, sorted, `/` between folders. Offline, those in the cache.
    pub fn list(&self) -> Result<Vec<String>, HubError> {
        let mut names = match &self.0 {
            Place::Folder(folder) => names_below(folder)?,
            Place::Hub(remote) => match remote.snapshot() {
                Some(snapshot) if remote.hub.offline => names_below(&snapshot)?,
                None if remote.hub.offline => return Err(remote.offline("the list of files")),
                _ => transfer::list(remote)?,
            },
        };
        names.sort();
        Ok(names)
    }
}

/// Refuses names that would leave the folder; they come from index files, which anybody may have written.
fn check_name(name: &str) -> Result<(), HubError> {
    let inside = Path::new(name).components().all(|c| matches!(c, Component::Normal(_)));
    if name.is_empty()
        || !inside
        || name.contains(['\\', '\0', '?', '#', '%'])
        || name.chars().any(char::is_control)
    {
        return Err(HubError::BadFileName { file: name.into() });
    }
    Ok(())
}

/// Files below `root`, links followed; hidden ones left out.
fn names_below(root: &Path) -> Result<Vec<String>, HubError> {
    let mut names = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(below) = folders.pop() {
        let folder = root.join(&below);
        let unreadable = |source| HubError::Io { action: "read the folder", path: folder.clone(), source };
        for entry in std::fs::read_dir(&folder).map_err(unreadable)? {
            let name = entry.map_err(unreadable)?.file_name();
            let Some(text) = name.to_str().filter(|t| !t.starts_with('.')) else { continue };
            let path = below.join(text);
            // Depth guards against links that lead in circles.
            match std::fs::metadata(root.join(&path)) {
                Ok(m) if m.is_dir() && path.components().count() < 8 => folders.push(path),
                Ok(m) if m.is_file() => names.push(path.to_string_lossy().replace('\\', "/")),
                _ => {}
            }
        }
    }
    Ok(names)
}

impl Remote {
    fn file(&self, name: &str) -> Result<PathBuf, HubError> {
        if let Some(path) = self.cached(name) {
            return Ok(path);
        }
        if self.hub.offline {
            return Err(self.offline(name));
        }
        // Known to be absent from the cached commit, noted as the Python library notes it.
        if self.snapshot().is_some_and(|s| self.absence(&s, name).is_some_and(|note| note.exists())) {
            return Err(self.not_in_repo(name));
        }
        transfer::fetch(self, name)
    }

    /// The cached copy of `name` at our revision.
    fn cached(&self, name: &str) -> Option<PathBuf> {
        let path = self.snapshot()?.join(name);
        path.is_file().then_some(path)
    }

    /// The folder of the commit that our revision stands for, where the cache has one.
    fn snapshot(&self) -> Option<PathBuf> {
        let revision = self.repo.revision();
        let cache = self.hub.cache.repo(self.repo.clone());
        let noted = std::fs::read_to_string(self.folder().join("refs").join(revision)).ok();
        let commit = noted.map_or_else(|| revision.to_owned(), |c| c.trim().to_owned());
        if !transfer::is_plain_name(&commit) {
            return None;
        }
        Some(cache.pointer_path(&commit)).filter(|p| p.is_dir())
    }

    fn folder(&self) -> PathBuf {
        self.hub.cache.path().join(self.repo.folder_name())
    }

    /// Where the absence of `name` from the commit of `snapshot` is noted.
    fn absence(&self, snapshot: &Path, name: &str) -> Option<PathBuf> {
        Some(self.folder().join(".no_exist").join(snapshot.file_name()?).join(name))
    }

    fn offline(&self, file: &str) -> HubError {
        HubError::Offline {
            id: self.id.as_str().into(),
            revision: self.repo.revision().into(),
            file: file.into(),
            cache: self.hub.cache_dir().into(),
            revision_cached: self.snapshot().is_some(),
        }
    }

    fn not_in_repo(&self, file: &str) -> HubError {
        HubError::NotInRepo {
            id: self.id.as_str().into(),
            revision: self.repo.revision().into(),
            file: file.into(),
            endpoint: self.hub.endpoint.as_str().into(),
        }
    }
}

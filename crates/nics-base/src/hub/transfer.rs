//! Requests to the hub: the head of a file, its body, the list of a repository's files.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response};
use ureq::{Agent, Body};

use super::{HubError, Remote};
use crate::exit::TryAgain;

/// How long another process may hold the lock of a file before we give up.
const LOCK_PATIENCE: Duration = Duration::from_secs(600);
/// Longest answer to a listing, in bytes.
const LIST_LIMIT: u64 = 64 << 20;

/// What the hub says about a file before it sends it.
struct Head {
    commit: String,
    etag: String,
    /// In bytes.
    size: Option<u64>,
}

/// Fetches `name` into the cache and returns its path in the snapshot.
pub(super) fn fetch(remote: &Remote, name: &str) -> Result<PathBuf, HubError> {
    let head = head(remote, name)?;
    let cache = remote.hub.cache.repo(remote.repo.clone());
    let blob = cache.blob_path(&head.etag);
    let pointer = cache.pointer_path(&head.commit).join(name);
    for path in [&blob, &pointer] {
        let parent = path.parent().unwrap_or(path);
        fs::create_dir_all(parent).map_err(io("create the folder", parent))?;
    }

    let lock = lock(remote, name, &blob.with_extension("lock"))?;
    if !blob.is_file() {
        let part = blob.with_extension("part");
        body(remote, name, &head, &part)?;
        fs::rename(&part, &blob).map_err(io("rename into the cache", &blob))?;
    }
    link(&blob, &pointer).map_err(io("link into the cache", &pointer))?;
    // Last, so that a revision is known only once it has a file.
    cache.create_ref(&head.commit).map_err(io("note the revision in", &remote.folder()))?;
    drop(lock);
    Ok(pointer)
}

/// The names of all files of the repository at its revision.
pub(super) fn list(remote: &Remote) -> Result<Vec<String>, HubError> {
    const WHAT: &str = "the list of files";
    let url = format!("{}/api/{}", remote.hub.endpoint, remote.repo.api_url());
    let mut answer = get(remote, &agent(remote, true), &url, None).map_err(|e| remote.failed(WHAT, &e))?;
    let status = answer.status().as_u16();
    if status != 200 {
        return Err(remote.refused(WHAT, status, answer.headers()));
    }
    let bad = |reason: &str| remote.bad_answer(WHAT, reason);
    let text = answer.body_mut().with_config().limit(LIST_LIMIT).read_to_string();
    let text = text.map_err(|e| remote.failed(WHAT, &e))?;
    let info: serde_json::Value = serde_json::from_str(&text).map_err(|e| bad(&format!("no JSON: {e}")))?;
    let siblings = info["siblings"].as_array().ok_or_else(|| bad("JSON without `siblings`"))?;
    let names = siblings.iter().map(|s| s["rfilename"].as_str().map(str::to_owned));
    names.collect::<Option<_>>().ok_or_else(|| bad("a sibling without `rfilename`"))
}

/// Whether a name that a server or a cache file gives us stays one plain path component.
pub(super) fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !name.is_empty() && name.len() <= 128 && !name.starts_with('.') && name.chars().all(plain)
}

/// Asks for the head of a file.
///
/// Commit and etag come from the hub itself, large files then redirect to a content server: redirects that stay on the
/// host are followed, the first one that leaves it ends the search.
fn head(remote: &Remote, name: &str) -> Result<Head, HubError> {
    let agent = agent(remote, false);
    let mut url = file_url(remote, name);
    let mut answer = None;
    for _ in 0..5 {
        let got = request(remote, agent.head(&url)).call().map_err(|e| remote.failed(name, &e))?;
        let status = got.status();
        let location = got.headers().get("location").and_then(|l| l.to_str().ok()).map(str::to_owned);
        let next = location.filter(|l| status.is_redirection() && l.starts_with('/') && !l.starts_with("//"));
        answer = Some(got);
        match next {
            Some(path) => url = format!("{}{path}", origin(&remote.hub.endpoint)),
            None => break,
        }
    }
    let answer = answer.ok_or_else(|| remote.bad_answer(name, "nothing"))?;
    let (status, headers) = (answer.status(), answer.headers());
    if !status.is_success() && !status.is_redirection() {
        let missing = remote.refused(name, status.as_u16(), headers);
        if matches!(missing, HubError::NotInRepo { .. }) {
            note_absence(remote, name, headers);
        }
        return Err(missing);
    }
    let text = |key: &str| headers.get(key).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let etag = text("x-linked-etag").or_else(|| text("etag"));
    let etag = etag.map(|e| e.trim_start_matches("W/").trim_matches('"').to_owned());
    let commit = text("x-repo-commit");
    let size = text("x-linked-size").or_else(|| text("content-length").filter(|_| status.is_success()));
    match (commit, etag) {
        (Some(commit), Some(etag)) if is_plain_name(&commit) && is_plain_name(&etag) => {
            Ok(Head { commit, etag, size: size.and_then(|s| s.parse().ok()) })
        }
        (Some(_), Some(_)) => Err(remote.bad_answer(name, "its x-repo-commit or etag is no plain name")),
        _ => Err(remote.bad_answer(name, "it has no x-repo-commit and etag; does HF_ENDPOINT name a hub?")),
    }
}

/// Downloads the body into `part`, going on where an earlier attempt stopped.
fn body(remote: &Remote, name: &str, head: &Head, part: &Path) -> Result<(), HubError> {
    let mut open = OpenOptions::new();
    let mut file = open.write(true).create(true).truncate(false).open(part).map_err(io("open", part))?;
    let mut done = file.seek(SeekFrom::End(0)).map_err(io("read", part))?;
    if done > 0 && head.size.is_none_or(|size| done >= size) {
        // Nothing left to ask for, or no way to tell: start over, servers answer an empty range with an error.
        done = 0;
    }
    let range = (done > 0).then(|| format!("bytes={done}-"));
    let agent = agent(remote, true);
    let answer = get(remote, &agent, &file_url(remote, name), range.as_deref());
    let mut answer = answer.map_err(|e| remote.failed(name, &e))?;
    match answer.status().as_u16() {
        206 if done > 0 => {}
        200 => done = 0,
        other => return Err(remote.refused(name, other, answer.headers())),
    }
    file.set_len(done).map_err(io("write", part))?;
    file.seek(SeekFrom::Start(done)).map_err(io("write", part))?;

    tracing::info!(repository = remote.id, file = name, bytes = head.size, "downloading");
    let bar = Bar::new(head.size, done, name);
    let mut reader = answer.body_mut().with_config().limit(u64::MAX).reader();
    let mut buffer = vec![0; 1 << 18];
    loop {
        // What arrived before a break stays in `part` for the next attempt.
        let n = match reader.read(&mut buffer) {
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(remote.failed(name, &ureq::Error::from(e))),
        };
        if n == 0 {
            break;
        }
        file.write_all(&buffer[..n]).map_err(io("write", part))?;
        done += n as u64;
        bar.at(done);
    }
    if let Some(size) = head.size.filter(|&size| size != done) {
        drop(fs::remove_file(part));
        return Err(remote.bad_answer(name, &format!("it announced {size} bytes and sent {done}")));
    }
    file.sync_all().map_err(io("write", part))
}

/// The hub's address of a file. Names were checked to need no escapes but that of a space.
fn file_url(remote: &Remote, name: &str) -> String {
    let repo = &remote.repo;
    let name = name.replace(' ', "%20");
    format!("{}/{}/resolve/{}/{name}", remote.hub.endpoint, repo.url(), repo.url_revision())
}

/// Scheme and host of an address.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find('/').map_or(url.len(), |at| host + at);
    &url[..end]
}

fn agent(remote: &Remote, follow: bool) -> Agent {
    let hub = &remote.hub;
    let config = Agent::config_builder()
        .user_agent(concat!("nics/", env!("CARGO_PKG_VERSION")))
        .http_status_as_error(false)
        .max_redirects(if follow { 10 } else { 0 })
        .max_redirects_will_error(false)
        // The token is for the hub, not for the content server that it sends us to.
        .redirect_auth_headers(RedirectAuthHeaders::SameHost)
        .timeout_resolve(Some(hub.patience))
        .timeout_connect(Some(hub.patience))
        .timeout_recv_response(Some(hub.patience))
        .timeout_per_read(Some(hub.stall));
    let host = origin(&hub.endpoint).split("://").nth(1).unwrap_or_default();
    let local = ["localhost", "127.", "[::1]"].iter().any(|l| host.starts_with(l));
    // A proxy cannot reach this machine's own addresses.
    let config = if local { config.proxy(None) } else { config };
    config.build().into()
}

fn request<B>(remote: &Remote, mut request: ureq::RequestBuilder<B>) -> ureq::RequestBuilder<B> {
    // Lengths must be those of the file.
    request = request.header("accept-encoding", "identity");
    match &remote.hub.token {
        Some(token) => request.header("authorization", format!("Bearer {token}")),
        None => request,
    }
}

fn get(
    remote: &Remote,
    agent: &Agent,
    url: &str,
    range: Option<&str>,
) -> Result<Response<Body>, ureq::Error> {
    let request = request(remote, agent.get(url));
    match range {
        Some(range) => request.header("range", range).call(),
        None => request.call(),
    }
}

/// Waits for the lock of a blob. The lock ends with the file handle.
fn lock(remote: &Remote, name: &str, path: &Path) -> Result<File, HubError> {
    let file = File::create(path).map_err(io("create", path))?;
    let start = Instant::now();
    while let Err(e) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
        if e != rustix::io::Errno::WOULDBLOCK && e != rustix::io::Errno::INTR {
            return Err(io("lock", path)(e.into()));
        }
        if start.elapsed() > LOCK_PATIENCE {
            return Err(HubError::Busy {
                id: remote.id.as_str().into(),
                file: name.into(),
                lock: path.into(),
                reason: TryAgain(format!("still locked after {} s", LOCK_PATIENCE.as_secs())),
            });
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(file)
}

/// Makes `pointer` stand for `blob` by a relative link, so that the cache can be moved.
fn link(blob: &Path, pointer: &Path) -> io::Result<()> {
    if pointer.exists() {
        return Ok(());
    }
    // A link that leads nowhere.
    drop(fs::remove_file(pointer));
    let Some(repo) = blob.parent().and_then(Path::parent) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    let below = pointer.strip_prefix(repo).map_err(io::Error::other)?;
    let mut target: PathBuf = below.components().skip(1).map(|_| "..").collect();
    target.push(blob.strip_prefix(repo).map_err(io::Error::other)?);
    #[cfg(unix)]
    let made = std::os::unix::fs::symlink(&target, pointer);
    #[cfg(not(unix))]
    let made = fs::copy(blob, pointer).map(drop);
    // Another process may have made it in the meantime.
    if pointer.exists() { Ok(()) } else { made }
}

/// Notes, as the Python library does, that a commit lacks a file, so that it is not asked for again.
fn note_absence(remote: &Remote, name: &str, headers: &HeaderMap) {
    let commit = headers.get("x-repo-commit").and_then(|c| c.to_str().ok()).filter(|c| is_plain_name(c));
    if let Some(commit) = commit {
        let note = remote.folder().join(".no_exist").join(commit).join(name);
        let made = fs::create_dir_all(note.parent().unwrap_or(&note)).and_then(|()| File::create(&note));
        if let Err(e) = made {
            tracing::debug!(path = %note.display(), error = %e, "cannot note an absent file");
        }
    }
}

impl Remote {
    /// The error for an HTTP status that is none of success.
    fn refused(&self, file: &str, status: u16, headers: &HeaderMap) -> HubError {
        let (id, endpoint): (Box<str>, Box<str>) =
            (self.id.as_str().into(), self.hub.endpoint.as_str().into());
        let revision = self.repo.revision().into();
        let code = headers.get("x-error-code").and_then(|c| c.to_str().ok()).unwrap_or_default();
        match (status, code) {
            (_, "EntryNotFound") => self.not_in_repo(file),
            (_, "RevisionNotFound") => HubError::NoSuchRevision { id, revision, endpoint },
            (_, "RepoNotFound") => HubError::NoSuchRepo { id, endpoint },
            (_, "GatedRepo") => HubError::Denied {
                id,
                endpoint,
                status,
                mend: "accept its conditions on the hub's page, then set HF_TOKEN to a token of that account",
            },
            // A hub that gives no code: a repository with a revision and no file is the common case.
            (404, _) if headers.contains_key("x-repo-commit") => self.not_in_repo(file),
            (404, _) => HubError::NoSuchRepo { id, endpoint },
            // The hub does not tell strangers whether a repository exists.
            (401, _) if self.hub.token.is_none() => HubError::Denied {
                id,
                endpoint,
                status,
                mend: "it does not exist or is private; check the spelling, or set HF_TOKEN",
            },
            (401 | 403, _) => HubError::Denied {
                id,
                endpoint,
                status,
                mend: "the token (HF_TOKEN or the token file) is not valid for it",
            },
            _ => HubError::Status {
                endpoint,
                id,
                file: file.into(),
                status,
                passing: (status == 429 || status >= 500)
                    .then(|| TryAgain("this may pass; try again later".into())),
            },
        }
    }

    /// The error for a request that got no answer, or a body that broke off.
    fn failed(&self, file: &str, error: &ureq::Error) -> HubError {
        let (id, endpoint): (Box<str>, Box<str>) =
            (self.id.as_str().into(), self.hub.endpoint.as_str().into());
        let file = file.into();
        let late = match error {
            ureq::Error::Timeout(_) => true,
            ureq::Error::Io(e) => e.kind() == io::ErrorKind::TimedOut,
            _ => false,
        };
        match error {
            _ if late => HubError::Timeout { endpoint, id, file, reason: TryAgain(error.to_string()) },
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => HubError::BadEndpoint { endpoint },
            ureq::Error::Protocol(e) => HubError::BadAnswer { endpoint, id, file, reason: e.to_string() },
            ureq::Error::LargeResponseHeader(..)
            | ureq::Error::BodyExceedsLimit(_)
            | ureq::Error::TooManyRedirects
            | ureq::Error::RedirectFailed => {
                HubError::BadAnswer { endpoint, id, file, reason: error.to_string() }
            }
            _ => {
                let cache = self.hub.cache_dir().into();
                HubError::Unreachable { endpoint, id, file, cache, reason: TryAgain(error.to_string()) }
            }
        }
    }

    fn bad_answer(&self, file: &str, reason: &str) -> HubError {
        HubError::BadAnswer {
            endpoint: self.hub.endpoint.as_str().into(),
            id: self.id.as_str().into(),
            file: file.into(),
            reason: reason.to_owned(),
        }
    }
}

fn io<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> HubError + 'a {
    move |source| HubError::Io { action, path: path.to_owned(), source }
}

/// Progress of one download, where there is a terminal and it is worth showing.
struct Bar {
    #[cfg(feature = "cli")]
    shown: Option<crate::progress::Progress>,
}

impl Bar {
    #[cfg(feature = "cli")]
    fn new(size: Option<u64>, done: u64, name: &str) -> Self {
        let shown = size.filter(|s| *s > 8 << 20).map(|s| crate::progress::Progress::bytes(s, name));
        if let Some(bar) = &shown {
            bar.start_at(done);
        }
        Self { shown }
    }

    #[cfg(feature = "cli")]
    fn at(&self, done: u64) {
        if let Some(bar) = &self.shown {
            bar.set(done);
        }
    }

    #[cfg(not(feature = "cli"))]
    fn new(_: Option<u64>, _: u64, _: &str) -> Self {
        Self {}
    }

    #[cfg(not(feature = "cli"))]
    #[allow(clippy::unused_self)]
    fn at(&self, _: u64) {}
}

#[cfg(feature = "cli")]
impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.shown {
            bar.finish();
        }
    }
}

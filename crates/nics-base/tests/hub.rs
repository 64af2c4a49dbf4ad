//! The hub client against a hub that lives in the test: right answers, wrong answers, no answers.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nics_base::exit::TryAgain;
use nics_base::hub::{Hub, HubError};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// No test may take longer to fail than a user should wait.
const PATIENCE: Duration = Duration::from_secs(1);

/// How the hub behaves.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Well,
    /// Files live on a content server: the hub redirects, with the headers that matter on the redirect.
    Redirects,
    Status(u16),
    /// A status with the hub's code for it.
    Coded(u16, &'static str),
    Silent,
    Garbage,
    /// 200 without the hub's headers, as a captive portal answers.
    Portal,
    HostileNames,
    /// Sends half a body, then closes.
    Breaks,
    /// Announces one length on the head and sends another.
    Lies,
}

struct FakeHub {
    endpoint: String,
    log: Arc<Mutex<Vec<String>>>,
    mood: Arc<Mutex<Mood>>,
    files: Arc<Mutex<HashMap<String, Vec<u8>>>>,
}

impl FakeHub {
    fn start(mood: Mood) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let files = HashMap::from([
            ("config.json".to_owned(), b"{\"hidden_size\": 8}".to_vec()),
            ("sub/a file.bin".to_owned(), (0..200_000_u32).map(|i| (i * 7) as u8).collect()),
        ]);
        let hub = Self {
            endpoint,
            log: Arc::default(),
            mood: Arc::new(Mutex::new(mood)),
            files: Arc::new(Mutex::new(files)),
        };
        let (log, mood, files) = (hub.log.clone(), hub.mood.clone(), hub.files.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // Copies: a silent answer must not hold a lock.
                let (log, mood, files) = (log.clone(), *mood.lock().unwrap(), files.lock().unwrap().clone());
                std::thread::spawn(move || answer(stream.unwrap(), &log, mood, &files));
            }
        });
        hub
    }

    fn client(&self, cache: &Path) -> Hub {
        client(&self.endpoint, cache, &[])
    }

    fn requests(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }
}

fn client(endpoint: &str, cache: &Path, more: &[(&str, &str)]) -> Hub {
    let mut vars = HashMap::from([
        ("HF_HOME", cache.to_str().unwrap()),
        ("HF_ENDPOINT", endpoint),
        ("HF_HUB_ETAG_TIMEOUT", "0.5"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "0.5"),
    ]);
    vars.extend(more.iter().copied());
    Hub::from_vars(|name| vars.get(name).map(|v| (*v).to_owned()))
}

/// Serves one request: `HEAD|GET /[datasets/]org/name/resolve/main/FILE`, the listing under `/api/`, and `/cdn/FILE`.
fn answer(stream: TcpStream, log: &Mutex<Vec<String>>, mood: Mood, files: &HashMap<String, Vec<u8>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line == "\r\n" {
            break;
        }
        lines.push(line.trim_end().to_owned());
    }
    let Some(first) = lines.first().cloned() else { return };
    let header = |name: &str| {
        let found = lines.iter().find(|l| l.to_ascii_lowercase().starts_with(&format!("{name}:")));
        found.map(|l| l.split_once(':').unwrap().1.trim().to_owned())
    };
    let (method, path) = {
        let mut words = first.split(' ');
        (words.next().unwrap().to_owned(), words.next().unwrap().to_owned())
    };
    let range = header("range")
        .map(|r| r.trim_start_matches("bytes=").trim_end_matches('-').parse::<usize>().unwrap());
    let auth = header("authorization").map(|a| format!(" [{a}]")).unwrap_or_default();
    let from = range.map(|r| format!(" from {r}")).unwrap_or_default();
    log.lock().unwrap().push(format!("{method} {path}{auth}{from}"));

    let mut stream = stream;
    let mut send = |status: u16, headers: &[(&str, &str)], body: &[u8]| {
        let mut head = format!("HTTP/1.1 {status} X\r\nconnection: close\r\n");
        for (k, v) in headers {
            head.extend([*k, ": ", *v, "\r\n"]);
        }
        if !headers.iter().any(|(k, _)| *k == "content-length") {
            head.extend(["content-length: ", &body.len().to_string(), "\r\n"]);
        }
        let body = if method == "HEAD" { &[][..] } else { body };
        let _ = stream.write_all(&[head.as_bytes(), b"\r\n", body].concat());
    };
    let hub_headers = [("x-repo-commit", COMMIT), ("etag", "\"abc123\"")];

    match mood {
        Mood::Status(status) => return send(status, &[], b"no"),
        Mood::Coded(status, code) => return send(status, &[("x-error-code", code)], b"no"),
        Mood::Silent => return std::thread::sleep(Duration::from_secs(5)),
        Mood::Garbage => {
            let _ = stream.write_all(b"\x00\x01\x02 nonsense\r\n\r\n");
            return;
        }
        Mood::Portal => return send(200, &[("content-type", "text/html")], b"<html>please log in</html>"),
        Mood::HostileNames => {
            return send(200, &[("x-repo-commit", "../../../evil"), ("etag", "\"../../evil\"")], b"evil");
        }
        _ => {}
    }
    if path.starts_with("/api/") {
        let names: Vec<_> = files.keys().map(|f| format!("{{\"rfilename\": \"{f}\"}}")).collect();
        let body = format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [{}]}}", names.join(","));
        return send(200, &[], body.as_bytes());
    }
    let name = path
        .rsplit_once("/resolve/main/")
        .or_else(|| path.rsplit_once("/cdn/"))
        .map(|(_, f)| f.replace("%20", " "));
    let Some(body) = name.and_then(|n| files.get(&n)) else {
        return send(
            404,
            &[("x-repo-commit", COMMIT), ("x-error-code", "EntryNotFound")],
            b"Entry not found",
        );
    };
    let size = body.len().to_string();
    if mood == Mood::Redirects && !path.starts_with("/cdn/") {
        let host = header("host").unwrap().replace("127.0.0.1", "localhost");
        let target = format!("http://{host}/cdn/{}", path.rsplit_once("/resolve/main/").unwrap().1);
        let headers = [
            ("x-repo-commit", COMMIT),
            ("x-linked-etag", "\"big1\""),
            ("x-linked-size", &size),
            ("location", &target),
        ];
        return send(302, &headers, b"");
    }
    match (mood, method.as_str()) {
        (Mood::Breaks, "GET") => {
            let rest = &body[range.unwrap_or(0)..];
            send(
                if range.is_some() { 206 } else { 200 },
                &[("content-length", &rest.len().to_string())],
                &rest[..rest.len() / 2],
            );
        }
        (Mood::Lies, "GET") => send(200, &hub_headers, &body[..body.len() / 2]),
        _ => match range {
            Some(at) => send(206, &hub_headers, &body[at..]),
            None => send(200, &hub_headers, body),
        },
    }
}

/// The message with its causes, as a binary prints it; the error must come within [`PATIENCE`].
fn failure<T: std::fmt::Debug>(work: impl FnOnce() -> Result<T, HubError>) -> (HubError, String) {
    let start = Instant::now();
    let error = work().unwrap_err();
    assert!(start.elapsed() < PATIENCE, "{error} took {:?}", start.elapsed());
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(e) = cause {
        text = format!("{text}: {e}");
        cause = e.source();
    }
    (error, text)
}

fn may_pass(error: &HubError) -> bool {
    std::error::Error::source(error).is_some_and(<dyn std::error::Error>::is::<TryAgain>)
}

fn all_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            found.extend(all_below(&path));
        }
        found.push(path);
    }
    found
}

#[test]
fn a_folder_is_used_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("sub")).unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    fs::write(dir.path().join("sub/x.bin"), "x").unwrap();
    fs::write(dir.path().join(".hidden"), "x").unwrap();
    let source =
        client("http://127.0.0.1:9", dir.path(), &[]).resolve_model(dir.path().to_str().unwrap()).unwrap();
    assert_eq!(source.file("config.json").unwrap(), dir.path().join("config.json"));
    assert_eq!(source.try_file("tokenizer.json").unwrap(), None);
    assert_eq!(source.list().unwrap(), ["config.json", "sub/x.bin"]);
    assert_eq!(source.name(), dir.path().display().to_string());
    let (error, text) = failure(|| source.file("tokenizer.json"));
    assert!(matches!(error, HubError::NotInFolder { .. }));
    assert_eq!(text, format!("{} has no file tokenizer.json", dir.path().display()));
}

#[test]
fn names_that_leave_the_folder_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let hub = FakeHub::start(Mood::Well);
    let folder = hub.client(dir.path()).resolve_model(dir.path().to_str().unwrap()).unwrap();
    let remote = hub.client(dir.path()).resolve_model("org/name").unwrap();
    for name in ["../secret", "/etc/passwd", "a/../../b", "", "a\0b", "a\nb", "x?y", "./a/../b", "%2e%2e/a"] {
        for source in [&folder, &remote] {
            assert!(matches!(source.file(name), Err(HubError::BadFileName { .. })), "{name:?}");
        }
    }
    assert!(hub.requests().is_empty());
}

#[test]
fn arguments_that_are_neither_folder_nor_id_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.safetensors");
    fs::write(&file, "x").unwrap();
    let hub = client("http://127.0.0.1:9", dir.path(), &[]);
    for (arg, says) in [
        ("", "it is empty"),
        (file.to_str().unwrap(), "is a file; give the folder that holds it"),
        ("/no/such/folder", "there is no such folder"),
        ("./nope", "there is no such folder"),
        ("nope", "there is no such folder, and a hub id has the form org/name"),
        ("a/b/c", "org/name"),
        ("org/na me", "only letters"),
        ("org/na--me", "only letters"),
        ("org/.name", "only letters"),
        ("org/name@", "revision"),
        ("org/name@../x", "revision"),
        ("org/name@a b", "revision"),
    ] {
        let (error, text) = failure(|| hub.resolve_model(arg));
        assert!(matches!(error, HubError::BadArgument { .. }), "{arg}");
        assert!(text.contains(says) && text.contains(&format!("`{arg}`")), "{text}");
    }
    let (error, text) = failure(|| client("huggingface.co", dir.path(), &[]).resolve_model("org/name"));
    assert!(matches!(error, HubError::BadEndpoint { .. }), "{text}");
}

#[test]
fn files_are_fetched_once_and_then_come_from_the_cache() {
    let cache = tempfile::tempdir().unwrap();
    let hub = FakeHub::start(Mood::Well);
    let source = hub.client(cache.path()).resolve_model("org/name").unwrap();
    let path = source.file("config.json").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "{\"hidden_size\": 8}");
    assert!(path.ends_with(format!("hub/models--org--name/snapshots/{COMMIT}/config.json")), "{path:?}");
    let reference = cache.path().join("hub/models--org--name/refs/main");
    assert_eq!(fs::read_to_string(reference).unwrap(), COMMIT);
    let asked = hub.requests();
    assert_eq!(asked, ["HEAD /org/name/resolve/main/config.json", "GET /org/name/resolve/main/config.json"]);

    assert_eq!(source.file("config.json").unwrap(), path);
    assert_eq!(hub.requests().len(), 2, "the second run asked again");
    // The link is relative: a moved cache still works.
    let moved = cache.path().join("moved");
    fs::rename(cache.path().join("hub"), &moved).unwrap();
    assert!(moved.join(format!("models--org--name/snapshots/{COMMIT}/config.json")).is_file());
}

#[test]
fn a_second_run_works_offline_and_with_a_dead_hub() {
    let cache = tempfile::tempdir().unwrap();
    let hub = FakeHub::start(Mood::Well);
    let path = hub.client(cache.path()).resolve_dataset("org/name").unwrap().file("sub/a file.bin").unwrap();
    assert_eq!(fs::read(&path).unwrap(), hub.files.lock().unwrap()["sub/a file.bin"]);
    assert!(hub.requests()[0].contains("/datasets/org/name/resolve/main/sub/a%20file.bin"));

    for (endpoint, offline) in [(hub.endpoint.as_str(), "1"), ("http://127.0.0.1:9", "0")] {
        let again = client(endpoint, cache.path(), &[("HF_HUB_OFFLINE", offline)]);
        let source = again.resolve_dataset("org/name").unwrap();
        assert_eq!(source.file("sub/a file.bin").unwrap(), path);
    }
    let before = hub.requests().len();
    let offline = client(&hub.endpoint, cache.path(), &[("HF_HUB_OFFLINE", "yes")]);
    let source = offline.resolve_dataset("org/name").unwrap();
    assert_eq!(source.list().unwrap(), ["sub/a file.bin"]);
    assert_eq!(source.try_file("config.json").unwrap(), None, "optional, and the revision is cached");
    let (error, text) = failure(|| source.file("config.json"));
    assert!(matches!(error, HubError::Offline { revision_cached: true, .. }));
    assert!(text.contains("HF_HUB_OFFLINE") && text.contains(cache.path().to_str().unwrap()), "{text}");
    let by_commit = offline.resolve_dataset(&format!("org/name@{COMMIT}")).unwrap();
    assert_eq!(by_commit.file("sub/a file.bin").unwrap(), path);
    let uncached = offline.resolve_model("org/other").unwrap();
    assert!(matches!(
        failure(|| uncached.try_file("config.json")).0,
        HubError::Offline { revision_cached: false, .. }
    ));
    assert!(matches!(failure(|| uncached.list()).0, HubError::Offline { .. }));
    assert_eq!(hub.requests().len(), before, "offline, yet the hub was asked");
}

#[test]
fn an_absent_file_is_remembered() {
    let cache = tempfile::tempdir().unwrap();
    let hub = FakeHub::start(Mood::Well);
    let source = hub.client(cache.path()).resolve_model("org/name").unwrap();
    source.file("config.json").unwrap();
    assert_eq!(source.try_file("generation_config.json").unwrap(), None);
    let asked = hub.requests().len();
    assert_eq!(source.try_file("generation_config.json").unwrap(), None);
    assert_eq!(hub.requests().len(), asked);
    let (error, text) = failure(|| source.file("generation_config.json"));
    assert!(matches!(error, HubError::NotInRepo { .. }));
    assert!(text.contains("org/name at revision main") && text.contains("generation_config.json"), "{text}");
    assert_eq!(source.list().unwrap(), ["config.json", "sub/a file.bin"]);
}

#[test]
fn the_token_reaches_the_hub_and_nobody_else() {
    let cache = tempfile::tempdir().unwrap();
    fs::write(cache.path().join("token"), " hf_from_file\n").unwrap();
    let hub = FakeHub::start(Mood::Redirects);
    let source = hub.client(cache.path()).resolve_model("org/name").unwrap();
    let path = source.file("sub/a file.bin").unwrap();
    assert_eq!(fs::read(path).unwrap().len(), 200_000);
    let asked = hub.requests();
    assert_eq!(
        asked,
        [
            "HEAD /org/name/resolve/main/sub/a%20file.bin [Bearer hf_from_file]",
            "GET /org/name/resolve/main/sub/a%20file.bin [Bearer hf_from_file]",
            "GET /cdn/sub/a%20file.bin",
        ]
    );
    let env = client(&hub.endpoint, cache.path(), &[("HF_TOKEN", "hf_from_env")]);
    assert!(!format!("{env:?}").contains("hf_from"), "a token in a log");
    env.resolve_model("org/name").unwrap().file("config.json").unwrap();
    assert!(hub.requests()[3].contains("hf_from_env"));
}

#[test]
fn a_broken_download_goes_on_where_it_stopped() {
    let cache = tempfile::tempdir().unwrap();
    let hub = FakeHub::start(Mood::Breaks);
    let source = hub.client(cache.path()).resolve_model("org/name").unwrap();
    let (error, text) = failure(|| source.file("sub/a file.bin"));
    assert!(matches!(error, HubError::Unreachable { .. }) && may_pass(&error), "{text}");
    assert!(failure(|| source.file("sub/a file.bin")).1.contains("sub/a file.bin"));
    hub.set(Mood::Well);
    let path = source.file("sub/a file.bin").unwrap();
    assert_eq!(fs::read(path).unwrap(), hub.files.lock().unwrap()["sub/a file.bin"]);
    let gets: Vec<_> = hub.requests().into_iter().filter(|r| r.starts_with("GET")).collect();
    assert!(gets[1].ends_with("from 100000") && gets[2].ends_with("from 150000"), "{gets:?}");
    assert!(all_below(cache.path()).iter().all(|p| p.extension().is_none_or(|e| e != "part")));
}

#[test]
fn a_part_that_is_already_whole_does_not_block() {
    let cache = tempfile::tempdir().unwrap();
    let hub = FakeHub::start(Mood::Well);
    let blobs = cache.path().join("hub/models--org--name/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join("abc123.part"), vec![0; 300_000]).unwrap();
    let path = hub.client(cache.path()).resolve_model("org/name").unwrap().file("sub/a file.bin").unwrap();
    assert_eq!(fs::read(path).unwrap(), hub.files.lock().unwrap()["sub/a file.bin"]);
}

#[test]
fn a_short_body_never_becomes_a_file() {
    let cache = tempfile::tempdir().unwrap();
    let hub = FakeHub::start(Mood::Lies);
    let source = hub.client(cache.path()).resolve_model("org/name").unwrap();
    let (error, text) = failure(|| source.file("sub/a file.bin"));
    assert!(matches!(error, HubError::BadAnswer { .. }), "{text}");
    assert!(text.contains("announced 200000 bytes and sent 100000"), "{text}");
    let left: Vec<_> = all_below(cache.path()).into_iter().filter(|p| p.is_file()).collect();
    assert!(left.iter().all(|p| p.extension().is_some_and(|e| e == "lock")), "{left:?}");
}

#[test]
fn wrong_answers_have_their_own_errors() {
    type Expected = fn(&HubError) -> bool;
    let cases: [(Mood, Expected, bool, &str); 12] = [
        (
            Mood::Status(404),
            |e| matches!(e, HubError::NoSuchRepo { .. }),
            false,
            "has no repository org/name",
        ),
        (
            Mood::Coded(404, "RepoNotFound"),
            |e| matches!(e, HubError::NoSuchRepo { .. }),
            false,
            "check the spelling",
        ),
        (Mood::Coded(401, "RepoNotFound"), |e| matches!(e, HubError::NoSuchRepo { .. }), false, "HF_TOKEN"),
        (
            Mood::Coded(404, "RevisionNotFound"),
            |e| matches!(e, HubError::NoSuchRevision { .. }),
            false,
            "no revision `main`",
        ),
        (
            Mood::Coded(403, "GatedRepo"),
            |e| matches!(e, HubError::Denied { status: 403, .. }),
            false,
            "accept its conditions",
        ),
        (Mood::Status(401), |e| matches!(e, HubError::Denied { status: 401, .. }), false, "set HF_TOKEN"),
        (Mood::Status(500), |e| matches!(e, HubError::Status { status: 500, .. }), true, "HTTP status 500"),
        (Mood::Status(429), |e| matches!(e, HubError::Status { status: 429, .. }), true, "try again later"),
        (Mood::Silent, |e| matches!(e, HubError::Timeout { .. }), true, "HF_HUB_ETAG_TIMEOUT"),
        (Mood::Garbage, |e| matches!(e, HubError::BadAnswer { .. }), false, "not a hub's answer"),
        (Mood::Portal, |e| matches!(e, HubError::BadAnswer { .. }), false, "does HF_ENDPOINT name a hub"),
        (Mood::HostileNames, |e| matches!(e, HubError::BadAnswer { .. }), false, "no plain name"),
    ];
    let hub = FakeHub::start(Mood::Well);
    for (mood, expected, passing, says) in cases {
        let cache = tempfile::tempdir().unwrap();
        hub.set(mood);
        let source = hub.client(cache.path()).resolve_model("org/name").unwrap();
        for (error, text) in
            [failure(|| source.file("config.json")), failure(|| source.try_file("config.json"))]
        {
            assert!(expected(&error), "{text}");
            assert_eq!(may_pass(&error), passing, "{text}");
            assert!(text.contains(says) && text.contains(&hub.endpoint), "{text}");
        }
        assert!(failure(|| source.list()).1.contains("org/name") || mood == Mood::Portal);
        assert!(all_below(cache.path()).is_empty(), "an error left something in the cache");
    }
}

#[test]
fn a_dead_hub_is_told_at_once() {
    let cache = tempfile::tempdir().unwrap();
    let source = client("http://127.0.0.1:9", cache.path(), &[]).resolve_model("org/name@v1.0").unwrap();
    assert_eq!(source.name(), "org/name@v1.0");
    let (error, text) = failure(|| source.file("config.json"));
    assert!(matches!(error, HubError::Unreachable { .. }) && may_pass(&error), "{text}");
    for part in ["cannot reach http://127.0.0.1:9", "config.json of org/name", "HF_HUB_OFFLINE=1", "refused"]
    {
        assert!(text.to_lowercase().contains(&part.to_lowercase()), "{text}");
    }
}

#[test]
fn the_cache_folder_follows_the_variables() {
    let place = |vars: &[(&str, &str)]| {
        let vars: HashMap<_, _> = vars.iter().copied().collect();
        Hub::from_vars(|n| vars.get(n).map(|v| (*v).to_owned())).cache_dir().display().to_string()
    };
    assert_eq!(place(&[("HOME", "/u")]), "/u/.cache/huggingface/hub");
    assert_eq!(place(&[("HOME", "/u"), ("XDG_CACHE_HOME", "/c")]), "/c/huggingface/hub");
    assert_eq!(place(&[("HOME", "/u"), ("HF_HOME", "~/hf")]), "/u/hf/hub");
    assert_eq!(place(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/elsewhere")]), "/elsewhere");
    assert_eq!(
        place(&[("HF_HOME", ""), ("HOME", "/u")]),
        "/u/.cache/huggingface/hub",
        "empty counts as unset"
    );
    let offline =
        |v: &'static str| Hub::from_vars(|n| (n == "HF_HUB_OFFLINE").then(|| v.to_owned())).is_offline();
    assert!(offline("1") && offline("true") && offline("ON") && !offline("0") && !offline(""));
}

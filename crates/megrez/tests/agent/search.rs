//! Providers against loopback servers.

use std::time::{Duration, Instant};

use megrez::agent::{
    Hit, HttpSearch, HttpSettings, LocalIndex, PageError, PageLimits, SearchError, SearchProvider,
};
use serde_json::{Value, json};

use crate::web::{Reply, Web};

/// No claim about speed: a busy machine is slow.
const PATIENCE: Duration = Duration::from_secs(60);

fn limits(timeout: Duration) -> PageLimits {
    PageLimits { timeout, bytes: 1 << 20, allow_private: true, ..PageLimits::default() }
}

/// A search service that finds these links.
fn service(links: Vec<String>, limits: PageLimits) -> (Web, HttpSearch) {
    let web = Web::new(move |_| {
        let items: Vec<Value> = links
            .iter()
            .map(|link| json!({"t": format!("title of {link}"), "at": {"url": link}, "s": "an excerpt"}))
            .collect();
        Reply::json(&json!({"found": {"items": items}}))
    });
    let search = HttpSearch::new(settings(&web.url("/search?q={query}&n={limit}"), ""), limits).unwrap();
    (web, search)
}

fn settings(endpoint: &str, more: &str) -> HttpSettings {
    HttpSettings::parse(&format!(
        "name = \"test\"\nendpoint = \"{endpoint}\"\nresults = \"/found/items\"\ntitle = \"/t\"\nlink = \"/at/url\"\n\
         snippet = \"/s\"\ntimeout_s = 2\n{more}"
    ))
    .unwrap()
}

#[test]
fn pages_of_all_kinds_side_by_side() {
    let pages = Web::new(|asked| match asked.path.as_str() {
        "/good" => Reply::html("<title>A page</title><p>It is sunny.</p><script>no</script>"),
        "/plain" => Reply::Page(200, "text/plain", "  plain text\n".into()),
        "/here" => Reply::Redirect("there".into()),
        "/there" => Reply::Redirect("/good".into()),
        "/loop" => Reply::Redirect("/loop".into()),
        "/pdf" => Reply::Page(200, "application/pdf", "%PDF".into()),
        "/500" => Reply::Page(500, "text/html", "no".into()),
        "/slow" => Reply::Late(PATIENCE),
        "/huge" => Reply::Endless("<p>word</p>"),
        _ => Reply::html("<script>only()</script>"),
    });
    let paths = ["/good", "/plain", "/here", "/loop", "/pdf", "/500", "/slow", "/huge", "/empty"];
    let (web, search) = service(paths.iter().map(|p| pages.url(p)).collect(), limits(Duration::from_secs(5)));
    let start = Instant::now();
    let hits = search.search("天气 & more", 9).unwrap();
    assert!(start.elapsed() < PATIENCE, "a slow page does not hold the others up");
    assert!(web.asked()[0].path.ends_with("q=%E5%A4%A9%E6%B0%94+%26+more&n=9"), "{:?}", web.asked());
    let page = |i: usize| hits[i].page.clone();
    assert_eq!(page(0).unwrap(), "It is sunny.");
    assert_eq!(hits[0].title, format!("title of {}", pages.url("/good")));
    assert_eq!(hits[0].snippet, "an excerpt");
    assert_eq!(page(1).unwrap(), "plain text");
    assert_eq!(page(2).unwrap(), "It is sunny.");
    assert_eq!(page(3), Err(PageError::Redirects(5)));
    assert_eq!(page(4), Err(PageError::Type("application/pdf".into())));
    assert_eq!(page(5), Err(PageError::Status(500)));
    assert_eq!(page(6), Err(PageError::Timeout(5)));
    let huge = page(7).unwrap();
    assert!(huge.starts_with("word\nword") && huge.len() <= 1 << 20, "what is beyond the limit is not read");
    assert!(matches!(page(8), Err(PageError::Unreadable(_))));
    // No more than was asked for.
    assert_eq!(search.search("x", 1).unwrap().len(), 1);
}

#[test]
fn this_machine_and_its_network_are_not_asked() {
    let inside = Web::new(|_| Reply::html("<p>secret</p>"));
    let port = inside.port;
    let links = vec![
        inside.url("/"),
        format!("http://localhost:{port}/"),
        format!("http://127.1:{port}/"),
        format!("http://2130706433:{port}/"),
        format!("http://[::1]:{port}/"),
        format!("http://[::ffff:127.0.0.1]:{port}/"),
        format!("http://user@127.0.0.1:{port}/"),
        "http://169.254.169.254/latest/meta-data/".into(),
        "http://10.0.0.1/".into(),
        "file:///etc/passwd".into(),
        "ftp://127.0.0.1/x".into(),
        "gopher://127.0.0.1/".into(),
        "not a url".into(),
    ];
    let safe = PageLimits { timeout: Duration::from_secs(5), ..PageLimits::default() };
    let (_web, search) = service(links, safe);
    for Hit { url, page, .. } in search.search("x", 99).unwrap() {
        // A machine without IPv6 cannot even try.
        let refused = matches!(page, Err(PageError::Refused(_)))
            || url.contains("[::") && matches!(page, Err(PageError::Unreachable(_)));
        assert!(refused, "{url}: {page:?}");
    }
    assert!(inside.asked().is_empty(), "no connection was made: {:?}", inside.asked());
}

#[test]
fn redirects_lead_nowhere_else_either() {
    let inside = Web::new(|_| Reply::html("<p>secret</p>"));
    let targets =
        [inside.url("/"), format!("http://localhost:{}/", inside.port), "file:///etc/passwd".into()];
    let to = targets.clone();
    let open = Web::new(move |asked| {
        let i: Option<usize> = asked.path[1..].parse().ok();
        i.map_or_else(|| Reply::html("<p>open</p>"), |i| Reply::Redirect(to[i].clone()))
    });
    let links = (0..targets.len()).map(|i| open.url(&format!("/{i}"))).chain([open.url("/page")]).collect();
    let limits = PageLimits {
        timeout: Duration::from_secs(5),
        allow_hosts: vec![format!("127.0.0.1:{}", open.port)],
        ..PageLimits::default()
    };
    let (_web, search) = service(links, limits);
    let hits = search.search("x", 9).unwrap();
    for hit in &hits[..targets.len()] {
        assert!(matches!(hit.page, Err(PageError::Refused(_))), "{}: {:?}", hit.url, hit.page);
    }
    assert_eq!(hits[targets.len()].page.as_deref(), Ok("open"));
    assert!(inside.asked().is_empty(), "no connection was made: {:?}", inside.asked());
}

#[test]
fn a_service_that_fails_says_how() {
    let web = Web::new(|asked| match asked.path.as_str() {
        "/500?q=x" => Reply::Page(500, "text/plain", "no".into()),
        "/401?q=x" => Reply::Page(401, "text/plain", "no".into()),
        "/moved?q=x" => Reply::Redirect("/else".into()),
        "/text?q=x" => Reply::html("hello"),
        "/other?q=x" => Reply::json(&json!([1, 2])),
        "/links?q=x" => Reply::json(&json!({"found": {"items": [{"t": "no link"}]}})),
        "/none?q=x" => Reply::json(&json!({"found": {}})),
        _ => Reply::Late(PATIENCE),
    });
    let ask = |path: &str| {
        let settings = settings(&format!("{}?q={{query}}", web.url(path)), "");
        HttpSearch::new(settings, PageLimits::default()).unwrap().search("x", 5)
    };
    assert!(matches!(ask("/500"), Err(SearchError::Status { status: 500, .. })));
    assert!(ask("/401").unwrap_err().to_string().contains("key is missing, wrong or used up"));
    assert!(ask("/moved").unwrap_err().to_string().contains("status 302: it moved"));
    assert!(ask("/text").unwrap_err().to_string().contains("no JSON"));
    assert!(ask("/other").unwrap_err().to_string().contains("no list at \"/found/items\""));
    assert!(ask("/links").unwrap_err().to_string().contains("no result has a link at \"/at/url\""));
    assert_eq!(ask("/none"), Ok(vec![]), "nothing found is no failure");
    assert!(matches!(ask("/slow"), Err(SearchError::Timeout { seconds: 2, .. })));
    let closed = settings("http://127.0.0.1:1/?q={query}", "");
    let closed = HttpSearch::new(closed, PageLimits::default()).unwrap();
    assert!(matches!(closed.search("x", 5), Err(SearchError::Unreachable { .. })));
}

#[test]
fn a_post_carries_its_body_and_the_key_of_the_environment() {
    let web = Web::new(|_| Reply::json(&json!({"found": {"items": []}})));
    // A variable that every process has, since tests must not change their own.
    let more = "method = \"POST\"\nbody = { q = \"{query}\", num = \"{limit}\" }\nkey_header = \"X-Key\"\n\
                key_env = \"CARGO_MANIFEST_DIR\"\nkey_prefix = \"Bearer \"";
    let search = HttpSearch::new(settings(&web.url("/s"), more), PageLimits::default()).unwrap();
    search.search("a \"b\"", 3).unwrap();
    let asked = web.asked().remove(0);
    assert!(asked.head.starts_with("POST /s "));
    assert_eq!(serde_json::from_str::<Value>(&asked.body).unwrap(), json!({"q": "a \"b\"", "num": 3}));
    let key = std::env::var("CARGO_MANIFEST_DIR").unwrap();
    assert!(asked.head.to_ascii_lowercase().contains(&format!("x-key: bearer {key}").to_ascii_lowercase()));

    let missing = more.replace("CARGO_MANIFEST_DIR", "NO_SUCH_VARIABLE_IS_SET");
    let e = HttpSearch::new(settings(&web.url("/s"), &missing), PageLimits::default()).err().unwrap();
    assert!(e.contains("set the variable NO_SUCH_VARIABLE_IS_SET"), "{e}");
}

#[test]
fn a_folder_of_documents_is_searched_alike_each_time() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write("weather.txt", "Tomorrow it will rain in Oslo.");
    write("deep/down/故宫.md", "# 故宫简介\n\n故宫位于北京市中心，建成于1420年。");
    write("page.html", "<title>Cats</title><p>Cats sleep most of the day.</p><script>dogs</script>");
    write(
        "many.jsonl",
        "{\"text\": \"The Eiffel Tower has 330 metres.\", \"url\": \"https://x.example/e\"}\n\n{\"title\": \"Bridges\", \"text\": \"The bridge is red.\"}\n",
    );
    write("picture.png", "rain rain rain");
    let index = LocalIndex::open(dir.path()).unwrap();
    assert_eq!(index.len(), 5);
    let first = |query: &str| index.search(query, 5).unwrap().into_iter().next();
    assert_eq!(first("rain in Oslo").unwrap().url, "weather.txt");
    let palace = first("故宫建于哪一年").unwrap();
    assert_eq!((palace.title.as_str(), palace.url.as_str()), ("故宫简介", "deep/down/故宫.md"));
    assert!(palace.page.unwrap().contains("1420"));
    assert_eq!(first("eiffel").unwrap().url, "https://x.example/e");
    assert_eq!(first("bridges").unwrap().url, "many.jsonl:3");
    assert!(first("dogs").is_none(), "what a page does not show is not found");
    for query in ["the", "rain", "北京 red"] {
        let again = LocalIndex::open(dir.path()).unwrap();
        assert_eq!(index.search(query, 5).unwrap(), again.search(query, 5).unwrap());
    }

    write("many.jsonl", "{\"text\": \"a\"}\n{\"txt\": \"b\"}\n");
    let e = LocalIndex::open(dir.path()).err().unwrap();
    assert!(e.contains("many.jsonl, line 2") && e.contains("text"), "{e}");
    let empty = tempfile::tempdir().unwrap();
    assert!(LocalIndex::open(empty.path()).err().unwrap().contains("no document"));
    assert!(LocalIndex::open(&empty.path().join("none")).err().unwrap().contains("none"));
}

//! A search service with a JSON answer: where to ask, and where in the answer the results are, are settings.

use std::path::Path;
use std::time::Duration;

use nics_base::settings;
use serde::Deserialize;
use serde_json::Value;
use ureq::Agent;
use ureq::http::Response;
use url::Url;

use super::page::{PageLimits, read_all};
use super::{Hit, PageError, SearchError, SearchProvider};

/// The most bytes of a service's answer.
const MAX_ANSWER: u64 = 8 << 20;

/// How a service is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Method {
    /// The query in the URL.
    Get,
    /// The query in a JSON body.
    Post,
}

/// A search service, as a TOML file describes it.
///
/// `{query}` and `{limit}` stand for the query and the number of results, in the endpoint (escaped) and in the texts of
/// the body; a text that is `{limit}` alone becomes a number.
///
/// ```no_run,standalone_crate
/// use megrez::agent::HttpSettings;
///
/// let settings = HttpSettings::parse(r#"
///     name = "my searxng"
///     endpoint = "http://127.0.0.1:8888/search?q={query}&format=json"
///     results = "/results"
///     link = "/url"
///     snippet = "/content"
/// "#)?;
/// # Ok::<(), String>(())
/// ```
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpSettings {
    /// The name of the service, for messages.
    pub name: String,
    /// Where to ask.
    pub endpoint: String,
    /// GET unless said otherwise.
    #[serde(default = "get")]
    pub method: Method,
    /// The JSON body of a POST.
    #[serde(default)]
    pub body: Option<Value>,
    /// The header that carries the key.
    #[serde(default)]
    pub key_header: Option<String>,
    /// The environment variable that holds the key.
    #[serde(default)]
    pub key_env: Option<String>,
    /// What stands in front of the key in its header, e.g. `Bearer `.
    #[serde(default)]
    pub key_prefix: String,
    /// JSON pointer to the list of results.
    pub results: String,
    /// JSON pointer to the title, within a result.
    #[serde(default = "title")]
    pub title: String,
    /// JSON pointer to the link, within a result.
    #[serde(default = "link")]
    pub link: String,
    /// JSON pointer to the excerpt, within a result.
    #[serde(default = "snippet")]
    pub snippet: String,
    /// The most time that the service may take, in seconds.
    #[serde(default = "ten")]
    pub timeout_s: u64,
}

fn get() -> Method {
    Method::Get
}
fn title() -> String {
    "/title".into()
}
fn link() -> String {
    "/link".into()
}
fn snippet() -> String {
    "/snippet".into()
}
fn ten() -> u64 {
    10
}

/// Services whose settings are built in, by name.
const KNOWN: [(&str, &str); 2] = [
    (
        "serper",
        r#"
        name = "serper"
        endpoint = "https://google.serper.dev/search"
        method = "POST"
        body = { q = "{query}", num = "{limit}" }
        key_header = "X-API-KEY"
        key_env = "SERPER_API_KEY"
        results = "/organic"
        "#,
    ),
    (
        "brave",
        r#"
        name = "brave"
        endpoint = "https://api.search.brave.com/res/v1/web/search?q={query}&count={limit}"
        key_header = "X-Subscription-Token"
        key_env = "BRAVE_API_KEY"
        results = "/web/results"
        link = "/url"
        snippet = "/description"
        "#,
    ),
];

impl HttpSettings {
    /// The settings of a service that is known by name, or of a TOML file.
    ///
    /// # Errors
    /// What is wrong, with the name of the file.
    pub fn named_or_file(source: &str) -> Result<Self, String> {
        if let Some((_, text)) = KNOWN.iter().find(|(name, _)| *name == source) {
            return Self::parse(text);
        }
        let text = std::fs::read_to_string(Path::new(source)).map_err(|e| {
            let known: Vec<&str> = KNOWN.iter().map(|(name, _)| *name).collect();
            format!("{source}: {e}; expected a TOML file or one of {}", known.join(", "))
        })?;
        Self::parse(&text).map_err(|e| format!("{source}: {e}"))
    }

    /// Settings from TOML.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(text: &str) -> Result<Self, String> {
        let settings: Self = settings::parse(text)?;
        settings.validate()?;
        Ok(settings)
    }

    fn validate(&self) -> Result<(), String> {
        let url = Url::parse(&fill(&self.endpoint, "query", 1, true))
            .map_err(|e| format!("endpoint {:?} is no URL: {e}", self.endpoint))?;
        if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
            return Err(format!("endpoint {:?}: expected http://.. or https://..", self.endpoint));
        }
        let body = self.body.as_ref().map(Value::to_string).unwrap_or_default();
        if !self.endpoint.contains("{query}") && !body.contains("{query}") {
            return Err("neither endpoint nor body holds {query}, where the query is filled in".into());
        }
        if self.method == Method::Get && self.body.is_some() {
            return Err("body is given but method is GET: set method = \"POST\"".into());
        }
        if self.key_header.is_some() != self.key_env.is_some() {
            return Err("key_header and key_env belong together, but one of them is missing".into());
        }
        for (name, pointer) in [
            ("results", &self.results),
            ("title", &self.title),
            ("link", &self.link),
            ("snippet", &self.snippet),
        ] {
            if !pointer.is_empty() && !pointer.starts_with('/') {
                return Err(format!("{name} is {pointer:?}, expected a JSON pointer such as \"/items\""));
            }
        }
        if !(1..=600).contains(&self.timeout_s) {
            return Err(format!("timeout_s is {}, expected 1 to 600", self.timeout_s));
        }
        Ok(())
    }
}

/// A search service over HTTP. The pages that it finds are read in parallel.
pub struct HttpSearch {
    settings: HttpSettings,
    key: Option<String>,
    limits: PageLimits,
    agent: Agent,
}

impl HttpSearch {
    /// A service with the key that the environment holds.
    ///
    /// # Errors
    /// When the variable of the key is not set.
    pub fn new(settings: HttpSettings, limits: PageLimits) -> Result<Self, String> {
        settings.validate()?;
        let key = match &settings.key_env {
            None => None,
            Some(variable) => match std::env::var(variable) {
                Ok(key) if !key.trim().is_empty() => Some(key.trim().to_owned()),
                _ => {
                    return Err(format!("{} needs a key: set the variable {variable}", settings.name));
                }
            },
        };
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // The key is for this host alone.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_global(Some(Duration::from_secs(settings.timeout_s)))
            .build();
        Ok(Self { settings, key, limits, agent: Agent::new_with_config(config) })
    }

    fn ask(&self, query: &str, limit: usize) -> Result<Value, SearchError> {
        let s = &self.settings;
        let url = fill(&s.endpoint, query, limit, true);
        let key = s.key_header.as_deref().zip(self.key.as_deref());
        let key = key.map(|(header, key)| (header, format!("{}{key}", s.key_prefix)));
        let answer = match s.method {
            Method::Get => {
                let request = self.agent.get(&url).header("Accept", "application/json");
                let request = match &key {
                    Some((header, key)) => request.header(*header, key),
                    None => request,
                };
                request.call()
            }
            Method::Post => {
                let body = fill_json(s.body.as_ref().unwrap_or(&Value::Null), query, limit);
                let request = self.agent.post(&url).header("Accept", "application/json");
                let request = match &key {
                    Some((header, key)) => request.header(*header, key),
                    None => request,
                };
                request.content_type("application/json").send(body.to_string())
            }
        };
        self.read(answer)
    }

    fn read(&self, answer: Result<Response<ureq::Body>, ureq::Error>) -> Result<Value, SearchError> {
        let service = || self.settings.name.clone();
        let failed = |e: ureq::Error| match e {
            ureq::Error::Timeout(_) => {
                SearchError::Timeout { service: service(), seconds: self.settings.timeout_s }
            }
            ureq::Error::BodyExceedsLimit(n) => {
                SearchError::BadAnswer { service: service(), reason: format!("it is longer than {n} bytes") }
            }
            other => SearchError::Unreachable { service: service(), reason: other.to_string() },
        };
        let mut answer = answer.map_err(failed)?;
        let status = answer.status().as_u16();
        if !(200..300).contains(&status) {
            return Err(SearchError::Status { service: service(), status });
        }
        let bytes = answer.body_mut().with_config().limit(MAX_ANSWER).read_to_vec().map_err(failed)?;
        serde_json::from_slice(&bytes)
            .map_err(|e| SearchError::BadAnswer { service: service(), reason: format!("no JSON: {e}") })
    }

    /// The results of an answer: title, link and excerpt of each. One without a link is left out.
    fn results(&self, answer: &Value, limit: usize) -> Result<Vec<[String; 3]>, SearchError> {
        let s = &self.settings;
        let list = match answer.pointer(&s.results) {
            // Services leave the list out when nothing was found.
            None | Some(Value::Null) if answer.is_object() => return Ok(Vec::new()),
            Some(Value::Array(list)) => list,
            _ => {
                let reason = format!("there is no list at {:?}", s.results);
                return Err(SearchError::BadAnswer { service: s.name.clone(), reason });
            }
        };
        let text = |result: &Value, pointer: &str| {
            result.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
        };
        let found = list.iter().map(|r| [text(r, &s.title), text(r, &s.link), text(r, &s.snippet)]);
        let found: Vec<[String; 3]> = found.filter(|[_, link, _]| !link.is_empty()).take(limit).collect();
        if found.is_empty() && !list.is_empty() {
            let reason = format!("no result has a link at {:?}", s.link);
            return Err(SearchError::BadAnswer { service: s.name.clone(), reason });
        }
        Ok(found)
    }
}

impl SearchProvider for HttpSearch {
    fn name(&self) -> &str {
        &self.settings.name
    }

    fn search(&self, query: &str, limit: usize) -> Result<Vec<Hit>, SearchError> {
        let results = self.results(&self.ask(query, limit)?, limit)?;
        let urls: Vec<String> = results.iter().map(|[_, link, _]| link.clone()).collect();
        let pages = read_all(&urls, &self.limits);
        let hit = |([title, url, snippet], page): ([String; 3], Result<(String, String), PageError>)| {
            let own = page.as_ref().map(|(title, _)| title.clone()).unwrap_or_default();
            Hit { title: if title.is_empty() { own } else { title }, url, snippet, page: page.map(|p| p.1) }
        };
        Ok(results.into_iter().zip(pages).map(hit).collect())
    }
}

/// `{query}` and `{limit}` filled into a text; `escape` for a place in a URL.
fn fill(text: &str, query: &str, limit: usize, escape: bool) -> String {
    let escaped: String = url::form_urlencoded::byte_serialize(query.as_bytes()).collect();
    let text = text.replace("{limit}", &limit.to_string());
    text.replace("{query}", if escape { &escaped } else { query })
}

fn fill_json(value: &Value, query: &str, limit: usize) -> Value {
    match value {
        Value::String(text) if text == "{limit}" => limit.into(),
        Value::String(text) => fill(text, query, limit, false).into(),
        Value::Array(all) => all.iter().map(|v| fill_json(v, query, limit)).collect(),
        Value::Object(all) => {
            Value::Object(all.iter().map(|(k, v)| (k.clone(), fill_json(v, query, limit))).collect())
        }
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn built_in_settings_are_valid() {
        for (name, _) in KNOWN {
            assert_eq!(HttpSettings::named_or_file(name).unwrap().name, name);
        }
        let e = HttpSettings::named_or_file("./none.toml").unwrap_err();
        assert!(e.contains("none.toml") && e.contains("serper, brave"), "{e}");
    }

    #[test]
    fn settings_that_make_no_sense_are_refused() {
        let base = "name = \"x\"\nresults = \"/r\"\n";
        for (text, why) in [
            ("endpoint = \"http://h/?q={query}\"\nmethod = \"PUT\"", "PUT"),
            ("endpoint = \"ftp://h/{query}\"", "expected http://"),
            ("endpoint = \"h?q={query}\"", "is no URL"),
            ("endpoint = \"http://h/\"", "neither endpoint nor body holds {query}"),
            ("endpoint = \"http://h/{query}\"\nbody = {}", "method is GET"),
            ("endpoint = \"http://h/{query}\"\nkey_env = \"K\"", "belong together"),
            ("endpoint = \"http://h/{query}\"\nlink = \"url\"", "JSON pointer"),
            ("endpoint = \"http://h/{query}\"\ntimeout_s = 0", "1 to 600"),
            ("endpoint = \"http://h/{query}\"\nkey = \"secret\"", "key"),
        ] {
            let e = HttpSettings::parse(&format!("{base}{text}")).unwrap_err();
            assert!(e.contains(why), "{text}: {e}");
        }
    }

    #[test]
    fn queries_are_escaped_where_they_have_to_be() {
        assert_eq!(
            fill("/?q={query}&n={limit}", "a&b 天{limit}", 5, true),
            "/?q=a%26b+%E5%A4%A9%7Blimit%7D&n=5"
        );
        let body = fill_json(&json!({"q": "{query}", "n": "{limit}", "deep": ["{query}!"]}), "a\"b", 5);
        assert_eq!(body, json!({"q": "a\"b", "n": 5, "deep": ["a\"b!"]}));
    }
}

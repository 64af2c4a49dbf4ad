//! Reading pages: in parallel, within limits of time and size, from public addresses unless said otherwise.

use std::io::Read;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use ureq::Agent;
use ureq::http::{Response, header};
use url::Url;

use super::address::{NotPublic, PublicOnly};
use super::visible::visible_text;

/// How pages are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageLimits {
    /// The most time for a page, redirects included.
    pub timeout: Duration,
    /// The most bytes of a page; what is beyond is not read.
    pub bytes: u64,
    /// The most redirects that are followed.
    pub redirects: usize,
    /// Whether addresses of this machine and its network may be read. For intranets and tests: whoever controls a search
    /// result can then make this process ask any service that it can reach.
    pub allow_private: bool,
    /// Hosts that may be read wherever they are, as URLs name them with the port where it is not the scheme's:
    /// `wiki.example` or `10.0.0.5:8080`.
    pub allow_hosts: Vec<String>,
}

impl Default for PageLimits {
    /// 10 seconds, 4 MiB, 5 redirects, public addresses alone.
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            bytes: 4 << 20,
            redirects: 5,
            allow_private: false,
            allow_hosts: Vec::new(),
        }
    }
}

/// Why a page has no text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PageError {
    /// It did not come in time.
    #[error("no answer within {0} s")]
    Timeout(u64),
    /// It is at an address that is not read: another scheme than http and https, this machine or its network.
    #[error("refused: {0}")]
    Refused(String),
    /// It redirects too often.
    #[error("more than {0} redirects")]
    Redirects(usize),
    /// The server answered with an error.
    #[error("status {0}")]
    Status(u16),
    /// It is no text.
    #[error("content of type {0:?} is not read")]
    Type(String),
    /// The connection failed.
    #[error("cannot be reached: {0}")]
    Unreachable(String),
    /// It is text that cannot be made sense of, or has none to show.
    #[error("{0}")]
    Unreadable(&'static str),
}

/// Reads pages at `urls` side by side: title (may be empty) and visible text of each, in their order.
///
/// Takes hardly longer than the limit of time: a page that is not there by then is given up.
pub(super) fn read_all(urls: &[String], limits: &PageLimits) -> Vec<Result<(String, String), PageError>> {
    let agent = agent(limits);
    let deadline = Instant::now() + limits.timeout;
    let late = || Err(PageError::Timeout(limits.timeout.as_secs()));
    let (send, receive) = mpsc::channel();
    for (i, url) in urls.iter().enumerate() {
        let (agent, url, limits, send) = (agent.clone(), url.clone(), limits.clone(), send.clone());
        // Detached: a name server that hangs must not hold up the others.
        let started = thread::Builder::new().name("page".into()).spawn(move || {
            let _ = send.send((i, read(&agent, &url, &limits, deadline)));
        });
        if let Err(e) = started {
            tracing::warn!("no thread for a page: {e}");
        }
    }
    drop(send);
    let mut pages: Vec<Result<(String, String), PageError>> = urls.iter().map(|_| late()).collect();
    // A little longer than the pages' own limit, so that their own reasons arrive.
    let deadline = deadline + Duration::from_millis(250);
    while let Ok((i, page)) = receive.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        pages[i] = page;
    }
    pages
}

fn agent(limits: &PageLimits) -> Agent {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        // A proxy would be asked for addresses that nobody here has checked.
        .proxy(None)
        .user_agent(concat!("megrez/", env!("CARGO_PKG_VERSION")))
        .accept("text/html, application/xhtml+xml, text/plain;q=0.9")
        .build();
    if limits.allow_private {
        return Agent::new_with_config(config);
    }
    let connector = ureq::unversioned::transport::DefaultConnector::default();
    Agent::with_parts(config, connector, PublicOnly::but(&limits.allow_hosts))
}

fn read(
    agent: &Agent,
    url: &str,
    limits: &PageLimits,
    deadline: Instant,
) -> Result<(String, String), PageError> {
    let mut url = Url::parse(url).map_err(|e| PageError::Refused(format!("{url:?} is no URL: {e}")))?;
    for _ in 0..=limits.redirects {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(PageError::Refused(format!("scheme {}", url.scheme())));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(PageError::Timeout(limits.timeout.as_secs()));
        }
        let request = agent.get(url.as_str()).config().timeout_global(Some(left)).build();
        let mut response = request.call().map_err(|e| failed(e, limits))?;
        let status = response.status().as_u16();
        if (300..400).contains(&status) && status != 304 {
            let to = text_header(&response, header::LOCATION);
            url = url.join(&to).map_err(|_| PageError::Refused(format!("redirect to {to:?}")))?;
            continue;
        }
        if !(200..300).contains(&status) {
            return Err(PageError::Status(status));
        }
        let kind = text_header(&response, header::CONTENT_TYPE);
        let html = is_html(&kind)?;
        let mut bytes = Vec::new();
        let mut body = response.body_mut().as_reader().take(limits.bytes);
        body.read_to_end(&mut bytes).map_err(|e| failed(e.into(), limits))?;
        return text_of(&bytes, &kind, html);
    }
    Err(PageError::Redirects(limits.redirects))
}

fn text_header<B>(response: &Response<B>, name: header::HeaderName) -> String {
    response.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
}

/// Whether a content type is HTML (`None` given: so is taken) or plain text.
fn is_html(kind: &str) -> Result<bool, PageError> {
    match kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
        "" | "text/html" | "application/xhtml+xml" => Ok(true),
        "text/plain" | "text/markdown" => Ok(false),
        other => Err(PageError::Type(other.to_owned())),
    }
}

fn text_of(bytes: &[u8], kind: &str, html: bool) -> Result<(String, String), PageError> {
    if bytes.contains(&0) && !bytes.starts_with(&[0xff, 0xfe]) && !bytes.starts_with(&[0xfe, 0xff]) {
        return Err(PageError::Unreadable("it is binary data"));
    }
    let text = decode(bytes, kind);
    let (title, text) = if html {
        visible_text(&text).ok_or(PageError::Unreadable("its markup is nested too deep"))?
    } else {
        (String::new(), text.trim().to_owned())
    };
    if text.is_empty() {
        return Err(PageError::Unreadable("it shows no text (perhaps only scripts write it)"));
    }
    Ok((title, text))
}

/// The text of a page in the encoding that its byte order mark, its header or its first kilobyte names; UTF-8 without.
fn decode(bytes: &[u8], kind: &str) -> String {
    let label = |text: &str| {
        let at = text.to_ascii_lowercase().find("charset=")? + "charset=".len();
        let name: String = text[at..]
            .trim_start_matches(['"', '\''])
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | ':' | '.'))
            .collect();
        encoding_rs::Encoding::for_label(name.as_bytes())
    };
    let start = String::from_utf8_lossy(&bytes[..bytes.len().min(1024)]);
    let encoding = label(kind).or_else(|| label(&start)).unwrap_or(encoding_rs::UTF_8);
    encoding.decode(bytes).0.into_owned()
}

fn failed(error: ureq::Error, limits: &PageLimits) -> PageError {
    match error {
        ureq::Error::Timeout(_) => PageError::Timeout(limits.timeout.as_secs()),
        ureq::Error::Other(e) if e.is::<NotPublic>() => PageError::Refused(e.to_string()),
        ureq::Error::Io(e) if e.kind() == std::io::ErrorKind::TimedOut => {
            PageError::Timeout(limits.timeout.as_secs())
        }
        other => PageError::Unreachable(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodings_are_found_where_pages_name_them() {
        let (gbk, ..) = encoding_rs::GBK.encode("天气晴");
        assert_eq!(decode(&gbk, "text/html; charset=gb2312"), "天气晴");
        let mut page = b"<meta charset='GBK'>".to_vec();
        page.extend(gbk.iter());
        assert!(decode(&page, "text/html").ends_with("天气晴"));
        assert_eq!(decode("天气".as_bytes(), ""), "天气");
        assert_eq!(decode(b"\xff\xfea\0", ""), "a");
    }

    #[test]
    fn types_that_are_no_text_are_refused() {
        assert_eq!(is_html("Text/HTML; charset=x"), Ok(true));
        assert_eq!(is_html("text/plain"), Ok(false));
        assert_eq!(is_html("application/pdf"), Err(PageError::Type("application/pdf".into())));
        assert!(text_of(b"a\0b", "", true).is_err());
        assert!(text_of(b"<script>x()</script>", "", true).is_err());
    }
}

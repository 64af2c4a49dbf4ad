//! What every request passes: its name, its key, its line in the log; a panic behind it becomes a 500.

use std::net::{IpAddr, SocketAddr};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;

use super::body;
use super::config::ServerConfig;
use super::driver::Phase;
use super::error::ApiError;
use super::record::Record;
use super::routes::{App, ROUTES};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The outermost layer of the router.
pub(super) async fn guard(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let open = ROUTES.iter().any(|r| r.open && path.as_deref() == Some(r.path) && r.method == "GET")
        && matches!(request.method().as_str(), "GET" | "HEAD");
    let id = request_id(&request);
    let record = Record::new(id, path.unwrap_or_else(|| "other".into()), app.metrics.clone());
    request.extensions_mut().insert(record.clone());

    let mut response = if let Some(error) = refusal(&app.config, &request, open) {
        body::refuse(request.into_body());
        closing(error.into_response())
    } else {
        AssertUnwindSafe(next.run(request))
            .catch_unwind()
            .await
            .unwrap_or_else(|_| ApiError::internal("the server failed on this request").into_response())
    };
    record.status(response.status());
    if let Ok(value) = HeaderValue::from_str(record.id()) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    // A server that drains keeps no connection for a next request.
    if matches!(app.handle.phase(), Phase::Draining | Phase::Stopped)
        || matches!(response.status(), StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT)
    {
        response = closing(response);
    }
    response
}

/// Why a request goes no further: it has no key, or comes from a page that only pretends to be this server's own.
fn refusal(config: &ServerConfig, request: &Request, open: bool) -> Option<ApiError> {
    let header = |name| request.headers().get(name).map(HeaderValue::as_bytes);
    if !open && !config.keys.admit(header(header::AUTHORIZATION)) {
        let message = "an API key is needed: send `Authorization: Bearer KEY` with one of this server's keys";
        return Some(ApiError::new(StatusCode::UNAUTHORIZED, message).with_code("invalid_api_key"));
    }
    // A web page whose name has been made to point to this machine (DNS rebinding) speaks to a server without keys as
    // to its own. Its name is in `Host`; names of this machine and addresses are in nobody's hands.
    if config.keys.is_empty() && !config.allow_open && !header(header::HOST).is_none_or(is_local) {
        let message =
            "Host is neither localhost nor an address: a server without API keys answers to no other name";
        return Some(ApiError::new(StatusCode::FORBIDDEN, message).with_code("host_not_allowed"));
    }
    None
}

fn is_local(host: &[u8]) -> bool {
    let Ok(host) = std::str::from_utf8(host) else { return false };
    if host.parse::<SocketAddr>().is_ok() || host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok() {
        return true;
    }
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name).to_ascii_lowercase();
    name == "localhost" || name.ends_with(".localhost")
}

/// The client's own name for its request where it is a plain word, else a new one.
fn request_id(request: &Request) -> String {
    let plain = |id: &&str| {
        (1..=128).contains(&id.len())
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    let given = request.headers().get(REQUEST_ID).and_then(|v| v.to_str().ok()).filter(plain);
    given.map_or_else(|| format!("req_{:032x}", rand::random::<u128>()), str::to_owned)
}

fn closing(mut response: Response) -> Response {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

#[cfg(test)]
mod tests {
    use super::is_local;

    #[test]
    fn names_of_this_machine_and_addresses_are_local() {
        for host in [
            "localhost",
            "LOCALHOST:8000",
            "a.localhost",
            "127.0.0.1",
            "127.0.0.1:80",
            "[::1]",
            "[::1]:8000",
            "10.1.2.3:1",
        ] {
            assert!(is_local(host.as_bytes()), "{host}");
        }
        for host in [
            "",
            "evil.com",
            "evil.com:8000",
            "localhost.evil.com",
            "127.0.0.1.evil.com",
            "localhost@evil.com",
            "1",
        ] {
            assert!(!is_local(host.as_bytes()), "{host}");
        }
    }
}

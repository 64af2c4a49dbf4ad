//! What every request passes: its name, its key, its line in the log; a panic behind it becomes a 500.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;

use super::body;
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

    let admitted = open
        || app.config.keys.admit(request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes));
    let mut response = if admitted {
        AssertUnwindSafe(next.run(request))
            .catch_unwind()
            .await
            .unwrap_or_else(|_| ApiError::internal("the server failed on this request").into_response())
    } else {
        body::refuse(request.into_body());
        let message = "an API key is needed: send `Authorization: Bearer KEY` with one of this server's keys";
        let error = ApiError::new(StatusCode::UNAUTHORIZED, message).with_code("invalid_api_key");
        closing(error.into_response())
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

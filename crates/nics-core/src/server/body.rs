//! Reading a request's body: its type, its length and the time it takes are limited.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use http_body_util::BodyExt;

use super::config::ServerConfig;
use super::error::ApiError;

/// How long, and how much, a refused body is read on for.
const LINGER: (Duration, usize) = (Duration::from_secs(2), 64 << 20);

/// The body of a request with JSON.
pub(super) async fn read(request: Request, config: &ServerConfig) -> Result<Bytes, ApiError> {
    let (parts, mut body) = request.into_parts();
    if let Err(error) = check_type(&parts.headers) {
        refuse(body);
        return Err(error);
    }
    let limit = config.max_body_bytes;
    let too_large = || {
        let message = format!("the body is longer than the {limit} bytes that this server reads");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message).with_code("body_too_large")
    };
    let announced =
        parts.headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|n| n > limit as u64) {
        // Who waits for a word before sending it has it now.
        if !parts.headers.contains_key(header::EXPECT) {
            refuse(body);
        }
        return Err(too_large());
    }
    let reading = async {
        let mut bytes = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| ApiError::bad("the body broke off"))?;
            let Ok(data) = frame.into_data() else { continue };
            if bytes.len() + data.len() > limit {
                return Err(too_large());
            }
            bytes.extend_from_slice(&data);
        }
        Ok(Bytes::from(bytes))
    };
    let read = tokio::time::timeout(config.body_timeout, reading).await;
    match read {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) => {
            refuse(body);
            Err(error)
        }
        Err(_) => {
            let message = format!("the body did not arrive within {:?}", config.body_timeout);
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message).with_code("body_timeout"))
        }
    }
}

/// JSON, and said to be: a browser sends other types, or none, to a local server without asking it.
fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let unsupported = |message: String| ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message);
    let given = headers.get(header::CONTENT_TYPE).map(|v| v.to_str().unwrap_or("something else"));
    let essence = given.unwrap_or("absent").split(';').next().unwrap_or_default().trim();
    if !essence.eq_ignore_ascii_case("application/json") {
        let shown: String = essence.chars().take(60).collect();
        return Err(unsupported(format!("Content-Type is {shown}, expected application/json")));
    }
    match headers.get(header::CONTENT_ENCODING) {
        Some(encoding) if !encoding.as_bytes().eq_ignore_ascii_case(b"identity") => {
            Err(unsupported("a Content-Encoding is not supported by this server".into()))
        }
        _ => Ok(()),
    }
}

/// Goes on reading a body that is not wanted for a moment: a connection that is closed while its client still sends
/// takes the answer with it.
pub(super) fn refuse(mut body: Body) {
    use axum::body::HttpBody;
    if body.is_end_stream() {
        return;
    }
    tokio::spawn(tokio::time::timeout(LINGER.0, async move {
        let mut read = 0;
        while let Some(Ok(frame)) = body.frame().await {
            read += frame.data_ref().map_or(0, Bytes::len);
            if read > LINGER.1 {
                break;
            }
        }
    }));
}

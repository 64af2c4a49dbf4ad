//! What a request is answered with when it fails: OpenAI's error object with its HTTP status.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::driver::{Failure, Refusal};
use crate::Error;

/// A failed request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// The field of the request that is at fault.
    pub param: Option<String>,
    /// For programs.
    pub code: Option<&'static str>,
    pub retry_after: Option<Duration>,
}

impl ApiError {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// 400 without a field: the body as a whole is at fault.
    pub fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 400 about a field.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::bad(message) }
    }

    /// 400: a field holds something else than it should.
    pub fn expected(param: &str, found: &Value, expected: impl std::fmt::Display) -> Self {
        Self::field(param, format!("{param} is {}, expected {expected}", shown(found)))
    }

    /// 400: a field of OpenAI's API that this server does not know, with a value that would change the reply.
    pub fn unsupported(param: impl Into<String>) -> Self {
        let param = param.into();
        let message = format!("{param} is not supported by this server");
        Self { code: Some("unsupported_parameter"), ..Self::field(param, message) }
    }

    /// 400: prompt and reply do not fit.
    pub fn context(param: &str, message: impl Into<String>) -> Self {
        Self { code: Some("context_length_exceeded"), ..Self::field(param, message) }
    }

    /// 400 from what the front end says of a request's text.
    pub fn refused(param: &str, error: &Error) -> Self {
        match error {
            Error::ContextOverflow { .. } => Self::context(param, error.to_string()),
            _ => Self::field(param, error.to_string()),
        }
    }

    /// 400 from what the front end says of a request as a whole; the field is named where the error does.
    pub fn of_request(error: &Error) -> Self {
        match error {
            Error::Field { field, message } => Self::field(field, message),
            other => Self::bad(other.to_string()),
        }
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    #[must_use]
    pub fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// `{"error": {..}}`
    pub fn body(&self) -> Value {
        let kind = match self.status.as_u16() {
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {
            "message": self.message, "type": kind, "param": self.param, "code": self.code,
        }})
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::Busy { retry_after, .. } => Self {
                code: Some("rate_limit_exceeded"),
                retry_after: Some(retry_after),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, message)
            },
            Refusal::Stopping | Refusal::Dead(_) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code("unavailable")
            }
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let message = failure.to_string();
        match failure {
            Failure::Refused(_) => Self::bad(message),
            Failure::Job(_) | Failure::Step(_) => Self::internal(message),
            Failure::Stopped | Failure::Dead(_) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code("unavailable")
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = self.body().to_string();
        let mut response = (self.status, [(header::CONTENT_TYPE, "application/json")], body).into_response();
        let headers = response.headers_mut();
        if let Some(after) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs_f64().ceil() as u64));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// A value for a message: as it is where it is short, its kind where it is not.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) if text.chars().count() > 40 => "a long string".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
        other => other.to_string(),
    }
}

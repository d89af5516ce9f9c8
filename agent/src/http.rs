//! What both of the agent's HTTP servers share (quotes over TLS, commands over the local socket): how a body is read,
//! and what an error looks like.
//!
//! A body is somebody else's choice, so it has a size and a time; JSON is strict, because a misspelt field that is ignored
//! is an answer to a question that nobody asked.

use std::time::Duration;

use assay_evidence::wire::ErrorBody;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use zeroize::Zeroizing;

/// Largest request body that is read, in bytes.
pub const MAX_BODY: usize = 64 * 1024;
/// How long a client may take to send its body.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Every answer fits in memory: the largest one is bounded by whoever makes it.
pub type Response = hyper::Response<Full<Bytes>>;

/// A request that is refused or fails, as the client will see it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct ApiError {
    /// HTTP status, 4xx or 5xx.
    pub status: StatusCode,
    /// Stable word for programs, in kebab-case.
    pub code: &'static str,
    /// Sentence for people; names the thing and the remedy.
    pub message: String,
    /// Single reasons behind the refusal, where there are several.
    pub reasons: Vec<String>,
}

impl ApiError {
    /// An error without single reasons.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            reasons: Vec::new(),
        }
    }

    /// The request itself is wrong: 400.
    pub fn bad_request(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    /// There is nothing at this path: 404.
    #[must_use]
    pub fn not_found(path: &str) -> Self {
        let shown: String = path.chars().take(100).collect();
        Self::new(
            StatusCode::NOT_FOUND,
            "not-found",
            format!("there is nothing at {shown:?}"),
        )
    }

    /// Something failed on this side: 500, or 503 when asking again can help.
    pub fn failed(code: &'static str, error: &dyn std::error::Error, transient: bool) -> Self {
        let status = if transient {
            StatusCode::SERVICE_UNAVAILABLE
        } else {
            StatusCode::INTERNAL_SERVER_ERROR
        };
        Self::new(status, code, chain(error))
    }

    /// The answer that carries this error.
    #[must_use]
    pub fn into_response(self) -> Response {
        let mut body = ErrorBody::new(self.code, self.message);
        body.reasons = self.reasons;
        respond(self.status, &body)
    }
}

/// 200 with a JSON body.
pub fn ok<T: Serialize>(body: &T) -> Response {
    respond(StatusCode::OK, body)
}

/// 200 with a body that is JSON already.
pub fn ok_bytes(body: Bytes) -> Response {
    build(StatusCode::OK, body)
}

/// 200 with a secret. The bytes are handed to the kernel from where they are (a Unix socket takes several buffers at once, so that hyper
/// copies none together), and wiped then.
pub fn ok_secret(secret: Zeroizing<Vec<u8>>) -> Response {
    let mut response = build(StatusCode::OK, Bytes::from_owner(secret));
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    response
}

/// 405, with the methods that would have worked.
pub fn method_not_allowed(path: &str, allowed: &Method) -> Response {
    let message = format!("{path} wants {allowed}");
    let mut response = ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", message).into_response();
    if let Ok(value) = HeaderValue::from_str(allowed.as_str()) {
        response.headers_mut().insert(ALLOW, value);
    }
    response
}

/// Reads a request's body and parses it.
///
/// # Errors
/// Those of [`read_body`] with [`MAX_BODY`] and [`BODY_TIMEOUT`], and 400 when it is not the JSON that `T` wants; the
/// message names an unknown or missing field.
pub async fn read_json<T, B>(request: Request<B>) -> Result<T, ApiError>
where
    T: DeserializeOwned,
    B: hyper::body::Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let bytes = read_body(request, MAX_BODY, BODY_TIMEOUT).await?;
    serde_json::from_slice(&bytes)
        .map_err(|error| ApiError::bad_request("malformed-request", format!("the request body is refused: {error}")))
}

/// Reads a request's body of at most `limit` bytes.
///
/// # Errors
/// 413 when it is longer (a declared length is refused unread), 408 when it takes longer than `timeout`, 400 when it breaks
/// off.
pub async fn read_body<B>(request: Request<B>, limit: usize, timeout: Duration) -> Result<Bytes, ApiError>
where
    B: hyper::body::Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let too_large = || {
        let message = format!("the request body is larger than {limit} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body-too-large", message)
    };
    let body = request.into_body();
    if body.size_hint().lower() > limit as u64 {
        return Err(too_large());
    }
    match tokio::time::timeout(timeout, Limited::new(body, limit).collect()).await {
        Err(_) => {
            let message = format!("the request body did not arrive within {} s", timeout.as_secs());
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "body-timeout", message))
        }
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(ApiError::bad_request(
            "body-broken",
            format!("the request body broke off: {error}"),
        )),
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
    }
}

/// An error and its causes in one line, each once.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        let words = source.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = source.source();
    }
    text
}

/// Whose fault is it that a connection could not be accepted? `Some(pause)`: the peer's, or a shortage that passes, so go on
/// after the pause. `None`: the listening socket is broken, and a server that hears nobody should not look alive.
#[must_use]
pub fn accept_trouble(error: &std::io::Error) -> Option<Duration> {
    use nix::libc;
    match error.raw_os_error()? {
        // accept(2): pending network errors of the new connection; the next one is unharmed.
        libc::ECONNABORTED
        | libc::ECONNRESET
        | libc::EPROTO
        | libc::ENETDOWN
        | libc::ENOPROTOOPT
        | libc::EHOSTDOWN
        | libc::ENONET
        | libc::EHOSTUNREACH
        | libc::EOPNOTSUPP
        | libc::ENETUNREACH
        | libc::EPERM
        | libc::EINTR
        | libc::EAGAIN => Some(Duration::ZERO),
        // Files or memory are short: without a pause this would be a loop at full speed.
        libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM => Some(Duration::from_millis(500)),
        _ => None,
    }
}

fn respond<T: Serialize>(status: StatusCode, body: &T) -> Response {
    match serde_json::to_vec(body) {
        Ok(bytes) => build(status, Bytes::from(bytes)),
        // Cannot happen for our types (string keys, no failing Serialize); an empty 500 is still an answer.
        Err(error) => {
            tracing::error!("an answer could not be written as JSON: {error}");
            build(StatusCode::INTERNAL_SERVER_ERROR, Bytes::new())
        }
    }
}

fn build(status: StatusCode, body: Bytes) -> Response {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Wanted {
        #[expect(dead_code, reason = "only its presence is tested")]
        number: u8,
    }

    fn read(body: impl Into<Bytes>) -> Result<Wanted, ApiError> {
        let request = Request::new(Full::new(body.into()));
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap()
            .block_on(read_json(request))
    }

    #[test]
    fn a_body_is_strict_json() {
        assert!(read("{\"number\":1}").is_ok());
        let error = read("{\"number\":1,\"numbr\":2}").unwrap_err();
        assert!(error.message.contains("unknown field `numbr`"), "{error}");
        assert_eq!(error.code, "malformed-request");
        assert!(read("{}").unwrap_err().message.contains("missing field `number`"));
        assert_eq!(read("").unwrap_err().status, StatusCode::BAD_REQUEST);
    }

    #[test]
    fn a_long_body_is_refused_by_its_length() {
        let error = read(vec![b' '; MAX_BODY + 1]).unwrap_err();
        assert_eq!(
            (error.status, error.code),
            (StatusCode::PAYLOAD_TOO_LARGE, "body-too-large")
        );
        assert_eq!(read(vec![b' '; MAX_BODY]).unwrap_err().status, StatusCode::BAD_REQUEST);
    }

    #[test]
    fn accept_errors_are_sorted_by_fault() {
        let trouble = |errno| accept_trouble(&std::io::Error::from_raw_os_error(errno));
        assert_eq!(trouble(nix::libc::ECONNABORTED), Some(Duration::ZERO));
        assert!(trouble(nix::libc::EMFILE).unwrap() > Duration::ZERO);
        assert!(trouble(nix::libc::ENOBUFS).unwrap() > Duration::ZERO);
        assert_eq!(trouble(nix::libc::EBADF), None);
        assert_eq!(trouble(nix::libc::EINVAL), None);
    }

    #[test]
    fn causes_are_told_once() {
        let cause = std::io::Error::other("why");
        let error = crate::config::ConfigError::Read {
            path: "/p".into(),
            source: cause,
        };
        assert_eq!(chain(&error), "cannot read configuration /p: why");
    }
}

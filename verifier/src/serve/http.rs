//! Requests in, JSON out: sizes and times of bodies, and the one shape that every refusal has.

use std::time::Duration;

use assay_evidence::wire::ErrorBody;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A refusal, as the client sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub status: StatusCode,
    pub code: &'static str,
    pub message: String,
    pub reasons: Vec<String>,
}

impl Refusal {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            reasons: Vec::new(),
        }
    }

    pub fn forbidden(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, code, message)
    }

    /// Something here failed; the client learns no more than that, the journal has the rest.
    pub fn internal(error: &dyn std::error::Error) -> Self {
        tracing::error!("{}", crate::cli::chain(error));
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "the verifier failed; its journal says why",
        )
    }

    /// Adds the single reasons, as many as a client reads.
    pub fn because(mut self, reasons: &[String]) -> Self {
        self.reasons = shorten(reasons, MAX_REASONS);
        self
    }

    pub fn into_response(self) -> Response<Full<Bytes>> {
        let mut body = ErrorBody::new(self.code, self.message);
        body.reasons = self.reasons;
        json(self.status, &body)
    }
}

/// At most `limit` lines; the last one then says how many are not shown.
pub(crate) fn shorten(reasons: &[String], limit: usize) -> Vec<String> {
    if reasons.len() <= limit {
        return reasons.to_vec();
    }
    let shown = limit.saturating_sub(1);
    let mut short: Vec<String> = reasons.iter().take(shown).cloned().collect();
    short.push(format!("and {} more", reasons.len().saturating_sub(shown)));
    short
}

/// An answer with a JSON body.
pub(super) fn json(status: StatusCode, body: &impl Serialize) -> Response<Full<Bytes>> {
    // Our own types always serialize; an empty body would be the symptom.
    let bytes = serde_json::to_vec(body).unwrap_or_default();
    content(status, "application/json", bytes)
}

/// An answer with a body of this media type.
pub(super) fn content(status: StatusCode, media_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    response
}

/// Reads a body of at most `limit` bytes within [`BODY_TIMEOUT`] and parses it strictly.
pub(super) async fn read_json<T: DeserializeOwned>(body: Incoming, limit: usize) -> Result<T, Refusal> {
    let too_large = || {
        Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "body-too-large",
            format!("the request body is longer than {limit} bytes"),
        )
    };
    let limit_u64 = u64::try_from(limit).unwrap_or(u64::MAX);
    if body.size_hint().lower() > limit_u64 {
        return Err(too_large());
    }
    let collected = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, limit).collect()).await;
    let bytes = match collected {
        Ok(Ok(collected)) => collected.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(too_large()),
        Ok(Err(error)) => {
            return Err(Refusal::new(
                StatusCode::BAD_REQUEST,
                "body-broken",
                format!("the request body broke off: {error}"),
            ));
        }
        Err(_) => {
            let message = format!("the request body did not arrive within {} s", BODY_TIMEOUT.as_secs());
            return Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, "body-timeout", message));
        }
    };
    serde_json::from_slice(&bytes).map_err(|e| {
        Refusal::new(
            StatusCode::BAD_REQUEST,
            "bad-request",
            format!("the request body is malformed: {e}"),
        )
    })
}

/// 24 MiB at some 7 Mbit/s.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Reasons in one refusal.
pub(super) const MAX_REASONS: usize = 100;

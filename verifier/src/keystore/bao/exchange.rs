//! One request, and what its answer means.

use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use zeroize::Zeroizing;

use super::SourceError;
use crate::client::printable;
use crate::remote::{Connection, RemoteError, body, secret_header};

/// An honest answer has a kilobyte or two.
const MAX_ANSWER: usize = 64 * 1024;

/// An answer, its body read.
pub(super) struct Answer {
    pub status: StatusCode,
    body: Bytes,
}

/// What a login or a renewal gives.
#[derive(Deserialize)]
pub(super) struct Auth {
    pub client_token: Zeroed,
    /// In seconds; 0 for one that does not run out.
    pub lease_duration: u64,
    pub renewable: bool,
}

/// Text that is wiped.
#[derive(Deserialize)]
#[serde(from = "String")]
pub(super) struct Zeroed(pub Zeroizing<String>);

impl From<String> for Zeroed {
    fn from(text: String) -> Self {
        Self(Zeroizing::new(text))
    }
}

#[derive(Deserialize)]
struct Login {
    auth: Auth,
}

#[derive(Deserialize)]
struct Envelope<T> {
    data: T,
}

#[derive(Deserialize)]
struct Errors {
    errors: Vec<String>,
}

/// Sends a request and reads its answer.
pub(super) async fn exchange(
    connection: &mut Connection,
    method: &Method,
    path: &str,
    namespace: Option<&str>,
    token: Option<&str>,
    request: Option<&Value>,
) -> Result<Answer, RemoteError> {
    let mut headers = vec![
        (
            HeaderName::from_static("x-vault-request"),
            HeaderValue::from_static("true"),
        ),
        (CONTENT_TYPE, HeaderValue::from_static("application/json")),
    ];
    for (name, value) in [("x-vault-namespace", namespace), ("x-vault-token", token)] {
        if let Some(value) = value {
            headers.push(secret_header(name, value)?);
        }
    }
    let bytes = request.map(Value::to_string).unwrap_or_default();
    let response = connection.send(method.clone(), path, &headers, body(bytes)).await?;
    let status = response.status();
    let body = connection.read(response.into_body(), MAX_ANSWER).await?;
    Ok(Answer { status, body })
}

impl Answer {
    /// Whether the server understood, and says no: as opposed to not being able to say.
    pub fn is_refusal(&self) -> bool {
        self.status.is_client_error() && self.status != StatusCode::TOO_MANY_REQUESTS
    }

    /// The answer, if it is a yes.
    pub fn good(self, server: &str, path: &str) -> Result<Self, SourceError> {
        let (server, path) = (server.to_owned(), path.to_owned());
        let (status, words) = (self.status, self.words());
        Err(match status {
            status if status.is_success() => return Ok(self),
            StatusCode::FORBIDDEN => SourceError::Denied { server, path },
            StatusCode::NOT_FOUND => SourceError::Missing { server, path },
            // How transit says that its key is gone.
            StatusCode::BAD_REQUEST if words.contains("key not found") => SourceError::Missing { server, path },
            StatusCode::SERVICE_UNAVAILABLE if words.contains("sealed") => SourceError::Sealed { server },
            StatusCode::TOO_MANY_REQUESTS => SourceError::Unwell {
                server,
                path,
                status,
                words,
            },
            status if status.is_server_error() => SourceError::Unwell {
                server,
                path,
                status,
                words,
            },
            status => SourceError::Refused {
                server,
                path,
                status,
                words,
            },
        })
    }

    /// What came with a yes.
    pub fn data<T: DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_slice::<Envelope<T>>(&self.body)
            .ok()
            .map(|envelope| envelope.data)
    }

    /// The token of a login or a renewal.
    pub fn auth(&self) -> Option<Auth> {
        serde_json::from_slice::<Login>(&self.body).ok().map(|login| login.auth)
    }

    /// What the server says of itself, for people.
    pub fn words(&self) -> String {
        let errors = serde_json::from_slice::<Errors>(&self.body).map(|body| body.errors);
        match errors {
            Ok(errors) if !errors.is_empty() => printable(&errors.join("; ")),
            _ => "it gives no reason".to_owned(),
        }
    }
}

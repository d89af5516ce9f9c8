//! Sealed images in stores of others: a plain HTTP one (PUT, GET), and OpenStack's Glance.
//!
//! What is there is useless without its key, so the store is trusted with nothing: what comes back is held against a SHA-256, and opens
//! only with the header that its key is for.

use std::path::Path;
use std::time::Duration;

use hyper::header::{HeaderName, HeaderValue};
use hyper::{Method, StatusCode};
use serde_json::Value;

use crate::remote::{Body, Connection, Remote, RemoteError, Trust, body, secret_header};

mod download;
mod error;
mod glance;
mod plain;
mod upload;

pub use error::ImageStoreError;
pub use glance::{Glance, NewImage};
pub use plain::PlainStore;

/// How far a transfer is: bytes done, bytes in all.
pub type Hear<'a> = &'a mut dyn FnMut(u64, u64);

/// How long a store may do nothing.
const STALL: Duration = Duration::from_secs(120);
/// Longest answer that is not an image.
const MAX_ANSWER: usize = 1024 * 1024;
/// A token of a store.
const MAX_TOKEN: usize = 16 * 1024;

/// A store, and how it is asked.
struct Store {
    remote: Remote,
    token: Option<(HeaderName, HeaderValue)>,
}

impl Store {
    fn new(url: &str, ca_file: Option<&Path>, token: Option<(&'static str, &str)>) -> Result<Self, ImageStoreError> {
        let remote = Remote::new(
            url.parse()?,
            Trust {
                ca_file,
                identity: None,
            },
        )?;
        let token = match token {
            None => None,
            Some(_) if !remote.endpoint().is_private() => {
                return Err(ImageStoreError::TokenInClear(remote.endpoint().to_string()));
            }
            Some((_, text)) if text.len() > MAX_TOKEN => return Err(RemoteError::Header("token").into()),
            Some((name, text)) => Some(secret_header(name, text)?),
        };
        Ok(Self { remote, token })
    }

    fn name(&self) -> String {
        self.remote.endpoint().to_string()
    }

    async fn connect(&self) -> Result<Connection, ImageStoreError> {
        Ok(self.remote.connect(STALL).await?)
    }

    fn headers(&self, more: &[(HeaderName, HeaderValue)]) -> Vec<(HeaderName, HeaderValue)> {
        self.token.iter().chain(more).cloned().collect()
    }

    /// A small request with a small answer, within [`STALL`].
    async fn ask(
        &self,
        method: Method,
        path: &str,
        json: Option<&Value>,
    ) -> Result<(StatusCode, Vec<u8>), ImageStoreError> {
        self.ask_as(method, path, json, "application/json").await
    }

    /// The same, with the body called so.
    async fn ask_as(
        &self,
        method: Method,
        path: &str,
        json: Option<&Value>,
        media_type: &'static str,
    ) -> Result<(StatusCode, Vec<u8>), ImageStoreError> {
        let asking = async {
            let mut connection = self.connect().await?;
            let media_type = (hyper::header::CONTENT_TYPE, HeaderValue::from_static(media_type));
            let headers = self.headers(json.map(|_| media_type).as_slice());
            let bytes = json.map(Value::to_string).unwrap_or_default();
            let answer = connection.send(method, path, &headers, body(bytes)).await?;
            let status = answer.status();
            let read = connection.read(answer.into_body(), MAX_ANSWER).await?;
            Ok((status, read.to_vec()))
        };
        tokio::time::timeout(STALL, asking)
            .await
            .unwrap_or_else(|_| Err(self.remote.late("answer", STALL).into()))
    }

    /// Puts what is sent there, and wants a yes.
    async fn put(&self, path: &str, sent: Body) -> Result<(), ImageStoreError> {
        let mut connection = self.connect().await?;
        let binary = HeaderValue::from_static("application/octet-stream");
        let headers = self.headers(&[(hyper::header::CONTENT_TYPE, binary)]);
        let answer = connection.send(Method::PUT, path, &headers, sent).await?;
        let status = answer.status();
        let words = connection.read(answer.into_body(), MAX_ANSWER).await?;
        self.good(status, path, &words)
    }

    fn good(&self, status: StatusCode, path: &str, words: &[u8]) -> Result<(), ImageStoreError> {
        if status.is_success() {
            return Ok(());
        }
        let words = String::from_utf8_lossy(words);
        Err(ImageStoreError::Refused {
            store: self.name(),
            path: path.to_owned(),
            status,
            words: crate::client::printable(words.trim()),
        })
    }
}

/// SHA-256, in hex.
fn hex_of(hash: ring::digest::Context) -> String {
    hex::encode(hash.finish())
}

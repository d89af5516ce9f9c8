//! The commands' side of the local socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use assay_evidence::wire::ErrorBody;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::CliError;

const MAX_ANSWER: usize = 1024 * 1024;

/// Why the daemon could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers on the socket.
    #[error("the agent does not answer on {path}: start it with `systemctl start assay-agent` (and be root)")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The daemon is there, and silent.
    #[error("the agent did not answer within {} s: see `systemctl status assay-agent`", .0.as_secs())]
    Timeout(Duration),
    /// The daemon went away during the request.
    #[error("the agent broke off; `journalctl -u assay-agent` has its last words")]
    Broken(#[source] hyper::Error),
    /// The answer is cut off or too long.
    #[error("the agent's answer is cut off or too long")]
    Answer(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The answer is not what was asked for.
    #[error("the agent's answer is malformed; are the running agent and this program of one version?")]
    Malformed(#[source] serde_json::Error),
    /// The request could not be made.
    #[error("the request could not be made")]
    Request(#[source] hyper::http::Error),
}

impl ClientError {
    /// Whether no daemon runs.
    pub(super) fn is_absent(&self) -> bool {
        let kinds = [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused];
        matches!(self, Self::Connect { source, .. } if kinds.contains(&source.kind()))
    }
}

/// Asks the daemon something.
pub(super) fn get<A: DeserializeOwned>(socket: &Path, path: &str) -> Result<A, CliError> {
    ask(socket, Method::GET, path, Bytes::new(), None)
}

/// Tells the daemon to do something. It has its own time limit for each thing that it does.
pub(super) fn post<Q: Serialize, A: DeserializeOwned>(socket: &Path, path: &str, request: &Q) -> Result<A, CliError> {
    let body = serde_json::to_vec(request).map_err(CliError::Json)?;
    ask(socket, Method::POST, path, Bytes::from(body), None)
}

/// The same for hooks, behind which a toolstack waits with a time limit of its own: a daemon that hangs must not make them hang.
pub(super) fn post_within<Q: Serialize, A: DeserializeOwned>(
    socket: &Path,
    path: &str,
    request: &Q,
    limit: Duration,
) -> Result<A, CliError> {
    let body = serde_json::to_vec(request).map_err(CliError::Json)?;
    ask(socket, Method::POST, path, Bytes::from(body), Some(limit))
}

/// Hands the daemon bytes that are no JSON.
pub(super) fn put<A: DeserializeOwned>(socket: &Path, path: &str, body: Vec<u8>) -> Result<A, CliError> {
    ask(socket, Method::PUT, path, Bytes::from(body), None)
}

fn ask<A: DeserializeOwned>(
    socket: &Path,
    method: Method,
    path: &str,
    body: Bytes,
    limit: Option<Duration>,
) -> Result<A, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(CliError::Runtime)?;
    let exchange = exchange(socket, method, path, body);
    let (success, bytes) = runtime.block_on(async {
        match limit {
            Some(limit) => tokio::time::timeout(limit, exchange)
                .await
                .unwrap_or(Err(ClientError::Timeout(limit))),
            None => exchange.await,
        }
    })?;
    if success {
        return Ok(serde_json::from_slice(&bytes).map_err(ClientError::Malformed)?);
    }
    let ErrorBody { error, reasons } = serde_json::from_slice(&bytes).map_err(ClientError::Malformed)?;
    Err(CliError::Refused {
        code: error.code,
        message: error.message,
        reasons,
    })
}

async fn exchange(socket: &Path, method: Method, path: &str, body: Bytes) -> Result<(bool, Bytes), ClientError> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|source| ClientError::Connect {
            path: socket.to_owned(),
            source,
        })?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(ClientError::Broken)?;
    let driver = tokio::spawn(async move { drop(connection.await) });
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, "agent.sock")
        .body(Full::new(body))
        .map_err(ClientError::Request)?;
    let response = sender.send_request(request).await.map_err(ClientError::Broken)?;
    let success = response.status().is_success();
    let bytes = Limited::new(response.into_body(), MAX_ANSWER)
        .collect()
        .await
        .map_err(ClientError::Answer)?
        .to_bytes();
    driver.abort();
    Ok((success, bytes))
}

//! One connection to a verifier. Challenge and release travel on the same one: the evidence is bound to it through the TLS
//! exporter, so an answer that was relayed from another connection is worth nothing.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use assay_evidence::binding::{EXPORTER_LABEL, Exporter};
use assay_evidence::wire::ErrorBody;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, DATE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::client::Resumption;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::url::VerifierUrl;
use crate::join::Joined;

/// TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A wrapped key or an error with its reasons.
const MAX_ANSWER: usize = 1024 * 1024;

/// Why a verifier gave no usable answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// TLS could not be set up with the host's own identity.
    #[error("the host's TLS identity cannot be used: run `assay-agent join FILE --force`")]
    Setup(#[source] rustls::Error),
    /// Name resolution, TCP or TLS failed.
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    /// A step took too long.
    #[error("no answer within {} s", .0.as_secs_f32())]
    Timeout(Duration),
    /// The connection broke during a request.
    #[error("the connection broke; has this host been added on the verifier (`assay-verifier host add`)?")]
    Broken(#[source] hyper::Error),
    /// The request could not be written.
    #[error("the request could not be made")]
    Request(#[source] hyper::http::Error),
    /// The request could not be written as JSON.
    #[error("the request could not be written")]
    Encode(#[source] serde_json::Error),
    /// The answer is cut off, or longer than [`MAX_ANSWER`].
    #[error("the answer is broken off or larger than {MAX_ANSWER} bytes")]
    Answer(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The answer is not what was asked for.
    #[error("the answer to {path} is malformed")]
    Malformed {
        /// The request.
        path: &'static str,
        /// What the parser says.
        #[source]
        source: serde_json::Error,
    },
    /// The verifier says no.
    #[error("{message} ({status}, {code})")]
    Status {
        /// HTTP status.
        status: StatusCode,
        /// The verifier's word for programs.
        code: String,
        /// The verifier's words for people.
        message: String,
        /// Its reasons, one by one.
        reasons: Vec<String>,
    },
}

/// The TLS side of every connection: the join file's CA as only root, the host's own certificate.
///
/// # Errors
/// [`ClientError::Setup`].
pub fn tls_config(joined: &Joined) -> Result<Arc<ClientConfig>, ClientError> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(joined.membership.ca().clone()).map_err(ClientError::Setup)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(ClientError::Setup)?
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![joined.certificate()], joined.key())
        .map_err(ClientError::Setup)?;
    // Each unlock proves itself anew.
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// An open connection; dropping it closes it.
pub struct Connection {
    authority: String,
    exporter: Exporter,
    sender: SendRequest<Full<Bytes>>,
    date: Option<SystemTime>,
    driver: tokio::task::JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Connection {
    /// Connects, within `limit` or ten seconds, whichever is less.
    ///
    /// # Errors
    /// [`ClientError::Connect`] or [`ClientError::Timeout`].
    pub async fn open(url: &VerifierUrl, tls: Arc<ClientConfig>, limit: Duration) -> Result<Self, ClientError> {
        let limit = limit.min(CONNECT_TIMEOUT);
        tokio::time::timeout(limit, Self::connect(url, tls))
            .await
            .unwrap_or(Err(ClientError::Timeout(limit)))
    }

    async fn connect(url: &VerifierUrl, tls: Arc<ClientConfig>) -> Result<Self, ClientError> {
        let tcp = TcpStream::connect((url.address().host(), url.address().port()))
            .await
            .map_err(ClientError::Connect)?;
        tcp.set_nodelay(true).map_err(ClientError::Connect)?;
        let stream = TlsConnector::from(tls)
            .connect(url.server_name(), tcp)
            .await
            .map_err(ClientError::Connect)?;
        let exporter = stream
            .get_ref()
            .1
            .export_keying_material([0; 32], EXPORTER_LABEL, None)
            .map_err(|error| ClientError::Connect(io::Error::other(error)))?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(ClientError::Broken)?;
        // Its error reaches us through the request that it fails.
        let driver = tokio::spawn(async move { drop(connection.await) });
        Ok(Self {
            authority: url.address().to_string(),
            exporter: Exporter::new(exporter),
            sender,
            date: None,
            driver,
        })
    }

    /// Keying material that names this connection.
    #[must_use]
    pub fn exporter(&self) -> Exporter {
        self.exporter
    }

    /// The verifier's clock, to the second, as of its last answer; none before, and where it did not say.
    #[must_use]
    pub const fn date(&self) -> Option<SystemTime> {
        self.date
    }

    /// Sends a request, within `limit`.
    ///
    /// # Errors
    /// [`ClientError::Status`] when the verifier says no, the others when there is no usable answer.
    pub async fn post<Q: Serialize, A: DeserializeOwned>(
        &mut self,
        path: &'static str,
        request: &Q,
        limit: Duration,
    ) -> Result<A, ClientError> {
        let body = serde_json::to_vec(request).map_err(ClientError::Encode)?;
        self.ask(Method::POST, path, Bytes::from(body), limit).await
    }

    /// Asks for something, within `limit`.
    ///
    /// # Errors
    /// As [`Connection::post`].
    pub async fn get<A: DeserializeOwned>(&mut self, path: &'static str, limit: Duration) -> Result<A, ClientError> {
        self.ask(Method::GET, path, Bytes::new(), limit).await
    }

    async fn ask<A: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &'static str,
        body: Bytes,
        limit: Duration,
    ) -> Result<A, ClientError> {
        let exchange = self.exchange(method, path, body);
        let bytes = tokio::time::timeout(limit, exchange)
            .await
            .unwrap_or(Err(ClientError::Timeout(limit)))?;
        serde_json::from_slice(&bytes).map_err(|source| ClientError::Malformed { path, source })
    }

    async fn exchange(&mut self, method: Method, path: &'static str, body: Bytes) -> Result<Bytes, ClientError> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, &self.authority)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(ClientError::Request)?;
        let response = self.sender.send_request(request).await.map_err(ClientError::Broken)?;
        let status = response.status();
        let date = response.headers().get(DATE).and_then(|date| date.to_str().ok());
        self.date = date.and_then(|date| httpdate::parse_http_date(date).ok());
        let bytes = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(ClientError::Answer)?
            .to_bytes();
        if status.is_success() {
            return Ok(bytes);
        }
        let (code, message, reasons) = match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(body) => (body.error.code, body.error.message, body.reasons),
            Err(_) => (
                "no-code".to_owned(),
                "the verifier gave no reason".to_owned(),
                Vec::new(),
            ),
        };
        Err(ClientError::Status {
            status,
            code,
            message,
            reasons,
        })
    }
}

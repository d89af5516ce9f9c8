//! Asking an agent: one TLS 1.3 connection, client certificate of this verifier, the agent's key pinned.
//!
//! What comes back is untrusted: it is limited in size and time, parsed strictly, and judged elsewhere.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use assay_evidence::binding::{EXPORTER_LABEL, Exporter};
use assay_evidence::bundle::{Bundle, BundleError};
use assay_evidence::wire::{
    ActivateRequest, ActivateResponse, ErrorBody, Identity, LeaseAnswer, LeaseNews, ListHead, LogPage, QuoteRequest,
};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::ServerName;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

use crate::config::StateDir;
use crate::pki::{PkiError, Role, TlsIdentity};

mod pin;

pub use pin::Pin;
use pin::PinVerifier;

/// Why an agent could not be asked, or gave no usable answer.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The verifier's own certificate cannot be used.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// TLS could not be set up with the verifier's own certificate.
    #[error("the verifier's client certificate cannot be used")]
    Tls(#[source] rustls::Error),
    /// The address does not resolve, or nothing listens there.
    #[error("cannot connect to {address}")]
    Connect {
        /// As enrolled.
        address: String,
        /// The system's answer.
        #[source]
        cause: io::Error,
    },
    /// A step took too long.
    #[error("{address} did not {step} within {} s", .after.as_secs_f64())]
    Timeout {
        /// As enrolled.
        address: String,
        /// What was waited for.
        step: String,
        /// The limit.
        after: Duration,
    },
    /// Somebody else's key answers.
    #[error("at {address} answers another TLS key (sha256 {}) than the enrolled host's ({}); if its agent was joined anew, remove the host and add it again", hex::encode(.found), hex::encode(.pinned))]
    OtherKey {
        /// As enrolled.
        address: String,
        /// The key that answered.
        found: [u8; 32],
        /// The key that was pinned.
        pinned: [u8; 32],
    },
    /// The handshake failed otherwise.
    #[error("TLS handshake with {address} failed")]
    Handshake {
        /// As enrolled.
        address: String,
        /// What TLS says.
        #[source]
        cause: io::Error,
    },
    /// The connection gives no exporter value; only before the handshake is over.
    #[error("the TLS connection to {address} gives no exporter value")]
    Exporter {
        /// As enrolled.
        address: String,
        /// What TLS says.
        #[source]
        cause: rustls::Error,
    },
    /// The connection broke during a request. TLS 1.3 reports a refused client certificate only here.
    #[error("{address} broke off {path}; if it refuses the certificate, its agent has joined another verifier")]
    Request {
        /// As enrolled.
        address: String,
        /// The request.
        path: String,
        /// What HTTP says.
        #[source]
        cause: hyper::Error,
    },
    /// The answer is longer than any honest one.
    #[error("the answer of {address} to {path} is cut off or longer than {limit} bytes")]
    Body {
        /// As enrolled.
        address: String,
        /// The request.
        path: String,
        /// The limit in bytes.
        limit: usize,
    },
    /// The agent says no.
    #[error(transparent)]
    Refused(Box<AgentRefusal>),
    /// The answer is not the JSON that it should be.
    #[error("the answer of {address} to {path} is malformed")]
    Malformed {
        /// As enrolled.
        address: String,
        /// The request.
        path: String,
        /// What the parser says.
        #[source]
        cause: serde_json::Error,
    },
    /// The evidence is not a bundle.
    #[error("the evidence of {address} is malformed")]
    Bundle {
        /// As enrolled.
        address: String,
        /// What the parser says.
        #[source]
        cause: BundleError,
    },
}

/// An error that the agent answered with.
#[derive(Debug, Error)]
#[error("{address} refuses {path}: {message} ({status}, {code})")]
pub struct AgentRefusal {
    /// As enrolled.
    pub address: String,
    /// The request.
    pub path: String,
    /// HTTP status.
    pub status: StatusCode,
    /// The agent's code for it.
    pub code: String,
    /// The agent's words for it.
    pub message: String,
}

impl ClientError {
    /// Whether the host itself gave an answer that no honest agent gives, as opposed to not answering.
    pub fn is_bad_evidence(&self) -> bool {
        matches!(self, Self::Malformed { .. } | Self::Bundle { .. } | Self::Body { .. })
    }
}

/// What every connection to an agent shares: the verifier's client certificate.
#[derive(Clone)]
pub struct Asker {
    provider: Arc<CryptoProvider>,
    certificate: Arc<SingleCertAndKey>,
}

impl Asker {
    /// Reads the verifier's client certificate.
    pub fn load(state: &StateDir) -> Result<Self, ClientError> {
        Self::new(TlsIdentity::load(state, Role::Client)?)
    }

    /// Asks with this certificate.
    pub fn new(identity: TlsIdentity) -> Result<Self, ClientError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let certified = CertifiedKey::from_der(identity.chain, identity.key, &provider).map_err(ClientError::Tls)?;
        Ok(Self {
            provider,
            certificate: Arc::new(SingleCertAndKey::from(certified)),
        })
    }

    /// Connects to the agent at `address` (`HOST:PORT`). Each later request on the connection may take `timeout`, and
    /// so may this.
    pub async fn connect(&self, address: &str, pin: Pin, timeout: Duration) -> Result<Agent, ClientError> {
        let connecting = self.connect_unlimited(address, pin, timeout);
        tokio::time::timeout(timeout, connecting).await.unwrap_or_else(|_| {
            Err(ClientError::Timeout {
                address: address.to_owned(),
                step: "complete a TLS handshake".to_owned(),
                after: timeout,
            })
        })
    }

    async fn connect_unlimited(&self, address: &str, pin: Pin, timeout: Duration) -> Result<Agent, ClientError> {
        let unreachable = |cause| ClientError::Connect {
            address: address.to_owned(),
            cause,
        };
        let tcp = TcpStream::connect(address).await.map_err(unreachable)?;
        // Without it each small request of ours waits for the delayed acknowledgement of the one before.
        tcp.set_nodelay(true).map_err(unreachable)?;
        let verifier = Arc::new(PinVerifier::new(pin, self.provider.clone()));
        let connector = TlsConnector::from(Arc::new(self.config(verifier.clone())?));
        let connected = connector.connect(AGENT_NAME.clone(), tcp).await;
        let stream = match (connected, pin, verifier.seen()) {
            (_, Pin::Expect(pinned), Some(found)) if pinned != found => {
                return Err(ClientError::OtherKey {
                    address: address.to_owned(),
                    found,
                    pinned,
                });
            }
            (Ok(stream), ..) => stream,
            (Err(cause), ..) => {
                return Err(ClientError::Handshake {
                    address: address.to_owned(),
                    cause,
                });
            }
        };
        let Some(spki_sha256) = verifier.seen() else {
            let cause = io::Error::new(io::ErrorKind::InvalidData, "the agent presented no certificate");
            return Err(ClientError::Handshake {
                address: address.to_owned(),
                cause,
            });
        };
        let exporter = stream.get_ref().1.export_keying_material([0; 32], EXPORTER_LABEL, None);
        let exporter = exporter.map_err(|cause| ClientError::Exporter {
            address: address.to_owned(),
            cause,
        })?;
        let broken = |cause| ClientError::Request {
            address: address.to_owned(),
            path: "the connection".to_owned(),
            cause,
        };
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // Its error reaches us through the request that it fails.
        let driver = tokio::spawn(async move { drop(connection.await) });
        Ok(Agent {
            address: address.to_owned(),
            timeout,
            spki_sha256,
            exporter: Exporter::new(exporter),
            sender,
            driver,
        })
    }

    fn config(&self, verifier: Arc<PinVerifier>) -> Result<ClientConfig, ClientError> {
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(ClientError::Tls)?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(self.certificate.clone());
        // A resumed session would skip the certificate, and with it the pin.
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}

/// A connection to one agent; dropping it closes it.
pub struct Agent {
    address: String,
    timeout: Duration,
    spki_sha256: [u8; 32],
    exporter: Exporter,
    sender: SendRequest<Full<Bytes>>,
    driver: JoinHandle<()>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Agent {
    /// SHA-256 of the SubjectPublicKeyInfo of the key that answered.
    pub fn spki_sha256(&self) -> [u8; 32] {
        self.spki_sha256
    }

    /// This connection's exporter value, which its quotes must carry.
    pub fn exporter(&self) -> &Exporter {
        &self.exporter
    }

    /// `GET /v1/identity`.
    pub async fn identity(&mut self) -> Result<Identity, ClientError> {
        let body = self
            .exchange(Method::GET, "/v1/identity", Bytes::new(), SMALL_ANSWER)
            .await?;
        self.parse("/v1/identity", &body)
    }

    /// `POST /v1/activate`.
    pub async fn activate(&mut self, request: &ActivateRequest) -> Result<ActivateResponse, ClientError> {
        let body = self.post("/v1/activate", request, SMALL_ANSWER).await?;
        self.parse("/v1/activate", &body)
    }

    /// `GET /v1/log?from=`: a piece of the log, for whoever is far behind.
    pub async fn log(&mut self, from: u64) -> Result<LogPage, ClientError> {
        let path = format!("/v1/log?from={from}");
        let body = self.exchange(Method::GET, &path, Bytes::new(), LARGE_ANSWER).await?;
        self.parse(&path, &body)
    }

    /// `POST /v1/quote`.
    pub async fn quote(&mut self, request: &QuoteRequest) -> Result<Bundle, ClientError> {
        let body = self.post("/v1/quote", request, LARGE_ANSWER).await?;
        Bundle::from_json(&body).map_err(|cause| ClientError::Bundle {
            address: self.address.clone(),
            cause,
        })
    }

    /// `PUT /v1/approved`: brings the agent a signed list. It may take longer than a question: the agent writes to its
    /// disk, and the longest list has megabytes.
    pub async fn put_approved(&mut self, list: String) -> Result<ListHead, ClientError> {
        let path = "/v1/approved";
        let before = self.timeout;
        self.timeout = before.max(LIST_TIMEOUT);
        let answer = self.exchange(Method::PUT, path, Bytes::from(list), SMALL_ANSWER).await;
        self.timeout = before;
        self.parse(path, &answer?)
    }

    /// `POST /v1/leases`: what becomes of the keys that the host holds.
    pub async fn leases(&mut self, news: &LeaseNews) -> Result<LeaseAnswer, ClientError> {
        let body = self.post("/v1/leases", news, DISKS_ANSWER).await?;
        self.parse("/v1/leases", &body)
    }

    async fn post(&mut self, path: &str, request: &impl Serialize, limit: usize) -> Result<Bytes, ClientError> {
        let body = serde_json::to_vec(request).map_err(|cause| ClientError::Malformed {
            address: self.address.clone(),
            path: path.to_owned(),
            cause,
        })?;
        self.exchange(Method::POST, path, Bytes::from(body), limit).await
    }

    async fn exchange(&mut self, method: Method, path: &str, body: Bytes, limit: usize) -> Result<Bytes, ClientError> {
        let (address, after) = (self.address.clone(), self.timeout);
        let exchanging = self.exchange_unlimited(method, path, body, limit);
        tokio::time::timeout(after, exchanging).await.unwrap_or_else(|_| {
            Err(ClientError::Timeout {
                address,
                step: format!("answer {path}"),
                after,
            })
        })
    }

    async fn exchange_unlimited(
        &mut self,
        method: Method,
        path: &str,
        body: Bytes,
        limit: usize,
    ) -> Result<Bytes, ClientError> {
        let address = || self.address.clone();
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        // The paths are ours, so the fallback is never used.
        *request.uri_mut() = path.parse().unwrap_or_default();
        request
            .headers_mut()
            .insert(HOST, hyper::header::HeaderValue::from_static("assay-agent"));
        request.headers_mut().insert(
            CONTENT_TYPE,
            hyper::header::HeaderValue::from_static("application/json"),
        );
        let broken = |cause| ClientError::Request {
            address: address(),
            path: path.to_owned(),
            cause,
        };
        let response = self.sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let limit = if status.is_success() { limit } else { SMALL_ANSWER };
        let body = Limited::new(response.into_body(), limit).collect().await;
        let body = body
            .map_err(|_| ClientError::Body {
                address: address(),
                path: path.to_owned(),
                limit,
            })?
            .to_bytes();
        if status.is_success() {
            return Ok(body);
        }
        let (code, message) = match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(body) => (body.error.code, body.error.message),
            Err(_) => ("no-code".to_owned(), "no reason given".to_owned()),
        };
        let [code, message] = [code, message].map(|text| printable(&text));
        Err(ClientError::Refused(Box::new(AgentRefusal {
            address: address(),
            path: path.to_owned(),
            status,
            code,
            message,
        })))
    }

    fn parse<T: DeserializeOwned>(&self, path: &str, body: &[u8]) -> Result<T, ClientError> {
        serde_json::from_slice(body).map_err(|cause| ClientError::Malformed {
            address: self.address.clone(),
            path: path.to_owned(),
            cause,
        })
    }
}

/// A stranger's text, fit for a terminal and a log line.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .take(500)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// The agent's certificate is pinned, not named; something must stand in the SNI extension.
static AGENT_NAME: std::sync::LazyLock<ServerName<'static>> = std::sync::LazyLock::new(|| {
    ServerName::try_from("assay-agent").unwrap_or_else(|_| ServerName::from(std::net::IpAddr::from([127, 0, 0, 1])))
});

/// For an approved list, which the agent checks and writes to its disk.
const LIST_TIMEOUT: Duration = Duration::from_secs(60);
/// Identities, activations and errors.
const SMALL_ANSWER: usize = 64 * 1024;
/// A line for each open disk.
const DISKS_ANSWER: usize = 1024 * 1024;
/// Quotes and log pages: the same bound as for the evidence in a key request.
const LARGE_ANSWER: usize = 24 * 1024 * 1024;

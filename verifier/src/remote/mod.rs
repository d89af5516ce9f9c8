//! Services of others, asked over HTTP/1.1: a key source, an image store.
//!
//! TLS 1.3 with the roots that the operator names. What comes back is untrusted: each caller limits it in size and time.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{HOST, HeaderName, HeaderValue};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

mod endpoint;
mod error;

pub use endpoint::Endpoint;
pub use error::RemoteError;

/// What is sent: in memory, or read as it goes.
pub type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Where distributions keep the CAs that they trust: Debian, Enterprise Linux.
const SYSTEM_ROOTS: [&str; 2] = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];

/// Whom to believe, and who we are.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trust<'a> {
    /// PEM file of the CAs that the server's certificate may be of; `None`: those of the system.
    pub ca_file: Option<&'a Path>,
    /// PEM files of our own certificate chain and of its key.
    pub identity: Option<(&'a Path, &'a Path)>,
}

/// A service and how it is reached.
pub struct Remote {
    endpoint: Endpoint,
    tls: Option<TlsConnector>,
}

impl Remote {
    /// Reads certificates; connects to nothing yet.
    ///
    /// # Errors
    /// [`RemoteError::Pem`], [`RemoteError::NoRoots`] and [`RemoteError::Tls`] for certificates that can't be used.
    pub fn new(endpoint: Endpoint, trust: Trust<'_>) -> Result<Self, RemoteError> {
        let tls = if endpoint.is_https() {
            Some(TlsConnector::from(Arc::new(tls_config(trust)?)))
        } else {
            None
        };
        Ok(Self { endpoint, tls })
    }

    /// Where it is.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Connects, within `limit`.
    ///
    /// # Errors
    /// [`RemoteError::Connect`], [`RemoteError::Handshake`], [`RemoteError::Timeout`].
    pub async fn connect(&self, limit: Duration) -> Result<Connection, RemoteError> {
        tokio::time::timeout(limit, self.connect_unlimited())
            .await
            .unwrap_or_else(|_| Err(self.late("take the connection", limit)))
    }

    /// The error for a step that took too long.
    #[must_use]
    pub fn late(&self, step: &'static str, after: Duration) -> RemoteError {
        RemoteError::Timeout {
            server: self.endpoint.to_string(),
            step,
            after,
        }
    }

    async fn connect_unlimited(&self) -> Result<Connection, RemoteError> {
        let server = || self.endpoint.to_string();
        let unreachable = |cause| RemoteError::Connect {
            server: server(),
            cause,
        };
        let address = self.endpoint.address();
        let tcp = TcpStream::connect((address.host(), address.port()))
            .await
            .map_err(unreachable)?;
        tcp.set_nodelay(true).map_err(unreachable)?;
        let Some(tls) = &self.tls else {
            return self.speak(tcp).await;
        };
        let name = ServerName::try_from(address.host().to_owned()).map_err(|_| RemoteError::Url {
            url: server(),
            why: "its host is no name that a certificate can have",
        })?;
        let stream = tls.connect(name, tcp).await.map_err(|cause| RemoteError::Handshake {
            server: server(),
            cause,
        })?;
        self.speak(stream).await
    }

    async fn speak(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> Result<Connection, RemoteError> {
        let server = self.endpoint.to_string();
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream))
                .await
                .map_err(|cause| RemoteError::Broken {
                    server: server.clone(),
                    cause,
                })?;
        // Its error reaches us through the request that it fails.
        let driver = tokio::spawn(async move { drop(connection.await) });
        Ok(Connection {
            server,
            authority: self.endpoint.address().to_string(),
            base: self.endpoint.base().to_owned(),
            sender,
            driver,
        })
    }
}

/// An open connection; dropping it closes it.
pub struct Connection {
    server: String,
    authority: String,
    base: String,
    sender: SendRequest<Body>,
    driver: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Connection {
    /// Sends a request to a path below the service's own, and waits for the head of the answer.
    ///
    /// # Errors
    /// [`RemoteError::Broken`]; [`RemoteError::Request`] for a path that no URL can have.
    pub async fn send(
        &mut self,
        method: Method,
        path: &str,
        headers: &[(HeaderName, HeaderValue)],
        body: Body,
    ) -> Result<Response<Incoming>, RemoteError> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(HOST, &self.authority)
            .body(body)
            .map_err(|cause| RemoteError::Request {
                server: self.server.clone(),
                cause,
            })?;
        request.headers_mut().extend(headers.iter().cloned());
        self.sender
            .send_request(request)
            .await
            .map_err(|cause| RemoteError::Broken {
                server: self.server.clone(),
                cause,
            })
    }

    /// The whole body of an answer, of at most `limit` bytes.
    ///
    /// # Errors
    /// [`RemoteError::Body`].
    pub async fn read(&self, answer: Incoming, limit: usize) -> Result<Bytes, RemoteError> {
        let body = Limited::new(answer, limit).collect().await;
        Ok(body
            .map_err(|_| RemoteError::Body {
                server: self.server.clone(),
                limit,
            })?
            .to_bytes())
    }
}

/// A body that is in memory.
#[must_use]
pub fn body(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A header's value that may not be printed.
///
/// # Errors
/// [`RemoteError::Header`] for characters that no header has.
pub fn secret_header(name: &'static str, value: &str) -> Result<(HeaderName, HeaderValue), RemoteError> {
    let mut value = HeaderValue::from_str(value).map_err(|_| RemoteError::Header(name))?;
    value.set_sensitive(true);
    Ok((HeaderName::from_static(name), value))
}

fn tls_config(trust: Trust<'_>) -> Result<ClientConfig, RemoteError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(RemoteError::Tls)?
        .with_root_certificates(roots(trust.ca_file)?);
    let Some((chain, key)) = trust.identity else {
        return Ok(builder.with_no_client_auth());
    };
    let chain = certificates(chain)?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(|cause| RemoteError::Pem {
        path: key.to_owned(),
        cause,
    })?;
    builder.with_client_auth_cert(chain, key).map_err(RemoteError::Tls)
}

fn roots(ca_file: Option<&Path>) -> Result<RootCertStore, RemoteError> {
    let path = match ca_file {
        Some(path) => path.to_owned(),
        None => SYSTEM_ROOTS
            .iter()
            .map(PathBuf::from)
            .find(|path| path.exists())
            .ok_or(RemoteError::NoRoots)?,
    };
    let mut roots = RootCertStore::empty();
    let (usable, _) = roots.add_parsable_certificates(certificates(&path)?);
    if usable == 0 {
        return Err(RemoteError::Empty { path });
    }
    Ok(roots)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, RemoteError> {
    let bad = |cause| RemoteError::Pem {
        path: path.to_owned(),
        cause,
    };
    CertificateDer::pem_file_iter(path)
        .map_err(bad)?
        .collect::<Result<_, _>>()
        .map_err(bad)
}

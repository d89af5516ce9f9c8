//! Evidence over mutual TLS, for the verifiers that this host has joined.
//!
//! `GET /v1/identity` · `POST /v1/activate` · `POST /v1/quote` · `GET /v1/log?from=N` · `PUT /v1/approved`. TLS 1.3 only, and no request is read
//! from anyone without a certificate of the join file's CA. Whatever a stranger causes is logged at debug level.

mod routes;
mod stream;
pub mod tls;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use assay_evidence::binding::Exporter;
use assay_evidence::wire::MAX_CONNECTIONS;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;

use self::routes::Routes;
use self::stream::{Activity, Guarded};
use crate::approved::ApprovedStore;
use crate::bundle::Source;
use crate::http::accept_trouble;
use crate::join::Joined;
use crate::leases::Leases;
use crate::tpm::Handle;

/// From accept to the end of the TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Strangers can only hold connections that are shaking hands: so many of all, so that verifiers always find room.
const MAX_HANDSHAKES: usize = MAX_CONNECTIONS / 2;

/// Why the server could not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be bound.
    #[error("cannot listen on {address}: choose another `listen` in agent.toml, or stop the program that uses it")]
    Bind {
        /// The address from the configuration.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The host's TLS identity or the CA cannot be used.
    #[error("TLS cannot be set up with what the join left: run `assay-agent join FILE --force`")]
    Tls(#[source] tls::TlsError),
    /// The listening socket failed for good.
    #[error("the quote server can no longer accept connections")]
    Accept(#[source] io::Error),
}

/// The bound quote server.
pub struct Server {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    routes: Arc<Routes>,
}

impl Server {
    /// Binds the address. Asking for the identity never touches the TPM: what it says of it is taken now.
    ///
    /// # Errors
    /// Any [`ServeError`] but [`ServeError::Accept`].
    pub async fn bind(
        listen: SocketAddr,
        joined: &Joined,
        tpm: Handle,
        source: Source,
        approved: ApprovedStore,
    ) -> Result<Self, ServeError> {
        let config = tls::server_config(joined).map_err(ServeError::Tls)?;
        let routes = Routes::new(tpm, source, approved);
        let listener = TcpListener::bind(listen).await.map_err(|source| ServeError::Bind {
            address: listen,
            source,
        })?;
        Ok(Self {
            listener,
            acceptor: TlsAcceptor::from(config),
            routes: Arc::new(routes),
        })
    }

    /// Takes the verifier's word on the keys of open disks.
    #[must_use]
    pub fn with_leases(mut self, leases: Leases) -> Self {
        if let Some(routes) = Arc::get_mut(&mut self.routes) {
            routes.leases = Some(leases);
        }
        self
    }

    /// The address that is listened on; tells the port when port 0 was asked for.
    ///
    /// # Errors
    /// What the system says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until accepting fails for good.
    ///
    /// # Errors
    /// [`ServeError::Accept`]; the daemon should end then.
    pub async fn run(self) -> Result<Infallible, ServeError> {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
        loop {
            // Permits before accept: who finds no slot waits in the kernel's backlog. The semaphores are never closed.
            let (Ok(slot), Ok(handshake)) = (
                Arc::clone(&slots).acquire_owned().await,
                Arc::clone(&handshakes).acquire_owned().await,
            ) else {
                return Err(ServeError::Accept(io::ErrorKind::BrokenPipe.into()));
            };
            match self.listener.accept().await {
                Ok((tcp, peer)) => {
                    let (acceptor, routes) = (self.acceptor.clone(), Arc::clone(&self.routes));
                    tokio::spawn(async move {
                        serve_connection(tcp, peer, &acceptor, routes, handshake).await;
                        drop(slot);
                    });
                }
                Err(error) => {
                    let Some(pause) = accept_trouble(&error) else {
                        return Err(ServeError::Accept(error));
                    };
                    if pause.is_zero() {
                        tracing::debug!("a connection went away before it was accepted: {error}");
                    } else {
                        tracing::warn!("the quote server cannot accept at the moment: {error}");
                        tokio::time::sleep(pause).await;
                    }
                }
            }
        }
    }
}

async fn serve_connection(
    tcp: TcpStream,
    peer: SocketAddr,
    acceptor: &TlsAcceptor,
    routes: Arc<Routes>,
    handshake: OwnedSemaphorePermit,
) {
    // Without it the answer to a small request waits for a delayed acknowledgement: 40 ms.
    if let Err(error) = tcp.set_nodelay(true) {
        tracing::debug!(%peer, "cannot set TCP_NODELAY: {error}");
    }
    let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(tcp)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(%peer, "TLS handshake refused: {error}");
            return;
        }
        Err(_) => {
            tracing::debug!(%peer, "TLS handshake took more than {} s", HANDSHAKE_TIMEOUT.as_secs());
            return;
        }
    };
    drop(handshake);
    let exporter = match tls::exporter(stream.get_ref().1) {
        Ok(exporter) => exporter,
        Err(error) => {
            tracing::debug!(%peer, "no TLS exporter: {error}");
            return;
        }
    };
    if let Err(error) = serve_http(stream, routes, exporter).await {
        tracing::debug!(%peer, "connection ended: {error}");
    }
}

async fn serve_http<S>(stream: S, routes: Arc<Routes>, exporter: Exporter) -> Result<(), hyper::Error>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let activity = Activity::default();
    let guarded = Guarded::new(stream, activity.clone());
    let service = service_fn(move |request| {
        let (routes, busy) = (Arc::clone(&routes), activity.begin());
        async move {
            let response = routes.answer(request, exporter).await;
            drop(busy);
            Ok::<_, Infallible>(response)
        }
    });
    // Deadlines are kept by `Guarded`, which can tell idle from slow; see there. The read buffer holds headers only.
    http1::Builder::new()
        .header_read_timeout(None)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(guarded), service)
        .await
}

//! The service: requests for keys from hosts, host states for operators, and the poller beside them.
//!
//! Everything that a stranger can use up has a limit: handshakes, connections, connections per key, header and body
//! times and sizes, open nonces, judgements at a time. Any part that ends, ends the service: a dead poller beside a
//! live key service would release keys on stale knowledge.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use assay_evidence::wire::{HEADER_TIMEOUT_S, MAX_CONNECTIONS};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;

use crate::audit::{AuditLog, AuditLogError};
use crate::client::{Asker, ClientError};
use crate::config::{Config, StateDir};
use crate::keystore::{self, KeySource, KeyStoreError};
use crate::leases::Leases;
use crate::lists::{Lists, ListsError};
use crate::nudges::Nudges;
use crate::pki::PkiError;
use crate::poll::Poller;
use crate::signing::SigningError;
use crate::store::{Store, StoreError};
use crate::verdicts::Verdicts;

mod challenges;
mod http;
mod record;
mod release;
mod routes;
mod tls;

pub use challenges::{Challenge, ChallengeError, Challenges, LIFETIME as NONCE_LIFETIME, Purpose};
pub(crate) use http::shorten;
use tls::{Peer, Tls};

/// Why the service does not start, or ended.
#[derive(Debug, Error)]
pub enum ServeError {
    /// A certificate cannot be read.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// The certificates do not work together.
    #[error("TLS cannot be set up with the certificates in the state directory")]
    Tls(#[source] rustls::Error),
    /// The CA cannot be used to check operators.
    #[error("the CA in the state directory cannot be used to check operators")]
    Verifier(#[source] rustls::server::VerifierBuilderError),
    /// The client certificate for asking agents cannot be used.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The key store cannot be opened.
    #[error(transparent)]
    KeyStore(#[from] KeyStoreError),
    /// The key for approved lists cannot be used.
    #[error(transparent)]
    Lists(#[from] ListsError),
    /// The key for verdicts cannot be used.
    #[error(transparent)]
    Signing(#[from] SigningError),
    /// The audit log cannot be written.
    #[error(transparent)]
    Audit(#[from] AuditLogError),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The address is in use, or not ours.
    #[error("cannot listen on {address}: set another `listen` in config.toml, or stop what uses it")]
    Listen {
        /// As configured.
        address: SocketAddr,
        /// The system's answer.
        #[source]
        cause: io::Error,
    },
    /// Connections cannot be accepted any more.
    #[error("cannot accept connections")]
    Accept(#[source] io::Error),
    /// Signals cannot be waited for.
    #[error("cannot wait for signals")]
    Signal(#[source] io::Error),
}

/// What every request needs.
struct Service {
    store: Store,
    keys: Arc<dyn KeySource>,
    challenges: Mutex<Challenges>,
    verdicts: Arc<Verdicts>,
    audit: Arc<AuditLog>,
    nudges: Arc<Nudges>,
    poll_interval: Duration,
    /// A judgement holds a log in memory.
    judgements: Semaphore,
}

/// The service, listening but not answering yet.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    tls: Arc<Tls>,
    service: Arc<Service>,
    poller: Poller,
}

impl Server {
    /// Opens everything in the state directory and listens.
    pub async fn bind(state: &StateDir, config: &Config) -> Result<Self, ServeError> {
        let store = Store::open(&state.database())?;
        let keys: Arc<dyn KeySource> = Arc::new(keystore::open(state.path(), config.key_source.as_ref())?);
        let tls = Arc::new(Tls::load(state)?);
        let audit = Arc::new(AuditLog::open(state)?);
        let leases = Leases::new(keys.clone(), audit.clone(), config.quote_timeout);
        let poller = Poller::new(store.clone(), Asker::load(state)?, Lists::open(state)?, leases, config);
        let failed = |cause| ServeError::Listen {
            address: config.listen,
            cause,
        };
        let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let service = Service {
            store,
            keys,
            challenges: Mutex::default(),
            verdicts: Arc::new(Verdicts::open(state, config)?),
            audit,
            nudges: poller.nudges(),
            poll_interval: config.poll_interval,
            judgements: Semaphore::new(MAX_JUDGEMENTS),
        };
        Ok(Self {
            listener,
            address,
            tls,
            service: Arc::new(service),
            poller,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers requests and polls hosts until one of the two fails.
    pub async fn run(self) -> Result<Infallible, ServeError> {
        let Self {
            listener,
            tls,
            service,
            poller,
            ..
        } = self;
        tokio::select! {
            ended = accept(listener, tls, service) => ended,
            ended = poller.run() => ended.map_err(ServeError::Store),
        }
    }
}

async fn accept(listener: TcpListener, tls: Arc<Tls>, service: Arc<Service>) -> Result<Infallible, ServeError> {
    let handshakes = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let established = Arc::new(Established::default());
    let next = AtomicU64::new(0);
    loop {
        // While all are taken, newcomers wait in the kernel's queue.
        let Ok(permit) = handshakes.clone().acquire_owned().await else {
            continue;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                pause_or_end(e).await?;
                continue;
            }
        };
        let (tls, service, established) = (tls.clone(), service.clone(), established.clone());
        let number = next.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            if let Err(e) = connection(stream, number, permit, &tls, service, &established).await {
                // Strangers can cause this at will.
                tracing::debug!("connection {number}: {e}");
            }
        });
    }
}

/// Whose fault a failed accept is: the peer's (go on), the system's for now (wait), or nobody's who could help it.
async fn pause_or_end(error: io::Error) -> Result<(), ServeError> {
    use io::ErrorKind::{
        ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable, Interrupted, NetworkDown,
        NetworkUnreachable, OutOfMemory,
    };
    match error.kind() {
        // accept(2) reports errors that waited on the new connection.
        ConnectionAborted | ConnectionRefused | ConnectionReset | HostUnreachable | Interrupted | NetworkDown
        | NetworkUnreachable => Ok(()),
        kind if kind == OutOfMemory || matches!(error.raw_os_error(), Some(EMFILE | ENFILE | ENOBUFS)) => {
            tracing::warn!("cannot accept a connection for now: {error}");
            tokio::time::sleep(Duration::from_millis(200)).await;
            Ok(())
        }
        _ => Err(ServeError::Accept(error)),
    }
}

async fn connection(
    stream: TcpStream,
    number: u64,
    handshake: OwnedSemaphorePermit,
    tls: &Tls,
    service: Arc<Service>,
    established: &Arc<Established>,
) -> Result<(), ConnectionError> {
    stream.set_nodelay(true).map_err(ConnectionError::Handshake)?;
    let accepting = TlsAcceptor::from(tls.config.clone()).accept(stream);
    let stream = tokio::time::timeout(HEADER_TIMEOUT, accepting)
        .await
        .map_err(|_| ConnectionError::Slow)?
        .map_err(ConnectionError::Handshake)?;
    let peer = tls.peer(stream.get_ref().1).map_err(ConnectionError::Peer)?;
    let known = is_known(&peer, &service).await;
    let _place = established
        .enter(peer.spki_sha256, known)
        .ok_or(ConnectionError::Full)?;
    drop(handshake);
    let asking = Arc::new(Asking { number, peer, service });
    let answer = service_fn(|request| {
        let asking = asking.clone();
        async move { Ok::<_, Infallible>(routes::answer(&asking, request).await) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_headers(64)
        .serve_connection(TokioIo::new(stream), answer);
    tokio::time::timeout(CONNECTION_LIFETIME, serving)
        .await
        .map_err(|_| ConnectionError::Slow)?
        .map_err(ConnectionError::Http)
}

/// Whether a host or an operator is at the other end, as of now. What they may do is looked up for each request.
async fn is_known(peer: &Peer, service: &Service) -> bool {
    let spki = peer.spki_sha256;
    let host = service.store.run(move |s| s.host_by_spki(&spki)).await;
    peer.not_operator.is_ok() || host.is_ok_and(|host| host.is_some())
}

/// A connection and whoever is at its other end.
struct Asking {
    number: u64,
    peer: Peer,
    service: Arc<Service>,
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.service
            .challenges
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .close(self.number);
    }
}

/// Why a connection ended early.
#[derive(Debug, Error)]
enum ConnectionError {
    #[error("too slow")]
    Slow,
    #[error("TLS handshake: {0}")]
    Handshake(io::Error),
    #[error("peer: {0}")]
    Peer(rustls::Error),
    #[error("too many connections")]
    Full,
    #[error("HTTP: {0}")]
    Http(hyper::Error),
}

/// Connections whose handshake is over, by the peer's key: one key, however busy, leaves room for the others, and strangers,
/// who make a new key for each connection, leave room for those who are known.
#[derive(Default)]
struct Established(Mutex<Places>);

#[derive(Default)]
struct Places {
    by_key: HashMap<[u8; 32], usize>,
    strangers: usize,
}

impl Established {
    fn enter(self: &Arc<Self>, key: [u8; 32], known: bool) -> Option<Place> {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all = places.by_key.values().sum::<usize>();
        let mine = places.by_key.get(&key).copied().unwrap_or(0);
        let full = all >= MAX_ESTABLISHED || mine >= MAX_OF_ONE_KEY;
        if full || (!known && places.strangers >= MAX_STRANGERS) {
            return None;
        }
        places.by_key.insert(key, mine.saturating_add(1));
        if !known {
            places.strangers = places.strangers.saturating_add(1);
        }
        drop(places);
        Some(Place {
            of: self.clone(),
            key,
            known,
        })
    }
}

/// One connection's place; dropping it frees it.
struct Place {
    of: Arc<Established>,
    key: [u8; 32],
    known: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.of.0.lock().unwrap_or_else(PoisonError::into_inner);
        match places.by_key.get_mut(&self.key) {
            Some(count) if *count > 1 => *count = count.saturating_sub(1),
            _ => drop(places.by_key.remove(&self.key)),
        }
        if !self.known {
            places.strangers = places.strangers.saturating_sub(1);
        }
    }
}

const HEADER_TIMEOUT: Duration = Duration::from_secs(HEADER_TIMEOUT_S);
/// No client needs a connection for longer.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(300);
const MAX_ESTABLISHED: usize = 256;
/// Of those. Hosts that are to be added are among the strangers: they learn so from the refusal.
const MAX_STRANGERS: usize = 32;
const MAX_OF_ONE_KEY: usize = 8;
const MAX_JUDGEMENTS: usize = 16;
/// Linux error numbers that `io::ErrorKind` has no stable name for.
const ENFILE: i32 = 23;
const EMFILE: i32 = 24;
const ENOBUFS: i32 = 105;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_and_busy_keys_leave_room_for_others() {
        let established = Arc::new(Established::default());
        let key = |n: usize, first: u8| {
            let mut key = [first; 32];
            key[1] = u8::try_from(n).unwrap();
            key
        };
        let strangers: Vec<_> = (0..MAX_STRANGERS)
            .map(|n| established.enter(key(n, 1), false).unwrap())
            .collect();
        assert!(established.enter(key(0, 2), false).is_none(), "one stranger too many");
        let busy: Vec<_> = (0..MAX_OF_ONE_KEY)
            .map(|_| established.enter([3; 32], true).unwrap())
            .collect();
        assert!(
            established.enter([3; 32], true).is_none(),
            "one connection of a host too many"
        );
        assert!(established.enter([4; 32], true).is_some(), "another host");
        drop((strangers, busy));
        assert!(established.enter(key(0, 2), false).is_some());
        assert!(established.0.lock().unwrap().by_key.is_empty());
    }
}

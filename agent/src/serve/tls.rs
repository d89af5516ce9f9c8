//! TLS as the quote server speaks it.

use std::sync::Arc;

use assay_evidence::binding::{EXPORTER_LABEL, Exporter};
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig, ServerConnection};

use crate::join::Joined;

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The join file's CA is no trust anchor.
    #[error("the join file's CA cannot be used")]
    Ca(#[source] rustls::Error),
    /// No verifier of client certificates can be made with it.
    #[error("client certificates cannot be checked with the join file's CA")]
    ClientVerifier(#[source] VerifierBuilderError),
    /// Protocol version, or the host's key and certificate.
    #[error("the host's TLS key and certificate cannot be used")]
    Identity(#[source] rustls::Error),
}

/// TLS 1.3 only; a client certificate of the join file's CA is required; nothing is resumed, so that every connection checks the
/// certificate (and its dates) anew and has an exporter of its own.
///
/// # Errors
/// [`TlsError`].
pub fn server_config(joined: &Joined) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(joined.membership.ca().clone()).map_err(TlsError::Ca)?;
    // Checks chain, dates and the extended key usage clientAuth.
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(TlsError::ClientVerifier)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Identity)?
        .with_client_cert_verifier(clients)
        .with_single_cert(vec![joined.certificate()], joined.key())
        .map_err(TlsError::Identity)?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

/// Keying material that names this connection (RFC 8446 §7.5); evidence is bound to it.
///
/// # Errors
/// When the handshake is not over.
pub fn exporter(connection: &ServerConnection) -> Result<Exporter, rustls::Error> {
    connection
        .export_keying_material([0; 32], EXPORTER_LABEL, None)
        .map(Exporter::new)
}

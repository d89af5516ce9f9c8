//! Who is at the other end: a host by its pinned key, an operator by the CA, or a stranger.
//!
//! The handshake itself only makes sure that the peer holds the key of the certificate that it shows. Which role that
//! key has is decided afterwards, against the database, so that a removed host is a stranger at its next request.

use std::sync::Arc;

use assay_evidence::binding::{EXPORTER_LABEL, Exporter};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig, ServerConnection, SignatureScheme,
};

use super::ServeError;
use crate::config::StateDir;
use crate::pki::{Role, TlsIdentity, ca_certificate, names_an_operator, spki_sha256};

/// What the TLS layer says about a peer.
#[derive(Clone)]
pub(super) struct Peer {
    /// SHA-256 of the SubjectPublicKeyInfo of the key that it holds.
    pub spki_sha256: [u8; 32],
    /// Nothing if it is an operator, else why not.
    pub not_operator: Result<(), String>,
    /// This connection's exporter value.
    pub exporter: Exporter,
}

/// Server configuration and the check for operators.
pub(super) struct Tls {
    pub config: Arc<ServerConfig>,
    operators: Arc<dyn ClientCertVerifier>,
}

impl Tls {
    /// Reads server certificate and CA.
    pub fn load(state: &StateDir) -> Result<Self, ServeError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(ca_certificate(state)?).map_err(ServeError::Tls)?;
        let operators = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .build()
            .map_err(ServeError::Verifier)?;
        let identity = TlsIdentity::load(state, Role::Server)?;
        let mut config = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(ServeError::Tls)?
            .with_client_cert_verifier(Arc::new(AnyKeyHolder { provider }))
            .with_single_cert(identity.chain, identity.key)
            .map_err(ServeError::Tls)?;
        // A resumed session would vouch for a certificate that was shown at another time.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self {
            config: Arc::new(config),
            operators,
        })
    }

    /// What is known of the peer of a connection whose handshake is over.
    pub fn peer(&self, connection: &ServerConnection) -> Result<Peer, Error> {
        let chain = connection.peer_certificates().unwrap_or_default();
        let (leaf, rest) = chain.split_first().ok_or(Error::NoCertificatesPresented)?;
        let spki_sha256 =
            spki_sha256(leaf).map_err(|_| Error::InvalidCertificate(rustls::CertificateError::BadEncoding))?;
        let exporter = connection.export_keying_material([0; 32], EXPORTER_LABEL, None)?;
        Ok(Peer {
            spki_sha256,
            not_operator: self.check_operator(leaf, rest),
            exporter: Exporter::new(exporter),
        })
    }

    fn check_operator(&self, leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> Result<(), String> {
        self.operators
            .verify_client_cert(leaf, rest, UnixTime::now())
            .map_err(|e| e.to_string())?;
        if names_an_operator(leaf) {
            Ok(())
        } else {
            Err("the certificate was not issued to an operator".to_owned())
        }
    }
}

/// Accepts every certificate whose key signs the handshake. On its own this admits nobody to anything.
#[derive(Debug)]
struct AnyKeyHolder {
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for AnyKeyHolder {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        ParsedCertificate::try_from(end_entity)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not offered".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

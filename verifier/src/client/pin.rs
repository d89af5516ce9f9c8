//! Whom a TLS handshake with an agent may end with: the holder of one pinned key, whatever its certificate says.

use std::sync::{Arc, OnceLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};

use crate::pki::spki_sha256;

/// Which key must answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pin {
    /// The key pinned at enrolment: SHA-256 of its SubjectPublicKeyInfo.
    Expect([u8; 32]),
    /// Whichever does: only at enrolment, where the key proves itself to be the attested host's right after.
    FirstContact,
}

/// Checks the handshake's signature and the key behind it. Names and dates of a self-signed certificate prove nothing
/// and are not looked at.
#[derive(Debug)]
pub(super) struct PinVerifier {
    pin: Pin,
    seen: OnceLock<[u8; 32]>,
    provider: Arc<CryptoProvider>,
}

impl PinVerifier {
    pub(super) fn new(pin: Pin, provider: Arc<CryptoProvider>) -> Self {
        Self {
            pin,
            seen: OnceLock::new(),
            provider,
        }
    }

    /// The key that the peer presented, once it did.
    pub(super) fn seen(&self) -> Option<[u8; 32]> {
        self.seen.get().copied()
    }
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let found = spki_sha256(end_entity).map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        // One verifier serves one handshake.
        if self.seen.set(found).is_err() {
            return Err(Error::General("a pin verifier was used twice".to_owned()));
        }
        match self.pin {
            Pin::Expect(pinned) if pinned != found => Err(Error::InvalidCertificate(
                CertificateError::ApplicationVerificationFailure,
            )),
            Pin::Expect(_) | Pin::FirstContact => Ok(ServerCertVerified::assertion()),
        }
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

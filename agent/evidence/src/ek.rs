//! Whether an endorsement key is one that the operator trusts: pinned by hash, or certified by a TPM maker.
//!
//! A [`TrustedEk`] can only be made by [`EkTrust::check`]. It says that a key is trusted, not that the host has it:
//! that is what a credential made for it ([`crate::credential`]) proves.

mod chain;

pub use chain::{ChainError, MAX_ANCHORS, MAX_CERTIFICATE, MAX_INTERMEDIATES};

use x509_parser::oid_registry::OID_EC_P256;
use x509_parser::pem::Pem;
use x509_parser::prelude::FromDer as _;
use x509_parser::public_key::{PublicKey, RSAPublicKey};
use x509_parser::time::ASN1Time;
use x509_parser::x509::SubjectPublicKeyInfo;

use crate::digest::Sha256Digest;
use crate::tpm::{Attributes, Parameters, Public, TpmError};
use crate::wire::Identity;

/// Longest file of CA certificates, in bytes.
pub const MAX_CA_FILE: usize = 1024 * 1024;

/// Why an endorsement key is not trusted.
#[derive(Debug, thiserror::Error)]
pub enum EkError {
    /// The public area can't be read.
    #[error("the endorsement key's public area can't be read")]
    Public(#[source] TpmError),
    /// The key's attributes are not those of an endorsement key.
    #[error("the key has the attributes {found}, an endorsement key has {wanted} and does not sign")]
    Attributes {
        /// What it has.
        found: Attributes,
        /// What it must have.
        wanted: Attributes,
    },
    /// Another key than the pinned one.
    #[error("the endorsement key is sha256:{found}, pinned is sha256:{pinned}: another TPM, or a cleared one")]
    NotPinned {
        /// The key that the host has.
        found: Sha256Digest,
        /// The key that the operator named.
        pinned: Sha256Digest,
    },
    /// Roots are configured, and the TPM has no certificate.
    #[error("the TPM has no endorsement key certificate: pin its key instead, with --ek-sha256 {0}")]
    NoCertificate(Sha256Digest),
    /// No CA is configured at all.
    #[error("no CA certificate is configured to check the endorsement key's certificate against")]
    NoAnchors,
    /// The certificate is for another key.
    #[error("the certificate is for another key than the endorsement key sha256:{0}")]
    KeyMismatch(Sha256Digest),
    /// The certificate or its chain is refused.
    #[error("the endorsement key's certificate is refused")]
    Chain(#[from] ChainError),
    /// A file of CA certificates holds none, or something else.
    #[error("the file of CA certificates is neither PEM nor DER")]
    CaFile,
    /// The time is none that a certificate could be valid at.
    #[error("{0} is no time in seconds since 1970")]
    Time(i64),
}

/// What makes an endorsement key trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EkTrust {
    /// The SHA-256 of its `TPMT_PUBLIC`: for TPMs without certificate, and software ones. It is constant for the life of
    /// a TPM, until its endorsement hierarchy is cleared.
    PinnedSha256(Sha256Digest),
    /// Its certificate chains to one of these (DER), whether they are self-signed or not.
    Roots(Vec<Vec<u8>>),
}

/// An endorsement key that [`EkTrust::check`] found trusted.
#[derive(Debug, Clone)]
pub struct TrustedEk {
    public: Public,
    sha256: Sha256Digest,
}

impl TrustedEk {
    /// The key.
    #[must_use]
    pub fn public(&self) -> &Public {
        &self.public
    }

    /// The SHA-256 of its `TPMT_PUBLIC`, by which it can be pinned.
    #[must_use]
    pub fn sha256(&self) -> Sha256Digest {
        self.sha256
    }
}

impl EkTrust {
    /// Reads an operator's file of CA certificates: PEM with any number of them, or one in DER.
    ///
    /// # Errors
    /// [`EkError::CaFile`] for anything else.
    pub fn read_ca_file(bytes: &[u8]) -> Result<Vec<Vec<u8>>, EkError> {
        if bytes.len() > MAX_CA_FILE {
            return Err(EkError::CaFile);
        }
        if bytes.first() == Some(&0x30) {
            let der = vec![bytes.to_vec()];
            chain::read_anchors(&der)?;
            return Ok(der);
        }
        let mut ders = Vec::new();
        for pem in Pem::iter_from_buffer(bytes) {
            let pem = pem.map_err(|_| EkError::CaFile)?;
            if pem.label == "CERTIFICATE" {
                ders.push(pem.contents);
            }
        }
        chain::read_anchors(&ders)?;
        if ders.is_empty() {
            Err(EkError::CaFile)
        } else {
            Ok(ders)
        }
    }

    /// Checks the endorsement key that a host shows: its public area, and its certificate, behind which the TPM's
    /// intermediate certificates may follow. `now` is in seconds since 1970.
    ///
    /// # Errors
    /// One variant of [`EkError`] for each reason.
    pub fn check(&self, identity: &Identity, now: i64) -> Result<TrustedEk, EkError> {
        let ek_public = identity.ek_public.as_ref();
        let public = Public::parse(ek_public).map_err(EkError::Public)?;
        check_attributes(&public)?;
        let sha256 = Sha256Digest::of(ek_public);
        match self {
            Self::PinnedSha256(pinned) if *pinned == sha256 => {}
            Self::PinnedSha256(pinned) => {
                return Err(EkError::NotPinned {
                    found: sha256,
                    pinned: *pinned,
                });
            }
            Self::Roots(roots) => {
                if roots.is_empty() {
                    return Err(EkError::NoAnchors);
                }
                let certificate = identity.ek_certificate.as_ref().ok_or(EkError::NoCertificate(sha256))?;
                let now = ASN1Time::from_timestamp(now).map_err(|_| EkError::Time(now))?;
                let certificates = chain::read_host(certificate.as_ref())?;
                chain::check(&certificates, &chain::read_anchors(roots)?, now)?;
                if !certificates
                    .first()
                    .is_some_and(|leaf| same_key(leaf.public_key(), &public))
                {
                    return Err(EkError::KeyMismatch(sha256));
                }
            }
        }
        Ok(TrustedEk { public, sha256 })
    }
}

/// An EK never leaves its TPM and decrypts only what the TPM's own protocols wrap (TCG EK Credential Profile, B.3.3).
/// A key that also signs, or decrypts at will, could be asked to open a credential.
fn check_attributes(public: &Public) -> Result<(), EkError> {
    let wanted = Attributes::FIXED_TPM
        .with(Attributes::FIXED_PARENT)
        .with(Attributes::SENSITIVE_DATA_ORIGIN)
        .with(Attributes::RESTRICTED)
        .with(Attributes::DECRYPT);
    let found = public.attributes();
    if !found.has(wanted) || found.has_any(Attributes::SIGN) {
        return Err(EkError::Attributes { found, wanted });
    }
    Ok(())
}

/// Whether a certificate's key is this key.
fn same_key(info: &SubjectPublicKeyInfo<'_>, key: &Public) -> bool {
    match key.parameters() {
        Parameters::Rsa { modulus, exponent, .. } => {
            // Older EK certificates say RSAES-OAEP instead of rsaEncryption, over the same two numbers.
            let Ok((&[], rsa)) = RSAPublicKey::from_der(&info.subject_public_key.data) else {
                return false;
            };
            let exponent_there = rsa.try_exponent().unwrap_or(0);
            rsa.modulus.strip_prefix(&[0]).unwrap_or(rsa.modulus) == modulus.as_slice()
                && exponent_there == u64::from(*exponent)
        }
        Parameters::P256 { point, .. } => {
            let curve = info.algorithm.parameters.as_ref().and_then(|any| any.as_oid().ok());
            curve == Some(OID_EC_P256)
                && matches!(info.parsed(), Ok(PublicKey::EC(there)) if there.data() == point.uncompressed())
        }
    }
}

#[cfg(test)]
mod tests;

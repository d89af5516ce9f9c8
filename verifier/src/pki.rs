//! The verifier's own certificates: one CA, the server certificate that hosts check, and two client certificates.
//!
//! The CA exists so that a host needs one file to join. Hosts are *not* issued certificates: their keys are pinned at
//! enrolment together with their attestation key, so a leaked CA key cannot invent a host.

use std::io;
use std::path::PathBuf;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use ring::digest::{SHA256, digest};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::ParsedCertificate;
use thiserror::Error;
use time::{Duration, OffsetDateTime};
use zeroize::Zeroizing;

use crate::config::{ServiceUrl, StateDir};

/// Why a certificate or key could not be made or read.
#[derive(Debug, Error)]
pub enum PkiError {
    /// Making a key or signing a certificate failed.
    #[error("cannot make the {0} certificate")]
    Generate(&'static str, #[source] rcgen::Error),
    /// A file of the PKI could not be read.
    #[error("cannot read {}: restore it from a backup of the state directory", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        cause: io::Error,
    },
    /// A file is not the PEM that it should be.
    #[error("{} is not valid PEM of the expected kind: restore it from a backup of the state directory", .path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        #[source]
        cause: rustls::pki_types::pem::Error,
    },
    /// A certificate is not X.509.
    #[error("not a valid X.509 certificate")]
    Certificate(#[source] rustls::Error),
}

/// What a certificate of this CA is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The service, towards hosts and operators.
    Server,
    /// The service, when it asks agents.
    Client,
    /// A person or scheduler that reads host states.
    Operator,
}

impl Role {
    /// File name stem in the state directory.
    pub fn file(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
            Self::Operator => OPERATOR_UNIT,
        }
    }
}

/// A certificate with its private key, both PEM; the key wipes itself.
pub struct Issued {
    /// The certificate.
    pub certificate_pem: String,
    /// PKCS#8.
    pub key_pem: Zeroizing<String>,
}

/// The verifier's CA, able to sign.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: Issued,
}

impl Authority {
    /// Makes a new CA, valid for ten years from `now`.
    pub fn generate(url: &ServiceUrl, now: OffsetDateTime) -> Result<Self, PkiError> {
        let failed = |cause| PkiError::Generate("CA", cause);
        let key = new_key("CA")?;
        let mut params =
            params(&format!("Assay verifier CA for {}", url.address().host()), "ca", &[]).map_err(failed)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        (params.not_before, params.not_after) = validity(now);
        let certificate_pem = params.self_signed(&key).map_err(failed)?.pem();
        let key_pem = Zeroizing::new(key.serialize_pem());
        Ok(Self {
            issuer: Issuer::new(params, key),
            certificate: Issued {
                certificate_pem,
                key_pem,
            },
        })
    }

    /// Reads the CA of a state directory, to issue further certificates.
    pub fn load(state: &StateDir) -> Result<Self, PkiError> {
        let read = |path: PathBuf| std::fs::read_to_string(&path).map_err(|cause| PkiError::Read { path, cause });
        let certificate_pem = read(state.certificate("ca"))?;
        let key_pem = Zeroizing::new(read(state.key("ca"))?);
        let key = KeyPair::from_pem(&key_pem).map_err(|e| PkiError::Generate("CA", e))?;
        let issuer = Issuer::from_ca_cert_pem(&certificate_pem, key).map_err(|e| PkiError::Generate("CA", e))?;
        Ok(Self {
            issuer,
            certificate: Issued {
                certificate_pem,
                key_pem,
            },
        })
    }

    /// The CA's own certificate and key.
    pub fn certificate(&self) -> &Issued {
        &self.certificate
    }

    /// Issues a certificate for a role, valid as long as the CA if `now` is the CA's; server certificates carry `names`
    /// (DNS names or IP addresses) and always the loopback names.
    pub fn issue(&self, role: Role, names: &[String], now: OffsetDateTime) -> Result<Issued, PkiError> {
        self.issue_until(role, names, now, validity(now).1)
    }

    /// As [`Authority::issue`], with another end of validity.
    pub fn issue_until(
        &self,
        role: Role,
        names: &[String],
        now: OffsetDateTime,
        until: OffsetDateTime,
    ) -> Result<Issued, PkiError> {
        let failed = |cause| PkiError::Generate(role.file(), cause);
        let (common_name, names, usage) = match role {
            Role::Server => {
                let mut all = names.to_vec();
                all.extend(LOOPBACK.iter().map(|n| (*n).to_owned()).filter(|n| !names.contains(n)));
                (
                    names.first().map_or("assay-verifier", String::as_str),
                    all,
                    ExtendedKeyUsagePurpose::ServerAuth,
                )
            }
            Role::Client => ("assay-verifier", Vec::new(), ExtendedKeyUsagePurpose::ClientAuth),
            Role::Operator => ("assay-operator", Vec::new(), ExtendedKeyUsagePurpose::ClientAuth),
        };
        let mut params = params(common_name, role.file(), &names).map_err(failed)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = (validity(now).0, until);
        let key = new_key(role.file())?;
        let certificate_pem = params.signed_by(&key, &self.issuer).map_err(failed)?.pem();
        Ok(Issued {
            certificate_pem,
            key_pem: Zeroizing::new(key.serialize_pem()),
        })
    }
}

/// A certificate chain and key as rustls takes them.
pub struct TlsIdentity {
    /// End entity first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
}

impl TlsIdentity {
    /// Reads the files of a role.
    pub fn load(state: &StateDir, role: Role) -> Result<Self, PkiError> {
        let path = state.key(role.file());
        let key = PrivateKeyDer::from_pem_file(&path).map_err(|cause| PkiError::Pem { path, cause })?;
        Ok(Self {
            chain: certificates(state.certificate(role.file()))?,
            key,
        })
    }
}

/// The CA certificate of a state directory.
pub fn ca_certificate(state: &StateDir) -> Result<CertificateDer<'static>, PkiError> {
    let path = state.certificate("ca");
    CertificateDer::from_pem_file(&path).map_err(|cause| PkiError::Pem { path, cause })
}

/// SHA-256 of the CA's SubjectPublicKeyInfo: the pin that sealed images carry.
pub fn ca_spki_sha256(state: &StateDir) -> Result<[u8; 32], PkiError> {
    spki_sha256(&ca_certificate(state)?)
}

/// SHA-256 of a certificate's DER SubjectPublicKeyInfo (RFC 7469 pin), as the TLS library itself parses it: a second
/// parser could see another key than the one whose signature was checked.
pub fn spki_sha256(certificate: &CertificateDer<'_>) -> Result<[u8; 32], PkiError> {
    let parsed = ParsedCertificate::try_from(certificate).map_err(PkiError::Certificate)?;
    Ok(sha256(parsed.subject_public_key_info().as_ref()))
}

/// Whether the certificate's subject says that it was issued to an operator. Only meaningful for a certificate that was
/// checked against the CA before.
pub fn names_an_operator(certificate: &CertificateDer<'_>) -> bool {
    let Ok((_, parsed)) = x509_parser::parse_x509_certificate(certificate) else {
        return false;
    };
    let mut units = parsed.subject().iter_organizational_unit();
    units.any(|unit| unit.as_str().is_ok_and(|u| u == OPERATOR_UNIT))
}

fn certificates(path: PathBuf) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    let bad = |cause| PkiError::Pem {
        path: path.clone(),
        cause,
    };
    CertificateDer::pem_file_iter(&path)
        .map_err(bad)?
        .collect::<Result<_, _>>()
        .map_err(bad)
}

fn new_key(role: &'static str) -> Result<KeyPair, PkiError> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|cause| PkiError::Generate(role, cause))
}

fn params(common_name: &str, unit: &str, names: &[String]) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names.to_vec())?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Assay");
    params.distinguished_name.push(DnType::OrganizationalUnitName, unit);
    params.distinguished_name.push(DnType::CommonName, common_name);
    Ok(params)
}

/// Ten years, beginning a day early: hosts whose clock runs behind can join at once.
fn validity(now: OffsetDateTime) -> (OffsetDateTime, OffsetDateTime) {
    (now - Duration::days(1), now + Duration::days(3653))
}

/// SHA-256.
pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

const OPERATOR_UNIT: &str = "operator";
const LOOPBACK: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

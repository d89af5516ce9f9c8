//! From an EK certificate to a root that the operator configured.
//!
//! Not a web PKI verifier: EK certificates carry TCG extensions, a critical subject alternative name with a directory
//! name, and roots that are not always self-signed, all of which those refuse. What is checked: signatures (SHA-256 or
//! stronger), validity at a given time, that issuers are CAs which may sign certificates, path lengths, and that no
//! critical extension is one that this code does not know (TCG EK Credential Profile; RFC 5280 §6.1).

use x509_parser::certificate::{BasicExtension, X509Certificate};
use x509_parser::error::X509Error;
use x509_parser::extensions::{BasicConstraints, X509Extension};
use x509_parser::oid_registry::{self as oids, Oid, asn1_rs::oid};
use x509_parser::prelude::FromDer as _;
use x509_parser::time::ASN1Time;

/// Most certificates between the EK's and the root.
pub const MAX_INTERMEDIATES: usize = 4;
/// Most certificates that an operator configures.
pub const MAX_ANCHORS: usize = 256;
/// Longest certificate, in bytes.
pub const MAX_CERTIFICATE: usize = 16 * 1024;

/// tcg-kp-EKCertificate: "this certificate is for an endorsement key".
const EK_CERTIFICATE: Oid<'static> = oid!(2.23.133.8.1);
/// The arc of the TCG, whose extensions describe the TPM and constrain nothing.
const TCG: Oid<'static> = oid!(2.23.133);

/// Why a certificate chain is refused. Certificates are named by their subject.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// Bytes that are no certificate, or with bytes behind it that are not padding.
    #[error("the {0} is not a DER certificate")]
    Malformed(&'static str),
    /// Longer than [`MAX_CERTIFICATE`], or too many of them.
    #[error("the {0} is too long, or there are too many")]
    TooMuch(&'static str),
    /// An extension could not be read, or occurs twice.
    #[error("an extension of the certificate {subject:?} can't be read")]
    Extension {
        /// The certificate.
        subject: String,
        /// What the parser found.
        #[source]
        source: X509Error,
    },
    /// A critical extension that this program doesn't understand, so that it may not ignore it.
    #[error("the certificate {subject:?} has an unknown critical extension {oid}")]
    UnknownCritical {
        /// The certificate.
        subject: String,
        /// The extension.
        oid: String,
    },
    /// Not valid yet, or no more.
    #[error(
        "the certificate {subject:?} is valid from {from} to {until}, and now is {now}: check the clock, or get a current one"
    )]
    Validity {
        /// The certificate.
        subject: String,
        /// First moment of its validity.
        from: String,
        /// Last moment of its validity.
        until: String,
        /// The time that was asked about.
        now: String,
    },
    /// The EK's certificate is one of a CA.
    #[error("the certificate {0:?} is a CA's, not an endorsement key's")]
    LeafIsCa(String),
    /// The certificate is for another purpose.
    #[error("the certificate {0:?} is not for an endorsement key: its key usage says otherwise")]
    LeafUsage(String),
    /// An issuer is no CA.
    #[error("the certificate {0:?} signs others without being a CA's")]
    NotCa(String),
    /// More CAs below an issuer than it allows.
    #[error("the certificate {0:?} does not allow as many CAs below it")]
    PathLength(String),
    /// A signature does not verify, or is made with SHA-1.
    #[error("the certificate {subject:?} is not signed by {issuer:?}")]
    Signature {
        /// The certificate.
        subject: String,
        /// Whose signature it claims.
        issuer: String,
        /// What the verifier found.
        #[source]
        source: X509Error,
    },
    /// No configured CA signed the chain's last certificate.
    #[error(
        "no configured CA {issuer:?}, which the certificate {subject:?} names: add the TPM maker's certificate with --ek-ca"
    )]
    NoAnchor {
        /// The certificate at which the search ended.
        subject: String,
        /// Its issuer.
        issuer: String,
    },
}

/// Reads the certificates that a host sent: the EK's, then intermediates, if any. NV areas are larger than what is in
/// them, so closing bytes of only 00 or only FF are let go.
pub fn read_host(bytes: &[u8]) -> Result<Vec<X509Certificate<'_>>, ChainError> {
    const WHAT: &str = "endorsement key's certificate";
    let mut certificates = Vec::new();
    let mut rest = bytes;
    while !(rest.iter().all(|&byte| byte == 0) || rest.iter().all(|&byte| byte == 0xFF)) {
        if certificates.len() > MAX_INTERMEDIATES {
            return Err(ChainError::TooMuch(WHAT));
        }
        let (after, certificate) = X509Certificate::from_der(rest).map_err(|_| ChainError::Malformed(WHAT))?;
        if certificate.as_raw().len() > MAX_CERTIFICATE {
            return Err(ChainError::TooMuch(WHAT));
        }
        certificates.push(certificate);
        rest = after;
    }
    if certificates.is_empty() {
        Err(ChainError::Malformed(WHAT))
    } else {
        Ok(certificates)
    }
}

/// Reads the configured certificates.
pub fn read_anchors(ders: &[Vec<u8>]) -> Result<Vec<X509Certificate<'_>>, ChainError> {
    const WHAT: &str = "configured CA certificate";
    if ders.len() > MAX_ANCHORS {
        return Err(ChainError::TooMuch(WHAT));
    }
    ders.iter()
        .map(|der| match X509Certificate::from_der(der) {
            Ok((&[], certificate)) => Ok(certificate),
            _ => Err(ChainError::Malformed(WHAT)),
        })
        .collect()
}

/// Checks the first certificate as the EK's, and that a chain through the others ends at an anchor. `now` is in seconds
/// since 1970.
pub fn check(
    certificates: &[X509Certificate<'_>],
    anchors: &[X509Certificate<'_>],
    now: ASN1Time,
) -> Result<(), ChainError> {
    let Some((leaf, intermediates)) = certificates.split_first() else {
        return Err(ChainError::Malformed("endorsement key's certificate"));
    };
    check_leaf(leaf, now)?;
    let mut current = leaf;
    // Each turn goes one certificate up, so a loop of certificates ends here too.
    for below in 0..=MAX_INTERMEDIATES {
        if let Some(refusal) = signed_by_anchor(current, anchors, now) {
            return refusal;
        }
        let Some(issuer) = intermediates.iter().find(|other| issued(other, current)) else {
            break;
        };
        check_signature(current, issuer)?;
        check_common(issuer, now)?;
        check_ca(issuer, below, true)?;
        current = issuer;
    }
    Err(ChainError::NoAnchor {
        subject: subject(current),
        issuer: current.issuer().to_string(),
    })
}

/// `None` when no anchor has the issuer's name. Several may have it (a CA renewed with a new key): one must fit.
fn signed_by_anchor(
    certificate: &X509Certificate<'_>,
    anchors: &[X509Certificate<'_>],
    now: ASN1Time,
) -> Option<Result<(), ChainError>> {
    let mut refusal = None;
    for anchor in anchors.iter().filter(|anchor| issued(anchor, certificate)) {
        // The path length of an anchor is not enforced: the operator trusts it as it is (RFC 5280 §6.1.1 d).
        let found = check_signature(certificate, anchor)
            .and_then(|()| check_common(anchor, now))
            .and_then(|()| check_ca(anchor, 0, false));
        if found.is_ok() {
            return Some(found);
        }
        refusal = Some(found);
    }
    refusal
}

fn issued(issuer: &X509Certificate<'_>, certificate: &X509Certificate<'_>) -> bool {
    issuer.subject().as_raw() == certificate.issuer().as_raw()
}

fn check_signature(certificate: &X509Certificate<'_>, issuer: &X509Certificate<'_>) -> Result<(), ChainError> {
    let refuse = |source| ChainError::Signature {
        subject: subject(certificate),
        issuer: subject(issuer),
        source,
    };
    // Collisions in SHA-1 are a matter of money, and the library would still take it.
    if [oids::OID_PKCS1_SHA1WITHRSA, oids::OID_SHA1_WITH_RSA].contains(&certificate.signature_algorithm.algorithm) {
        return Err(refuse(X509Error::SignatureUnsupportedAlgorithm));
    }
    certificate.verify_signature(Some(issuer.public_key())).map_err(refuse)
}

fn check_leaf(leaf: &X509Certificate<'_>, now: ASN1Time) -> Result<(), ChainError> {
    check_common(leaf, now)?;
    if basic_constraints(leaf)?.is_some_and(|constraints| constraints.ca) {
        return Err(ChainError::LeafIsCa(subject(leaf)));
    }
    let usage = leaf.key_usage().map_err(|source| unreadable(leaf, source))?;
    if usage.is_some_and(|usage| !usage.value.key_encipherment() && !usage.value.key_agreement()) {
        return Err(ChainError::LeafUsage(subject(leaf)));
    }
    // Old TPMs have no extended key usage at all; one that names other purposes only is another certificate.
    let extended = leaf.extended_key_usage().map_err(|source| unreadable(leaf, source))?;
    if extended.is_some_and(|extended| !extended.value.other.contains(&EK_CERTIFICATE)) {
        return Err(ChainError::LeafUsage(subject(leaf)));
    }
    Ok(())
}

/// Validity and critical extensions.
fn check_common(certificate: &X509Certificate<'_>, now: ASN1Time) -> Result<(), ChainError> {
    let validity = certificate.validity();
    if !validity.is_valid_at(now) {
        return Err(ChainError::Validity {
            subject: subject(certificate),
            from: validity.not_before.to_string(),
            until: validity.not_after.to_string(),
            now: now.to_string(),
        });
    }
    match certificate
        .iter_extensions()
        .find(|extension| extension.critical && !understood(extension))
    {
        None => Ok(()),
        Some(extension) => Err(ChainError::UnknownCritical {
            subject: subject(certificate),
            oid: extension.oid.to_id_string(),
        }),
    }
}

/// Extensions that are checked here, or that constrain nothing which this check relies on: names of the subject,
/// policies (the operator chose the CA), and the TCG's descriptions of a TPM.
fn understood(extension: &X509Extension<'_>) -> bool {
    [
        oids::OID_X509_EXT_BASIC_CONSTRAINTS,
        oids::OID_X509_EXT_KEY_USAGE,
        oids::OID_X509_EXT_EXTENDED_KEY_USAGE,
        oids::OID_X509_EXT_SUBJECT_ALT_NAME,
        oids::OID_X509_EXT_CERTIFICATE_POLICIES,
    ]
    .contains(&extension.oid)
        || extension.oid.starts_with(&TCG)
}

/// An anchor from before X.509 v3 has no constraints; an intermediate must have them.
fn check_ca(issuer: &X509Certificate<'_>, below: usize, intermediate: bool) -> Result<(), ChainError> {
    match basic_constraints(issuer)? {
        None if intermediate => return Err(ChainError::NotCa(subject(issuer))),
        Some(constraints) if !constraints.ca => return Err(ChainError::NotCa(subject(issuer))),
        Some(&BasicConstraints {
            path_len_constraint: Some(allowed),
            ..
        }) if intermediate && usize::try_from(allowed).is_ok_and(|allowed| below > allowed) => {
            return Err(ChainError::PathLength(subject(issuer)));
        }
        _ => {}
    }
    match issuer.key_usage().map_err(|source| unreadable(issuer, source))? {
        Some(usage) if !usage.value.key_cert_sign() => Err(ChainError::NotCa(subject(issuer))),
        _ => Ok(()),
    }
}

fn basic_constraints<'a>(certificate: &'a X509Certificate<'_>) -> Result<Option<&'a BasicConstraints>, ChainError> {
    let found: Option<BasicExtension<&BasicConstraints>> = certificate
        .basic_constraints()
        .map_err(|source| unreadable(certificate, source))?;
    Ok(found.map(|extension| extension.value))
}

fn unreadable(certificate: &X509Certificate<'_>, source: X509Error) -> ChainError {
    ChainError::Extension {
        subject: subject(certificate),
        source,
    }
}

/// EK certificates often have an empty subject; the serial number names them then.
fn subject(certificate: &X509Certificate<'_>) -> String {
    let subject = certificate.subject().to_string();
    if subject.is_empty() {
        format!("serial {}", certificate.raw_serial_as_string())
    } else {
        subject
    }
}

//! The verdict for a stranger: an EAT Attestation Result (draft-ietf-rats-ear-04), a JWT that whoever trusts this verifier's key can
//! check, wherever it came from.
//!
//! One attester, the host, is one submodule. Its trustworthiness vector (draft-ietf-rats-ar4si) says in a number of everybody's
//! what kind of thing is wrong; the claim `assay_verdict`, which others ignore, says exactly what. Nothing here decides: a [`Submod`] is
//! made from an [`Appraisal`], or says that there is none.

mod vector;

pub use vector::{Claim, Tier, Vector};

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::appraise::{Appraisal, Failure};
use crate::event::Mode;
use crate::jws::{self, Key, Signer};

/// The profile of the claims (section 3 of the draft).
pub const PROFILE: &str = "tag:ietf.org,2026:rats/ear#04";
/// Media type of the signed form (RFC 9782; section 5 of the draft).
pub const MEDIA_TYPE: &str = r#"application/eat+jwt; eat_profile="tag:ietf.org,2026:rats/ear#04""#;
/// Who made the verifier.
pub const DEVELOPER: &str = "Assay";
/// Failures, and notes, that a result lists; it counts the rest.
pub const MAX_FAILURES: usize = 1000;
/// How long a nonce may be, in bytes (RFC 9711 section 4.1).
pub const NONCE_BYTES: core::ops::RangeInclusive<usize> = 8..=64;

/// A caller's nonce that can't be echoed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NonceError {
    /// Not base64url.
    #[error("the nonce is not base64url without padding")]
    Encoding,
    /// Shorter or longer than an EAT's nonce may be.
    #[error("the nonce has {0} bytes, it must have 8 to 64")]
    Length(usize),
}

/// Why no result could be signed.
#[derive(Debug, thiserror::Error)]
pub enum EarError {
    /// The claims have no JSON form.
    #[error("the verdict cannot be written as JSON")]
    Json(#[source] serde_json::Error),
    /// The signature could not be made.
    #[error("the verdict could not be signed")]
    Sign,
}

/// A nonce that a relying party gave, to see that a result was made for it: 8 to 64 bytes, in base64url.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Nonce(String);

impl Nonce {
    /// Reads base64url text without padding.
    ///
    /// # Errors
    /// [`NonceError`].
    pub fn parse(text: &str) -> Result<Self, NonceError> {
        // Before the text is decoded: it may have any length.
        if text.len() > MAX_NONCE_TEXT {
            return Err(NonceError::Length(text.len().saturating_mul(3) / 4));
        }
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| NonceError::Encoding)?;
        if NONCE_BYTES.contains(&bytes.len()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(NonceError::Length(bytes.len()))
        }
    }
}

/// 64 bytes in base64url.
const MAX_NONCE_TEXT: usize = 86;

/// What the verdict on a host rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Basis {
    /// Evidence that verified, judged by a policy.
    Appraisal,
    /// Evidence that verified, and no policy to judge it by.
    NoPolicy,
    /// Evidence that did not verify, or whose log does not lead to what was quoted.
    BadEvidence,
    /// The host gave no evidence.
    NoEvidence,
}

/// The claims on one host (`EAR-appraisal`, section 3.1 of the draft), as they are kept until somebody asks for them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Submod {
    ear_status: Tier,
    ear_trustworthiness_vector: Vector,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ear_appraisal_policy_ids: Vec<String>,
    assay_verdict: Details,
}

/// The extension claim `assay_verdict`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Details {
    basis: Basis,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    host: Option<About>,
    /// Failures as [`Failure`] is serialized, and its line in `text`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    failures: Vec<Value>,
    #[serde(default, skip_serializing_if = "is_zero")]
    failures_left_out: usize,
    /// Why there is no appraisal.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    reasons: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    notes: Vec<String>,
}

/// What was judged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct About {
    boot_id: String,
    reset_count: u32,
    records: u64,
    tier: u8,
    mode: Mode,
    protected: bool,
}

impl Submod {
    /// A verdict by a policy.
    #[must_use]
    pub fn appraised(appraisal: &Appraisal) -> Self {
        let failures = appraisal.failures();
        let vector = Vector::of(failures);
        // There is no half trust here: a warning of the vector's is a refusal all the same.
        let ear_status = if appraisal.is_trusted() {
            vector.tier()
        } else {
            Tier::Contraindicated
        };
        let details = Details {
            host: Some(About {
                boot_id: appraisal.boot_id().to_owned(),
                reset_count: appraisal.reset_count(),
                records: appraisal.records(),
                tier: appraisal.tier(),
                mode: appraisal.mode(),
                protected: appraisal.protected(),
            }),
            failures: failures.iter().take(MAX_FAILURES).map(told).collect(),
            failures_left_out: failures.len().saturating_sub(MAX_FAILURES),
            notes: appraisal.notes().iter().take(MAX_FAILURES).cloned().collect(),
            ..Details::new(Basis::Appraisal, Vec::new())
        };
        Self {
            ear_status,
            ear_trustworthiness_vector: vector,
            ear_appraisal_policy_ids: vec![appraisal.policy().to_owned()],
            assay_verdict: details,
        }
    }

    /// The host proved who it is, and there is no policy to judge it by.
    #[must_use]
    pub fn no_policy(reasons: Vec<String>) -> Self {
        Self::without_appraisal(Tier::None, Vector::identified(), Basis::NoPolicy, reasons)
    }

    /// What the host gave as evidence does not verify.
    #[must_use]
    pub fn bad_evidence(reasons: Vec<String>) -> Self {
        Self::without_appraisal(
            Tier::Contraindicated,
            Vector::bad_evidence(),
            Basis::BadEvidence,
            reasons,
        )
    }

    /// The host gave no evidence.
    #[must_use]
    pub fn no_evidence(reasons: Vec<String>) -> Self {
        Self::without_appraisal(Tier::None, Vector::nothing(), Basis::NoEvidence, reasons)
    }

    fn without_appraisal(ear_status: Tier, vector: Vector, basis: Basis, mut reasons: Vec<String>) -> Self {
        reasons.truncate(MAX_FAILURES);
        Self {
            ear_status,
            ear_trustworthiness_vector: vector,
            ear_appraisal_policy_ids: Vec::new(),
            assay_verdict: Details::new(basis, reasons),
        }
    }

    /// The same verdict on a log that has so many records by now.
    pub fn went_on(&mut self, records: u64) {
        if let Some(host) = &mut self.assay_verdict.host {
            host.records = records;
        }
    }

    /// The host's status.
    #[must_use]
    pub const fn status(&self) -> Tier {
        self.ear_status
    }

    /// The whole claims-set, to be shown or signed.
    #[must_use]
    pub fn result<'a>(&'a self, issue: &Issue<'a>) -> Ear<'a> {
        Ear {
            eat_profile: PROFILE,
            iat: issue.issued,
            exp: issue.expires,
            ear_verifier_id: VerifierId {
                developer: DEVELOPER,
                build: issue.build,
            },
            ear_status: self.ear_status,
            eat_nonce: issue.nonce,
            submods: BTreeMap::from([(issue.host, self)]),
        }
    }
}

impl Details {
    const fn new(basis: Basis, reasons: Vec<String>) -> Self {
        Self {
            basis,
            host: None,
            failures: Vec::new(),
            failures_left_out: 0,
            reasons,
            notes: Vec::new(),
        }
    }
}

/// When, by whom and for whom a result is made.
#[derive(Debug, Clone, Copy)]
pub struct Issue<'a> {
    /// The verifier's name for the host; the submodule's label.
    pub host: &'a str,
    /// The verifier's program and version.
    pub build: &'a str,
    /// Unix time, seconds.
    pub issued: i64,
    /// Unix time, seconds, from which on nobody may rely on it.
    pub expires: i64,
    /// The caller's nonce, if one was given.
    pub nonce: Option<&'a Nonce>,
}

/// The claims-set of an EAT Attestation Result.
#[derive(Debug, Clone, Serialize)]
pub struct Ear<'a> {
    eat_profile: &'static str,
    iat: i64,
    exp: i64,
    ear_verifier_id: VerifierId<'a>,
    ear_status: Tier,
    #[serde(skip_serializing_if = "Option::is_none")]
    eat_nonce: Option<&'a Nonce>,
    submods: BTreeMap<&'a str, &'a Submod>,
}

#[derive(Debug, Clone, Serialize)]
struct VerifierId<'a> {
    developer: &'static str,
    build: &'a str,
}

impl Ear<'_> {
    /// Signs it: a compact JWT, ES256.
    ///
    /// # Errors
    /// [`EarError`].
    pub fn sign(&self, signer: &Signer) -> Result<String, EarError> {
        let payload = serde_json::to_vec(self).map_err(EarError::Json)?;
        jws::sign(&header(signer.public()), &payload, signer).ok_or(EarError::Sign)
    }
}

/// The one header of this key. The thumbprint tells a relying party that knows several keys which one to take.
fn header(key: &Key) -> String {
    format!(r#"{{"alg":"ES256","kid":"{}","typ":"eat+jwt"}}"#, key.thumbprint())
}

/// A failure with all that is known about it, and as a line of text.
fn told(failure: &Failure) -> Value {
    let mut told = serde_json::to_value(failure).unwrap_or_default();
    if let Value::Object(members) = &mut told {
        members.insert("text".into(), failure.to_string().into());
    }
    told
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
const fn is_zero(count: &usize) -> bool {
    *count == 0
}

#[cfg(test)]
mod tests;

//! Whether a host gets a disk's key, and the wrapping of it.
//!
//! Two checks must have passed, each of which is a value that only the check can make: the evidence was appraised as
//! trusted ([`Appraisal`]), and the key to wrap to lives in the host's TPM under a policy that names the very PCR
//! values which were judged ([`ReleaseTarget`]). Both carry the `extraData` of the quote they rest on, so that the one
//! can't be paired with the other of another request.

use zeroize::Zeroizing;

use crate::appraise::Appraisal;
use crate::binding::Binding;
use crate::digest::{Algorithm, Sha256Digest};
use crate::jwe::{self, Jwe, JweError};
use crate::quote::{QUOTED_BANK, QUOTED_PCRS};
use crate::replay::ReplayedLog;
use crate::tpm::{
    Attest, AttestationKey, Attested, Attributes, EccPoint, Name, Parameters, Public, Signature, SignatureError,
    TpmError, policy_pcr_digest,
};
use crate::wire::ReleaseKey;

/// Attributes of a release key, exactly these. Neither userWithAuth nor adminWithPolicy: only its PCR policy opens it,
/// and no one but the TPM ever had it.
pub const KEY_ATTRIBUTES: Attributes = Attributes::FIXED_TPM
    .with(Attributes::FIXED_PARENT)
    .with(Attributes::SENSITIVE_DATA_ORIGIN)
    .with(Attributes::NO_DA)
    .with(Attributes::DECRYPT);

/// `TPM_RH_NULL` (TPM 2.0 Part 2, section 7.4): the hierarchy whose keys are gone with the next reset.
const NULL_HIERARCHY: u32 = 0x4000_0007;

/// Why a key is not released.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// The evidence was quoted for something else than this key, disk and release key.
    #[error("the evidence was not quoted for this release: ask for a new challenge")]
    Binding,
    /// The release key's public area can't be read.
    #[error("the release key's public area cannot be read")]
    Public(#[source] TpmError),
    /// The release key has other attributes.
    #[error("the release key has the attributes {found}; it must have exactly {KEY_ATTRIBUTES}")]
    Attributes {
        /// What it has.
        found: Attributes,
    },
    /// The release key is not a P-256 key without scheme and cipher.
    #[error("the release key is not a plain P-256 key with a sha256 Name")]
    KeyType,
    /// The certification's signature is not in TPM form.
    #[error("the signature of the release key's certification cannot be read")]
    SignatureForm(#[source] TpmError),
    /// The enrolled AK did not sign the certification.
    #[error("the release key is not certified by the host's enrolled attestation key")]
    Signature(#[source] SignatureError),
    /// Signed, but not an attestation.
    #[error("the release key's certification cannot be read")]
    Attest(#[source] TpmError),
    /// Signed, but another kind of attestation.
    #[error("the signed statement is not a certification of a key")]
    NotACertification,
    /// The certification answers another request.
    #[error("the release key was certified for another request")]
    ExtraData,
    /// Another key was certified.
    #[error("the certified key is not the release key: {certified} was certified, the release key is {key}")]
    Name {
        /// Name in the certification, hex.
        certified: String,
        /// Name of the release key.
        key: Name,
    },
    /// The certified key outlives a reset.
    #[error("the release key is not in the TPM's NULL hierarchy: it would outlive a reboot")]
    Hierarchy,
    /// The TPM was reset or restarted between quote and certification.
    #[error("quote and certification are not from one run of the TPM: {counter} {quote} and {certification}")]
    Counters {
        /// `reset count` or `restart count`.
        counter: &'static str,
        /// In the quote.
        quote: u32,
        /// In the certification.
        certification: u32,
    },
    /// The release key can be used in another state than the quoted one.
    #[error("the release key is not bound to the quoted PCRs: its policy is {found}, theirs is {wanted}")]
    Policy {
        /// The key's policy, hex.
        found: String,
        /// What the quoted values demand.
        wanted: Sha256Digest,
    },
    /// The evidence is not trusted.
    #[error("the host is not trusted: {}", reasons.join(" | "))]
    NotTrusted {
        /// Every failure, a line each.
        reasons: Vec<String>,
    },
    /// The appraisal and the release key belong to different requests.
    #[error("the appraised evidence is not the one that the release key was quoted with")]
    OtherEvidence,
    /// The release key was quoted for another key id.
    #[error("the host asked for key {asked:?}, not for {given:?}")]
    KeyId {
        /// Key id that the evidence is bound to.
        asked: String,
        /// Key id of the secret at hand.
        given: String,
    },
    /// The secret could not be wrapped.
    #[error("the key could not be wrapped")]
    Wrap(#[source] JweError),
}

impl ReleaseError {
    /// Why the host is not trusted, a line each; empty for the other errors.
    #[must_use]
    pub fn reasons(&self) -> &[String] {
        match self {
            Self::NotTrusted { reasons } => reasons,
            _ => &[],
        }
    }
}

/// A disk's passphrase. It is wiped when dropped, and can be neither printed, cloned nor serialized.
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// Takes the bytes over.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The bytes, for who opens the disk.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl From<Zeroizing<Vec<u8>>> for Secret {
    fn from(bytes: Zeroizing<Vec<u8>>) -> Self {
        Self(bytes)
    }
}

/// A key in the host's TPM that a secret may be wrapped to: usable only by that TPM, until its next reset, while its PCRs
/// are those quoted.
#[derive(Debug, Clone)]
pub struct ReleaseTarget {
    point: EccPoint,
    key_id: String,
    disk: [u8; 16],
    extra_data: [u8; 32],
}

impl ReleaseTarget {
    /// The key id that the host asked for.
    #[must_use]
    pub fn key_id(&self) -> &str {
        &self.key_id
    }

    /// UUID of the LUKS header that the host asked for.
    #[must_use]
    pub const fn disk(&self) -> [u8; 16] {
        self.disk
    }
}

/// Checks a release key against the evidence that came with it. `binding` is the one that the evidence was verified with.
///
/// # Errors
/// One variant of [`ReleaseError`] for each reason.
pub fn check_release_key(
    log: &ReplayedLog,
    ak: &AttestationKey,
    binding: &Binding<'_>,
    key: &ReleaseKey,
) -> Result<ReleaseTarget, ReleaseError> {
    let public = Public::parse(key.public.as_ref()).map_err(ReleaseError::Public)?;
    let name = public.name();
    let Binding::Release {
        key_name, disk, key_id, ..
    } = binding
    else {
        return Err(ReleaseError::Binding);
    };
    if **key_name != name || binding_digest(log, binding) != *log.extra_data() {
        return Err(ReleaseError::Binding);
    }
    let point = check_public(&public)?;
    check_certification(log, ak, &name, key)?;
    check_policy(log, &public)?;
    Ok(ReleaseTarget {
        point,
        key_id: (*key_id).to_owned(),
        disk: *disk,
        extra_data: *log.extra_data(),
    })
}

/// Wraps a disk's secret to a checked release key, for evidence that was appraised as trusted.
///
/// # Errors
/// [`ReleaseError::NotTrusted`] with every reason, [`ReleaseError::OtherEvidence`], [`ReleaseError::KeyId`],
/// [`ReleaseError::Wrap`].
pub fn release(
    appraisal: &Appraisal,
    target: &ReleaseTarget,
    key_id: &str,
    secret: &Secret,
) -> Result<Jwe, ReleaseError> {
    if !appraisal.is_trusted() {
        return Err(ReleaseError::NotTrusted {
            reasons: appraisal.reasons(),
        });
    }
    if *appraisal.extra_data() != target.extra_data {
        return Err(ReleaseError::OtherEvidence);
    }
    if target.key_id != key_id {
        return Err(ReleaseError::KeyId {
            asked: target.key_id.clone(),
            given: key_id.to_owned(),
        });
    }
    jwe::wrap(&target.point, key_id, secret.expose()).map_err(ReleaseError::Wrap)
}

/// What the quote's `extraData` must be. The evidence was verified with *some* binding; that it was this one is shown
/// here, not assumed.
fn binding_digest(log: &ReplayedLog, binding: &Binding<'_>) -> [u8; 32] {
    let head = &log.quote().head;
    binding.digest(head.records(), &head.value())
}

fn check_public(public: &Public) -> Result<EccPoint, ReleaseError> {
    if public.attributes() != KEY_ATTRIBUTES {
        return Err(ReleaseError::Attributes {
            found: public.attributes(),
        });
    }
    match public.parameters() {
        Parameters::P256 {
            symmetric: None,
            scheme: None,
            point,
        } if public.name_alg() == Algorithm::Sha256 => Ok(*point),
        _ => Err(ReleaseError::KeyType),
    }
}

/// The order is that of a quote: signature over the bytes as they came, then what they say.
fn check_certification(
    log: &ReplayedLog,
    ak: &AttestationKey,
    name: &Name,
    key: &ReleaseKey,
) -> Result<(), ReleaseError> {
    let signature = Signature::parse(key.certify_signature.as_ref()).map_err(ReleaseError::SignatureForm)?;
    ak.verify(key.certify_attest.as_ref(), &signature)
        .map_err(ReleaseError::Signature)?;
    let attest = Attest::parse(key.certify_attest.as_ref()).map_err(ReleaseError::Attest)?;
    let Attested::Certify {
        name: certified,
        qualified_name,
    } = &attest.attested
    else {
        return Err(ReleaseError::NotACertification);
    };
    if attest.extra_data != log.extra_data() {
        return Err(ReleaseError::ExtraData);
    }
    if certified != name.as_bytes() {
        return Err(ReleaseError::Name {
            certified: hex::encode(certified),
            key: name.clone(),
        });
    }
    // The qualified Name of a primary key is made of its hierarchy's handle and its Name (Part 1, section 26.5).
    let qualified = [NULL_HIERARCHY.to_be_bytes().as_slice(), name.as_bytes()].concat();
    if qualified_name != Name::new(Algorithm::Sha256, &qualified).as_bytes() {
        return Err(ReleaseError::Hierarchy);
    }
    for (counter, quote, certification) in [
        ("reset count", log.reset_count(), attest.clock.reset_count),
        ("restart count", log.restart_count(), attest.clock.restart_count),
    ] {
        if quote != certification {
            return Err(ReleaseError::Counters {
                counter,
                quote,
                certification,
            });
        }
    }
    Ok(())
}

/// The key's policy must be the one that `TPM2_PolicyPCR` gives for the values that were quoted and judged.
fn check_policy(log: &ReplayedLog, public: &Public) -> Result<(), ReleaseError> {
    let quoted = log.pcrs().get(&QUOTED_BANK).into_iter().flatten();
    let values = quoted
        .filter(|(index, _)| QUOTED_PCRS.contains(index))
        .map(|(index, value)| (*index, value.clone()));
    let wanted = policy_pcr_digest(&values.collect());
    if public.auth_policy() != wanted.as_ref() {
        return Err(ReleaseError::Policy {
            found: hex::encode(public.auth_policy()),
            wanted,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;

//! The approved list: what a host in enforce mode may run, signed by its verifier.
//!
//! A compact JWS, see [`jws`](crate::jws).
//! A list of a policy names the host that it is for, if it is for one alone; a serial number keeps an older list from coming
//! back.

pub use crate::jws::{Key as ListKey, KeyError as ListKeyError, Signer as ListSigner};

use serde::{Deserialize, Serialize};

use crate::digest::Sha256Digest;
use crate::jws::{self, JwsError};
use crate::policy;
use crate::wire::{B64, ListHead};

/// Version of the payload that this crate reads and writes.
pub const VERSION: u32 = 1;
/// Most digests of a list.
pub const MAX_DIGESTS: usize = 250_000;
/// Longest list, in bytes of its compact form: two base64 encodings of [`MAX_DIGESTS`], and room for the rest.
pub const MAX_LIST: usize = 14 * 1024 * 1024;

/// The one header, as JSON.
const HEADER: &str = r#"{"alg":"ES256","typ":"assay-approved+jwt"}"#;
const DIGEST: usize = 32;

/// Why a list can't be made, or is refused.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// Longer than [`MAX_LIST`].
    #[error("the approved list is {0} bytes long, at most {MAX_LIST} are read")]
    TooLong(usize),
    /// Not three base64url parts with dots between them.
    #[error("the approved list is not a compact JWS (three base64url parts with dots between them)")]
    Form,
    /// Another header than the one of this profile.
    #[error("the approved list has another header than {HEADER}")]
    Header,
    /// Signed by somebody else, or changed.
    #[error("the approved list was not signed by the verifier that this host has joined, or was changed since")]
    Signature,
    /// The payload is not JSON of the form, though it was signed.
    #[error("the approved list is not JSON of the expected form")]
    Json(#[source] serde_json::Error),
    /// Another version of the payload.
    #[error("the approved list has version {0}, this program reads version {VERSION}")]
    Version(u32),
    /// The policy's name is none.
    #[error("the approved list is of a policy without a usable name")]
    Policy,
    /// It ends before it begins.
    #[error("the approved list ends at {expires}, before it was issued at {issued} (Unix time)")]
    Dates {
        /// Unix time.
        issued: u64,
        /// Unix time.
        expires: u64,
    },
    /// The digests are cut.
    #[error("the approved list has {0} bytes of digests, which is no multiple of {DIGEST}")]
    Cut(usize),
    /// Nothing is approved: a host under it could not start anything, its agent included.
    #[error("the approved list is empty: a host in enforce mode could run nothing; capture a policy first")]
    Empty,
    /// More than [`MAX_DIGESTS`].
    #[error("the approved list has {0} digests, at most {MAX_DIGESTS} are possible")]
    TooMany(usize),
    /// Digests that are not in ascending order, or there twice.
    #[error("the approved list is not sorted, or has a digest twice, at digest {0}")]
    Order(usize),
    /// For another host.
    #[error("the approved list is for the host with TLS key sha256:{found}, this one has sha256:{own}")]
    OtherHost {
        /// The host that it is for.
        found: Sha256Digest,
        /// This host.
        own: Sha256Digest,
    },
    /// Its time to be taken over is past.
    #[error("the approved list could be taken over until {expires} (Unix time), it is {now}: sign it anew")]
    Expired {
        /// Unix time.
        expires: u64,
        /// Unix time.
        now: u64,
    },
    /// Older than the one that is held.
    #[error("the approved list has serial {found}, this host holds {held} already: an older list is not taken back")]
    Rollback {
        /// Serial that is held.
        held: u64,
        /// Serial that came.
        found: u64,
    },
    /// Another list under the serial of the one that is held.
    #[error("another approved list with serial {0} is held already: sign this one anew")]
    SameSerial(u64),
    /// The signature could not be made.
    #[error("the approved list could not be signed")]
    Sign,
}

/// What a list says; signed, it is a [`ListDraft`]'s JWS, and verified an [`ApprovedList`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListDraft {
    /// Name of the policy that it was made from.
    pub policy: String,
    /// SHA-256 of the TLS key (SPKI) of the one host that it is for; none for every host of the verifier.
    pub host: Option<Sha256Digest>,
    /// Higher than that of every list before it.
    pub serial: u64,
    /// Unix time.
    pub issued: u64,
    /// Unix time after which no host takes it over. A host that holds it goes on: it must be able to boot.
    pub expires: Option<u64>,
    /// What may run, in any order.
    pub digests: Vec<Sha256Digest>,
}

/// The payload.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Payload {
    version: u32,
    policy: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    host: Option<Sha256Digest>,
    serial: u64,
    issued: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires: Option<u64>,
    digests: B64,
}

impl ListDraft {
    /// Signs it: the compact form, to be sent or saved as it is.
    ///
    /// # Errors
    /// [`ListError`]: what no host would take is not signed.
    pub fn sign(mut self, signer: &ListSigner) -> Result<String, ListError> {
        self.digests.sort_unstable();
        self.digests.dedup();
        check(&self)?;
        let mut bytes = Vec::with_capacity(self.digests.len().saturating_mul(DIGEST));
        for digest in &self.digests {
            bytes.extend_from_slice(digest.as_ref());
        }
        let payload = Payload {
            version: VERSION,
            policy: self.policy,
            host: self.host,
            serial: self.serial,
            issued: self.issued,
            expires: self.expires,
            digests: B64(bytes),
        };
        let payload = serde_json::to_vec(&payload).map_err(ListError::Json)?;
        jws::sign(HEADER, &payload, signer).ok_or(ListError::Sign)
    }
}

/// A list as it came, from a connection or a file. Only its length is known to be possible.
#[derive(Debug, Clone, Copy)]
pub struct UntrustedList<'a>(&'a [u8]);

impl<'a> UntrustedList<'a> {
    /// Takes the bytes of a compact JWS; a line end behind them, as an editor leaves it, is not part of it.
    ///
    /// # Errors
    /// [`ListError::TooLong`].
    pub fn new(bytes: &'a [u8]) -> Result<Self, ListError> {
        let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        if bytes.len() > MAX_LIST {
            return Err(ListError::TooLong(bytes.len()));
        }
        Ok(Self(bytes))
    }

    /// Whether this verifier signed it, for this host (SHA-256 of its TLS key's SPKI) or for all.
    ///
    /// # Errors
    /// [`ListError`].
    pub fn verify(self, key: &ListKey, host: &Sha256Digest) -> Result<ApprovedList, ListError> {
        let payload = jws::verify(self.0, HEADER, key).map_err(|error| match error {
            JwsError::Form => ListError::Form,
            JwsError::Header => ListError::Header,
            JwsError::Signature => ListError::Signature,
        })?;
        let draft = parse(&payload)?;
        match draft.host {
            Some(found) if found != *host => Err(ListError::OtherHost { found, own: *host }),
            _ => Ok(ApprovedList {
                sha256: Sha256Digest::of(self.0),
                draft,
            }),
        }
    }
}

/// A list that this host's verifier signed, for this host. Digests are sorted, each there once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApprovedList {
    sha256: Sha256Digest,
    draft: ListDraft,
}

impl ApprovedList {
    /// What may run, ascending; at least one, at most [`MAX_DIGESTS`].
    #[must_use]
    pub fn digests(&self) -> &[Sha256Digest] {
        &self.draft.digests
    }

    /// Its number; lists only go up.
    #[must_use]
    pub const fn serial(&self) -> u64 {
        self.draft.serial
    }

    /// Name of the verifier's policy that it was made from.
    #[must_use]
    pub fn policy(&self) -> &str {
        &self.draft.policy
    }

    /// When it was signed, Unix time.
    #[must_use]
    pub const fn issued(&self) -> u64 {
        self.draft.issued
    }

    /// SHA-256 of the signed list as it came.
    #[must_use]
    pub const fn sha256(&self) -> Sha256Digest {
        self.sha256
    }

    /// What identifies it.
    #[must_use]
    pub fn head(&self) -> ListHead {
        ListHead {
            serial: self.draft.serial,
            sha256: self.sha256,
            entries: u64::try_from(self.draft.digests.len()).unwrap_or(u64::MAX),
        }
    }

    /// Whether it may take the place of the list that is held, if one is. `false`: it says what that one says.
    ///
    /// # Errors
    /// [`ListError::Expired`], [`ListError::Rollback`], [`ListError::SameSerial`].
    pub fn replaces(&self, held: Option<&Self>, now: u64) -> Result<bool, ListError> {
        if let Some(held) = held {
            let (held_serial, found) = (held.serial(), self.serial());
            if found < held_serial {
                return Err(ListError::Rollback {
                    held: held_serial,
                    found,
                });
            }
            if found == held_serial {
                // Content, not bytes: anybody can turn one ES256 signature into another one of the same text.
                let same = self.draft == held.draft;
                return if same {
                    Ok(false)
                } else {
                    Err(ListError::SameSerial(found))
                };
            }
        }
        match self.draft.expires {
            Some(expires) if now > expires => Err(ListError::Expired { expires, now }),
            _ => Ok(true),
        }
    }
}

fn parse(payload: &[u8]) -> Result<ListDraft, ListError> {
    let payload: Payload = serde_json::from_slice(payload).map_err(ListError::Json)?;
    if payload.version != VERSION {
        return Err(ListError::Version(payload.version));
    }
    let bytes = payload.digests.0;
    if !bytes.len().is_multiple_of(DIGEST) {
        return Err(ListError::Cut(bytes.len()));
    }
    let draft = ListDraft {
        policy: payload.policy,
        host: payload.host,
        serial: payload.serial,
        issued: payload.issued,
        expires: payload.expires,
        digests: bytes
            .chunks_exact(DIGEST)
            .filter_map(|chunk| Sha256Digest::try_from(chunk).ok())
            .collect(),
    };
    check(&draft)?;
    Ok(draft)
}

/// What both sides demand of a list's content.
fn check(draft: &ListDraft) -> Result<(), ListError> {
    if !policy::is_name(&draft.policy) {
        return Err(ListError::Policy);
    }
    if let Some(expires) = draft.expires.filter(|expires| *expires < draft.issued) {
        return Err(ListError::Dates {
            issued: draft.issued,
            expires,
        });
    }
    match draft.digests.len() {
        0 => return Err(ListError::Empty),
        found if found > MAX_DIGESTS => return Err(ListError::TooMany(found)),
        _ => {}
    }
    let pairs = draft.digests.iter().zip(draft.digests.iter().skip(1));
    match (1..).zip(pairs).find(|(_, (one, next))| one >= next) {
        Some((at, _)) => Err(ListError::Order(at)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;

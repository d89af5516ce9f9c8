//! What can happen to a key, as the audit log tells it.

use serde::{Deserialize, Serialize};

use crate::digest::Sha256Digest;
use crate::uuid::Uuid;

/// Longest text of an event, in characters; what is longer is cut.
pub const MAX_TEXT: usize = 512;
/// Most reasons of one refusal; the last of them then says how many there were.
pub const MAX_REASONS: usize = 20;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Event {
    /// A key is about to leave, wrapped to the host's TPM. Written before it leaves.
    Released {
        /// Who asked for what.
        request: Request,
        /// The policy that the host meets.
        policy: String,
        /// The host's boot, as quoted.
        boot_id: String,
        /// SHA-256 of the quote that was judged (`TPMS_ATTEST`).
        quote_sha256: Sha256Digest,
        /// For how many seconds; absent where the key has no lease.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lease_s: Option<u64>,
    },
    /// A host got no key.
    Refused {
        /// Who asked for what.
        request: Request,
        /// The refusal's name.
        code: String,
        /// The refusal in words.
        message: String,
        /// The verdict's reasons.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        reasons: Vec<String>,
        /// Refusals of this host since the last one that is in the log: when there are very many, not each is.
        #[serde(default, skip_serializing_if = "is_zero")]
        unrecorded: u64,
    },
    /// A host holds a key no more.
    Returned {
        /// Which key of which host.
        key: Taken,
        /// How that is known.
        why: String,
    },
    /// A host was told that it may not hold a key any more.
    Withdrawn {
        /// Which key of which host.
        key: Taken,
        /// Why.
        reasons: Vec<String>,
        /// What the host is to do.
        on_loss: String,
    },
    /// The terms of a key were changed.
    Terms {
        /// The key.
        key_id: Uuid,
        /// What they are now, in words.
        terms: String,
    },
    /// A key was forgotten for good.
    Removed {
        /// The key.
        key_id: Uuid,
    },
    /// What a crash left of a record stood here, and was removed: a key leaves only after its record is whole.
    Torn {
        /// How much of it there is.
        bytes: u64,
        /// SHA-256 of it.
        sha256: Sha256Digest,
    },
}

/// Who asks for what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The host's name.
    pub host: String,
    /// TPM Name of its attestation key, hex.
    pub ak_name: String,
    /// The key, as the host named it.
    pub key_id: String,
    /// The disk.
    pub disk: Uuid,
    /// What the host says that the disk is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
}

/// A key that a host holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Taken {
    /// The host's name.
    pub host: String,
    /// The key.
    pub key_id: Uuid,
    /// The disk.
    pub disk: Uuid,
}

impl Event {
    /// The host that it is about.
    #[must_use]
    pub fn host(&self) -> Option<&str> {
        match self {
            Self::Released { request, .. } | Self::Refused { request, .. } => Some(&request.host),
            Self::Returned { key, .. } | Self::Withdrawn { key, .. } => Some(&key.host),
            Self::Terms { .. } | Self::Removed { .. } | Self::Torn { .. } => None,
        }
    }

    /// The key that it is about.
    #[must_use]
    pub fn key_id(&self) -> Option<String> {
        match self {
            Self::Released { request, .. } | Self::Refused { request, .. } => Some(request.key_id.clone()),
            Self::Returned { key, .. } | Self::Withdrawn { key, .. } => Some(key.key_id.to_string()),
            Self::Terms { key_id, .. } | Self::Removed { key_id } => Some(key_id.to_string()),
            Self::Torn { .. } => None,
        }
    }

    /// With each text that comes from elsewhere cut to what a record takes.
    #[must_use]
    pub fn shortened(mut self) -> Self {
        match &mut self {
            Self::Released { request, boot_id, .. } => {
                request.shorten();
                cut(boot_id);
            }
            Self::Refused {
                request,
                message,
                reasons,
                ..
            } => {
                request.shorten();
                cut(message);
                cut_all(reasons);
            }
            Self::Returned { why, .. } => cut(why),
            Self::Withdrawn { reasons, .. } => cut_all(reasons),
            Self::Terms { .. } | Self::Removed { .. } | Self::Torn { .. } => {}
        }
        self
    }
}

impl Request {
    fn shorten(&mut self) {
        cut(&mut self.key_id);
        if let Some(vm) = &mut self.vm {
            cut(vm);
        }
    }
}

fn cut_all(reasons: &mut Vec<String>) {
    let count = reasons.len();
    if count > MAX_REASONS {
        let shown = MAX_REASONS.saturating_sub(1);
        reasons.truncate(shown);
        reasons.push(format!("and {} more", count.saturating_sub(shown)));
    }
    reasons.iter_mut().for_each(cut);
}

fn cut(text: &mut String) {
    if let Some((at, _)) = text.char_indices().nth(MAX_TEXT) {
        text.truncate(at);
        text.push('…');
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the shape that serde asks for")]
const fn is_zero(count: &u64) -> bool {
    *count == 0
}

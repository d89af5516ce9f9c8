//! Why a policy can't be read, made or changed.

use super::{MAX_JSON, MAX_NAME, VERSION};
use crate::digest::DigestError;
use crate::event::{LoadKind, MAX_PATH};

/// Why a policy can't be read, made or changed.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// Longer than [`MAX_JSON`].
    #[error("the policy is {0} bytes long, at most {MAX_JSON} are read")]
    TooLong(usize),
    /// Not JSON, or a member is missing, unknown, or of another type.
    #[error("the policy is not JSON of the expected form")]
    Json(#[source] serde_json::Error),
    /// Another version of the format.
    #[error("the policy has version {0}, this program reads versions 1 to {VERSION}")]
    Version(u32),
    /// A name that is empty, too long, or has characters beyond letters, digits, `-`, `_` and `.`.
    #[error("{0:?} is no name for {1}: 1 to {MAX_NAME} letters, digits, '-', '_' or '.'")]
    Name(String, &'static str),
    /// Two parts of one kind have the same name.
    #[error("the policy has two {1} named {0:?}")]
    Twice(String, &'static str),
    /// No part has this name.
    #[error("policy {policy} has no boot configuration and no set named {part:?}")]
    NoSuchPart {
        /// Name of the policy.
        policy: String,
        /// The name that was asked for.
        part: String,
    },
    /// A list is longer than its limit.
    #[error("the policy's {list} has {found} entries, at most {limit} are allowed")]
    TooMany {
        /// Name of the list.
        list: &'static str,
        /// Its length.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// A path is longer than a log can have.
    #[error("the path {0:?}… is longer than {MAX_PATH} bytes")]
    Path(String),
    /// A PCR that no quote covers.
    #[error("the policy has values for PCR {0}; it can have them for 0 to 15, 17 and 18")]
    Pcr(u8),
    /// A PCR value that is no SHA-256 digest.
    #[error("the policy's value for PCR {pcr} is no value of the sha256 bank")]
    PcrValue {
        /// The PCR.
        pcr: u8,
        /// What is wrong with it.
        #[source]
        source: DigestError,
    },
    /// A tier that does not exist.
    #[error("the policy allows tier {0}; there are tiers 1, 2 and 3")]
    Tier(u8),
    /// A rule about something that does not exist, or an answer that makes no sense there.
    #[error("the policy's rules cannot have {what} {name:?}; {remedy}")]
    Rule {
        /// What it is about.
        what: &'static str,
        /// As it stands in the file.
        name: String,
        /// What would do.
        remedy: String,
    },
    /// A time that can't be written.
    #[error("{0} is no time that a policy can have: years 1970 to 9999")]
    Time(u64),
    /// The log to capture from is not complete.
    #[error("the host's inventory is not complete yet: wait until its agent reports ready, then capture")]
    NotReady,
    /// The log to capture from has a hole, so that it says nothing about a good host.
    #[error(
        "the host's log has a violation ({0}): a policy is made from a host without one, reboot it and capture then"
    )]
    Violation(String),
    /// Code in the log to capture from was not hashed.
    #[error("the host runs {0:?}, which could not be hashed: a policy can't approve it")]
    NotHashed(String),
    /// Code in the log to capture from could change while it was hashed.
    #[error(
        "the host loaded {0:?} while somebody had it open for writing: reboot the host, and capture before it is written to"
    )]
    Unstable(String),
    /// Code in the log to capture from had pages that were changed in memory.
    #[error("the host made {0:?} executable with pages that were changed in memory: a policy can't approve that")]
    Modified(String),
    /// Somebody tried to get at the agent of the host to capture from.
    #[error(
        "the host's log has an attempt on its agent ({kind} by task {task:?}): find out who tried, reboot the host, and capture then"
    )]
    Attempt {
        /// What was tried.
        kind: LoadKind,
        /// Name of the task that tried.
        task: String,
    },
    /// A kind that has no digest, so that none can be approved.
    #[error("{0} can't be approved: nobody can measure what it loads; use kexec_file_load, as kexec -s does")]
    NeverAllowed(LoadKind),
}

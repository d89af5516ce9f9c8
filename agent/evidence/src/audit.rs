//! The audit log: which key went to which host, for which disk, when, and why; and who was refused.
//!
//! One record a line, each a compact JWS (RFC 7515, ES256) by a key of its own that names the hash of the line before. So a
//! record that was changed, left out or moved shows itself to whoever has the public key; what was cut off at the end shows itself to
//! whoever remembers a later head. Layout: `agent/docs/formats.md`, "Audit log".

mod event;
#[cfg(test)]
mod tests;

pub use event::{Event, MAX_REASONS, MAX_TEXT, Request, Taken};

use serde::{Deserialize, Serialize};

use crate::digest::Sha256Digest;
use crate::jws::{self, JwsError, Key, Signer};

/// The one header, as JSON.
const HEADER: &str = r#"{"alg":"ES256","typ":"assay-audit+jws"}"#;
/// The one version of a record.
const VERSION: u32 = 1;
/// Longest record, in bytes, its line end aside: twice what the longest event takes.
pub const MAX_LINE: usize = 256 * 1024;

/// A record as it is signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// 1.
    pub version: u32,
    /// Its number; the first one is 1.
    pub seq: u64,
    /// SHA-256 of the record before as it stands in the log, without its line end; zeros before the first.
    pub prev: Sha256Digest,
    /// When it was written, Unix time in seconds.
    pub time: i64,
    /// What happened.
    pub event: Event,
}

/// Where a log ends: whoever remembers it sees later whether the log still leads there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Number of the last record; 0 of an empty log.
    pub seq: u64,
    /// SHA-256 of it, as the next one names it.
    pub hash: Sha256Digest,
}

impl Head {
    /// Of a log without records.
    pub const EMPTY: Self = Self {
        seq: 0,
        hash: Sha256Digest::new([0; 32]),
    };
}

/// Why a log is not what its writer wrote.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuditError {
    /// Longer than any record.
    #[error("the line where record {0} should be is longer than {MAX_LINE} bytes: it is no record")]
    TooLong(u64),
    /// Not a record at all.
    #[error("the line where record {0} should be is no record: it was changed")]
    Form(u64),
    /// Signed for another purpose.
    #[error("record {0} has another header than {HEADER}: it was signed for another purpose")]
    Header(u64),
    /// Changed, or somebody else's.
    #[error("record {0} was not signed with this key, or was changed since")]
    Signature(u64),
    /// Signed, and of no form that this program knows.
    #[error("record {seq} cannot be read: was it written by a newer assay-verifier? {why}")]
    Content {
        /// Which should be there.
        seq: u64,
        /// What the reader says.
        why: String,
    },
    /// Records are missing.
    #[error("record {expected} is missing: record {found} is in its place")]
    Missing {
        /// Which should be there.
        expected: u64,
        /// Which is there.
        found: u64,
    },
    /// A record stands where it was not written.
    #[error("record {found} is in the place of record {expected}: records were moved or repeated")]
    Moved {
        /// Which should be there.
        expected: u64,
        /// Which is there.
        found: u64,
    },
    /// A record that follows another one than that which is there.
    #[error("record {seq} does not follow the record before it: that one was replaced, or the log was begun anew")]
    Chain {
        /// Which.
        seq: u64,
    },
    /// The last line has no end.
    #[error(
        "the line of record {seq} is torn after {bytes} bytes: a crash leaves that, and the next start of `assay-verifier serve` removes it and says so in the log; while `serve` runs, the log was cut"
    )]
    Torn {
        /// Which should be there.
        seq: u64,
        /// What there is of it.
        bytes: usize,
    },
    /// The log does not lead to where it led before.
    #[error("no record has the hash {hash}: the log was cut at its end, or is another one; its last record is {last}")]
    Cut {
        /// The head that was remembered.
        hash: Sha256Digest,
        /// Number of the last record that is there.
        last: u64,
    },
    /// The record could not be signed, or is too long.
    #[error("record {0} could not be signed")]
    Sign(u64),
}

impl Record {
    /// The record that follows a log's head, and the head that it makes.
    ///
    /// # Errors
    /// [`AuditError::Sign`].
    pub fn sign(head: &Head, time: i64, event: Event, signer: &Signer) -> Result<(String, Head), AuditError> {
        let seq = head.seq.saturating_add(1);
        let record = Self {
            version: VERSION,
            seq,
            prev: head.hash,
            time,
            event: event.shortened(),
        };
        let payload = serde_json::to_vec(&record).map_err(|_| AuditError::Sign(seq))?;
        let line = jws::sign(HEADER, &payload, signer).ok_or(AuditError::Sign(seq))?;
        if line.len() > MAX_LINE {
            return Err(AuditError::Sign(seq));
        }
        let hash = Sha256Digest::of(line.as_bytes());
        Ok((line, Head { seq, hash }))
    }

    /// Reads one line, without its end, that this key signed. `expected` is for the error's words.
    ///
    /// # Errors
    /// [`AuditError`]; nothing in the line is read before its signature is checked.
    pub fn read(line: &[u8], key: &Key, expected: u64) -> Result<Self, AuditError> {
        if line.len() > MAX_LINE {
            return Err(AuditError::TooLong(expected));
        }
        let payload = jws::verify(line, HEADER, key).map_err(|error| match error {
            JwsError::Form => AuditError::Form(expected),
            JwsError::Header => AuditError::Header(expected),
            JwsError::Signature => AuditError::Signature(expected),
        })?;
        let unreadable = |why: String| AuditError::Content { seq: expected, why };
        let record: Self = serde_json::from_slice(&payload).map_err(|e| unreadable(e.to_string()))?;
        if record.version != VERSION {
            return Err(unreadable(format!("it has version {}", record.version)));
        }
        Ok(record)
    }
}

/// Checks a log line by line, from its first record on.
pub struct Checker<'a> {
    key: &'a Key,
    head: Option<Head>,
    /// A head that was remembered, and whether it has come by.
    remembered: Option<(Sha256Digest, bool)>,
    /// Whether it must begin with the first record.
    whole: bool,
}

impl<'a> Checker<'a> {
    /// A check by this key. The log must lead by the head `remembered`, if there is one.
    #[must_use]
    pub fn new(key: &'a Key, remembered: Option<Sha256Digest>) -> Self {
        Self {
            key,
            head: None,
            remembered: remembered.map(|hash| (hash, hash == Head::EMPTY.hash)),
            whole: remembered.is_none(),
        }
    }

    /// A check of what is there of a log, whose older files may have been put away.
    #[must_use]
    pub fn of_part(key: &'a Key) -> Self {
        Self {
            whole: false,
            ..Self::new(key, None)
        }
    }

    /// The next line, without its end.
    ///
    /// # Errors
    /// [`AuditError`], which names the record.
    pub fn line(&mut self, line: &[u8]) -> Result<Record, AuditError> {
        let record = Record::read(line, self.key, self.expected())?;
        self.follows(&record)?;
        let hash = Sha256Digest::of(line);
        self.see(record.prev);
        self.see(hash);
        self.head = Some(Head { seq: record.seq, hash });
        Ok(record)
    }

    /// The end of the log, with what stands behind its last line end.
    ///
    /// # Errors
    /// [`AuditError`]: a torn line, or a remembered head that never came.
    pub fn end(self, rest: &[u8]) -> Result<Head, AuditError> {
        let head = self.head.unwrap_or(Head::EMPTY);
        if !rest.is_empty() {
            return Err(AuditError::Torn {
                seq: self.expected(),
                bytes: rest.len(),
            });
        }
        match self.remembered {
            Some((hash, false)) => Err(AuditError::Cut { hash, last: head.seq }),
            _ => Ok(head),
        }
    }

    fn expected(&self) -> u64 {
        self.head.map_or(1, |head| head.seq.saturating_add(1))
    }

    fn see(&mut self, hash: Sha256Digest) {
        if let Some((remembered, seen)) = &mut self.remembered {
            *seen |= *remembered == hash;
        }
    }

    fn follows(&self, record: &Record) -> Result<(), AuditError> {
        let found = record.seq;
        let Some(head) = self.head else {
            return match found {
                1 if record.prev == Head::EMPTY.hash => Ok(()),
                0 | 1 => Err(AuditError::Chain { seq: found }),
                // Older files were put away; who remembers a head from then on knows that nothing else was.
                _ if !self.whole => Ok(()),
                _ => Err(AuditError::Missing { expected: 1, found }),
            };
        };
        let expected = self.expected();
        match found.cmp(&expected) {
            core::cmp::Ordering::Greater => Err(AuditError::Missing { expected, found }),
            core::cmp::Ordering::Less => Err(AuditError::Moved { expected, found }),
            core::cmp::Ordering::Equal if record.prev != head.hash => Err(AuditError::Chain { seq: found }),
            core::cmp::Ordering::Equal => Ok(()),
        }
    }
}

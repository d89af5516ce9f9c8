//! The running head of a log.

use super::{CelError, Record};
use crate::digest::{Algorithm, Sha256Digest};

/// The running head of a log: H₀ = 32 zero bytes, Hₙ₊₁ = SHA-256(Hₙ || the record's SHA-256 digest).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    records: u64,
    value: Sha256Digest,
}

impl Head {
    /// The head of the empty log.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            records: 0,
            value: Sha256Digest::ZERO,
        }
    }

    /// Takes the next record in.
    ///
    /// # Errors
    /// [`CelError::Number`] when it is not the next one, [`CelError::Digest`] when it has no SHA-256 digest.
    pub fn push(&mut self, record: &Record) -> Result<(), CelError> {
        if record.number != self.records {
            return Err(CelError::Number {
                found: record.number,
                wanted: self.records,
            });
        }
        let missing = CelError::Digest {
            record: record.number,
            bank: "sha256",
            reason: "is missing",
        };
        let digest = record.digest(Algorithm::Sha256).ok_or(missing)?;
        self.value = Sha256Digest::of_parts(&[self.value.as_ref(), digest]);
        self.records = self.records.saturating_add(1);
        Ok(())
    }

    /// Records taken in so far.
    #[must_use]
    pub const fn records(&self) -> u64 {
        self.records
    }

    /// The head after them.
    #[must_use]
    pub const fn value(&self) -> Sha256Digest {
        self.value
    }
}

impl Default for Head {
    fn default() -> Self {
        Self::new()
    }
}

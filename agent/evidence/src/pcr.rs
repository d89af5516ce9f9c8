//! Which PCR a host's runtime log is in.

use core::fmt;

/// The PCR that a host's runtime log is extended into: 13, or 12 or 14 where 13 has an owner already. All others belong
/// to firmware, boot loader or IMA, or can be reset.
///
/// The verifier pins it for each host, and hands it in. It is never read from evidence: root of a host could otherwise
/// begin a clean log in a PCR that nothing was extended into yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuntimePcr(u8);

/// A PCR that no runtime log can be in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("PCR {0} cannot hold a runtime log: use 12, 13 (the default) or 14")]
pub struct RuntimePcrError(pub u8);

impl RuntimePcr {
    /// 13, where agents extend it unless they are configured otherwise.
    pub const DEFAULT: Self = Self(13);

    /// Takes 12, 13 and 14.
    ///
    /// # Errors
    /// [`RuntimePcrError`] for any other.
    pub const fn new(index: u8) -> Result<Self, RuntimePcrError> {
        match index {
            12..=14 => Ok(Self(index)),
            _ => Err(RuntimePcrError(index)),
        }
    }

    /// Its index.
    #[must_use]
    pub const fn index(self) -> u8 {
        self.0
    }
}

impl fmt::Display for RuntimePcr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pcrs_without_another_owner_hold_a_log() {
        let allowed: Vec<u8> = (0..=u8::MAX).filter(|index| RuntimePcr::new(*index).is_ok()).collect();
        assert_eq!(allowed, [12, 13, 14]);
        assert_eq!(RuntimePcr::new(13), Ok(RuntimePcr::DEFAULT));
        assert_eq!(RuntimePcr::new(16), Err(RuntimePcrError(16)));
    }
}

//! The owner's way in without any verifier: a second key slot, whose key goes to no host and is kept nowhere.

use std::fmt;

use zeroize::Zeroizing;

use super::{SealError, random};

const RAW_LEN: usize = 32;
/// Digits between two hyphens.
const GROUP: usize = 8;

/// A recovery key: 32 random bytes in hex, in groups of eight. The text with its hyphens is the LUKS passphrase, so that it can be typed
/// into `cryptsetup open` as it was printed. Wiped when dropped, and not clonable.
pub struct RecoveryKey(Zeroizing<String>);

impl RecoveryKey {
    /// Makes a new one.
    ///
    /// # Errors
    /// [`SealError::Random`].
    pub fn generate() -> Result<Self, SealError> {
        let mut raw = Zeroizing::new([0_u8; RAW_LEN]);
        random(raw.as_mut())?;
        let digits = Zeroizing::new(hex::encode(raw.as_ref()));
        // With room for all of it: a string that grows leaves unwiped copies behind.
        let mut text = Zeroizing::new(String::with_capacity(2 * digits.len()));
        for (place, digit) in digits.chars().enumerate() {
            if place > 0 && place.is_multiple_of(GROUP) {
                text.push('-');
            }
            text.push(digit);
        }
        Ok(Self(text))
    }

    /// The text, for the one who keeps it and for the key slot.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for RecoveryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RecoveryKey(hidden)")
    }
}

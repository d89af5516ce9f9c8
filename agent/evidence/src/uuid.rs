//! UUIDs as the kernel's boot id, LUKS2 headers and key ids write them.

use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The text is not a UUID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a UUID (lower-case hex, 8-4-4-4-12)")]
pub struct UuidError;

/// A UUID of any version. Text form: lower-case hex with hyphens, 36 characters.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Uuid([u8; 16]);

impl Uuid {
    /// The UUID with these bytes, in the order of its text form.
    #[must_use]
    pub const fn new(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// A version 4 UUID made of these random bytes (RFC 9562, section 5.4).
    #[must_use]
    pub fn from_random(bytes: [u8; 16]) -> Self {
        Self::versioned(bytes, 0x40)
    }

    /// A version 8 UUID made of these bytes, which mean something of our own (RFC 9562, section 5.8).
    #[must_use]
    pub fn from_custom(bytes: [u8; 16]) -> Self {
        Self::versioned(bytes, 0x80)
    }

    fn versioned(mut bytes: [u8; 16], high: u8) -> Self {
        if let Some(version) = bytes.get_mut(6) {
            *version = (*version & 0x0F) | high;
        }
        if let Some(variant) = bytes.get_mut(8) {
            *variant = (*variant & 0x3F) | 0x80;
        }
        Self(bytes)
    }

    /// The 16 bytes, in the order of the text form.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Uuid({self})")
    }
}

impl FromStr for Uuid {
    type Err = UuidError;

    fn from_str(text: &str) -> Result<Self, UuidError> {
        let plain: String = text.chars().filter(|c| *c != '-').collect();
        let bytes: [u8; 16] = crate::digest::lower_hex(&plain)
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or(UuidError)?;
        let uuid = Self(bytes);
        // Hyphens in other places, or none, would be a second spelling of the same id.
        if uuid.to_string() == text {
            Ok(uuid)
        } else {
            Err(UuidError)
        }
    }
}

impl Serialize for Uuid {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Uuid {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_spelling() {
        let text = "6b1f0e2a-93c4-4d5e-8f70-0123456789ab";
        let uuid: Uuid = text.parse().unwrap();
        assert_eq!(uuid.to_string(), text);
        assert_eq!(uuid.as_bytes()[..2], [0x6b, 0x1f]);
        for bad in [
            "",
            "6B1F0E2A-93C4-4D5E-8F70-0123456789AB",
            "6b1f0e2a93c44d5e8f700123456789ab",
            "6b1f0e2a-93c4-4d5e-8f70-0123456789a",
        ] {
            assert_eq!(bad.parse::<Uuid>(), Err(UuidError), "{bad}");
        }
    }

    #[test]
    fn random_has_version_and_variant() {
        assert_eq!(
            Uuid::from_random([0xFF; 16]).to_string(),
            "ffffffff-ffff-4fff-bfff-ffffffffffff"
        );
        assert_eq!(
            Uuid::from_custom([0; 16]).to_string(),
            "00000000-0000-8000-8000-000000000000"
        );
    }
}

//! Keys of encrypted VHDs, as XenServer's and XCP-ng's storage manager names them.
//!
//! The storage manager knows a key by its hash alone (`sm-config:key_hash` of a VDI; blktap's `include/vhd.h` keeps it in the
//! VHD itself). The hash is public, and the same in every snapshot and clone. From it comes the id that the key has at a
//! verifier, so that who has a VDI's key hash can ask for the key, and no table leads from one to the other.

use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::digest::{DigestError, Sha256Digest};
use crate::uuid::Uuid;

/// How long a key may be, in bytes: for AES-128-XTS and for AES-256-XTS (blktap, `drivers/crypto/xts_aes.h`).
pub const KEY_BYTES: [usize; 2] = [32, 64];

/// The storage manager always hashes with this nonce in front (`vhd-util key -C`).
const NONCE: [u8; 32] = [0; 32];

/// Hash of a VHD's key: SHA-256 over 32 zero bytes and the key. Text form: 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyHash(Sha256Digest);

impl KeyHash {
    /// The hash of a key.
    ///
    /// # Errors
    /// The key's length, when it is none of [`KEY_BYTES`].
    pub fn of(key: &[u8]) -> Result<Self, usize> {
        if KEY_BYTES.contains(&key.len()) {
            Ok(Self(Sha256Digest::of_parts(&[&NONCE, key])))
        } else {
            Err(key.len())
        }
    }

    /// The key's id at a verifier: a version 8 UUID (RFC 9562, section 5.8) whose other 122 bits are the first of the hash.
    #[must_use]
    pub fn key_id(&self) -> Uuid {
        let mut bytes = [0; 16];
        for (to, from) in bytes.iter_mut().zip(self.0.as_bytes()) {
            *to = *from;
        }
        Uuid::from_custom(bytes)
    }

    /// The 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        self.0.as_bytes()
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyHash({self})")
    }
}

impl FromStr for KeyHash {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        text.parse().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What blktap's own `vhd-util key -C` and the storage manager say of these two keys.
    #[test]
    fn hashes_are_those_of_the_storage_manager() {
        let key: Vec<u8> = (0..64).collect();
        let hash = KeyHash::of(&key).unwrap();
        let known = "dc7a48014fc1fac8b52af39bc7ea5cafafabf8bb81fb8f880fdf3b4a4566795c";
        assert_eq!(hash.to_string(), known);
        assert_eq!(known.parse(), Ok(hash));
        assert_eq!(hash.key_id().to_string(), "dc7a4801-4fc1-8ac8-b52a-f39bc7ea5caf");
        assert_eq!(
            KeyHash::of(&key[..32]).unwrap().to_string(),
            "bb2275c49f28ad52cae6d55e34a974a58c7a3ba26f976e8ecbbe7a536918dc73"
        );
    }

    #[test]
    fn other_lengths_are_no_keys() {
        for length in [0, 16, 31, 33, 63, 65, 128] {
            assert_eq!(KeyHash::of(&vec![7; length]), Err(length));
        }
    }

    #[test]
    fn a_hash_has_one_spelling() {
        let known = "dc7a48014fc1fac8b52af39bc7ea5cafafabf8bb81fb8f880fdf3b4a4566795c";
        for bad in [&known[1..], &known.to_uppercase(), ""] {
            assert!(bad.parse::<KeyHash>().is_err(), "{bad}");
        }
    }
}

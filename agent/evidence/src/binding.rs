//! What a quote is about: the `extraData` that ties it to a question, a connection, a log and a key.
//!
//! Each binding is SHA-256 over a fixed layout with a tag of its own in front, so that evidence made for one purpose is
//! never an answer to another. The layouts are in `agent/docs/formats.md`.

use core::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::digest::Sha256Digest;
use crate::tpm::Name;

/// Label of the TLS exporter (RFC 8446, section 7.5), without context.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-assay-binding-v1";

const TAG_QUOTE: &[u8] = b"assay/quote/1\0";
const TAG_RELEASE: &[u8] = b"assay/release/1\0";

/// Bytes that are no nonce or exporter because there are not 32 of them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} has {found} bytes, it must have 32")]
pub struct BindingError {
    /// `nonce` or `TLS exporter`.
    pub what: &'static str,
    /// Its length in bytes.
    pub found: usize,
}

/// A question's nonce: 32 random bytes, for one use. Base64 in JSON.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Nonce([u8; 32]);

impl Nonce {
    /// The nonce with these bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl TryFrom<&[u8]> for Nonce {
    type Error = BindingError;

    fn try_from(bytes: &[u8]) -> Result<Self, BindingError> {
        bytes.try_into().map(Self).map_err(|_| BindingError {
            what: "nonce",
            found: bytes.len(),
        })
    }
}

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nonce({})", hex::encode(self.0))
    }
}

impl Serialize for Nonce {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(self.0))
    }
}

impl<'de> Deserialize<'de> for Nonce {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = STANDARD
            .decode(text)
            .map_err(|_| de::Error::custom("nonce is not standard base64 with padding"))?;
        bytes.as_slice().try_into().map_err(de::Error::custom)
    }
}

/// Keying material exported from the TLS connection that carries the evidence ([`EXPORTER_LABEL`]).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Exporter([u8; 32]);

impl Exporter {
    /// The exporter with these bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl TryFrom<&[u8]> for Exporter {
    type Error = BindingError;

    fn try_from(bytes: &[u8]) -> Result<Self, BindingError> {
        bytes.try_into().map(Self).map_err(|_| BindingError {
            what: "TLS exporter",
            found: bytes.len(),
        })
    }
}

impl fmt::Debug for Exporter {
    // Keying material of a live connection stays out of logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Exporter(..)")
    }
}

/// What a quote was asked for.
#[derive(Debug, Clone, Copy)]
pub enum Binding<'a> {
    /// The verifier's regular question.
    Quote {
        /// The verifier's nonce.
        nonce: &'a Nonce,
        /// Of the connection that the question came by.
        exporter: &'a Exporter,
    },
    /// A disk's key is wanted. The certification of the release key carries the same digest.
    Release {
        /// The verifier's nonce.
        nonce: &'a Nonce,
        /// Of the connection that the challenge came by.
        exporter: &'a Exporter,
        /// Name of the release key.
        key_name: &'a Name,
        /// UUID of the LUKS header.
        disk: [u8; 16],
        /// The wanted key, at most [`MAX_KEY_ID`](crate::wire::MAX_KEY_ID) bytes.
        key_id: &'a str,
    },
}

impl Binding<'_> {
    /// The `extraData` for this question and a log of `records` records with this head.
    #[must_use]
    pub fn digest(&self, records: u64, head: &Sha256Digest) -> [u8; 32] {
        let records = records.to_be_bytes();
        let digest = match self {
            Self::Quote { nonce, exporter } => {
                Sha256Digest::of_parts(&[TAG_QUOTE, &nonce.0, &exporter.0, &records, head.as_ref()])
            }
            Self::Release {
                nonce,
                exporter,
                key_name,
                disk,
                key_id,
            } => Sha256Digest::of_parts(&[
                TAG_RELEASE,
                &nonce.0,
                &exporter.0,
                &records,
                head.as_ref(),
                &length(key_name.as_bytes()),
                key_name.as_bytes(),
                disk,
                &length(key_id.as_bytes()),
                key_id.as_bytes(),
            ]),
        };
        *digest.as_bytes()
    }
}

/// A u16 length. A Name has at most 66 bytes. Of a key id beyond 64 KiB the length is cut, which leaves the layout
/// unambiguous: it is the last field.
fn length(bytes: &[u8]) -> [u8; 2] {
    u16::try_from(bytes.len()).unwrap_or(u16::MAX).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Algorithm;

    fn name() -> Name {
        Name::new(Algorithm::Sha256, b"public area")
    }

    #[test]
    fn quote_layout_is_known() {
        let (nonce, exporter) = (Nonce::new([1; 32]), Exporter::new([2; 32]));
        let mut bytes = b"assay/quote/1\0".to_vec();
        bytes.extend_from_slice(&[1; 32]);
        bytes.extend_from_slice(&[2; 32]);
        bytes.extend_from_slice(&[0, 0, 0, 0, 0, 0, 1, 2]);
        bytes.extend_from_slice(&[3; 32]);
        let binding = Binding::Quote {
            nonce: &nonce,
            exporter: &exporter,
        };
        assert_eq!(
            binding.digest(258, &Sha256Digest::new([3; 32])),
            *Sha256Digest::of(&bytes).as_bytes()
        );
    }

    #[test]
    fn release_layout_is_known() {
        let (nonce, exporter, name) = (Nonce::new([1; 32]), Exporter::new([2; 32]), name());
        let mut bytes = b"assay/release/1\0".to_vec();
        bytes.extend_from_slice(&[1; 32]);
        bytes.extend_from_slice(&[2; 32]);
        bytes.extend_from_slice(&7_u64.to_be_bytes());
        bytes.extend_from_slice(&[3; 32]);
        bytes.extend_from_slice(&[0, 34]);
        bytes.extend_from_slice(name.as_bytes());
        bytes.extend_from_slice(&[9; 16]);
        bytes.extend_from_slice(&[0, 3]);
        bytes.extend_from_slice(b"k-1");
        let binding = Binding::Release {
            nonce: &nonce,
            exporter: &exporter,
            key_name: &name,
            disk: [9; 16],
            key_id: "k-1",
        };
        assert_eq!(
            binding.digest(7, &Sha256Digest::new([3; 32])),
            *Sha256Digest::of(&bytes).as_bytes()
        );
    }

    #[test]
    fn every_input_counts() {
        let name = name();
        let other = Name::new(Algorithm::Sha256, b"another");
        let digest = |nonce: u8, exporter: u8, name: &Name, disk: u8, key_id: &str, records: u64, head: u8| {
            let (nonce, exporter) = (Nonce::new([nonce; 32]), Exporter::new([exporter; 32]));
            let binding = Binding::Release {
                nonce: &nonce,
                exporter: &exporter,
                key_name: name,
                disk: [disk; 16],
                key_id,
            };
            binding.digest(records, &Sha256Digest::new([head; 32]))
        };
        let base = digest(1, 2, &name, 3, "k", 4, 5);
        assert_ne!(base, digest(9, 2, &name, 3, "k", 4, 5));
        assert_ne!(base, digest(1, 9, &name, 3, "k", 4, 5));
        assert_ne!(base, digest(1, 2, &other, 3, "k", 4, 5));
        assert_ne!(base, digest(1, 2, &name, 9, "k", 4, 5));
        assert_ne!(base, digest(1, 2, &name, 3, "l", 4, 5));
        assert_ne!(base, digest(1, 2, &name, 3, "k", 9, 5));
        assert_ne!(base, digest(1, 2, &name, 3, "k", 4, 9));
    }

    #[test]
    fn nonce_has_32_bytes() {
        let text = serde_json::to_string(&Nonce::new([7; 32])).unwrap();
        assert_eq!(serde_json::from_str::<Nonce>(&text).unwrap(), Nonce::new([7; 32]));
        let error = serde_json::from_str::<Nonce>("\"AAAA\"").unwrap_err();
        assert!(
            error.to_string().contains("nonce has 3 bytes, it must have 32"),
            "{error}"
        );
    }
}

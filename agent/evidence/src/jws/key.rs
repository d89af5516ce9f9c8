//! The keys that sign: P-256, one for each purpose, and not the CA's, so that whoever may sign can't make verifiers.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _, UnparsedPublicKey,
};

use crate::digest::Sha256Digest;

/// DER of a P-256 SubjectPublicKeyInfo before the point (RFC 5480): id-ecPublicKey, prime256v1, a bit string of 65 bytes.
const SPKI_PREFIX: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
/// Bytes of an uncompressed point.
const POINT: usize = 65;
/// Characters of a line in PEM.
const PEM_LINE: usize = 64;
/// Bytes of a coordinate.
const COORDINATE: usize = 32;

/// A key that can't be used to sign or to check by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The public half is not a P-256 SubjectPublicKeyInfo in DER, with an uncompressed point.
    #[error("it is not the SubjectPublicKeyInfo of a P-256 key (DER, uncompressed point)")]
    Public,
    /// The private half is not PKCS#8 of a P-256 key.
    #[error("it is not a P-256 private key (PKCS#8)")]
    Private,
}

/// The public half: what hosts know from their join file, and relying parties from the verifier's operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    point: [u8; POINT],
}

impl Key {
    /// Reads a SubjectPublicKeyInfo. Whether the point is on the curve shows at the first signature.
    ///
    /// # Errors
    /// [`KeyError::Public`].
    pub fn from_spki(der: &[u8]) -> Result<Self, KeyError> {
        let point = der.strip_prefix(&SPKI_PREFIX).ok_or(KeyError::Public)?;
        let point: [u8; POINT] = point.try_into().map_err(|_| KeyError::Public)?;
        match point {
            [4, ..] => Ok(Self { point }),
            _ => Err(KeyError::Public),
        }
    }

    /// The SubjectPublicKeyInfo, DER.
    #[must_use]
    pub fn spki(&self) -> Vec<u8> {
        [SPKI_PREFIX.as_slice(), &self.point].concat()
    }

    /// SHA-256 of the SubjectPublicKeyInfo.
    #[must_use]
    pub fn spki_sha256(&self) -> Sha256Digest {
        Sha256Digest::of(&self.spki())
    }

    /// The SubjectPublicKeyInfo in PEM (RFC 7468 section 13).
    #[must_use]
    pub fn pem(&self) -> String {
        let mut text = "-----BEGIN PUBLIC KEY-----\n".to_owned();
        for (at, character) in (1..).zip(STANDARD.encode(self.spki()).chars()) {
            text.push(character);
            if at % PEM_LINE == 0 {
                text.push('\n');
            }
        }
        if !text.ends_with('\n') {
            text.push('\n');
        }
        text.push_str("-----END PUBLIC KEY-----\n");
        text
    }

    /// As a JSON Web Key (RFC 7517), members in the order of its thumbprint (RFC 7638 section 3).
    #[must_use]
    pub fn jwk(&self) -> String {
        let (x, y) = self.coordinates();
        format!(r#"{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}"#)
    }

    /// The thumbprint (RFC 7638): SHA-256 of [`Key::jwk`], base64url.
    #[must_use]
    pub fn thumbprint(&self) -> String {
        URL_SAFE_NO_PAD.encode(Sha256Digest::of(self.jwk().as_bytes()))
    }

    fn coordinates(&self) -> (String, String) {
        let [_, point @ ..] = &self.point;
        let (x, y) = point.split_at(COORDINATE);
        (URL_SAFE_NO_PAD.encode(x), URL_SAFE_NO_PAD.encode(y))
    }

    /// Whether this is its signature (r ‖ s) of the message.
    pub(crate) fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &self.point)
            .verify(message, signature)
            .is_ok()
    }
}

/// The private half, the verifier's.
pub struct Signer {
    pair: EcdsaKeyPair,
    public: Key,
}

impl Signer {
    /// Reads a private key.
    ///
    /// # Errors
    /// [`KeyError::Private`].
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, KeyError> {
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der, &SystemRandom::new())
            .map_err(|_| KeyError::Private)?;
        let point = pair.public_key().as_ref().try_into();
        let point = point.map_err(|_| KeyError::Private)?;
        Ok(Self {
            pair,
            public: Key { point },
        })
    }

    /// What others check by.
    #[must_use]
    pub const fn public(&self) -> &Key {
        &self.public
    }

    /// r ‖ s; none when the system gives no random numbers.
    pub(crate) fn sign(&self, message: &[u8]) -> Option<Vec<u8>> {
        let signature = self.pair.sign(&SystemRandom::new(), message).ok()?;
        Some(signature.as_ref().to_vec())
    }
}

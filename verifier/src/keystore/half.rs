//! Keys in two halves: what the key store keeps of a key whose other half a server of secrets has.
//!
//! The passphrase is encrypted under a random key that is used for nothing else. That key, the *half*, goes to the server; the
//! ciphertext stays in the key file, under the master key as ever. So neither who reads the server nor who reads the state directory and
//! its backups has a disk's key, and what passes over the network opens nothing.

use assay_evidence::uuid::Uuid;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{KeyStoreError, Passphrase, io::fill_random};

/// Length of a half in bytes.
pub const HALF_LEN: usize = 32;

/// The part of a key that a server of secrets has. Wiped when dropped, and not printable.
pub struct Half(Zeroizing<[u8; HALF_LEN]>);

impl Half {
    /// Takes what a server gave; `None` when it isn't [`HALF_LEN`] bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut half = Zeroizing::new([0; HALF_LEN]);
        if bytes.len() != HALF_LEN {
            return None;
        }
        half.copy_from_slice(bytes);
        Some(Self(half))
    }

    /// The bytes, for the server.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        self.0.as_ref()
    }

    fn key(&self) -> Option<LessSafeKey> {
        UnboundKey::new(&AES_256_GCM, self.expose()).ok().map(LessSafeKey::new)
    }
}

/// Where a server has a key's half. Part of the key file, and under its authentication.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "engine", rename_all = "lowercase", deny_unknown_fields)]
pub enum Held {
    /// In KV version 2.
    Kv {
        /// Where the engine is mounted.
        mount: String,
        /// The secret.
        path: String,
    },
    /// Here, encrypted by transit.
    Transit {
        /// Where the engine is mounted.
        mount: String,
        /// The server's key.
        key: String,
        /// What the server made of the half.
        ciphertext: String,
    },
}

impl Held {
    /// The engine's name.
    #[must_use]
    pub const fn engine(&self) -> &'static str {
        match self {
            Self::Kv { .. } => "kv",
            Self::Transit { .. } => "transit",
        }
    }
}

/// A server that has halves of keys: OpenBao here; a Barbican or a KMIP server would be others. Calls block.
pub trait SecretsServer: Send + Sync {
    /// Gives it a new key's half.
    ///
    /// # Errors
    /// [`KeyStoreError::Source`].
    fn keep(&self, key_id: Uuid, half: &Half) -> Result<Held, KeyStoreError>;

    /// Asks for a half.
    ///
    /// # Errors
    /// [`KeyStoreError::Source`].
    fn reveal(&self, held: &Held) -> Result<Half, KeyStoreError>;

    /// Has it forget a half; fine when it has none any more.
    ///
    /// # Errors
    /// [`KeyStoreError::Source`].
    fn forget(&self, held: &Held) -> Result<(), KeyStoreError>;
}

/// A new half, and the passphrase encrypted under it.
pub(super) fn split(key_id: Uuid, passphrase: &Passphrase) -> Result<(Half, Zeroizing<Vec<u8>>), KeyStoreError> {
    let mut half = Half(Zeroizing::new([0; HALF_LEN]));
    fill_random(half.0.as_mut())?;
    let failed = || KeyStoreError::Encrypt { key_id };
    // Encrypted in place: with room for the tag, the clear text is never copied by a growing vector.
    let mut rest = Zeroizing::new(Vec::with_capacity(
        passphrase.expose().len().saturating_add(AES_256_GCM.tag_len()),
    ));
    rest.extend_from_slice(passphrase.expose());
    half.key()
        .ok_or_else(failed)?
        .seal_in_place_append_tag(only_nonce(), associated_data(key_id), &mut *rest)
        .map_err(|_| failed())?;
    Ok((half, rest))
}

/// The passphrase's bytes; `None` when the two halves are not of this one key.
pub(super) fn join(key_id: Uuid, half: &Half, rest: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let mut buffer = Zeroizing::new(rest.to_vec());
    let clear = half
        .key()?
        .open_in_place(only_nonce(), associated_data(key_id), &mut buffer)
        .ok()?;
    Some(Zeroizing::new(clear.to_vec()))
}

/// Each half encrypts one message in its life, so no nonce is ever used twice.
fn only_nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; NONCE_LEN])
}

fn associated_data(key_id: Uuid) -> Aad<Vec<u8>> {
    let mut data = b"assay/key-half\0".to_vec();
    data.extend_from_slice(key_id.as_bytes());
    Aad::from(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_halves_make_the_key_and_no_others_do() {
        let [one, two] = [1_u128, 2].map(|number| Uuid::new(number.to_be_bytes()));
        let passphrase = Passphrase::generate().unwrap();
        let (half, rest) = split(one, &passphrase).unwrap();
        assert_eq!(*join(one, &half, &rest).unwrap(), passphrase.expose());
        assert!(join(two, &half, &rest).is_none());
        let (other, other_rest) = split(one, &passphrase).unwrap();
        assert!(join(one, &other, &rest).is_none());
        assert!(join(one, &half, &other_rest).is_none());
        assert!(join(one, &half, &[]).is_none());
        assert!(Half::from_bytes(&[0; 31]).is_none() && Half::from_bytes(&[0; 33]).is_none());
    }
}

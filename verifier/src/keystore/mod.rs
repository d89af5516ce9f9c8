//! Where disk keys are kept, and the only way to them.
//!
//! The verifier needs little of a key store: a key by its id, a list without secrets, and a place to put a new one.
//! [`KeySource`] says just that, so that a customer's Vault or Barbican can take the place of the files here.
//! [`FileKeyStore`] is the source for small sites and tests: one encrypted file per key under the state directory.

mod error;
mod file;
mod format;
mod io;

use std::collections::BTreeSet;
use std::fmt;

use assay_evidence::uuid::Uuid;
use zeroize::Zeroizing;

pub use error::KeyStoreError;
pub use file::{FileKeyStore, KEY_DIR, MASTER_FILE, create_master};

/// What a key belongs to. Nothing in here is secret, everything in here is authenticated by the key store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyInfo {
    /// The key's id, as the image's token names it.
    pub key_id: Uuid,
    /// The LUKS UUID of the one disk that the key opens.
    pub disk_uuid: Uuid,
    /// The policy that a host must meet to get the key. This, never the image's token, decides.
    pub policy: String,
    /// What a host must be tagged as to get the key, beside meeting the policy: by its operator, or by the policy.
    pub tags: BTreeSet<String>,
    /// File name of the image when it was sealed: a help for people, no more.
    pub image: String,
    /// Size of the disk inside the image, in bytes.
    pub size: u64,
    /// When the key was made, in seconds since 1970 UTC.
    pub created: i64,
}

/// A LUKS passphrase: [`PASSPHRASE_LEN`] hexadecimal characters, wiped when dropped, and neither printable nor
/// clonable.
pub struct Passphrase(Zeroizing<Vec<u8>>);

/// Length of every passphrase in bytes: 32 random bytes written in hex, so that every key source (Barbican
/// `passphrase`, Vault strings, `cryptsetup --key-file -`) carries the same bytes.
pub const PASSPHRASE_LEN: usize = 64;

impl Passphrase {
    /// Makes a new random passphrase.
    ///
    /// # Errors
    /// [`KeyStoreError::Random`] when the system gives no random bytes.
    pub fn generate() -> Result<Self, KeyStoreError> {
        let mut raw = Zeroizing::new([0_u8; PASSPHRASE_LEN / 2]);
        io::fill_random(raw.as_mut())?;
        let mut text = Zeroizing::new(vec![0_u8; PASSPHRASE_LEN]);
        // The lengths fit by construction; the error can't happen, and isn't hidden either.
        hex::encode_to_slice(raw.as_ref(), &mut text).map_err(|_| KeyStoreError::Random)?;
        Ok(Self(text))
    }

    /// Takes a passphrase that was stored; `None` when it isn't [`PASSPHRASE_LEN`] lower-case hex characters.
    #[must_use]
    pub fn from_stored(bytes: Zeroizing<Vec<u8>>) -> Option<Self> {
        let hex_only = bytes.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        (bytes.len() == PASSPHRASE_LEN && hex_only).then_some(Self(bytes))
    }

    /// The passphrase itself, for the call that needs it.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(hidden)")
    }
}

/// A key together with what it belongs to.
#[derive(Debug)]
pub struct StoredKey {
    /// What the key belongs to.
    pub info: KeyInfo,
    /// The secret.
    pub passphrase: Passphrase,
}

/// Result of [`KeySource::list`]: one broken entry must not hide the others, nor be hidden itself.
#[derive(Debug, Default)]
pub struct Listing {
    /// Every key that can be read, oldest first.
    pub keys: Vec<KeyInfo>,
    /// Every entry that can't be.
    pub damaged: Vec<KeyStoreError>,
}

/// A place that keeps disk keys.
pub trait KeySource: Send + Sync {
    /// The key with this id.
    ///
    /// # Errors
    /// [`KeyStoreError::NotFound`] when there is none; the others when it can't be read or isn't genuine.
    fn get(&self, key_id: Uuid) -> Result<StoredKey, KeyStoreError>;

    /// All keys, without their secrets.
    ///
    /// # Errors
    /// Only when the source as a whole can't be read; single damaged entries are part of the listing.
    fn list(&self) -> Result<Listing, KeyStoreError>;

    /// Keeps a new key; durable when this returns.
    ///
    /// # Errors
    /// [`KeyStoreError::Exists`] when the id is taken; the others when the key can't be written.
    fn put(&self, info: &KeyInfo, passphrase: &Passphrase) -> Result<(), KeyStoreError>;

    /// Forgets a key. Whatever it encrypted can't be opened any more.
    ///
    /// # Errors
    /// [`KeyStoreError::NotFound`] when there is none; the others when it can't be removed.
    fn remove(&self, key_id: Uuid) -> Result<(), KeyStoreError>;
}

//! Where disk keys are kept, and the only way to them.
//!
//! The verifier needs little of a key store: a key by its id, a list without secrets, and a place to put a new one.
//! [`KeySource`] says just that. [`FileKeyStore`] has one encrypted file per key under the state directory. What a key demands of hosts is
//! always there, so that whoever runs a server of secrets decides nothing about releases; the secret is there too, or, when `config.toml` names
//! a key source, in two halves, one of which a [`SecretsServer`] has.

mod bao;
mod error;
mod file;
mod format;
mod half;
mod io;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use assay_evidence::terms::Terms;
use assay_evidence::vhd::KeyHash;
use assay_evidence::{digest::Sha256Digest, uuid::Uuid};
use zeroize::Zeroizing;

use crate::config::KeySourceConfig;

pub use bao::{Bao, SourceError};
pub use error::KeyStoreError;
pub use file::{FileKeyStore, KEY_DIR, MASTER_FILE, Place, create_master};
pub use half::{HALF_LEN, Half, Held, SecretsServer};

/// Opens the key store of a state directory with the key source that is configured, if any. Asks no server yet.
///
/// # Errors
/// As [`FileKeyStore::open`]; [`KeyStoreError::Source`] for certificates that can't be used.
pub fn open(state_dir: &Path, source: Option<&KeySourceConfig>) -> Result<FileKeyStore, KeyStoreError> {
    let store = FileKeyStore::open(state_dir)?;
    match source {
        None => Ok(store),
        Some(config) => Ok(store.with_server(Box::new(Bao::open(config)?))),
    }
}

/// What a key is, and so what it opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    /// A passphrase of the one LUKS disk with the UUID in [`KeyInfo::disk_uuid`].
    Luks,
    /// The raw key of encrypted VHDs, with its hash, from which [`KeyInfo::key_id`] is made. It is no one disk's: each snapshot and
    /// clone has it, under a UUID that nobody knew when the key was made. So [`KeyInfo::disk_uuid`] is [`NO_DISK`], and whatever
    /// VDI a host names is written down and bound into its evidence.
    Vhd(KeyHash),
}

/// Stands for the disk of a key that is no one disk's: the nil UUID (RFC 9562, section 5.9).
pub const NO_DISK: Uuid = Uuid::new([0; 16]);

/// What a key belongs to. Nothing in here is secret, everything in here is authenticated by the key store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyInfo {
    /// The key's id, as the image's token names it.
    pub key_id: Uuid,
    /// What it is.
    pub kind: KeyKind,
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
    /// Fingerprint of the image's LUKS header ([`assay_evidence::luks`]): the key is released for no other. `None` for keys from before
    /// there were any.
    pub header: Option<Sha256Digest>,
    /// The key of the same disk that this one took the place of, until `image rotate --confirm`.
    pub replaces: Option<Uuid>,
    /// What it demands beside policy and tags.
    pub terms: Terms,
}

/// A disk's secret: a LUKS passphrase of [`PASSPHRASE_LEN`] hexadecimal characters, or the raw key of a VHD. Wiped when dropped, and
/// neither printable nor clonable.
pub struct Passphrase(Zeroizing<Vec<u8>>);

/// Length of every LUKS passphrase in bytes: 32 random bytes written in hex, so that every key source (Barbican
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

    /// Makes a new random key for a VHD, `length` bytes long, and its hash.
    ///
    /// # Errors
    /// [`KeyStoreError::Random`] when the system gives no random bytes; [`KeyStoreError::VhdKey`] for a length that no key has.
    pub fn generate_vhd(length: usize) -> Result<(Self, KeyHash), KeyStoreError> {
        let mut raw = Zeroizing::new(vec![0_u8; length]);
        io::fill_random(raw.as_mut())?;
        Self::from_vhd(raw)
    }

    /// Takes the raw key of a VHD, and tells its hash.
    ///
    /// # Errors
    /// [`KeyStoreError::VhdKey`] for a length that no key has.
    pub fn from_vhd(raw: Zeroizing<Vec<u8>>) -> Result<(Self, KeyHash), KeyStoreError> {
        let hash = KeyHash::of(&raw).map_err(|len| KeyStoreError::VhdKey { len })?;
        Ok((Self(raw), hash))
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
    /// Where the other halves are of those keys that are kept in two.
    pub held: BTreeMap<Uuid, Held>,
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

    /// What the key with this id belongs to; its secret is not fetched from anywhere.
    ///
    /// # Errors
    /// As [`KeySource::get`], without those of a server.
    fn describe(&self, key_id: Uuid) -> Result<KeyInfo, KeyStoreError> {
        self.get(key_id).map(|key| key.info)
    }

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

    /// Gives a key other terms; durable when this returns.
    ///
    /// # Errors
    /// [`KeyStoreError::NotFound`] when there is none, [`KeyStoreError::Terms`]; the others when it can't be written.
    fn set_terms(&self, key_id: Uuid, terms: &Terms) -> Result<(), KeyStoreError>;

    /// Forgets a key. Whatever it encrypted can't be opened any more.
    ///
    /// # Errors
    /// [`KeyStoreError::NotFound`] when there is none; the others when it can't be removed.
    fn remove(&self, key_id: Uuid) -> Result<(), KeyStoreError>;
}

//! The key file: JSON for people and backups, AES-256-GCM for the secret, and every field under its authentication.

use std::collections::BTreeSet;
use std::path::Path;

use assay_evidence::{policy::is_name, uuid::Uuid, wire::B64};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{KeyInfo, KeyStoreError, Passphrase, StoredKey, io::fill_random};

/// The versions of the file format: the second one has tags, and only keys that demand some are written in it.
const PLAIN: u32 = 1;
/// See [`PLAIN`].
pub(super) const VERSION: u32 = 2;
/// Longest policy or image name in bytes.
pub(super) const MAX_NAME: usize = 1024;
/// Most tags that one key demands.
const MAX_TAGS: usize = 64;
/// A key file is under 8 KiB; whatever is longer is something else.
pub(super) const MAX_FILE: u64 = 16 * 1024;
/// Length of the master key in bytes.
pub(super) const MASTER_LEN: usize = 32;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    version: u32,
    key_id: Uuid,
    disk_uuid: Uuid,
    policy: String,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    tags: BTreeSet<String>,
    image: String,
    size: u64,
    created: i64,
    nonce: B64,
    ciphertext: B64,
}

/// The key that encrypts all others.
pub(super) struct MasterKey(LessSafeKey);

impl MasterKey {
    /// `None` when it isn't [`MASTER_LEN`] bytes.
    pub(super) fn new(bytes: &[u8]) -> Option<Self> {
        UnboundKey::new(&AES_256_GCM, bytes)
            .ok()
            .map(|key| Self(LessSafeKey::new(key)))
    }
}

/// Encrypts one key into the bytes of its file.
///
/// The nonce is random: 96 bits are plenty for the number of disks that one master key ever sees (NIST SP 800-38D
/// section 8.3 allows 2^32 uses).
pub(super) fn seal(master: &MasterKey, info: &KeyInfo, passphrase: &Passphrase) -> Result<Vec<u8>, KeyStoreError> {
    for (field, text) in [("policy name", &info.policy), ("image name", &info.image)] {
        if text.len() > MAX_NAME {
            return Err(KeyStoreError::FieldTooLong {
                field,
                len: text.len(),
                limit: MAX_NAME,
            });
        }
    }
    if info.tags.len() > MAX_TAGS || info.tags.iter().any(|tag| !is_name(tag)) {
        return Err(KeyStoreError::Tags { key_id: info.key_id });
    }
    let version = if info.tags.is_empty() { PLAIN } else { VERSION };
    let mut nonce = [0_u8; NONCE_LEN];
    fill_random(&mut nonce)?;
    // Encrypted in place: with room for the tag, the clear text is never copied by a growing vector.
    let mut sealed = Zeroizing::new(Vec::with_capacity(passphrase.expose().len() + AES_256_GCM.tag_len()));
    sealed.extend_from_slice(passphrase.expose());
    master
        .0
        .seal_in_place_append_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(associated_data(version, info)),
            &mut *sealed,
        )
        .map_err(|_| KeyStoreError::Encrypt { key_id: info.key_id })?;
    let file = KeyFile {
        version,
        key_id: info.key_id,
        disk_uuid: info.disk_uuid,
        policy: info.policy.clone(),
        tags: info.tags.clone(),
        image: info.image.clone(),
        size: info.size,
        created: info.created,
        nonce: B64(nonce.to_vec()),
        ciphertext: B64(sealed.to_vec()),
    };
    let mut json = serde_json::to_vec_pretty(&file).map_err(|_| KeyStoreError::Encrypt { key_id: info.key_id })?;
    json.push(b'\n');
    Ok(json)
}

/// Reads one key out of the bytes of its file, which `path` only names for errors.
pub(super) fn open(master: &MasterKey, path: &Path, bytes: &[u8]) -> Result<StoredKey, KeyStoreError> {
    let file: KeyFile = serde_json::from_slice(bytes).map_err(|source| KeyStoreError::Malformed {
        path: path.to_owned(),
        source,
    })?;
    if !(PLAIN..=VERSION).contains(&file.version) {
        return Err(KeyStoreError::Version {
            path: path.to_owned(),
            version: file.version,
            known: VERSION,
        });
    }
    let info = KeyInfo {
        key_id: file.key_id,
        disk_uuid: file.disk_uuid,
        policy: file.policy,
        tags: file.tags,
        image: file.image,
        size: file.size,
        created: file.created,
    };
    let tampered = || KeyStoreError::Tampered { path: path.to_owned() };
    // The first version does not authenticate them.
    if (file.version == PLAIN) != info.tags.is_empty() {
        return Err(tampered());
    }
    let nonce = Nonce::try_assume_unique_for_key(&file.nonce.0).map_err(|_| tampered())?;
    let mut buffer = Zeroizing::new(file.ciphertext.0);
    let clear = master
        .0
        .open_in_place(nonce, Aad::from(associated_data(file.version, &info)), &mut buffer)
        .map_err(|_| tampered())?;
    let passphrase = Passphrase::from_stored(Zeroizing::new(clear.to_vec())).ok_or_else(tampered)?;
    Ok(StoredKey { info, passphrase })
}

/// What AES-GCM authenticates beside the secret: version and key id, and all that the verifier later believes about
/// the key. A file whose disk or policy was edited must not open.
fn associated_data(version: u32, info: &KeyInfo) -> Vec<u8> {
    let mut data = b"assay/key-file\0".to_vec();
    data.extend_from_slice(&version.to_be_bytes());
    data.extend_from_slice(info.key_id.as_bytes());
    data.extend_from_slice(info.disk_uuid.as_bytes());
    data.extend_from_slice(&info.size.to_be_bytes());
    data.extend_from_slice(&info.created.to_be_bytes());
    for text in [&info.policy, &info.image].into_iter().chain(&info.tags) {
        // As u64: no length is ever cut.
        let len = u64::try_from(text.len()).unwrap_or(u64::MAX);
        data.extend_from_slice(&len.to_be_bytes());
        data.extend_from_slice(text.as_bytes());
    }
    data
}

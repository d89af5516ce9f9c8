//! The key file: JSON for people and backups, AES-256-GCM for the secret, and every field under its authentication.

use std::collections::BTreeSet;
use std::path::Path;

use assay_evidence::{digest::Sha256Digest, policy::is_name, terms::Terms, uuid::Uuid, vhd::KeyHash, wire::B64};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{Held, KeyInfo, KeyKind, KeyStoreError, Passphrase, io::fill_random};

/// The versions of the file format. A key is written in the first one that has all that it needs: the second one has tags, the
/// third one kinds of keys, a header's fingerprint, and the key that is replaced, the fourth one terms, the fifth one keys in two halves.
const PLAIN: u32 = 1;
/// See [`PLAIN`].
const TAGS: u32 = 2;
/// See [`PLAIN`].
const KINDS: u32 = 3;
/// See [`PLAIN`].
const TERMS: u32 = 4;
/// See [`PLAIN`].
pub(super) const VERSION: u32 = 5;
/// Longest policy or image name in bytes.
pub(super) const MAX_NAME: usize = 1024;
/// Most tags that one key demands.
const MAX_TAGS: usize = 64;
/// A key file is under 28 KiB; whatever is longer is something else.
pub(super) const MAX_FILE: u64 = 32 * 1024;
/// Length of the master key in bytes.
pub(super) const MASTER_LEN: usize = 32;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    version: u32,
    key_id: Uuid,
    /// There for the key of a VHD alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vhd_key_hash: Option<KeyHash>,
    disk_uuid: Uuid,
    policy: String,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    tags: BTreeSet<String>,
    image: String,
    size: u64,
    created: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    header_sha256: Option<Sha256Digest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    replaces: Option<Uuid>,
    terms: Option<Terms>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    held: Option<Held>,
    nonce: B64,
    ciphertext: B64,
}

/// What a key file holds.
pub(super) struct KeptKey {
    /// What the key belongs to.
    pub info: KeyInfo,
    /// Its secret, or what there is of it here.
    pub secret: Kept,
}

/// What a key file holds of a secret.
pub(super) enum Kept {
    /// All.
    Whole(Passphrase),
    /// What remains when the half is taken away that is held there.
    Rest {
        /// Where the half is.
        held: Held,
        /// The passphrase, encrypted under the half.
        rest: Zeroizing<Vec<u8>>,
    },
}

impl Kept {
    /// Where the other half is.
    pub(super) fn held(&self) -> Option<&Held> {
        match self {
            Self::Whole(_) => None,
            Self::Rest { held, .. } => Some(held),
        }
    }

    /// What is kept of it here.
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Whole(passphrase) => passphrase.expose(),
            Self::Rest { rest, .. } => rest,
        }
    }
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
///
/// `clear` is the passphrase, or what remains of it when one half is `held` elsewhere.
pub(super) fn seal(
    master: &MasterKey,
    info: &KeyInfo,
    clear: &[u8],
    held: Option<&Held>,
) -> Result<Vec<u8>, KeyStoreError> {
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
    info.terms.check().map_err(|source| KeyStoreError::Terms {
        key_id: info.key_id,
        source,
    })?;
    if matches!(info.kind, KeyKind::Vhd(_)) && info.terms.are_watched() {
        return Err(KeyStoreError::VhdLease { key_id: info.key_id });
    }
    let version = version_for(info, held);
    let mut nonce = [0_u8; NONCE_LEN];
    fill_random(&mut nonce)?;
    // Encrypted in place: with room for the tag, the clear text is never copied by a growing vector.
    let mut sealed = Zeroizing::new(Vec::with_capacity(clear.len().saturating_add(AES_256_GCM.tag_len())));
    sealed.extend_from_slice(clear);
    master
        .0
        .seal_in_place_append_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(associated_data(version, info, held)),
            &mut *sealed,
        )
        .map_err(|_| KeyStoreError::Encrypt { key_id: info.key_id })?;
    let file = KeyFile {
        version,
        key_id: info.key_id,
        vhd_key_hash: match info.kind {
            KeyKind::Luks => None,
            KeyKind::Vhd(hash) => Some(hash),
        },
        disk_uuid: info.disk_uuid,
        policy: info.policy.clone(),
        tags: info.tags.clone(),
        image: info.image.clone(),
        size: info.size,
        created: info.created,
        header_sha256: info.header,
        replaces: info.replaces,
        terms: (version >= TERMS).then(|| info.terms.clone()),
        held: held.cloned(),
        nonce: B64(nonce.to_vec()),
        ciphertext: B64(sealed.to_vec()),
    };
    let mut json = serde_json::to_vec_pretty(&file).map_err(|_| KeyStoreError::Encrypt { key_id: info.key_id })?;
    json.push(b'\n');
    Ok(json)
}

/// Reads one key out of the bytes of its file, which `path` only names for errors.
pub(super) fn open(master: &MasterKey, path: &Path, bytes: &[u8]) -> Result<KeptKey, KeyStoreError> {
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
        kind: file.vhd_key_hash.map_or(KeyKind::Luks, KeyKind::Vhd),
        disk_uuid: file.disk_uuid,
        policy: file.policy,
        tags: file.tags,
        image: file.image,
        size: file.size,
        created: file.created,
        header: file.header_sha256,
        replaces: file.replaces,
        terms: file.terms.unwrap_or_default(),
    };
    let tampered = || KeyStoreError::Tampered { path: path.to_owned() };
    // The versions before do not authenticate what they do not know.
    let held = file.held;
    if file.version != version_for(&info, held.as_ref()) {
        return Err(tampered());
    }
    let nonce = Nonce::try_assume_unique_for_key(&file.nonce.0).map_err(|_| tampered())?;
    let mut buffer = Zeroizing::new(file.ciphertext.0);
    let clear = master
        .0
        .open_in_place(
            nonce,
            Aad::from(associated_data(file.version, &info, held.as_ref())),
            &mut buffer,
        )
        .map_err(|_| tampered())?;
    let clear = Zeroizing::new(clear.to_vec());
    let secret = match held {
        Some(held) => Kept::Rest { held, rest: clear },
        None => Kept::Whole(secret_of(info.kind, clear).ok_or_else(tampered)?),
    };
    Ok(KeptKey { info, secret })
}

/// The secret of a key of this kind; `None` when these bytes are none.
pub(super) fn secret_of(kind: KeyKind, clear: Zeroizing<Vec<u8>>) -> Option<Passphrase> {
    match kind {
        KeyKind::Luks => Passphrase::from_stored(clear),
        KeyKind::Vhd(wanted) => match Passphrase::from_vhd(clear) {
            Ok((key, hash)) => (hash == wanted).then_some(key),
            Err(_) => None,
        },
    }
}

/// The first version that has all that this key needs.
fn version_for(info: &KeyInfo, held: Option<&Held>) -> u32 {
    let bound = info.header.is_some() || info.replaces.is_some();
    match (info.kind, bound, info.tags.is_empty()) {
        _ if held.is_some() => VERSION,
        _ if info.terms != Terms::default() => TERMS,
        (KeyKind::Vhd(_), ..) | (_, true, _) => KINDS,
        (KeyKind::Luks, false, false) => TAGS,
        (KeyKind::Luks, false, true) => PLAIN,
    }
}

/// What AES-GCM authenticates beside the secret: version and key id, and all that the verifier later believes about
/// the key. A file whose disk or policy was edited must not open.
fn associated_data(version: u32, info: &KeyInfo, held: Option<&Held>) -> Vec<u8> {
    let mut data = b"assay/key-file\0".to_vec();
    data.extend_from_slice(&version.to_be_bytes());
    data.extend_from_slice(info.key_id.as_bytes());
    data.extend_from_slice(info.disk_uuid.as_bytes());
    data.extend_from_slice(&info.size.to_be_bytes());
    data.extend_from_slice(&info.created.to_be_bytes());
    if version >= KINDS {
        // What follows the tags must not be taken for one of them.
        let tags = u64::try_from(info.tags.len()).unwrap_or(u64::MAX);
        data.extend_from_slice(&tags.to_be_bytes());
    }
    for text in [&info.policy, &info.image].into_iter().chain(&info.tags) {
        // As u64: no length is ever cut.
        let len = u64::try_from(text.len()).unwrap_or(u64::MAX);
        data.extend_from_slice(&len.to_be_bytes());
        data.extend_from_slice(text.as_bytes());
    }
    if let KeyKind::Vhd(hash) = info.kind {
        data.extend_from_slice(b"vhd\0");
        data.extend_from_slice(hash.as_bytes());
    }
    // Behind any number of tags, so each part begins with what no length does.
    for (name, value) in [
        ("header_sha256", info.header.as_ref().map(AsRef::<[u8]>::as_ref)),
        ("replaces", info.replaces.as_ref().map(|key| key.as_bytes().as_slice())),
    ] {
        if let Some(value) = value {
            data.extend_from_slice(&u64::MAX.to_be_bytes());
            data.extend_from_slice(name.as_bytes());
            data.push(0);
            data.extend_from_slice(value);
        }
    }
    if version >= TERMS {
        data.extend_from_slice(b"terms\0");
        // One form for equal terms: members in the order of the type. It can't fail: they hold text and numbers.
        data.extend_from_slice(&serde_json::to_vec(&info.terms).unwrap_or_default());
    }
    if let Some(held) = held {
        data.extend_from_slice(b"held\0");
        // It can't fail either: it holds text.
        data.extend_from_slice(&serde_json::to_vec(held).unwrap_or_default());
    }
    data
}

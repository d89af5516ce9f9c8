//! A new key for an image, and the end of the old one.
//!
//! Two steps, so that at no moment a crash or a mistake leaves the image without a key that opens it: first a slot for the new key, then
//! the header's word that this is the one to ask for; both keys open the image until the owner confirms. The volume key stays what it was, and
//! with it what a host that had the old key may have kept: who wants that changed unseals the image and seals it again.

use std::path::Path;

use assay_evidence::{token::LuksToken, uuid::Uuid};
use libcryptsetup_rs::{LibcryptErr, TokenInput};

use super::{
    Format, SealError, Sealed, Terms,
    header::{luks_failed, token_json},
    key_info, new_uuid, sidecar,
};
use crate::keystore::{KeyInfo, KeySource, KeyStoreError, Passphrase, StoredKey};

/// Gives an image a new key, which its header names from now on. The old one opens it as well until [`confirm`].
/// `terms` says where the key is asked for; policy and tags stay those of the old key.
///
/// Run again after a crash it goes on with the key that it had made.
///
/// # Errors
/// [`SealError::Unconfirmed`] while an earlier rotation is not confirmed, and those of reading the image.
pub fn rotate(path: &Path, keys: &dyn KeySource, terms: &Terms<'_>) -> Result<KeyInfo, SealError> {
    let image = Sealed::read(path)?;
    let old = current_key(&image, keys)?;
    if let Some(before) = old.info.replaces
        && is_kept(keys, before)?
    {
        return Err(SealError::Unconfirmed {
            path: path.to_owned(),
            old: before,
        });
    }
    image.slot_of(old.passphrase.expose())?;
    let new = new_key(&image, &old, keys, terms)?;
    let slot = match image.slot_of(new.passphrase.expose()) {
        Ok(slot) => slot,
        Err(SealError::WrongSecret(_)) => image.fill_slot(old.passphrase.expose(), new.passphrase.expose())?,
        Err(error) => return Err(error),
    };
    let token = LuksToken::new(
        slot,
        terms.verifiers.to_vec(),
        terms.verifier_spki_sha256,
        new.info.key_id.to_string(),
        new.info.policy.clone(),
    )
    .map_err(SealError::Token)?;
    set_token(&image, &token, new.passphrase.expose())?;
    image.sync()?;
    Ok(new.info)
}

/// Ends a rotation: the old key's slot is wiped, and the old key forgotten. Copies of the image from before the rotation can't be opened any more but with
/// their recovery key.
///
/// # Errors
/// [`SealError::NothingToConfirm`] when the image's key replaced none, [`SealError::WrongSecret`] when the new key doesn't open the image; nothing is
/// wiped then.
pub fn confirm(path: &Path, keys: &dyn KeySource) -> Result<Uuid, SealError> {
    let image = Sealed::read(path)?;
    let new = current_key(&image, keys)?;
    let nothing = || SealError::NothingToConfirm(path.to_owned());
    let old_id = new.info.replaces.ok_or_else(nothing)?;
    let kept = image.slot_of(new.passphrase.expose())?;
    let old = match keys.get(old_id) {
        Ok(old) => old,
        Err(KeyStoreError::NotFound { .. }) => return Err(nothing()),
        Err(error) => return Err(SealError::Key(error)),
    };
    match image.slot_of(old.passphrase.expose()) {
        Ok(slot) if slot != kept => image.wipe_slot(slot, new.passphrase.expose())?,
        // An earlier run came as far as this.
        Ok(_) | Err(SealError::WrongSecret(_)) => image.sync()?,
        Err(error) => return Err(error),
    }
    keys.remove(old_id).map_err(SealError::Key)?;
    Ok(old_id)
}

/// The key that the image names.
fn current_key(image: &Sealed, keys: &dyn KeySource) -> Result<StoredKey, SealError> {
    let key = keys.get(image.key_id()?).map_err(SealError::Key)?;
    if key.info.disk_uuid != image.uuid {
        return Err(SealError::OtherHeader {
            path: image.path.clone(),
            key_id: key.info.key_id,
        });
    }
    Ok(key)
}

fn is_kept(keys: &dyn KeySource, key: Uuid) -> Result<bool, SealError> {
    match keys.describe(key) {
        Ok(_) => Ok(true),
        Err(KeyStoreError::NotFound { .. }) => Ok(false),
        Err(error) => Err(SealError::Key(error)),
    }
}

/// The key that an interrupted rotation made, or a new one, kept before the image knows of it.
fn new_key(image: &Sealed, old: &StoredKey, keys: &dyn KeySource, terms: &Terms<'_>) -> Result<StoredKey, SealError> {
    let made = keys.list().map_err(SealError::Key)?.keys;
    let made = made
        .iter()
        .find(|key| key.replaces == Some(old.info.key_id) && key.disk_uuid == image.uuid);
    if let Some(made) = made {
        if made.terms != old.info.terms {
            keys.set_terms(made.key_id, &old.info.terms).map_err(SealError::Key)?;
        }
        return keys.get(made.key_id).map_err(SealError::Key);
    }
    let info = KeyInfo {
        policy: old.info.policy.clone(),
        tags: old.info.tags.clone(),
        // A new key is no looser than the old one.
        terms: old.info.terms.clone(),
        header: Some(image.fingerprint),
        replaces: Some(old.info.key_id),
        ..key_info(new_uuid()?, image.uuid, &image.path, old.info.size, terms)
    };
    let passphrase = Passphrase::generate().map_err(SealError::Key)?;
    keys.put(&info, &passphrase).map_err(SealError::Key)?;
    Ok(StoredKey { info, passphrase })
}

/// Puts the token where the old one was. The secret opens the image.
fn set_token(image: &Sealed, token: &LuksToken, secret: &[u8]) -> Result<(), SealError> {
    if image.format != Format::Luks2 {
        return sidecar::replace(&image.path, token);
    }
    let (mut device, _, _) = image.open(secret)?;
    let failed = |operation| luks_failed(&image.path, operation);
    let json = device.status_handle().dump_json().map_err(failed("read the tokens"))?;
    let tokens = json.get("tokens").and_then(serde_json::Value::as_object);
    let place = tokens.into_iter().flatten().find_map(|(place, held)| {
        let ours = held.get("type").and_then(serde_json::Value::as_str) == Some(assay_evidence::token::TYPE);
        place.parse::<u32>().ok().filter(|_| ours)
    });
    let new = token_json(token)?;
    let input = place.map_or(TokenInput::AddToken(&new), |place| {
        TokenInput::ReplaceToken(place, &new)
    });
    let set: Result<u32, LibcryptErr> = device.token_handle().json_set(input);
    set.map(drop).map_err(failed("write the token"))
}

//! `image inspect` and `image properties`.

use std::path::Path;

use serde_json::{Value, json};

use super::ImageError;
use crate::cli::{CliError, print, print_json};
use crate::config::StateDir;
use crate::keystore::{FileKeyStore, KeyInfo, KeySource as _, KeyStoreError};
use crate::seal::{Format, Sealed};

/// What the key store says about an image.
enum Known {
    /// There is no key store here.
    NoStore,
    /// It has no such key, or the image names none.
    No,
    /// It has the key, and the header is the one that it is for.
    Yes(KeyInfo),
    /// It has the key, for another header.
    OtherHeader(KeyInfo),
}

pub(super) fn run(state: &StateDir, path: &Path, json: bool) -> Result<(), CliError> {
    let image = Sealed::read(path).map_err(ImageError::Seal)?;
    let known = look_up(state, &image)?;
    if json {
        print_json(&as_json(&image, &known))
    } else {
        print(&as_text(&image, &known))
    }
}

fn look_up(state: &StateDir, image: &Sealed) -> Result<Known, CliError> {
    let keys = match FileKeyStore::open(state.path()) {
        Ok(keys) => keys,
        Err(KeyStoreError::MasterMissing { .. }) => return Ok(Known::NoStore),
        Err(error) => return Err(error.into()),
    };
    let Ok(key_id) = image.key_id() else {
        return Ok(Known::No);
    };
    match keys.describe(key_id) {
        Ok(info) if image.check_key(&info).is_ok() => Ok(Known::Yes(info)),
        Ok(info) => Ok(Known::OtherHeader(info)),
        Err(KeyStoreError::NotFound { .. }) => Ok(Known::No),
        Err(error) => Err(error.into()),
    }
}

const fn format_name(format: Format) -> &'static str {
    match format {
        Format::Luks2 => "luks2",
        Format::Luks1 => "luks1",
        Format::Qcow2Luks => "qcow2-luks",
    }
}

fn as_json(image: &Sealed, known: &Known) -> Value {
    let (word, key) = match known {
        Known::NoStore => ("no-store", None),
        Known::No => ("unknown", None),
        Known::Yes(key) => ("known", Some(key)),
        Known::OtherHeader(key) => ("other-header", Some(key)),
    };
    let key = key.map(|key| {
        json!({
            "policy": key.policy,
            "tags": key.tags,
            "image": key.image,
            "header_sha256": key.header,
            "replaces": key.replaces,
        })
    });
    json!({
        "image": image.path,
        "format": format_name(image.format),
        "disk_uuid": image.uuid,
        "disk_bytes": image.disk_size,
        "cipher": image.cipher,
        "sector_size": image.sector_size,
        "data_offset": image.data_offset,
        "key_slots": image.slots,
        "header_sha256": image.fingerprint,
        "token": image.token.as_ref().ok(),
        "token_problem": image.token.as_ref().err().map(ToString::to_string),
        "key_store": word,
        "key": key,
    })
}

fn as_text(image: &Sealed, known: &Known) -> String {
    let slots: Vec<String> = image.slots.iter().map(ToString::to_string).collect();
    let mut text = format!(
        "{path}\nformat {format}\ndisk {uuid}\nsize {size} bytes\ncipher {cipher}, sectors of {sector} bytes\nslots {slots}\nheader sha256:{fingerprint}\n",
        path = image.path.display(),
        format = format_name(image.format),
        uuid = image.uuid,
        size = image.disk_size,
        cipher = image.cipher.escape_debug(),
        sector = image.sector_size,
        slots = slots.join(", "),
        fingerprint = image.fingerprint,
    );
    match &image.token {
        Ok(token) => text.push_str(&format!(
            "key {key}\nverifiers {verifiers}\npolicy {policy}\n",
            key = token.key_id(),
            verifiers = token.verifiers().join(", "),
            policy = token.policy(),
        )),
        Err(error) => text.push_str(&format!("key unknown: {error}\n")),
    }
    text.push_str(&match known {
        Known::NoStore => "key store: there is none here\n".to_owned(),
        Known::No => "key store: does not have this key\n".to_owned(),
        Known::Yes(key) => format!("key store: has this key, for hosts that meet policy {}\n", key.policy),
        Known::OtherHeader(_) => {
            "key store: has this key, but for another header: it was replaced or changed, and no host gets the key\n"
                .to_owned()
        }
    });
    text
}

/// What an image store is told of an image: names as of Glance's "Standardize Image Encryption"; the last three are ours.
pub(super) fn property_list(image: &Sealed) -> Result<Vec<(&'static str, String)>, ImageError> {
    let key_id = image.key_id()?;
    let luks = match image.format {
        Format::Luks2 => "LUKSv2",
        Format::Luks1 | Format::Qcow2Luks => "LUKSv1",
    };
    let mut properties = vec![
        ("os_encrypt_format", luks.to_owned()),
        ("os_encrypt_key_id", key_id.to_string()),
        // The key is the verifier's, and an image store deletes none of its keys.
        ("os_encrypt_key_deletion_policy", "do_not_delete".to_owned()),
        ("os_decrypt_container_format", "bare".to_owned()),
        ("os_decrypt_size", image.disk_size.to_string()),
    ];
    if let Ok(token) = &image.token {
        properties.push(("assay_verifiers", token.verifiers().join(",")));
        properties.push(("assay_verifier_spki_sha256", token.verifier_spki().to_string()));
        properties.push(("assay_policy", token.policy().to_owned()));
    }
    Ok(properties)
}

pub(super) fn properties(path: &Path, json: bool) -> Result<(), CliError> {
    let image = Sealed::read(path).map_err(ImageError::Seal)?;
    let properties = property_list(&image)?;
    if json {
        let members = properties
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.into()));
        return print_json(&Value::Object(members.collect()));
    }
    let lines: Vec<String> = properties
        .iter()
        .map(|(name, value)| format!("{name}={value}\n"))
        .collect();
    print(&lines.concat())
}

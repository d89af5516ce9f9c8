//! The fingerprint of a LUKS header: what an image's key is bound to beside the image's UUID.
//!
//! A LUKS header is checksummed, not signed: whoever has the storage can write another one. The verifier keeps the fingerprint
//! of the header that it sealed, hosts say the fingerprint of the header that they see, and a key is not released
//! for another.
//!
//! It covers what decides how the data is read: the UUID, the data segments (place, cipher, sector size, start of the tweak), the digests
//! (which name the volume key without giving it away), and the flags and requirements that change either. It leaves out what the owner
//! may change without touching the data: key slots, tokens, label, size of the header's areas. A key slot needs no cover: what comes out of it
//! is held against the digest.

use serde_json::Value;

use crate::digest::Sha256Digest;
use crate::uuid::Uuid;

/// Length in bytes of a LUKS1 header up to its key slots ("LUKS1 On-Disk Format Specification", table 2.1): magic, version, cipher, payload
/// offset, key length, the volume key's digest with its salt and iterations, UUID.
pub const LUKS1_FIXED_LEN: usize = 208;

/// Most levels of objects and arrays inside the metadata; LUKS2 itself has five.
const MAX_DEPTH: usize = 16;

/// Why a header has no fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FingerprintError {
    /// A part of LUKS2 metadata isn't there, or of another type.
    #[error("the LUKS2 metadata has no {0}: the header is damaged")]
    Missing(&'static str),
    /// LUKS2 metadata that is nested as none is.
    #[error("the LUKS2 metadata is nested more than {MAX_DEPTH} levels deep: the header is damaged")]
    Depth,
    /// The beginning of a LUKS1 header is cut off.
    #[error("the LUKS1 header has {0} bytes instead of {LUKS1_FIXED_LEN}: it is cut off")]
    Short(usize),
}

/// The fingerprint of a LUKS2 header: its UUID, and its metadata as libcryptsetup gives it (LUKS2 On-Disk Format, section 3).
///
/// # Errors
/// [`FingerprintError::Missing`], [`FingerprintError::Depth`].
pub fn luks2(uuid: Uuid, metadata: &Value) -> Result<Sha256Digest, FingerprintError> {
    let object = |name: &'static str| {
        let member = metadata.get(name).and_then(Value::as_object);
        member.ok_or(FingerprintError::Missing(name))
    };
    let mut text = b"assay/luks2-header/1\0".to_vec();
    text.extend_from_slice(uuid.as_bytes());
    canonical(&Value::Object(object("segments")?.clone()), &mut text, MAX_DEPTH)?;
    let mut digests = object("digests")?.clone();
    for digest in digests.values_mut().filter_map(Value::as_object_mut) {
        // Which slots hold the key changes with every slot that the owner adds.
        digest.remove("keyslots");
    }
    canonical(&Value::Object(digests), &mut text, MAX_DEPTH)?;
    let config = object("config")?;
    for name in ["flags", "requirements"] {
        canonical(config.get(name).unwrap_or(&Value::Null), &mut text, MAX_DEPTH)?;
    }
    Ok(Sha256Digest::of(&text))
}

/// The fingerprint of a LUKS1 header, from its first [`LUKS1_FIXED_LEN`] bytes; what follows are its key slots.
///
/// # Errors
/// [`FingerprintError::Short`].
pub fn luks1(header: &[u8]) -> Result<Sha256Digest, FingerprintError> {
    let fixed = header
        .get(..LUKS1_FIXED_LEN)
        .ok_or(FingerprintError::Short(header.len()))?;
    Ok(Sha256Digest::of_parts(&[b"assay/luks1-header/1\0", fixed]))
}

/// JSON with sorted members and no white space, so that one content has one text, whoever wrote it and however the map is kept.
fn canonical(value: &Value, text: &mut Vec<u8>, depth: usize) -> Result<(), FingerprintError> {
    let below = || depth.checked_sub(1).ok_or(FingerprintError::Depth);
    match value {
        Value::Object(members) => {
            let mut names: Vec<_> = members.iter().collect();
            names.sort_by_key(|(name, _)| *name);
            text.push(b'{');
            for (name, member) in names {
                text.extend_from_slice(Value::String(name.clone()).to_string().as_bytes());
                text.push(b':');
                canonical(member, text, below()?)?;
                text.push(b',');
            }
            text.push(b'}');
        }
        Value::Array(items) => {
            text.push(b'[');
            for item in items {
                canonical(item, text, below()?)?;
                text.push(b',');
            }
            text.push(b']');
        }
        plain => text.extend_from_slice(plain.to_string().as_bytes()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const UUID: Uuid = Uuid::new([7; 16]);

    fn metadata() -> Value {
        json!({
            "keyslots": {"0": {"type": "luks2", "key_size": 64}},
            "tokens": {"0": {"type": "assay"}},
            "segments": {"0": {"type": "crypt", "offset": "4194304", "size": "dynamic", "iv_tweak": "0",
                "encryption": "aes-xts-plain64", "sector_size": 512}},
            "digests": {"0": {"type": "pbkdf2", "keyslots": ["0"], "segments": ["0"], "hash": "sha256",
                "iterations": 1000, "salt": "c2FsdA==", "digest": "ZGlnZXN0"}},
            "config": {"json_size": "12288", "keyslots_size": "4161536"}
        })
    }

    fn of(edit: impl FnOnce(&mut Value)) -> Sha256Digest {
        let mut changed = metadata();
        edit(&mut changed);
        luks2(UUID, &changed).unwrap()
    }

    #[test]
    fn what_the_owner_may_change_changes_nothing() {
        let before = of(|_| ());
        for (what, after) in [
            ("a second slot", of(|m| m["keyslots"]["1"] = json!({"type": "luks2"}))),
            (
                "its entry in the digest",
                of(|m| m["digests"]["0"]["keyslots"] = json!(["0", "1"])),
            ),
            ("another token", of(|m| m["tokens"] = json!({}))),
            ("larger areas", of(|m| m["config"]["keyslots_size"] = json!("16744448"))),
        ] {
            assert_eq!(after, before, "{what}");
        }
    }

    #[test]
    fn what_decides_how_the_data_is_read_changes_it() {
        let before = of(|_| ());
        let segment = |member: &str, value: Value| {
            let name = member.to_owned();
            of(move |m| m["segments"]["0"][name.as_str()] = value)
        };
        for (what, after) in [
            ("offset", segment("offset", json!("8388608"))),
            ("cipher", segment("encryption", json!("cipher_null-ecb"))),
            ("tweak", segment("iv_tweak", json!("1"))),
            ("sectors", segment("sector_size", json!(4096))),
            ("size", segment("size", json!("512"))),
            (
                "a second segment",
                of(|m| m["segments"]["1"] = json!({"type": "linear"})),
            ),
            ("volume key", of(|m| m["digests"]["0"]["digest"] = json!("b3RoZXI="))),
            ("its salt", of(|m| m["digests"]["0"]["salt"] = json!("b3RoZXI="))),
            (
                "where it is used",
                of(|m| m["digests"]["0"]["segments"] = json!(["0", "1"])),
            ),
            ("flags", of(|m| m["config"]["flags"] = json!(["allow-discards"]))),
            (
                "requirements",
                of(|m| m["config"]["requirements"] = json!({"mandatory": ["online-reencrypt"]})),
            ),
            ("UUID", luks2(Uuid::new([8; 16]), &metadata()).unwrap()),
        ] {
            assert_ne!(after, before, "{what}");
        }
    }

    /// Hosts and verifiers of different builds must agree.
    #[test]
    fn a_known_answer() {
        assert_eq!(
            of(|_| ()).to_string(),
            "42b38d2aeabe31a409127b7436f580da1d3dc269397f043b30afb6b620201ee1"
        );
        assert_eq!(
            luks1(&[1; 592]).unwrap().to_string(),
            "3c31b6e3d9f6db4502a2f2a31fc7085107f0b2677a645370ab8222cd4cc4e2eb"
        );
    }

    #[test]
    fn a_header_without_its_parts_has_none() {
        for part in ["segments", "digests", "config"] {
            let mut cut = metadata();
            cut.as_object_mut().unwrap().remove(part);
            assert_eq!(luks2(UUID, &cut), Err(FingerprintError::Missing(part)));
        }
        let mut deep = json!(0);
        for _ in 0..40 {
            deep = json!([deep]);
        }
        let mut nested = metadata();
        nested["segments"]["0"]["x"] = deep;
        assert_eq!(luks2(UUID, &nested), Err(FingerprintError::Depth));
        assert_eq!(luks1(&[0; 207]), Err(FingerprintError::Short(207)));
    }

    #[test]
    fn key_slots_of_luks1_are_left_out() {
        let mut header = [3_u8; 592];
        let before = luks1(&header).unwrap();
        header[LUKS1_FIXED_LEN] = 4;
        assert_eq!(luks1(&header).unwrap(), before);
        header[LUKS1_FIXED_LEN - 1] = 4;
        assert_ne!(luks1(&header).unwrap(), before);
    }
}

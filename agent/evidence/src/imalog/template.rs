//! Templates: which fields an entry has, and how they are hashed (security/integrity/ima/ima_template.c, ima_crypto.c).

use super::FileDigest;
use crate::digest::Algorithm;

/// A field of a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Field {
    /// `d`: 20 bytes, SHA-1 or MD5, without a length.
    OldDigest,
    /// `n`: a name of at most 255 bytes, hashed as 256.
    OldName,
    /// `d-ng`: algorithm, colon, NUL, digest.
    Digest,
    /// `d-ngv2`: type, colon, and as `d-ng`.
    DigestV2,
    /// `n-ng`: the path and its NUL.
    Name,
    /// `sig`: `security.ima`.
    Signature,
    /// `buf`: the measured bytes.
    Buffer,
    /// `d-modsig`, `modsig`, `evmsig`, `iuid`, …: hashed, and not looked at.
    Other,
}

/// What the name of the template `ima` is hashed as: `IMA_EVENT_NAME_LEN_MAX` + 1 bytes.
const OLD_NAME: usize = 256;

/// The fields of a template by its name, or by the list of them that stands in for one (`ima_template_fmt=`).
pub(super) fn fields(name: &str) -> Option<Vec<Field>> {
    let list = match name {
        "ima" => "d|n",
        "ima-ng" => "d-ng|n-ng",
        "ima-ngv2" => "d-ngv2|n-ng",
        "ima-sig" => "d-ng|n-ng|sig",
        "ima-sigv2" => "d-ngv2|n-ng|sig",
        "ima-buf" => "d-ng|n-ng|buf",
        "ima-modsig" => "d-ng|n-ng|sig|d-modsig|modsig",
        "evm-sig" => "d-ng|n-ng|evmsig|xattrnames|xattrlengths|xattrvalues|iuid|igid|imode",
        // Only the template of that very name has these two without lengths.
        list if list.split('|').any(|id| id == "d" || id == "n") => return None,
        list => list,
    };
    list.split('|').map(field).collect()
}

fn field(id: &str) -> Option<Field> {
    Some(match id {
        "d" => Field::OldDigest,
        "n" => Field::OldName,
        "d-ng" => Field::Digest,
        "d-ngv2" => Field::DigestV2,
        "n-ng" => Field::Name,
        "sig" => Field::Signature,
        "buf" => Field::Buffer,
        "d-modsig" | "modsig" | "evmsig" | "xattrnames" | "xattrlengths" | "xattrvalues" | "iuid" | "igid"
        | "imode" => Field::Other,
        _ => return None,
    })
}

/// The template digest (`ima_calc_field_array_hash_tfm`): every field behind its length, but for the template `ima`.
pub(super) fn digest(bank: Algorithm, template: &str, fields: &[(Field, &[u8])]) -> Vec<u8> {
    let mut hashed = Vec::new();
    for (field, data) in fields {
        if template != "ima" {
            // A field's length was read from four bytes.
            let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
            hashed.extend_from_slice(&length.to_le_bytes());
        }
        hashed.extend_from_slice(data);
        if *field == Field::OldName {
            hashed.resize(hashed.len().saturating_add(OLD_NAME.saturating_sub(data.len())), 0);
        }
    }
    bank.hash(&hashed)
}

/// The file's digest among the fields.
pub(super) fn file_digest<'a>(fields: &[(Field, &'a [u8])]) -> Option<FileDigest<'a>> {
    let of = |wanted| fields.iter().find(|(field, _)| *field == wanted).map(|(_, data)| *data);
    if let Some(digest) = of(Field::OldDigest) {
        return Some(FileDigest {
            algorithm: "sha1",
            digest,
            verity: false,
        });
    }
    let (data, verity) = match (of(Field::Digest), of(Field::DigestV2)) {
        (Some(data), _) => (data, false),
        (_, Some(data)) => match data.strip_prefix(b"verity:") {
            Some(rest) => (rest, true),
            None => (data.strip_prefix(b"ima:")?, false),
        },
        _ => return None,
    };
    let end = data.windows(2).position(|two| two == b":\0")?;
    let algorithm = std::str::from_utf8(data.get(..end)?).ok()?;
    let known = !algorithm.is_empty()
        && algorithm
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    known.then_some(FileDigest {
        algorithm,
        digest: data.get(end.checked_add(2)?..)?,
        verity,
    })
}

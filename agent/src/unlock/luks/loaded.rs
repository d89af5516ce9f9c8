//! A header in libcryptsetup's hands, together with what it says: what was checked is what is used.

use std::fs::File;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use assay_evidence::luks;
use assay_evidence::token::{LuksToken, TokenError};
use assay_evidence::uuid::Uuid;
use libcryptsetup_rs::consts::vals::EncryptionFormat;
use libcryptsetup_rs::{CryptDevice, CryptInit, Either, LibcryptErr};
use serde_json::Value;

use super::luks1::HeaderCopy;
use super::{
    CIPHER, Container, DiskError, Header, MAX_ITERATIONS, MAX_KDF_KIB, MAX_KDF_WORK_KIB, MAX_KEY, open_by_name,
};

/// A header, and the device that libcryptsetup opens with it.
pub(super) struct Loaded {
    pub(super) header: Header,
    pub(super) device: CryptDevice,
    /// Of LUKS1; libcryptsetup reads key slots in it.
    _copy: Option<HeaderCopy>,
}

impl Loaded {
    /// That of an image.
    ///
    /// # Errors
    /// Those of [`Header::read`].
    pub(super) fn of(image: &Path) -> Result<Self, DiskError> {
        match HeaderCopy::take(&mut open_image(image)?, image)? {
            Some(copy) => {
                let failed = |source| header_failed(image, source);
                let apart = copy.path();
                let paths = Either::Right((apart.as_path(), image));
                let mut device = CryptInit::init_with_data_device(paths).map_err(failed)?;
                let load = device.context_handle().load::<()>(Some(EncryptionFormat::Luks1), None);
                load.map_err(failed)?;
                Self::luks1(device, copy, image)
            }
            None => Self::luks2(load_luks2(image)?, image),
        }
    }

    /// That of an image which is open under this name.
    ///
    /// # Errors
    /// Those of [`Header::read`], [`DiskError::NotOpen`].
    pub(super) fn of_mapping(name: &str, image: &Path) -> Result<Self, DiskError> {
        match HeaderCopy::take(&mut open_image(image)?, image)? {
            Some(copy) => Self::luks1(open_by_name(name, Some(&copy.path()))?, copy, image),
            None => Self::luks2(open_by_name(name, None)?, image),
        }
    }

    fn luks1(device: CryptDevice, copy: HeaderCopy, image: &Path) -> Result<Self, DiskError> {
        Ok(Self {
            header: copy.header(image)?,
            device,
            _copy: Some(copy),
        })
    }

    fn luks2(mut device: CryptDevice, image: &Path) -> Result<Self, DiskError> {
        Ok(Self {
            header: luks2_header(&mut device, image)?,
            device,
            _copy: None,
        })
    }
}

fn header_failed(image: &Path, source: LibcryptErr) -> DiskError {
    DiskError::Header {
        image: image.to_owned(),
        source,
    }
}

fn luks2_header(device: &mut CryptDevice, image: &Path) -> Result<Header, DiskError> {
    let failed = |source| header_failed(image, source);
    let uuid = *device.status_handle().get_uuid().map_err(failed)?.as_bytes();
    let metadata = device.status_handle().dump_json().map_err(failed)?;
    check_ciphers(&metadata, image)?;
    check_costs(&metadata, image)?;
    let token = find_token(&metadata).map_err(|source| DiskError::Token {
        image: image.to_owned(),
        source,
    })?;
    let fingerprint = luks::luks2(Uuid::new(uuid), &metadata).map_err(|source| DiskError::Fingerprint {
        image: image.to_owned(),
        source,
    })?;
    Ok(Header {
        image: image.to_owned(),
        container: Container::None,
        uuid,
        token,
        fingerprint,
    })
}

/// An image's file, or block device.
///
/// # Errors
/// [`DiskError::Open`].
pub(super) fn open_image(image: &Path) -> Result<File, DiskError> {
    // libcryptsetup answers "not a block device" to a file that is missing; ask the system first.
    let open = |source| DiskError::Open {
        image: image.to_owned(),
        source,
    };
    let kind = std::fs::metadata(image).map_err(open)?.file_type();
    if kind.is_dir() {
        return Err(open(std::io::ErrorKind::IsADirectory.into()));
    }
    // Opening a pipe would wait for its other end, and with it every other disk.
    if !kind.is_file() && !kind.is_block_device() {
        return Err(open(std::io::Error::other("it is neither a file nor a block device")));
    }
    File::open(image).map_err(open)
}

/// libcryptsetup's hold of a LUKS2 header.
pub(super) fn load_luks2(image: &Path) -> Result<CryptDevice, DiskError> {
    let not_luks = |source| DiskError::NotLuks {
        image: image.to_owned(),
        source,
    };
    let mut device = CryptInit::init(image).map_err(not_luks)?;
    device
        .context_handle()
        .load::<()>(Some(EncryptionFormat::Luks2), None)
        .map_err(not_luks)?;
    Ok(device)
}

/// Data and key slots, all of them: the slot that opens is whichever accepts the passphrase.
pub(super) fn check_ciphers(metadata: &Value, image: &Path) -> Result<(), DiskError> {
    let segments = entries(metadata, "segments").map(|(id, segment)| (format!("data segment {id}"), segment));
    for (part, value) in segments.chain(of_slots(metadata, "area")) {
        let cipher = value.get("encryption").and_then(Value::as_str).unwrap_or("nothing");
        if cipher != CIPHER {
            let cipher = cipher.chars().take(80).collect();
            return Err(DiskError::Cipher {
                image: image.to_owned(),
                part,
                cipher,
            });
        }
    }
    Ok(())
}

/// What opening may cost: the keys' lengths, and the derivations of all key slots and digests, since a passphrase may be tried on each,
/// on the one thread that opens disks.
pub(super) fn check_costs(metadata: &Value, image: &Path) -> Result<(), DiskError> {
    check_key_lengths(metadata, image)?;
    let digests = entries(metadata, "digests").map(|(id, digest)| (format!("digest {id}"), digest));
    for (part, kdf) in of_slots(metadata, "kdf").chain(digests) {
        let number = |member: &str| kdf.get(member).and_then(Value::as_u64).unwrap_or(0);
        let (iterations, passes, memory) = (number("iterations"), number("time"), number("memory"));
        if iterations > MAX_ITERATIONS || memory > MAX_KDF_KIB || passes.saturating_mul(memory) > MAX_KDF_WORK_KIB {
            return Err(DiskError::Cost {
                image: image.to_owned(),
                part,
                wanted: format!("{iterations} iterations, {passes} passes over {memory} KiB"),
            });
        }
    }
    Ok(())
}

/// The lengths of the keys in all key slots: libcryptsetup hands out what the slot that opened has, and asks a buffer only for the first
/// slot's length.
fn check_key_lengths(metadata: &Value, image: &Path) -> Result<(), DiskError> {
    for (slot, len) in of_slots(metadata, "key_size") {
        let len = len.as_u64();
        let known = len.and_then(|len| usize::try_from(len).ok());
        if known.is_none_or(|len| len > MAX_KEY) {
            let wanted = len.map_or_else(|| "an unknown length".to_owned(), |len| format!("{len} bytes"));
            return Err(DiskError::Cost {
                image: image.to_owned(),
                part: format!("key in {slot}"),
                wanted,
            });
        }
    }
    Ok(())
}

pub(super) fn find_token(metadata: &Value) -> Result<LuksToken, TokenError> {
    let tokens: Vec<Value> = entries(metadata, "tokens").map(|(_, token)| token.clone()).collect();
    LuksToken::find(&tokens)
}

/// One member of each key slot, with the slot's name for people.
fn of_slots<'a>(metadata: &'a Value, member: &str) -> impl Iterator<Item = (String, &'a Value)> {
    entries(metadata, "keyslots")
        .map(move |(id, slot)| (format!("key slot {id}"), slot.get(member).unwrap_or(&Value::Null)))
}

/// What the header has of one kind, each with its id.
fn entries<'a>(metadata: &'a Value, kind: &str) -> impl Iterator<Item = (&'a String, &'a Value)> {
    metadata.get(kind).and_then(Value::as_object).into_iter().flatten()
}

//! Sealing: a disk image in, a LUKS image out whose key is in the key store and nowhere else; and what else an owner does with sealed images.
//!
//! No root, no device-mapper, no loop device: libcryptsetup makes the header in memory, and
//! the data segment is encrypted here, in the same aes-xts-plain64 that dm-crypt reads. The result is what
//! `cryptsetup luksFormat` and a copy through `/dev/mapper` would have made; the tests hold it
//! against cryptsetup and qemu themselves.
//!
//! Order of things: write and sync `OUT.partial`, keep the key, give the file its name. A crash leaves at worst a
//! partial file, which the next run removes, or a key without an image; never an image without a key.

mod error;
mod header;
mod in_place;
mod input;
mod luks1;
mod nbd;
mod output;
mod qcow2;
mod qemu;
mod recovery;
mod rotate;
mod sealed;
mod segment;
mod sidecar;
mod slots;

use std::path::Path;

use assay_evidence::{digest::Sha256Digest, token::LuksToken, uuid::Uuid};

use crate::keystore::{KeyInfo, KeyKind, KeySource, Passphrase};

pub use assay_evidence::token::sidecar_path;
pub use error::SealError;
pub use header::{HEADER_LEN, SECTOR_LEN};
pub use in_place::{InPlace, InPlaceRequest};
pub use input::InputFormat;
pub use recovery::RecoveryKey;
pub use rotate::{confirm, rotate};
pub use sealed::Sealed;

use header::{Version, VolumeKey};
use input::Source;
use output::Partial;
use qemu::Share;

/// What a sealed image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// LUKS2, which hosts open with dm-crypt; all about the key is in its header.
    Luks2,
    /// LUKS1, which qemu reads, too; what a LUKS2 header would say about the key is in a file beside it.
    Luks1,
    /// qcow2 whose clusters are encrypted as in LUKS1; for qemu alone, with a file beside it as well.
    Qcow2Luks,
}

/// Length in bytes of the disk in an image that could be sealed.
///
/// # Errors
/// [`SealError`]: when the image cannot be read, or is none of whole sectors.
pub fn disk_size(input: &Path, format: Option<InputFormat>) -> Result<u64, SealError> {
    Ok(Source::open(input, format)?.len())
}

/// Who gets an image's key, and how it is asked for.
pub struct Terms<'a> {
    /// Name of the policy that hosts must meet to get the key.
    pub policy: &'a str,
    /// What hosts must be tagged as to get the key.
    pub tags: &'a [String],
    /// URLs at which hosts ask for the key.
    pub verifiers: &'a [String],
    /// SHA-256 over the subject public key info of the verifier's CA certificate.
    pub verifier_spki_sha256: Sha256Digest,
    /// The owner's own way in, in a second key slot; it is not kept.
    pub recovery: Option<&'a RecoveryKey>,
    /// Now, in seconds since 1970 UTC.
    pub now: i64,
}

/// What to seal, and what the image shall say about itself.
pub struct Request<'a> {
    /// The disk image: a regular file or a block device.
    pub input: &'a Path,
    /// What the operator says that it is; without it, a raw disk that doesn't look like anything else.
    pub input_format: Option<InputFormat>,
    /// The sealed image; must not exist.
    pub output: &'a Path,
    /// What the sealed image shall be.
    pub format: Format,
    /// Who gets its key.
    pub terms: Terms<'a>,
}

/// Seals an image and keeps its key in `keys`. `progress` hears the bytes done and the bytes in all, once a block.
///
/// # Errors
/// One [`SealError`] variant per refusal. After any of them neither the output nor a key for it exists.
pub fn seal(
    request: &Request<'_>,
    keys: &dyn KeySource,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<KeyInfo, SealError> {
    let mut source = Source::open(request.input, request.input_format)?;
    let passphrase = Passphrase::generate().map_err(SealError::Key)?;
    let key_id = new_uuid()?;
    let token = header::token(&request.terms, key_id)?;

    let (partial, written) = write(request, &mut source, &passphrase, &token, progress)?;
    let info = KeyInfo {
        header: Some(written.fingerprint),
        ..key_info(key_id, written.uuid, request.output, source.len(), &request.terms)
    };
    let beside = (request.format != Format::Luks2)
        .then(|| sidecar::create(request.output, &token))
        .transpose()?;
    keys.put(&info, &passphrase).map_err(SealError::Key)?;
    partial.publish().inspect_err(|_| {
        // The partial file is gone with this error; its key opens nothing. A second failure here leaves a key too
        // many, which harms nobody and shows in `key list`.
        drop(keys.remove(key_id));
    })?;
    if let Some(beside) = beside {
        beside.keep();
    }
    Ok(info)
}

/// The header of an image that was written.
struct Written {
    uuid: Uuid,
    fingerprint: Sha256Digest,
}

/// Writes the image under its partial name, whole and durable.
fn write(
    request: &Request<'_>,
    source: &mut Source,
    passphrase: &Passphrase,
    token: &LuksToken,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(Partial, Written), SealError> {
    let version = match request.format {
        Format::Luks2 => Version::Luks2,
        Format::Luks1 => Version::Luks1,
        Format::Qcow2Luks => {
            // qemu-img extends it as it goes, and leaves out what is zero.
            let partial = Partial::create(request.output, 0, 0o666)?;
            let mut hear = |share: Share| progress(share.of(source.len()), source.len());
            let inside = qcow2::convert(request, &partial, passphrase, &mut hear)?;
            source.check_unchanged()?;
            partial.sync()?;
            let written = Written {
                uuid: inside.luks.uuid,
                fingerprint: inside.luks.fingerprint,
            };
            return Ok((partial, written));
        }
    };
    let partial = Partial::create(request.output, HEADER_LEN.saturating_add(source.len()), 0o666)?;
    let volume_key = VolumeKey::generate()?;
    let header = header::make(version, partial.path(), &volume_key, passphrase, &request.terms, token)?;
    segment::encrypt(source, &partial, &volume_key, progress)?;
    partial.write_at(&header.bytes, 0)?;
    partial.sync()?;
    let written = Written {
        uuid: header.uuid,
        fingerprint: header.fingerprint,
    };
    Ok((partial, written))
}

/// What the key store is told about a new key.
fn key_info(key_id: Uuid, disk_uuid: Uuid, image: &Path, size: u64, terms: &Terms<'_>) -> KeyInfo {
    KeyInfo {
        key_id,
        kind: KeyKind::Luks,
        disk_uuid,
        terms: assay_evidence::terms::Terms::default(),
        policy: terms.policy.to_owned(),
        tags: terms.tags.iter().cloned().collect(),
        image: image
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default(),
        size,
        created: terms.now,
        header: None,
        replaces: None,
    }
}

/// A random (version 4) UUID.
fn new_uuid() -> Result<Uuid, SealError> {
    let mut bytes = [0_u8; 16];
    random(&mut bytes)?;
    Ok(Uuid::from_random(bytes))
}

fn random(buffer: &mut [u8]) -> Result<(), SealError> {
    use ring::rand::SecureRandom;
    ring::rand::SystemRandom::new()
        .fill(buffer)
        .map_err(|_| SealError::Random)
}

//! Sealing: a raw disk image in, a LUKS2 image out whose key is in the key store and nowhere else.
//!
//! No root, no device-mapper, no loop device: libcryptsetup writes header, key slot and token into a plain file, and
//! the data segment is encrypted here, in the same aes-xts-plain64 that dm-crypt reads. The result is what
//! `cryptsetup luksFormat` and a copy through `/dev/mapper` would have made; the tests hold it
//! against cryptsetup itself.
//!
//! Order of things: write and sync `OUT.partial`, keep the key, give the file its name. A crash leaves at worst a
//! partial file, or a key without an image; never an image without a key.

mod error;
mod header;
mod input;
mod output;
mod segment;

use std::path::Path;

use assay_evidence::{digest::Sha256Digest, uuid::Uuid};

use crate::keystore::{KeyInfo, KeySource, Passphrase};

pub use error::SealError;
pub use header::{HEADER_LEN, SECTOR_LEN};

use header::VolumeKey;
use input::Source;
use output::Partial;

/// What to seal, and what the image shall say about itself.
pub struct Request<'a> {
    /// The raw disk image: a regular file or a block device.
    pub input: &'a Path,
    /// The sealed image; must not exist.
    pub output: &'a Path,
    /// Name of the policy that hosts must meet to get the key.
    pub policy: &'a str,
    /// What hosts must be tagged as to get the key.
    pub tags: &'a [String],
    /// URLs at which hosts ask for the key.
    pub verifiers: &'a [String],
    /// SHA-256 over the subject public key info of the verifier's CA certificate.
    pub verifier_spki_sha256: Sha256Digest,
    /// Now, in seconds since 1970 UTC.
    pub now: i64,
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
    let mut source = Source::open(request.input)?;
    let partial = Partial::create(request.output, HEADER_LEN.saturating_add(source.len()))?;
    let passphrase = Passphrase::generate().map_err(SealError::Key)?;
    let volume_key = VolumeKey::generate()?;
    let key_id = new_uuid()?;

    let token = header::token(request, key_id)?;
    let header = header::write(partial.path(), &volume_key, &passphrase, &token)?;
    segment::encrypt(&mut source, &partial, &volume_key, progress)?;
    partial.sync()?;

    let info = KeyInfo {
        key_id,
        disk_uuid: header.uuid,
        policy: request.policy.to_owned(),
        tags: request.tags.iter().cloned().collect(),
        image: request
            .output
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default(),
        size: source.len(),
        created: request.now,
    };
    keys.put(&info, &passphrase).map_err(SealError::Key)?;
    partial.publish().inspect_err(|_| {
        // The partial file is gone with this error; its key opens nothing. A second failure here leaves a key too
        // many, which harms nobody and shows in `key list`.
        drop(keys.remove(key_id));
    })?;
    Ok(info)
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

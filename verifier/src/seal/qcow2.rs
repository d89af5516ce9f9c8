//! qcow2 with LUKS inside: written by qemu-img, which alone knows the format well.

use std::{ffi::OsString, path::Path};

use super::{
    InputFormat, Request, SealError,
    luks1::{self, InQcow2},
    output::Partial,
    qemu::{self, SECRET_ID, SecretFile, Share},
};
use crate::keystore::Passphrase;

/// Milliseconds of key stretching, of which keys of 32 random bytes need none; the least that qemu takes.
const ITER_TIME: &str = "1";
const KEY: &str = "key";
const NEW: &str = "new";

/// Converts the input into the partial file, and gives back what its header says.
pub(super) fn convert(
    request: &Request<'_>,
    partial: &Partial,
    passphrase: &Passphrase,
    hear: &mut dyn FnMut(Share),
) -> Result<InQcow2, SealError> {
    let format = request.input_format.unwrap_or(InputFormat::Raw);
    let key = SecretFile::new(passphrase.expose())?;
    let options = [
        "encrypt.format=luks",
        "encrypt.key-secret=key",
        "encrypt.cipher-alg=aes-256",
        "encrypt.cipher-mode=xts",
        "encrypt.ivgen-alg=plain64",
        "encrypt.hash-alg=sha256",
    ]
    .join(",");
    qemu::run_heard(
        qemu::command("qemu-img")
            .args(["convert", "-p", "-O", "qcow2", "--object", &key.object(KEY)])
            .args(["-o", &format!("{options},encrypt.iter-time={ITER_TIME}")])
            .arg(qemu::file_name(request.input, format)?)
            .arg(plain_name(partial.path())),
        request.input,
        hear,
    )?;
    if let Some(recovery) = request.terms.recovery {
        fill_slot(partial.path(), 1, passphrase.expose(), recovery.expose().as_bytes())?;
    }
    let found = luks1::read_in_qcow2(partial.file(), partial.path())?;
    found.ok_or_else(|| SealError::NotSealed(partial.path().to_owned()))
}

/// Fills a key slot with another secret. The key material goes into the file before the slot is said to be filled.
pub(super) fn fill_slot(image: &Path, slot: u32, secret: &[u8], new: &[u8]) -> Result<(), SealError> {
    let new = SecretFile::new(new)?;
    let options =
        format!("encrypt.keyslot={slot},encrypt.state=active,encrypt.new-secret={NEW},encrypt.iter-time={ITER_TIME}");
    amend(image, secret, &options, &["--object", &new.object(NEW)])
}

/// Wipes a key slot; the secret opens another one. qemu-img refuses to wipe the last.
pub(super) fn wipe_slot(image: &Path, slot: u32, secret: &[u8]) -> Result<(), SealError> {
    amend(
        image,
        secret,
        &format!("encrypt.keyslot={slot},encrypt.state=inactive"),
        &[],
    )
}

fn amend(image: &Path, secret: &[u8], options: &str, more: &[&str]) -> Result<(), SealError> {
    // qemu-img opens for writing what the image names.
    qemu::check_alone(image, InputFormat::Qcow2)?;
    let secret = SecretFile::new(secret)?;
    qemu::run(
        qemu::command("qemu-img")
            .args(["amend", "--object", &secret.object(SECRET_ID)])
            .args(more)
            .args(["-o", options])
            .arg(qemu::encrypted_name(image)?),
        image,
    )?;
    Ok(())
}

/// A file's name that is not taken for a protocol.
fn plain_name(path: &Path) -> OsString {
    let mut name = OsString::from("file:");
    name.push(path);
    name
}

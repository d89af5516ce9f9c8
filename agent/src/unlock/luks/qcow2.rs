//! qcow2 images with LUKS inside: what their headers say, opening, closing.
//!
//! Where the data are is known to qemu alone, so it is qemu-nbd that has the key: it shows the disk as a network block device of the
//! kernel's ([`nbd`]). On that lies a mapping ([`linear`]), so that the disk has a name, can be made to wait, and is known again by an agent that
//! was restarted, as every other one. To wipe the key is to end qemu-nbd; to give it back is to start another one below the mapping.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use assay_evidence::luks1::{self, Luks1};
use assay_evidence::qcow2::{self, Qcow2};

use self::linear::Linear;
use self::nbd::Device;
use super::luks1::{check, parse, token};
use super::{Container, DiskError, Header, loaded, suspend};

pub(super) mod linear;
pub(super) mod nbd;
mod program;
#[cfg(test)]
mod tests;

/// What qemu-nbd may take to write back what it holds, before it is killed: when a disk is closed, and when its key is lost.
const CLOSING: Duration = Duration::from_secs(10);
const WIPING: Duration = Duration::from_millis(500);

/// What the headers of an image say and its sidecar, checked; `None` of what does not begin as qcow2 does.
///
/// # Errors
/// [`DiskError::Open`], [`DiskError::Qcow2`], [`DiskError::NotEncrypted`], [`DiskError::NotAlone`], and those of a LUKS1 header.
pub(super) fn read(image: &Path) -> Result<Option<Header>, DiskError> {
    let file = loaded::open_image(image)?;
    let failed = |source| DiskError::Open {
        image: image.to_owned(),
        source,
    };
    let Some(start) = start_of(&file).map_err(failed)? else {
        return Ok(None);
    };
    let said = Qcow2::parse(&start).map_err(|source| DiskError::Qcow2 {
        image: image.to_owned(),
        source,
    })?;
    // qemu would open another file that a header names, whatever it is.
    if said.needs_another {
        return Err(DiskError::NotAlone {
            image: image.to_owned(),
        });
    }
    let Some(at) = said.luks_at else {
        return Err(DiskError::NotEncrypted {
            image: image.to_owned(),
        });
    };
    let luks = luks_header(&file, at, image)?;
    Ok(Some(Header {
        image: image.to_owned(),
        container: Container::Qcow2,
        uuid: *luks.uuid.as_bytes(),
        token: token(image)?,
        fingerprint: luks.fingerprint,
    }))
}

/// All that the header may take, of what begins as qcow2 does.
fn start_of(mut file: &File) -> io::Result<Option<Vec<u8>>> {
    let mut start = Vec::new();
    file.take(qcow2::START.len() as u64).read_to_end(&mut start)?;
    if start != qcow2::START {
        return Ok(None);
    }
    let rest = qcow2::MAX_LEN.saturating_sub(start.len());
    file.by_ref().take(rest as u64).read_to_end(&mut start)?;
    Ok(Some(start))
}

fn luks_header(file: &File, at: u64, image: &Path) -> Result<Luks1, DiskError> {
    let mut start = [0; luks1::LEN];
    file.read_exact_at(&mut start, at).map_err(|source| DiskError::Open {
        image: image.to_owned(),
        source,
    })?;
    let said = parse(&start, image)?;
    check(&said, image)?;
    Ok(said)
}

/// Opens an image as `/dev/mapper/NAME`.
///
/// # Errors
/// Those of [`read`], [`DiskError::Changed`], [`DiskError::WrongKey`], and those of [`Device::show`] and [`Linear::make`].
pub(super) fn open(header: &Header, name: &str, key: &[u8], run_dir: &Path) -> Result<(), DiskError> {
    let device = show(header, key, run_dir)?;
    Linear::make(name, &header.uuid, &device).inspect_err(|_| give_up(&device))
}

/// Refuses, before a key is asked for, what there would be no device for.
///
/// # Errors
/// [`DiskError::NoDevice`].
pub(super) fn check_free() -> Result<(), DiskError> {
    Device::free().map(drop)
}

/// Has the disk shown. qemu-nbd reads the headers by itself: before and after that they must be those that the key was asked for.
fn show(header: &Header, key: &[u8], run_dir: &Path) -> Result<Device, DiskError> {
    check_same(header)?;
    let device = Device::show(header, key, run_dir)?;
    check_same(header).inspect_err(|_| give_up(&device))?;
    Ok(device)
}

fn check_same(header: &Header) -> Result<(), DiskError> {
    match read(&header.image)? {
        Some(now) if now == *header => Ok(()),
        _ => Err(DiskError::Changed {
            image: header.image.clone(),
        }),
    }
}

/// Ends each qemu-nbd that an agent before this one started, and then ended before the mapping was there.
pub(super) fn end_strays(run_dir: &Path) {
    for device in nbd::shown(run_dir).iter().filter(|device| !device.is_held()) {
        give_up(device);
    }
}

/// Ends what failed half-way. The error that led here is the one to tell.
fn give_up(device: &Device) {
    if let Err(error) = device.end(CLOSING) {
        tracing::warn!("{error}");
    }
}

/// Closes a mapping, and ends the qemu-nbd below it.
///
/// # Errors
/// [`DiskError::Busy`], [`DiskError::Program`], [`DiskError::Said`], [`DiskError::StillThere`], [`DiskError::Processes`].
pub(super) fn close(mapping: &Linear) -> Result<(), DiskError> {
    // Looked for first: without the mapping nothing leads there.
    let device = mapping.device();
    mapping.remove()?;
    device.map_or(Ok(()), |device| device.end(CLOSING))
}

/// Makes a disk wait, and ends the qemu-nbd that has its key.
///
/// # Errors
/// [`DiskError::Suspend`], [`DiskError::StillThere`], [`DiskError::Processes`].
pub(super) fn wipe(mapping: &Linear) -> Result<(), DiskError> {
    suspend::suspend(mapping.name())?;
    mapping.device().map_or(Ok(()), |device| device.end(WIPING))
}

/// Gives a disk that waits without its key another qemu-nbd, if its headers are still those that the key was asked for.
///
/// # Errors
/// Those of [`open`], [`DiskError::NotOpen`], [`DiskError::Suspend`].
pub(super) fn resume_with(header: &Header, name: &str, key: &[u8], run_dir: &Path) -> Result<(), DiskError> {
    let mapping = Linear::find(name).ok_or_else(|| DiskError::NotOpen { name: name.to_owned() })?;
    let device = show(header, key, run_dir)?;
    mapping.put_on(&device).inspect_err(|_| give_up(&device))?;
    suspend::resume(name)
}

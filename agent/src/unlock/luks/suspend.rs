//! Open disks that wait: suspended with their key in the kernel, or with the key wiped from it.
#![expect(
    unsafe_code,
    reason = "ioctl(2) on device-mapper's control device has no safe wrapper"
)]

use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;

use libcryptsetup_rs::LibcryptErr;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{DiskError, Header, Loaded, check_name, open_by_name, wrong_key};

const CONTROL: &str = "/dev/mapper/control";
/// `struct dm_ioctl` of `linux/dm-ioctl.h`: its length, the version of the interface, and where flags and name stand in it.
const LEN: usize = 312;
const VERSION: [u32; 3] = [4, 0, 0];
const FLAGS_AT: usize = 28;
const NAME_AT: usize = 48;
/// Bytes of the name, its NUL included.
const NAME_LEN: usize = 128;
/// `DM_DEV_SUSPEND`: `_IOWR(0xfd, 6, struct dm_ioctl)`.
const DEV_SUSPEND: libc::c_ulong = 0xc138_fd06;
/// `DM_SUSPEND_FLAG`; without it the request resumes.
const SUSPEND: u32 = 1 << 1;
/// Any key slot that the key opens (`CRYPT_ANY_SLOT`).
const ANY_SLOT: libc::c_int = -1;

/// As the kernel takes it.
#[repr(C, align(8))]
struct Request([u8; LEN]);

impl Request {
    fn new(name: &str, flags: u32) -> Option<Self> {
        let mut bytes = [0; LEN];
        let len = u32::try_from(LEN).ok()?;
        let mut put = |at: usize, what: &[u8]| {
            let place = bytes.get_mut(at..at.checked_add(what.len())?)?;
            place.copy_from_slice(what);
            Some(())
        };
        for (at, number) in [0, 4, 8]
            .into_iter()
            .zip(VERSION)
            .chain([(12, len), (16, len), (FLAGS_AT, flags)])
        {
            put(at, &number.to_ne_bytes())?;
        }
        (name.len() < NAME_LEN).then(|| put(NAME_AT, name.as_bytes()))??;
        Some(Self(bytes))
    }
}

/// Makes a disk wait; its key stays in the kernel.
///
/// # Errors
/// [`DiskError::BadName`], [`DiskError::Suspend`].
pub(super) fn suspend(name: &str) -> Result<(), DiskError> {
    control(name, SUSPEND)
}

/// Lets a disk that waits with its key go on.
///
/// # Errors
/// [`DiskError::BadName`], [`DiskError::Suspend`].
pub(super) fn resume(name: &str) -> Result<(), DiskError> {
    control(name, 0)
}

/// Makes a disk wait, and wipes its key from the kernel. One that waits already goes on for the moment that this takes.
///
/// # Errors
/// [`DiskError::BadName`], [`DiskError::NotOpen`], [`DiskError::Suspend`].
pub(super) fn wipe(name: &str) -> Result<(), DiskError> {
    let mut device = open_by_name(name, None)?;
    // libcryptsetup refuses what is suspended already; to resume what is not does nothing.
    resume(name)?;
    device
        .context_handle()
        .suspend(name)
        .map_err(|source| failed(name, crypt_error(source)))
}

/// Gives a disk that waits without its key the key back, if its header is still the one that the key was asked for.
///
/// # Errors
/// [`DiskError::NotOpen`], [`DiskError::Header`] and the like, [`DiskError::Changed`], [`DiskError::WrongKey`],
/// [`DiskError::Suspend`].
pub(super) fn resume_with(header: &Header, name: &str, key: &[u8]) -> Result<(), DiskError> {
    let mut loaded = Loaded::of_mapping(name, &header.image)?;
    if loaded.header != *header {
        return Err(DiskError::Changed {
            image: header.image.clone(),
        });
    }
    let mut secret = Secret::new(key).map_err(|error| failed(name, error))?;
    let resumed =
        loaded
            .device
            .context_handle()
            .resume_by_keyfile_device_offset(name, ANY_SLOT, &secret.path(), key.len(), 0);
    secret.wipe(key.len());
    match resumed {
        Ok(_) => Ok(()),
        Err(LibcryptErr::IOError(error)) if error.raw_os_error() == Some(libc::EPERM) => Err(wrong_key(header)),
        Err(source) => Err(failed(name, crypt_error(source))),
    }
}

/// A key in memory that libcryptsetup reads like a file: it copies a passphrase given as text, and does not wipe the copy.
struct Secret(File);

impl Secret {
    fn new(key: &[u8]) -> std::io::Result<Self> {
        let mut file = File::from(memfd_create(c"assay", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(key)?;
        Ok(Self(file))
    }

    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }

    fn wipe(&mut self, len: usize) {
        let wiped = self
            .0
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.0.write_all(&vec![0; len]));
        if let Err(error) = wiped {
            // It is freed with the descriptor all the same.
            tracing::debug!("a key in memory could not be wiped: {error}");
        }
    }
}

fn control(name: &str, flags: u32) -> Result<(), DiskError> {
    check_name(name)?;
    let control = OpenOptions::new().read(true).write(true).open(CONTROL);
    let control = control.map_err(|error| failed(name, error))?;
    let Some(mut request) = Request::new(name, flags) else {
        return Err(failed(name, std::io::ErrorKind::InvalidInput.into()));
    };
    // SAFETY: the descriptor is open for the length of the call; the request is as long as the number and its own
    // `data_size` say, aligned as the kernel's structure is, and outlives the call, which neither keeps nor frees it.
    let answer = unsafe { libc::ioctl(control.as_raw_fd(), DEV_SUSPEND, request.0.as_mut_ptr()) };
    match answer {
        0 => Ok(()),
        _ => Err(failed(name, std::io::Error::last_os_error())),
    }
}

fn crypt_error(error: LibcryptErr) -> std::io::Error {
    match error {
        LibcryptErr::IOError(error) => error,
        other => std::io::Error::other(other),
    }
}

fn failed(name: &str, source: std::io::Error) -> DiskError {
    DiskError::Suspend {
        name: name.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_the_kernels() {
        let request = Request::new("assay-1", SUSPEND).unwrap();
        assert_eq!(std::mem::size_of::<Request>(), LEN);
        let number = |at: usize| u32::from_ne_bytes(request.0[at..at + 4].try_into().unwrap());
        assert_eq!([0, 4, 8, 12, 16, 28].map(number), [4, 0, 0, 312, 312, 2]);
        assert_eq!(request.0[48..56], *b"assay-1\0");
        assert!(Request::new(&"x".repeat(127), 0).is_some());
        assert!(Request::new(&"x".repeat(128), 0).is_none());
        // The number names direction, length, type and command (asm-generic/ioctl.h).
        assert_eq!(DEV_SUSPEND, (3 << 30) | (312 << 16) | (0xfd << 8) | 6);
    }

    #[test]
    fn a_key_in_memory_is_read_like_a_file_and_wiped() {
        let mut secret = Secret::new(b"0123456789abcdef").unwrap();
        assert_eq!(std::fs::read(secret.path()).unwrap(), b"0123456789abcdef");
        secret.wipe(16);
        assert_eq!(std::fs::read(secret.path()).unwrap(), [0; 16]);
    }
}

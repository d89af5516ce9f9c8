//! LUKS1 images: what their header says, and where they have their token.
//!
//! Of a LUKS2 header libcryptsetup gives out all that it read, of a LUKS1 header only parts. So that what was checked is what is used,
//! whatever the storage shows next, header and key slots are copied into memory, and libcryptsetup gets the copy as a header that lies apart from
//! its data.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use assay_evidence::luks1::{self, Luks1};
use assay_evidence::token::{LuksToken, MAX_TOKEN, sidecar_path};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{CIPHER, Container, DiskError, Header, MAX_ITERATIONS, MAX_KEY};

/// Of header and key slots together; cryptsetup's take 2 MiB, and images are sealed with 4.
const MAX_HEADER: u64 = 16 * 1024 * 1024;
/// `LUKS_STRIPES` of the specification: into so many parts every key is split.
const STRIPES: u32 = 4000;
const SECTOR_LEN: u64 = 512;

/// A LUKS1 header in memory, with its key slots.
pub(super) struct HeaderCopy {
    memory: File,
    said: Luks1,
}

impl HeaderCopy {
    /// Copies the header of an image, if it is a LUKS1 one, and checks it before libcryptsetup sees it.
    ///
    /// # Errors
    /// [`DiskError::Luks1`], [`DiskError::Cipher`], [`DiskError::Cost`], [`DiskError::Copy`].
    pub(super) fn take(file: &mut File, image: &Path) -> Result<Option<Self>, DiskError> {
        let failed = |source| DiskError::Copy {
            image: image.to_owned(),
            source,
        };
        let mut start = [0; luks1::LEN];
        match file.read_exact_at(&mut start, 0) {
            Ok(()) if start.starts_with(&luks1::START) => {}
            Ok(()) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(failed(error)),
        }
        let len = parse(&start, image)?.data_offset;
        if len > MAX_HEADER {
            return Err(cost(image, "header".to_owned(), format!("{len} bytes")));
        }
        let memory = copy(file, len).map_err(failed)?;
        // Of the copy, and not of what was there before it was made.
        memory.read_exact_at(&mut start, 0).map_err(failed)?;
        let said = parse(&start, image)?;
        check(&said, image)?;
        Ok(Some(Self { memory, said }))
    }

    /// A path at which libcryptsetup finds the copy, for as long as it lives.
    pub(super) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.memory.as_raw_fd()).into()
    }

    /// What header and sidecar say.
    ///
    /// # Errors
    /// [`DiskError::Sidecar`], [`DiskError::Token`].
    pub(super) fn header(&self, image: &Path) -> Result<Header, DiskError> {
        Ok(Header {
            image: image.to_owned(),
            container: Container::None,
            uuid: *self.said.uuid.as_bytes(),
            token: token(image)?,
            fingerprint: self.said.fingerprint,
        })
    }
}

/// Cipher and costs.
///
/// # Errors
/// [`DiskError::Cipher`], [`DiskError::Cost`].
pub(super) fn check(said: &Luks1, image: &Path) -> Result<(), DiskError> {
    if said.cipher != CIPHER {
        return Err(DiskError::Cipher {
            image: image.to_owned(),
            part: "data".to_owned(),
            cipher: said.cipher.chars().take(80).collect(),
        });
    }
    if usize::try_from(said.key_len).map_or(true, |len| len > MAX_KEY) {
        return Err(cost(image, "volume key".to_owned(), format!("{} bytes", said.key_len)));
    }
    let slots = said.slots.iter().map(|slot| {
        let part = format!("key slot {}", slot.number);
        (part, slot.iterations, slot.stripes)
    });
    let digest = ("digest".to_owned(), said.digest_iterations, 0);
    for (part, iterations, stripes) in slots.chain([digest]) {
        if u64::from(iterations) > MAX_ITERATIONS || stripes > STRIPES {
            return Err(cost(image, part, format!("{iterations} iterations, {stripes} stripes")));
        }
    }
    Ok(())
}

/// # Errors
/// [`DiskError::Luks1`].
pub(super) fn parse(start: &[u8], image: &Path) -> Result<Luks1, DiskError> {
    Luks1::parse(start).map_err(|source| DiskError::Luks1 {
        image: image.to_owned(),
        source,
    })
}

/// A sector longer than the header: libcryptsetup wants room for data behind it.
fn copy(file: &mut File, len: u64) -> io::Result<File> {
    let mut memory = File::from(memfd_create(c"luks1-header", MFdFlags::MFD_CLOEXEC)?);
    file.seek(SeekFrom::Start(0))?;
    io::copy(&mut file.take(len), &mut memory)?;
    memory.set_len(len.saturating_add(SECTOR_LEN))?;
    Ok(memory)
}

/// The token of the file beside the image.
///
/// # Errors
/// [`DiskError::Sidecar`], [`DiskError::Token`].
pub(super) fn token(image: &Path) -> Result<LuksToken, DiskError> {
    let sidecar = sidecar_path(image);
    let json = read_token(&sidecar).map_err(|source| DiskError::Sidecar {
        image: image.to_owned(),
        sidecar,
        source,
    })?;
    LuksToken::parse(&json).map_err(|source| DiskError::Token {
        image: image.to_owned(),
        source,
    })
}

fn read_token(sidecar: &Path) -> io::Result<Vec<u8>> {
    // A pipe must not be waited for: all other disks would wait, too.
    let flags = nix::libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(sidecar)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    let mut json = Vec::new();
    // One byte more than fits, so that a longer one is refused and not cut.
    file.take(MAX_TOKEN as u64 + 1).read_to_end(&mut json)?;
    Ok(json)
}

fn cost(image: &Path, part: String, wanted: String) -> DiskError {
    DiskError::Cost {
        image: image.to_owned(),
        part,
        wanted,
    }
}

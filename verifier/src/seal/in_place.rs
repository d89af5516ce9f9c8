//! Sealing without room for a copy: the disk is encrypted where it is, moved up by the length of the header.
//!
//! The disk is taken in chunks as long as the header, from its last to its first. Each is written behind where it stood, over the chunk
//! that was moved before it, so that at any moment all of the disk is there, in the clear or encrypted. A journal in the state directory
//! holds the header and how far it got: a run that was interrupted, by a crash or a full disk, is gone on with by the next.

mod journal;

use std::{
    fs::{File, OpenOptions},
    io::{self, Seek, SeekFrom},
    os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use assay_evidence::{digest::Sha256Digest, uuid::Uuid};
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, FcntlArg, fallocate, fcntl},
};
use zeroize::Zeroizing;

use super::{
    HEADER_LEN, SECTOR_LEN, SealError, Sealed, Terms,
    header::{self, Version, VolumeKey},
    input::{Contents, Source},
    key_info, new_uuid,
    segment::Xts,
};
use crate::keystore::{KeyInfo, KeySource, Passphrase};
use journal::{Entry, Journal};

/// What to seal in place.
pub struct InPlaceRequest<'a> {
    /// The raw disk: a regular file, which grows by [`HEADER_LEN`], or a block device.
    pub image: &'a Path,
    /// Length of the disk in bytes. Needed for a block device, which doesn't grow: it must have [`HEADER_LEN`] bytes more than that.
    pub disk_size: Option<u64>,
    /// Who gets the key.
    pub terms: Terms<'a>,
}

/// A sealing in place that was begun.
pub struct InPlace {
    image: PathBuf,
    file: File,
    is_file: bool,
    journal: Journal,
}

impl InPlace {
    /// Makes key, header and journal; the image is as it was. `journals` is the folder of journals.
    ///
    /// # Errors
    /// [`SealError`]: for an image that is in use, is no raw disk, or has no room. Neither key nor journal is left behind then.
    pub fn begin(request: &InPlaceRequest<'_>, journals: &Path, keys: &dyn KeySource) -> Result<Self, SealError> {
        let image = request.image;
        let source = Source::open_file(image)?;
        match source.contents()? {
            Contents::Unknown => {}
            Contents::Luks1 | Contents::Luks2 => return Err(SealError::InputLuks(image.to_owned())),
            Contents::Container(format) => {
                return Err(SealError::InPlaceFormat {
                    path: image.to_owned(),
                    format,
                });
            }
        }
        let (file, is_file) = claim(image)?;
        let disk_size = disk_size(request, &source, is_file)?;
        reserve(&file, image, is_file, disk_size)?;

        let key_id = new_uuid()?;
        let passphrase = Passphrase::generate().map_err(SealError::Key)?;
        let token = header::token(&request.terms, key_id)?;
        let volume_key = VolumeKey::generate()?;
        let header = header::make(Version::Luks2, image, &volume_key, &passphrase, &request.terms, &token)?;
        let info = KeyInfo {
            header: Some(header.fingerprint),
            ..key_info(key_id, header.uuid, image, disk_size, &request.terms)
        };
        keys.put(&info, &passphrase).map_err(SealError::Key)?;
        let entry = Entry::of(&file, key_id, disk_size);
        let journal = entry
            .and_then(|entry| Journal::create(journals, entry, &header.bytes))
            .inspect_err(|_| {
                // Nothing is encrypted with it. One that stays harms nobody.
                drop(keys.remove(key_id));
            })?;
        Ok(Self {
            image: image.to_owned(),
            file,
            is_file,
            journal,
        })
    }

    /// Whether a sealing that was begun needs this key.
    ///
    /// # Errors
    /// [`SealError::Output`] when nobody can tell.
    pub fn needs(key_id: Uuid, journals: &Path) -> Result<bool, SealError> {
        Journal::exists(journals, key_id)
    }

    /// The sealing of this image that was interrupted, if there is one.
    ///
    /// # Errors
    /// [`SealError`]: when the image is in use, or image or journal can't be read.
    pub fn find(image: &Path, journals: &Path) -> Result<Option<Self>, SealError> {
        let source = Source::open_file(image)?;
        let Some(journal) = Journal::find(journals, source.file())? else {
            return Ok(None);
        };
        let (file, is_file) = claim(image)?;
        Ok(Some(Self {
            image: image.to_owned(),
            file,
            is_file,
            journal,
        }))
    }

    /// Encrypts what is left, and ends with the header in its place. `progress` hears the bytes done and the bytes in all.
    ///
    /// # Errors
    /// [`SealError::InPlace`] with the reason: the image is partly encrypted, and the next run goes on.
    pub fn run(self, keys: &dyn KeySource, progress: &mut dyn FnMut(u64, u64)) -> Result<KeyInfo, SealError> {
        let image = self.image.clone();
        self.go_on(keys, progress).map_err(|source| SealError::InPlace {
            path: image,
            source: Box::new(source),
        })
    }

    fn go_on(mut self, keys: &dyn KeySource, progress: &mut dyn FnMut(u64, u64)) -> Result<KeyInfo, SealError> {
        let entry = self.journal.entry();
        let stored = keys.get(entry.key_id).map_err(SealError::Key)?;
        let volume_key = self.journal.volume_key(&self.image, &stored.passphrase)?;
        let mut left = self.check_state()?;
        if self.is_file {
            self.file
                .set_len(entry.disk_size + HEADER_LEN)
                .map_err(|source| self.failed("extend", source))?;
        }
        let xts = Xts::new(&volume_key);
        let mut chunk = Zeroizing::new(Vec::new());
        while let Some(number) = left.checked_sub(1) {
            let (offset, len) = self.place(number);
            chunk.resize(len, 0);
            self.file
                .read_exact_at(&mut chunk, offset)
                .map_err(|source| self.failed("read", source))?;
            xts.encrypt(&mut chunk, offset / SECTOR_LEN);
            // On the disk before the journal says so, and the journal before the next chunk goes over this one's old place.
            self.file
                .write_all_at(&chunk, offset + HEADER_LEN)
                .and_then(|()| self.file.sync_data())
                .map_err(|source| self.failed("write", source))?;
            self.journal.moved(number, &Sha256Digest::of(&chunk))?;
            left = number;
            progress(entry.disk_size - offset, entry.disk_size);
        }
        self.finish(stored.info)
    }

    /// Puts the header where the first chunk was, and looks whether it is read there.
    fn finish(self, info: KeyInfo) -> Result<KeyInfo, SealError> {
        let header = self.journal.header()?;
        self.file
            .write_all_at(&header, 0)
            .and_then(|()| self.file.sync_all())
            .map_err(|source| self.failed("write", source))?;
        let Self {
            image, file, journal, ..
        } = self;
        // libcryptsetup has locks of its own.
        drop(file);
        Sealed::read(&image)?.check_key(&info)?;
        journal.remove()?;
        Ok(info)
    }

    /// How many chunks are left, if the image is as the journal says: an older copy in its place would be encrypted twice.
    fn check_state(&self) -> Result<u64, SealError> {
        let entry = self.journal.entry();
        let changed = || SealError::InPlaceChanged(self.image.clone());
        let len = (&self.file)
            .seek(SeekFrom::End(0))
            .map_err(|source| self.failed("measure", source))?;
        if len < entry.disk_size || (self.is_file && len > entry.disk_size + HEADER_LEN) {
            return Err(changed());
        }
        let (left, digest) = self.journal.state()?;
        let begun = left < entry.chunks();
        if left > entry.chunks() || (begun && len < entry.disk_size + HEADER_LEN) {
            return Err(changed());
        }
        if begun {
            let (offset, len) = self.place(left);
            let mut chunk = vec![0; len];
            self.file
                .read_exact_at(&mut chunk, offset + HEADER_LEN)
                .map_err(|source| self.failed("read", source))?;
            if Sha256Digest::of(&chunk) != digest {
                return Err(changed());
            }
        }
        Ok(left)
    }

    /// Offset and length of a chunk in the clear, in bytes.
    fn place(&self, number: u64) -> (u64, usize) {
        let offset = number * HEADER_LEN;
        let len = self.journal.entry().disk_size.saturating_sub(offset).min(HEADER_LEN);
        (offset, usize::try_from(len).unwrap_or(0))
    }

    fn failed(&self, operation: &'static str, source: io::Error) -> SealError {
        no_room(
            &self.image,
            operation,
            self.journal.entry().disk_size + HEADER_LEN,
            source,
        )
    }
}

/// Opens the image for us alone: a VM that runs from it, or another run, keeps its claim.
fn claim(image: &Path) -> Result<(File, bool), SealError> {
    let failed = |source| SealError::Input {
        operation: "open",
        path: image.to_owned(),
        source,
    };
    let kind = std::fs::metadata(image).map_err(failed)?.file_type();
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if kind.is_block_device() {
        // Of a block device this is a claim against mounts, device-mapper and others that say so.
        options.custom_flags(libc::O_EXCL);
    }
    let file = options.open(image).map_err(|source| match source.kind() {
        io::ErrorKind::ResourceBusy => SealError::InUse(image.to_owned()),
        _ => failed(source),
    })?;
    // qemu holds locks of this kind on its images. Length 0: to the end, wherever that will be.
    let lock = libc::flock {
        l_type: libc::F_WRLCK.try_into().unwrap_or_default(),
        l_whence: libc::SEEK_SET.try_into().unwrap_or_default(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok((file, kind.is_file())),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(SealError::InUse(image.to_owned())),
        // Some file systems have none.
        Err(Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::EINVAL) => Ok((file, kind.is_file())),
        Err(errno) => Err(failed(errno.into())),
    }
}

fn disk_size(request: &InPlaceRequest<'_>, source: &Source, is_file: bool) -> Result<u64, SealError> {
    let path = || request.image.to_owned();
    let size = match request.disk_size {
        Some(size) if is_file && size != source.len() => {
            return Err(SealError::InPlaceSize {
                path: path(),
                len: source.len(),
                size,
            });
        }
        Some(size) => size,
        None if is_file => source.len(),
        None => {
            return Err(SealError::InPlaceNoSize {
                path: path(),
                room: HEADER_LEN,
            });
        }
    };
    if size == 0 {
        return Err(SealError::InputEmpty(path()));
    }
    if !size.is_multiple_of(SECTOR_LEN) {
        return Err(SealError::InputSize {
            path: path(),
            len: size,
        });
    }
    let room = source.len().checked_sub(HEADER_LEN).is_some_and(|most| size <= most);
    if is_file || room {
        return Ok(size);
    }
    Err(SealError::InPlaceSize {
        path: path(),
        len: source.len(),
        size,
    })
}

/// Has the file system set aside all blocks, those of holes and of the growth, while the image is still as it was.
fn reserve(file: &File, image: &Path, is_file: bool, disk_size: u64) -> Result<(), SealError> {
    let needed = disk_size.saturating_add(HEADER_LEN);
    let too_large = |_| no_room(image, "extend", needed, io::ErrorKind::FileTooLarge.into());
    let bytes = i64::try_from(needed).map_err(too_large)?;
    if !is_file {
        return Ok(());
    }
    match fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, bytes) {
        // Then a full disk is met on the way, and the next run goes on.
        Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
        Err(errno) => Err(no_room(image, "extend", needed, errno.into())),
    }
}

fn no_room(image: &Path, operation: &'static str, needed: u64, source: io::Error) -> SealError {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            SealError::DiskFull {
                path: image.to_owned(),
                needed,
                source,
            }
        }
        _ => SealError::Output {
            operation,
            path: image.to_owned(),
            source,
        },
    }
}

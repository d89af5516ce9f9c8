//! The image being made: under a partial name until it is whole, gone if it never gets there.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
};

use super::SealError;

/// `OUT.partial`, removed when dropped unless it was published.
pub(super) struct Partial {
    partial: PathBuf,
    output: PathBuf,
    file: File,
    len: u64,
}

impl Partial {
    /// Makes the partial file, with room for its full length. `mode` holds the permission bits, from which the umask takes.
    pub(super) fn create(output: &Path, len: u64, mode: u32) -> Result<Self, SealError> {
        let unusable = || SealError::OutputName(output.to_owned());
        let mut name = output.file_name().ok_or_else(unusable)?.to_owned();
        // qemu's programs take names in UTF-8 only.
        output.to_str().ok_or_else(unusable)?;
        if output.symlink_metadata().is_ok() {
            return Err(SealError::OutputExists(output.to_owned()));
        }
        name.push(".partial");
        let partial = output.with_file_name(name);
        remove_stale(&partial)?;
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&partial);
        let file = opened.map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => SealError::PartialExists(partial.clone()),
            _ => SealError::Output {
                operation: "create",
                path: partial.clone(),
                source,
            },
        })?;
        let locked = file.try_lock().is_ok();
        let this = Self {
            partial,
            output: output.to_owned(),
            file,
            len,
        };
        if !locked {
            // Another run took it for a stale one in this very moment, and removes it.
            return Err(SealError::PartialExists(this.partial.clone()));
        }
        allocate(&this.file, len).map_err(|source| this.failed("extend", source))?;
        Ok(this)
    }

    /// The partial file's path.
    pub(super) fn path(&self) -> &Path {
        &self.partial
    }

    /// The partial file, for reading what another program wrote into it.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Writes a block at a byte offset.
    pub(super) fn write_at(&self, block: &[u8], offset: u64) -> Result<(), SealError> {
        self.file
            .write_all_at(block, offset)
            .map_err(|source| self.failed("write", source))
    }

    /// Makes the content durable.
    pub(super) fn sync(&self) -> Result<(), SealError> {
        self.file.sync_all().map_err(|source| self.failed("sync", source))
    }

    /// Gives the file its name, durably. Never replaces a file that came there meanwhile.
    pub(super) fn publish(self) -> Result<(), SealError> {
        // A link refuses to replace, where a rename would not; the partial name goes with the drop.
        match fs::hard_link(&self.partial, &self.output) {
            Ok(()) => {}
            Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
                return Err(SealError::OutputExists(self.output.clone()));
            }
            Err(_) => self.rename()?,
        }
        let parent = self
            .output
            .parent()
            .filter(|dir| !dir.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        let synced = File::open(parent).and_then(|dir| dir.sync_all());
        synced.map_err(|source| {
            // Not durable is not done: take the name back, so that no image stays without its key.
            drop(fs::remove_file(&self.output));
            SealError::Output {
                operation: "sync the directory of",
                path: self.output.clone(),
                source,
            }
        })
    }

    /// For file systems without hard links (FAT, some network shares), where the small race can't be closed.
    fn rename(&self) -> Result<(), SealError> {
        if self.output.symlink_metadata().is_ok() {
            return Err(SealError::OutputExists(self.output.clone()));
        }
        fs::rename(&self.partial, &self.output).map_err(|source| SealError::Output {
            operation: "rename to",
            path: self.output.clone(),
            source,
        })
    }

    pub(super) fn failed(&self, operation: &'static str, source: io::Error) -> SealError {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                SealError::DiskFull {
                    path: self.partial.clone(),
                    needed: self.len,
                    source,
                }
            }
            _ => SealError::Output {
                operation,
                path: self.partial.clone(),
                source,
            },
        }
    }
}

/// Takes away what an interrupted run left: nobody holds its lock.
fn remove_stale(partial: &Path) -> Result<(), SealError> {
    let failed = |operation| {
        move |source| SealError::Output {
            operation,
            path: partial.to_owned(),
            source,
        }
    };
    match partial.symlink_metadata() {
        Ok(metadata) if metadata.is_file() => {}
        // A link or a folder is not of our making.
        Ok(_) => return Err(SealError::PartialExists(partial.to_owned())),
        Err(_) => return Ok(()),
    }
    let left = File::open(partial).map_err(failed("open"))?;
    match left.try_lock() {
        Ok(()) => fs::remove_file(partial).map_err(failed("remove")),
        Err(_) => Err(SealError::PartialExists(partial.to_owned())),
    }
}

/// Gives a file its full length with the blocks behind it, so that a full disk is known before the long work and not in the midst of it.
pub(super) fn allocate(file: &File, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let bytes = i64::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    match fallocate(file, FallocateFlags::empty(), 0, bytes) {
        // Some file systems can't; a full one is then known when it is.
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => file.set_len(len),
        done => done.map_err(io::Error::from),
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Either it was linked to its final name and this one is done with, or it failed; there is nobody left to tell.
        drop(fs::remove_file(&self.partial));
    }
}

//! The image being made: under a partial name until it is whole, gone if it never gets there.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
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
    /// Makes the partial file with its full length.
    pub(super) fn create(output: &Path, len: u64) -> Result<Self, SealError> {
        let unusable = || SealError::OutputName(output.to_owned());
        let mut name = output.file_name().ok_or_else(unusable)?.to_owned();
        // libcryptsetup takes C strings that the binding makes from UTF-8 only.
        output.to_str().ok_or_else(unusable)?;
        if output.symlink_metadata().is_ok() {
            return Err(SealError::OutputExists(output.to_owned()));
        }
        name.push(".partial");
        let partial = output.with_file_name(name);
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&partial);
        let file = opened.map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => SealError::PartialExists(partial.clone()),
            _ => SealError::Output {
                operation: "create",
                path: partial.clone(),
                source,
            },
        })?;
        let this = Self {
            partial,
            output: output.to_owned(),
            file,
            len,
        };
        this.file.set_len(len).map_err(|source| this.failed("extend", source))?;
        Ok(this)
    }

    /// The partial file's path.
    pub(super) fn path(&self) -> &Path {
        &self.partial
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

    fn failed(&self, operation: &'static str, source: io::Error) -> SealError {
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

impl Drop for Partial {
    fn drop(&mut self) {
        // Either it was linked to its final name and this one is done with, or it failed; there is nobody left to tell.
        drop(fs::remove_file(&self.partial));
    }
}

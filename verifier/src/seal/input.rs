//! The raw image: what is refused before anything is written, and reading it in whole blocks.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use super::{SECTOR_LEN, SealError};

/// Container formats by their first bytes. Sealed as they are, they would be a disk that no VM can boot.
const CONTAINERS: [(&[u8], &str); 4] = [
    (b"QFI\xfb", "qcow2"),
    (b"KDMV", "VMDK"),
    (b"vhdxfile", "VHDX"),
    (b"conectix", "VHD"),
];
/// Both LUKS versions begin with this.
const LUKS_MAGIC: &[u8] = b"LUKS\xba\xbe";

/// An image that may be sealed, opened for reading.
pub(super) struct Source {
    path: PathBuf,
    file: File,
    len: u64,
    state: FileState,
}

/// What changes when somebody writes to a regular file.
#[derive(PartialEq, Eq)]
struct FileState {
    size: u64,
    modified: (i64, i64),
}

impl Source {
    /// Opens an image and refuses what isn't a raw disk.
    pub(super) fn open(path: &Path) -> Result<Self, SealError> {
        let failed = |operation| {
            move |source| SealError::Input {
                operation,
                path: path.to_owned(),
                source,
            }
        };
        let mut file = File::open(path).map_err(failed("open"))?;
        let metadata = file.metadata().map_err(failed("look at"))?;
        if !metadata.is_file() && !metadata.file_type().is_block_device() {
            return Err(SealError::InputKind(path.to_owned()));
        }
        // A block device has no length in its metadata, but an end that can be sought.
        let len = file.seek(SeekFrom::End(0)).map_err(failed("measure"))?;
        file.rewind().map_err(failed("rewind"))?;
        if len == 0 {
            return Err(SealError::InputEmpty(path.to_owned()));
        }
        if !len.is_multiple_of(SECTOR_LEN) {
            return Err(SealError::InputSize {
                path: path.to_owned(),
                len,
            });
        }
        let mut start = Vec::new();
        (&file).take(8).read_to_end(&mut start).map_err(failed("read"))?;
        file.rewind().map_err(failed("rewind"))?;
        if start.starts_with(LUKS_MAGIC) {
            return Err(SealError::InputLuks(path.to_owned()));
        }
        if let Some((_, format)) = CONTAINERS.iter().find(|(magic, _)| start.starts_with(magic)) {
            return Err(SealError::InputFormat {
                path: path.to_owned(),
                format,
            });
        }
        let state = FileState::of(&file).map_err(failed("look at"))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            len,
            state,
        })
    }

    /// Length of the disk in bytes, a multiple of [`SECTOR_LEN`].
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Fills the block with the next bytes.
    pub(super) fn read_block(&mut self, block: &mut [u8]) -> Result<(), SealError> {
        self.file.read_exact(block).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => SealError::InputChanged(self.path.clone()),
            _ => SealError::Input {
                operation: "read",
                path: self.path.clone(),
                source,
            },
        })
    }

    /// Refuses an image that was written to since it was opened: what was read may be no state it was ever in.
    pub(super) fn check_unchanged(&self) -> Result<(), SealError> {
        let now = FileState::of(&self.file).map_err(|source| SealError::Input {
            operation: "look at",
            path: self.path.clone(),
            source,
        })?;
        if now == self.state {
            Ok(())
        } else {
            Err(SealError::InputChanged(self.path.clone()))
        }
    }
}

impl FileState {
    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

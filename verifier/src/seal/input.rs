//! What is sealed: a raw disk, or one inside a container format that qemu reads. What is refused is refused before anything is written.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use super::{SECTOR_LEN, SealError, nbd::Nbd, qemu};

/// Container formats by their first bytes. Sealed as they are, they would be a disk that no VM can boot.
const CONTAINERS: [(&[u8], &str); 4] = [
    (b"QFI\xfb", "qcow2"),
    (b"KDMV", "VMDK"),
    (b"vhdxfile", "VHDX"),
    (VHD_MAGIC, "VHD"),
];
/// A VHD of fixed size is a raw disk with this at the beginning of a last sector more.
const VHD_MAGIC: &[u8] = b"conectix";
/// Both LUKS versions begin with this.
const LUKS_MAGIC: &[u8] = b"LUKS\xba\xbe";

/// The format of an input. It is the operator who says so: a guest writes what it likes into its raw disk, a qcow2 header that names
/// one of the verifier's files as its backing file, for example.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputFormat {
    /// The disk's sectors and nothing else.
    Raw,
    /// qemu's.
    Qcow2,
    /// Microsoft's older one, as XCP-ng keeps disks.
    Vhd,
    /// Microsoft's newer one.
    Vhdx,
}

impl InputFormat {
    /// qemu's name of the driver.
    pub(super) const fn driver(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vhd => "vpc",
            Self::Vhdx => "vhdx",
        }
    }
}

/// What a file is by its first and last bytes.
pub(super) enum Contents {
    Luks2,
    Luks1,
    /// By its format's name.
    Container(&'static str),
    /// A raw disk, for all that can be seen.
    Unknown,
}

/// An image that may be sealed, opened for reading.
pub(super) struct Source {
    path: PathBuf,
    file: File,
    len: u64,
    state: FileState,
    /// The disk inside a container; without it, the file is the disk.
    disk: Option<Nbd>,
}

/// What changes when somebody writes to a regular file.
#[derive(PartialEq, Eq)]
struct FileState {
    size: u64,
    modified: (i64, i64),
}

impl Source {
    /// Opens an image and refuses what isn't a disk of whole sectors. Without a format it must be raw and look it.
    pub(super) fn open(path: &Path, format: Option<InputFormat>) -> Result<Self, SealError> {
        let mut source = Self::open_file(path)?;
        match (format, source.contents()?) {
            (_, Contents::Luks1 | Contents::Luks2) => return Err(SealError::InputLuks(path.to_owned())),
            (None, Contents::Container(format)) => {
                return Err(SealError::InputFormat {
                    path: path.to_owned(),
                    format,
                });
            }
            (None | Some(InputFormat::Raw), _) => {}
            (Some(format), _) => {
                if qemu::check_alone(path, format)? {
                    return Err(SealError::InputLuks(path.to_owned()));
                }
                source.read_through(Nbd::open(path, qemu::file_name(path, format)?, None)?);
            }
        }
        if source.len == 0 {
            return Err(SealError::InputEmpty(path.to_owned()));
        }
        if !source.len.is_multiple_of(SECTOR_LEN) {
            return Err(SealError::InputSize {
                path: path.to_owned(),
                len: source.len,
            });
        }
        Ok(source)
    }

    /// Opens the disk inside a qcow2 image that is encrypted.
    pub(super) fn open_encrypted(path: &Path, secret: &qemu::SecretFile) -> Result<Self, SealError> {
        let mut source = Self::open_file(path)?;
        let name = qemu::encrypted_name(path)?;
        source.read_through(Nbd::open(path, name, Some(secret))?);
        Ok(source)
    }

    /// Opens a regular file or a block device, whatever is in it.
    pub(super) fn open_file(path: &Path) -> Result<Self, SealError> {
        let failed = |operation| {
            move |source| SealError::Input {
                operation,
                path: path.to_owned(),
                source,
            }
        };
        // Looked at first: opening a pipe waits for its other end.
        let kind = std::fs::metadata(path).map_err(failed("open"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(SealError::InputKind(path.to_owned()));
        }
        let mut file = File::open(path).map_err(failed("open"))?;
        // A block device has no length in its metadata, but an end that can be sought.
        let len = file.seek(SeekFrom::End(0)).map_err(failed("measure"))?;
        let state = FileState::of(&file).map_err(failed("look at"))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            len,
            state,
            disk: None,
        })
    }

    /// Length of the disk in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Fills the block with the bytes at an offset.
    pub(super) fn read_at(&mut self, block: &mut [u8], offset: u64) -> Result<(), SealError> {
        let read = match &mut self.disk {
            Some(disk) => disk.read_at(block, offset),
            None => self.file.read_exact_at(block, offset),
        };
        read.map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof if self.disk.is_none() => SealError::InputChanged(self.path.clone()),
            _ => self.failed("read", source),
        })
    }

    /// Refuses an image that was written to since it was opened: what was read may be no state it was ever in.
    pub(super) fn check_unchanged(&self) -> Result<(), SealError> {
        let now = FileState::of(&self.file).map_err(|source| self.failed("look at", source))?;
        if now == self.state {
            Ok(())
        } else {
            Err(SealError::InputChanged(self.path.clone()))
        }
    }

    /// What the file is.
    pub(super) fn contents(&self) -> Result<Contents, SealError> {
        let start = self.peek(0)?;
        let luks = start.starts_with(LUKS_MAGIC);
        let by_start = CONTAINERS.iter().find(|(magic, _)| start.starts_with(magic));
        let by_end = || -> Result<_, SealError> {
            let last = self.len.saturating_sub(SECTOR_LEN);
            Ok(self.peek(last)?.starts_with(VHD_MAGIC).then_some("VHD"))
        };
        Ok(match (luks, start.last(), by_start) {
            // Behind the magic the version, big-endian.
            (true, Some(1), _) => Contents::Luks1,
            (true, ..) => Contents::Luks2,
            (false, _, Some((_, format))) => Contents::Container(format),
            (false, _, None) => by_end()?.map_or(Contents::Unknown, Contents::Container),
        })
    }

    /// The file itself.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    fn read_through(&mut self, disk: Nbd) {
        self.len = disk.len();
        self.disk = Some(disk);
    }

    /// Eight bytes, or as many as there are.
    fn peek(&self, offset: u64) -> Result<Vec<u8>, SealError> {
        let mut file = &self.file;
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(offset))
            .and_then(|_| file.take(8).read_to_end(&mut bytes))
            .map_err(|source| self.failed("read", source))?;
        Ok(bytes)
    }

    fn failed(&self, operation: &'static str, source: io::Error) -> SealError {
        SealError::Input {
            operation,
            path: self.path.clone(),
            source,
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

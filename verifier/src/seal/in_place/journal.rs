//! The journal of a sealing in place: `KEY.json` says of which image it is, `KEY.header` is the header to be, `KEY.position` how far it
//! got. The first is written last, and only with it there is a journal.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use assay_evidence::{digest::Sha256Digest, uuid::Uuid};
use libcryptsetup_rs::{CryptInit, consts::vals::EncryptionFormat};
use serde::{Deserialize, Serialize};

use crate::{
    files::{create_private, create_private_dir, replace_private, sync_dir},
    keystore::Passphrase,
    seal::{
        HEADER_LEN, SECTOR_LEN, SealError,
        header::{VolumeKey, luks_failed},
    },
};

const VERSION: u32 = 1;
/// An entry has some 200 bytes.
const MAX_ENTRY: u64 = 4096;
/// Chunks that are left, and the digest of the one that was moved last, encrypted. Shorter than a sector, which disks write whole.
const POSITION_LEN: usize = 8 + 32;

/// Of which image, and with which key.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    version: u32,
    /// Device and inode of a regular file; the device itself and 0 for a block device.
    device: u64,
    inode: u64,
    pub(super) key_id: Uuid,
    /// In bytes.
    pub(super) disk_size: u64,
}

impl Entry {
    pub(super) fn of(file: &File, key_id: Uuid, disk_size: u64) -> Result<Self, SealError> {
        let (device, inode) = identity(file)?;
        Ok(Self {
            version: VERSION,
            device,
            inode,
            key_id,
            disk_size,
        })
    }

    /// Chunks in all.
    pub(super) fn chunks(&self) -> u64 {
        self.disk_size.div_ceil(HEADER_LEN)
    }
}

/// A journal on the disk.
pub(super) struct Journal {
    entry: Entry,
    folder: PathBuf,
    position: File,
}

impl Journal {
    /// Writes a new one, durably.
    pub(super) fn create(folder: &Path, entry: Entry, header: &[u8]) -> Result<Self, SealError> {
        create_private_dir(folder).map_err(failed("create", folder))?;
        let path = |what: &str| folder.join(format!("{}.{what}", entry.key_id));
        let mut content = header.to_vec();
        // libcryptsetup wants a data segment behind the header.
        content.resize(header.len() + usize::try_from(SECTOR_LEN).unwrap_or(0), 0);
        create_private(&path("header"), &content).map_err(failed("write", &path("header")))?;
        let start = position(entry.chunks(), &Sha256Digest::ZERO);
        create_private(&path("position"), &start).map_err(failed("write", &path("position")))?;
        let json = serde_json::to_vec(&entry).map_err(|source| SealError::Journal {
            path: path("json"),
            source,
        })?;
        replace_private(&path("json"), &json).map_err(failed("write", &path("json")))?;
        Self::open(folder, entry)
    }

    /// Whether there is one of the image with this key.
    pub(super) fn exists(folder: &Path, key_id: Uuid) -> Result<bool, SealError> {
        let path = folder.join(format!("{key_id}.json"));
        fs::exists(&path).map_err(failed("look for", &path))
    }

    /// The journal of the image that this file is.
    pub(super) fn find(folder: &Path, image: &File) -> Result<Option<Self>, SealError> {
        let identity = identity(image)?;
        let entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(failed("list", folder)(source)),
        };
        for found in entries {
            let path = found.map_err(failed("list", folder))?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let entry = read_entry(&path)?;
            if (entry.device, entry.inode) == identity {
                return Self::open(folder, entry).map(Some);
            }
        }
        Ok(None)
    }

    fn open(folder: &Path, entry: Entry) -> Result<Self, SealError> {
        let path = folder.join(format!("{}.position", entry.key_id));
        let position = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .map_err(failed("open", &path))?;
        Ok(Self {
            entry,
            folder: folder.to_owned(),
            position,
        })
    }

    pub(super) fn entry(&self) -> Entry {
        self.entry
    }

    /// Chunks that are left, and the digest of the last one that was moved.
    pub(super) fn state(&self) -> Result<(u64, Sha256Digest), SealError> {
        let mut bytes = [0; POSITION_LEN];
        self.position
            .read_exact_at(&mut bytes, 0)
            .map_err(failed("read", &self.path("position")))?;
        let left = bytes.first_chunk().copied().map(u64::from_be_bytes);
        let digest = bytes.last_chunk().copied().map(Sha256Digest::new);
        Ok((left.unwrap_or(u64::MAX), digest.unwrap_or(Sha256Digest::ZERO)))
    }

    /// Notes durably that a chunk was moved, and with it all behind it.
    pub(super) fn moved(&mut self, chunk: u64, digest: &Sha256Digest) -> Result<(), SealError> {
        self.position
            .write_all_at(&position(chunk, digest), 0)
            .and_then(|()| self.position.sync_data())
            .map_err(failed("write", &self.path("position")))
    }

    /// The header to be.
    pub(super) fn header(&self) -> Result<Vec<u8>, SealError> {
        let path = self.path("header");
        let mut bytes = vec![0; usize::try_from(HEADER_LEN).unwrap_or(0)];
        File::open(&path)
            .and_then(|mut file| file.read_exact(&mut bytes))
            .map_err(failed("read", &path))?;
        Ok(bytes)
    }

    /// The volume key, out of that header.
    pub(super) fn volume_key(&self, image: &Path, passphrase: &Passphrase) -> Result<VolumeKey, SealError> {
        let path = self.path("header");
        let mut device = CryptInit::init(&path).map_err(luks_failed(image, "start"))?;
        device
            .context_handle()
            .load::<()>(Some(EncryptionFormat::Luks2), None)
            .map_err(luks_failed(image, "read the header to be"))?;
        let opened = VolumeKey::open(&mut device, passphrase.expose());
        opened
            .map(|(_, key)| key)
            .map_err(luks_failed(image, "open a key slot"))
    }

    /// The work is done.
    pub(super) fn remove(self) -> Result<(), SealError> {
        for what in ["json", "position", "header"] {
            let path = self.path(what);
            fs::remove_file(&path).map_err(failed("remove", &path))?;
        }
        sync_dir(&self.folder).map_err(failed("sync", &self.folder))
    }

    fn path(&self, what: &str) -> PathBuf {
        self.folder.join(format!("{}.{what}", self.entry.key_id))
    }
}

fn position(left: u64, digest: &Sha256Digest) -> Vec<u8> {
    [left.to_be_bytes().as_slice(), digest.as_ref()].concat()
}

fn identity(file: &File) -> Result<(u64, u64), SealError> {
    let metadata = file.metadata().map_err(failed("look at", Path::new("the image")))?;
    Ok(if metadata.file_type().is_block_device() {
        (metadata.rdev(), 0)
    } else {
        (metadata.dev(), metadata.ino())
    })
}

fn read_entry(path: &Path) -> Result<Entry, SealError> {
    let mut json = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_ENTRY).read_to_end(&mut json))
        .map_err(failed("read", path))?;
    let malformed = |source| SealError::Journal {
        path: path.to_owned(),
        source,
    };
    let entry: Entry = serde_json::from_slice(&json).map_err(malformed)?;
    if entry.version != VERSION {
        return Err(malformed(serde::de::Error::custom(format!(
            "version {} is not known",
            entry.version
        ))));
    }
    Ok(entry)
}

fn failed<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> SealError + 'a {
    move |source| SealError::Output {
        operation,
        path: path.to_owned(),
        source,
    }
}

//! The end of the log: the file that grows, and the lock that lets one process at a time make it grow.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use assay_evidence::audit::{AuditError, Event, Head, MAX_LINE, Record};
use assay_evidence::digest::Sha256Digest;
use assay_evidence::jws::Key;

use super::error::{AuditLogError, failed};
use super::{file_name, files};
use crate::files::{give_to_owner_of_parent, sync_dir};

/// The directory, locked against other writers until this is dropped.
pub(super) struct Locked {
    dir: PathBuf,
    _lock: File,
}

impl Locked {
    pub(super) fn take(dir: &Path) -> Result<Self, AuditLogError> {
        let lock = File::open(dir).map_err(failed("open", dir))?;
        lock.lock().map_err(failed("lock", dir))?;
        Ok(Self {
            dir: dir.to_owned(),
            _lock: lock,
        })
    }

    /// Whether nobody has begun another file since.
    pub(super) fn is_last(&self, tail: Option<&Tail>) -> Result<bool, AuditLogError> {
        Ok(files(&self.dir)?.last().map(|file| &file.path) == tail.map(|tail| &tail.path))
    }
}

/// The last file, and where it ends.
pub(super) struct Tail {
    path: PathBuf,
    file: File,
    len: u64,
    head: Head,
}

impl Tail {
    /// Where the log ends; none while there is no file. What a crash has left there of a record is removed, and is to be written
    /// down.
    pub(super) fn find(lock: &Locked, key: &Key) -> Result<(Option<Self>, Option<Event>), AuditLogError> {
        let Some(last) = files(&lock.dir)?.pop() else {
            return Ok((None, None));
        };
        let path = last.path;
        let mut file = open(&path, false)?;
        let len = file.metadata().map_err(failed("look at", &path))?.len();
        // The last record, and what there may be of another.
        let from = len.saturating_sub(u64::try_from(MAX_LINE).unwrap_or(u64::MAX).saturating_mul(2));
        let mut end = Vec::new();
        file.seek(SeekFrom::Start(from)).map_err(failed("read", &path))?;
        file.read_to_end(&mut end).map_err(failed("read", &path))?;
        let whole = end
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |at| at.saturating_add(1));
        let (lines, rest) = end.split_at_checked(whole).unwrap_or((&[], &end));
        let head = last_head(lines, key, last.first).map_err(|cause| AuditLogError::End {
            path: path.clone(),
            cause,
        })?;
        // A file of which a crash left no whole record goes on from the one before it.
        let head = match head {
            Some(head) => head,
            None => before(lock, key)?,
        };
        let left = u64::try_from(rest.len()).unwrap_or(u64::MAX);
        let len = len.saturating_sub(left);
        let torn = (left > 0).then(|| Event::Torn {
            bytes: left,
            sha256: Sha256Digest::of(rest),
        });
        if torn.is_some() {
            file.set_len(len)
                .and_then(|()| file.sync_data())
                .map_err(failed("shorten", &path))?;
        }
        Ok((Some(Self { path, file, len, head }), torn))
    }

    /// A new file for the record that makes this head.
    pub(super) fn begin(lock: &Locked, head: &Head) -> Result<Self, AuditLogError> {
        let path = file_name(&lock.dir, head.seq);
        let file = open(&path, true)?;
        give_to_owner_of_parent(&file, &path).map_err(failed("change the owner of", &path))?;
        sync_dir(&lock.dir).map_err(failed("sync", &lock.dir))?;
        Ok(Self {
            path,
            file,
            len: 0,
            head: Head::EMPTY,
        })
    }

    pub(super) const fn head(&self) -> Head {
        self.head
    }

    pub(super) fn has_room(&self, more: usize, limit: u64) -> bool {
        let more = u64::try_from(more).unwrap_or(u64::MAX);
        self.len == 0 || self.len.saturating_add(more) <= limit
    }

    /// Whether nobody else has written to the file, or put another in its place.
    pub(super) fn is_current(&self) -> bool {
        let named = std::fs::metadata(&self.path);
        let ours = self.file.metadata();
        named.is_ok_and(|named| {
            ours.is_ok_and(|ours| (named.dev(), named.ino(), named.len()) == (ours.dev(), ours.ino(), self.len))
        })
    }

    /// Writes a record that makes this head; on the disk when this returns.
    pub(super) fn write(&mut self, line: &[u8], head: Head) -> Result<(), AuditLogError> {
        self.file
            .write_all(line)
            .and_then(|()| self.file.sync_data())
            .map_err(failed("write", &self.path))?;
        self.len = self.len.saturating_add(u64::try_from(line.len()).unwrap_or(u64::MAX));
        self.head = head;
        Ok(())
    }
}

/// The head after the last record of these lines; none where there is none.
fn last_head(lines: &[u8], key: &Key, first: u64) -> Result<Option<Head>, AuditError> {
    let Some(lines) = lines.strip_suffix(b"\n") else {
        return Ok(None);
    };
    let last = lines.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
    let seq = Record::read(last, key, first)?.seq;
    let hash = Sha256Digest::of(last);
    Ok(Some(Head { seq, hash }))
}

/// Where the file before the last one ends.
fn before(lock: &Locked, key: &Key) -> Result<Head, AuditLogError> {
    let mut files = files(&lock.dir)?;
    files.pop();
    let Some(file) = files.pop() else {
        return Ok(Head::EMPTY);
    };
    let end = |cause| AuditLogError::End {
        path: file.path.clone(),
        cause,
    };
    let bytes = std::fs::read(&file.path).map_err(failed("read", &file.path))?;
    Ok(last_head(&bytes, key, file.first).map_err(end)?.unwrap_or(Head::EMPTY))
}

fn open(path: &Path, new: bool) -> Result<File, AuditLogError> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .create_new(new)
        .mode(0o600)
        .open(path)
        .map_err(failed("open", path))
}

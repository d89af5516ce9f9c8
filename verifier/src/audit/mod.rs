//! The audit log on this machine: files of signed records, written and synced before a key leaves.
//!
//! The files are named by their first record, and only ever grow; at [`MAX_FILE`] bytes the next one is begun. None is ever
//! removed by this program. Several processes may write: each append holds the directory's lock, and reads what others have
//! written since. What a crash left of a record is
//! removed, and the next record says so.

mod error;
mod file;
mod read;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use assay_evidence::audit::{Event, Head, Record};
use assay_evidence::jws::{Key, Signer};

pub use error::AuditLogError;
pub use read::{LogFile, files, read};

use crate::config::StateDir;
use crate::files::create_private_dir;
use crate::signing;
use crate::time::now;
use error::failed;
use file::{Locked, Tail};

/// A file is not continued beyond this many bytes.
pub const MAX_FILE: u64 = 64 * 1024 * 1024;
/// Refusals of one host that are recorded one by one within [`WINDOW`]; more are counted.
const MAX_REFUSALS: u32 = 60;
const WINDOW: Duration = Duration::from_secs(60);

/// The log, ready to be written.
pub struct AuditLog {
    dir: PathBuf,
    signer: Signer,
    tail: Mutex<Option<Tail>>,
    refusals: Mutex<HashMap<String, Refusals>>,
    max_file: u64,
}

/// How many times a host was refused of late.
struct Refusals {
    since: Instant,
    recorded: u32,
    unrecorded: u64,
}

impl AuditLog {
    /// Opens the log of a state directory, and writes down what a crash has left. A state directory of before there was a log
    /// gets one, with its key.
    ///
    /// # Errors
    /// [`AuditLogError`]: its key is missing or another one, or its files can't be read or written.
    pub fn open(state: &StateDir) -> Result<Self, AuditLogError> {
        let (dir, key) = (state.audit_dir(), state.audit_key());
        create_private_dir(&dir).map_err(failed("create directory", &dir))?;
        let signer = if key.exists() || files(&dir)?.is_empty() {
            signing::open_key(&key)?.0
        } else {
            // A new key would make the log look like somebody else's.
            return Err(AuditLogError::KeyMissing { key, dir });
        };
        let log = Self {
            dir,
            signer,
            tail: Mutex::default(),
            refusals: Mutex::default(),
            max_file: MAX_FILE,
        };
        let lock = Locked::take(&log.dir)?;
        log.current(&lock, &mut log.tail())?;
        Ok(log)
    }

    /// What the log is checked by.
    #[must_use]
    pub const fn key(&self) -> &Key {
        self.signer.public()
    }

    /// Writes a record; it is on the disk when this returns.
    ///
    /// # Errors
    /// [`AuditLogError`]; then whatever was to be recorded must not happen.
    pub fn append(&self, event: Event) -> Result<Head, AuditLogError> {
        let lock = Locked::take(&self.dir)?;
        let mut tail = self.tail();
        self.current(&lock, &mut tail)?;
        let written = self.write(&lock, &mut tail, event);
        if written.is_err() {
            // What there is of it now is found out by reading.
            *tail = None;
        }
        written
    }

    /// Writes down a refusal, unless there were so many of this host that it is only counted.
    ///
    /// # Errors
    /// As [`AuditLog::append`].
    pub fn append_refusal(&self, mut event: Event) -> Result<(), AuditLogError> {
        if let Event::Refused {
            request, unrecorded, ..
        } = &mut event
        {
            match self.count_refusal(&request.host, Instant::now()) {
                Some(others) => *unrecorded = others,
                None => return Ok(()),
            }
        }
        self.append(event).map(|_| ())
    }

    /// How many refusals went before this one without a record; none when this one gets none either.
    fn count_refusal(&self, host: &str, now: Instant) -> Option<u64> {
        let mut hosts = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        // Hosts are enrolled ones: as many as there are, and those of them that are quiet need no place.
        hosts.retain(|name, of| name == host || of.unrecorded > 0 || now.saturating_duration_since(of.since) < WINDOW);
        let of = hosts.entry(host.to_owned()).or_insert(Refusals {
            since: now,
            recorded: 0,
            unrecorded: 0,
        });
        if now.saturating_duration_since(of.since) >= WINDOW {
            (of.since, of.recorded) = (now, 0);
        }
        if of.recorded >= MAX_REFUSALS {
            of.unrecorded = of.unrecorded.saturating_add(1);
            return None;
        }
        of.recorded = of.recorded.saturating_add(1);
        Some(std::mem::take(&mut of.unrecorded))
    }

    /// Brings what is known of the log's end up to date.
    fn current(&self, lock: &Locked, tail: &mut Option<Tail>) -> Result<(), AuditLogError> {
        if tail.as_ref().is_some_and(Tail::is_current) && lock.is_last(tail.as_ref())? {
            return Ok(());
        }
        let (found, torn) = Tail::find(lock, self.signer.public())?;
        *tail = found;
        if let Some(event) = torn {
            tracing::warn!("the audit log ended with a record that was never finished: its key did not leave");
            self.write(lock, tail, event)?;
        }
        Ok(())
    }

    fn write(&self, lock: &Locked, tail: &mut Option<Tail>, event: Event) -> Result<Head, AuditLogError> {
        let before = tail.as_ref().map_or(Head::EMPTY, Tail::head);
        let (line, head) = Record::sign(&before, now(), event, &self.signer)?;
        let line = line + "\n";
        let room = |tail: &Tail| tail.has_room(line.len(), self.max_file);
        if !tail.as_ref().is_some_and(room) {
            *tail = Some(Tail::begin(lock, &head)?);
        }
        if let Some(tail) = tail.as_mut() {
            tail.write(line.as_bytes(), head)?;
        }
        Ok(head)
    }

    fn tail(&self) -> MutexGuard<'_, Option<Tail>> {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The public key of a state directory's log.
///
/// # Errors
/// [`AuditLogError::Signing`].
pub fn public_key(state: &StateDir) -> Result<Key, AuditLogError> {
    Ok(*signing::read_key(&state.audit_key())?.public())
}

/// The file whose first record is this one.
fn file_name(dir: &Path, first: u64) -> PathBuf {
    dir.join(format!("{first:020}.jws"))
}

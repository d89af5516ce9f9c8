//! Events between the kernel's queue and the log: on file before the kernel forgets them.
//!
//! The file holds encoded events, each behind its length. It lives in the run folder and so survives a killed agent, not a
//! reboot. It is emptied whenever the log covers all of it.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use assay_evidence::event::{self, Event};

use super::MeasureError;

/// File name in the run folder.
pub const NAME: &str = "journal";

/// From this size on, a journal that never gets empty is written anew without what the log covers.
const REWRITE: u64 = 4 * 1024 * 1024;

/// No event is longer than this (paths, command line and texts are limited).
const MAX_EVENT: usize = 64 * 1024;

/// The journal, open for appending.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Journal {
    /// Opens the journal of a run folder and gives the events that are in it.
    ///
    /// A last entry that is cut short was never acknowledged to the kernel, which delivers it again: it is dropped.
    ///
    /// # Errors
    /// [`MeasureError::File`].
    pub fn open(run_dir: &Path) -> Result<(Self, Vec<Event>), MeasureError> {
        let path = run_dir.join(NAME);
        let events = match std::fs::read(&path) {
            Ok(bytes) => decode(&bytes),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(source) => {
                return Err(MeasureError::File {
                    operation: "read the journal",
                    path,
                    source,
                });
            }
        };
        let mut journal = Self {
            file: create(&path)?,
            path,
            bytes: 0,
        };
        journal.rewrite(events.iter())?;
        Ok((journal, events))
    }

    /// Appends one event; when this returns, a killed agent's successor will find it.
    ///
    /// # Errors
    /// [`MeasureError::File`], for example when the file system is full; nothing of the event is left then.
    pub fn append(&mut self, event: &Event) -> Result<(), MeasureError> {
        let entry = encode(event)?;
        if let Err(source) = self.file.write_all(&entry) {
            // Half an entry would hide those that come after it.
            drop(self.file.set_len(self.bytes));
            return Err(MeasureError::File {
                operation: "append to the journal",
                path: self.path.clone(),
                source,
            });
        }
        self.bytes += entry.len() as u64;
        Ok(())
    }

    /// The log covers everything but `open`: forget the rest.
    ///
    /// # Errors
    /// [`MeasureError::File`].
    pub fn covered(&mut self, open: &[&Event]) -> Result<(), MeasureError> {
        if self.bytes == 0 {
            return Ok(());
        }
        if open.is_empty() {
            self.file
                .set_len(0)
                .map_err(MeasureError::file("empty the journal", &self.path))?;
            self.bytes = 0;
            return Ok(());
        }
        if self.bytes > REWRITE {
            self.rewrite(open.iter().copied())
        } else {
            Ok(())
        }
    }

    /// Writes a new journal beside the old one and puts it in its place.
    fn rewrite<'a>(&mut self, events: impl Iterator<Item = &'a Event>) -> Result<(), MeasureError> {
        let new = self.path.with_extension("new");
        let remove = std::fs::remove_file(&new);
        if let Err(source) = remove
            && source.kind() != std::io::ErrorKind::NotFound
        {
            return Err(MeasureError::File {
                operation: "remove",
                path: new,
                source,
            });
        }
        let mut file = create(&new)?;
        let mut bytes = 0;
        for event in events {
            let entry = encode(event)?;
            file.write_all(&entry)
                .map_err(MeasureError::file("write the journal", &new))?;
            bytes += entry.len() as u64;
        }
        std::fs::rename(&new, &self.path).map_err(MeasureError::file("replace the journal", &self.path))?;
        (self.file, self.bytes) = (file, bytes);
        Ok(())
    }
}

fn create(path: &Path) -> Result<File, MeasureError> {
    let opened = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
    opened.map_err(MeasureError::file("create", path))
}

fn encode(event: &Event) -> Result<Vec<u8>, MeasureError> {
    let record_error = |source| MeasureError::Record(assay_evidence::cel::CelError::Event { record: 0, source });
    let bytes = event::encode(event).map_err(record_error)?;
    let mut entry = u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes().to_vec();
    entry.extend_from_slice(&bytes);
    Ok(entry)
}

/// All whole events; what comes after the first that makes no sense is dropped with a warning.
fn decode(mut bytes: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<4>() {
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        let entry = rest.get(..length).filter(|_| length <= MAX_EVENT);
        let Some(event) = entry.and_then(|entry| event::decode(entry).ok()) else {
            break;
        };
        events.push(event);
        bytes = rest.get(length..).unwrap_or_default();
    }
    if !bytes.is_empty() {
        tracing::info!(
            bytes = bytes.len(),
            "the journal's last entry is incomplete: the kernel still has that event"
        );
    }
    events
}

#[cfg(test)]
mod tests {
    use assay_evidence::event::Violation;

    use super::*;

    fn lost(count: u64) -> Event {
        Event::Violation(Violation::Lost { count })
    }

    #[test]
    fn what_was_appended_is_found_again_until_covered() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, found) = Journal::open(dir.path()).unwrap();
        assert_eq!(found, []);
        journal.append(&lost(1)).unwrap();
        journal.append(&lost(2)).unwrap();
        let (mut journal, found) = Journal::open(dir.path()).unwrap();
        assert_eq!(found, [lost(1), lost(2)]);
        journal.append(&lost(3)).unwrap();
        journal.covered(&[]).unwrap();
        assert_eq!(Journal::open(dir.path()).unwrap().1, []);
    }

    #[test]
    fn a_cut_entry_at_the_end_is_dropped_wherever_it_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = Journal::open(dir.path()).unwrap();
        journal.append(&lost(1)).unwrap();
        let whole = journal.bytes;
        journal.append(&lost(2)).unwrap();
        let bytes = std::fs::read(dir.path().join(NAME)).unwrap();
        for cut in usize::try_from(whole).unwrap()..bytes.len() {
            assert_eq!(decode(&bytes[..cut]), [lost(1)], "cut at {cut}");
        }
    }

    #[test]
    fn a_large_journal_is_rewritten_with_what_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = Journal::open(dir.path()).unwrap();
        journal.append(&lost(1)).unwrap();
        journal.bytes = REWRITE + 1;
        journal.covered(&[&lost(2)]).unwrap();
        journal.append(&lost(3)).unwrap();
        assert_eq!(Journal::open(dir.path()).unwrap().1, [lost(2), lost(3)]);
    }
}

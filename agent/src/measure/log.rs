//! The runtime log's file: records appended one after the other, never changed.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use assay_evidence::cel::{Head, Record};
use assay_evidence::digest::Algorithm;
use assay_evidence::event::Event;

use super::MeasureError;
use crate::log_view::Advance;

/// File name in the run folder.
pub const NAME: &str = "log.cel";

/// What a record is for: near the log's limit, room is kept for what is more important.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// Events.
    Batch,
    /// An agent's start: a few of them fit after the last batch.
    Start,
    /// That the log is full.
    Last,
}

impl Room {
    /// Bytes before the limit that are not for this.
    const fn kept(self) -> u64 {
        match self {
            Self::Batch => 64 * 1024,
            Self::Start => 4 * 1024,
            Self::Last => 0,
        }
    }
}

/// The log, open for appending.
#[derive(Debug)]
pub struct LogWriter {
    path: PathBuf,
    file: File,
    end: u64,
    max_bytes: u64,
    head: Head,
    pcr: u8,
    banks: Vec<Algorithm>,
}

/// Where a log that exists already stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Position {
    /// Its length in bytes.
    pub end: u64,
    /// Its head.
    pub head: Head,
}

impl LogWriter {
    /// Opens the log at `position`; whatever follows it in the file is cut off.
    pub(super) fn open(
        path: &Path,
        max_bytes: u64,
        position: Position,
        pcr: u8,
        banks: Vec<Algorithm>,
    ) -> Result<Self, MeasureError> {
        let opened = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path);
        let file = opened.map_err(MeasureError::file("open the runtime log", path))?;
        file.set_len(position.end)
            .map_err(MeasureError::file("cut the runtime log", path))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            end: position.end,
            max_bytes,
            head: position.head,
            pcr,
            banks,
        })
    }

    /// Appends a record of these events, if there is room of this kind. It is in the log now, and must be extended before anything else is appended.
    ///
    /// # Errors
    /// [`MeasureError::LogFull`], [`MeasureError::File`]: the log is as before. [`MeasureError::Record`]: the events make no
    /// record.
    pub(super) fn append(&mut self, events: &[Event], room: Room) -> Result<(Record, Advance), MeasureError> {
        let record = Record::build(self.head.records(), self.pcr, events, &self.banks)?;
        let bytes = record.encode();
        let end = self.end + bytes.len() as u64;
        if end > self.max_bytes.saturating_sub(room.kept()) {
            return Err(MeasureError::LogFull {
                path: self.path.clone(),
                max_bytes: self.max_bytes,
            });
        }
        let mut head = self.head;
        head.push(&record)?;
        if let Err(source) = self.file.write_all(&bytes) {
            // No half record stays behind, if the file system lets us.
            drop(self.file.set_len(self.end));
            return Err(MeasureError::File {
                operation: "append to the runtime log",
                path: self.path.clone(),
                source,
            });
        }
        (self.end, self.head) = (end, head);
        Ok((
            record,
            Advance {
                end,
                head: head.value(),
            },
        ))
    }

    /// Its limit in bytes.
    pub(super) const fn max_bytes(&self) -> u64 {
        self.max_bytes
    }

    /// A second descriptor of the file, for readers.
    ///
    /// # Errors
    /// [`MeasureError::File`].
    pub fn reader(&self) -> Result<File, MeasureError> {
        File::open(&self.path).map_err(MeasureError::file("open the runtime log", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_file_system_is_named_with_its_remedy_and_nothing_counts_as_written() {
        let file = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let path = PathBuf::from("/run/assay/log.cel");
        let (head, banks) = (Head::new(), vec![Algorithm::Sha256]);
        let mut log = LogWriter {
            path,
            file,
            end: 0,
            max_bytes: 1 << 20,
            head,
            pcr: 13,
            banks,
        };
        let error = log.append(&[Event::Ready], Room::Batch).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, MeasureError::File { .. }), "{text}");
        assert!(
            text.contains("/run/assay/log.cel") && text.contains("free some space"),
            "{text}"
        );
        assert_eq!((log.end, log.head.records()), (0, 0));
    }

    #[test]
    fn records_are_appended_until_the_limit_and_room_is_kept_for_the_last() {
        const MAX: u64 = 65 * 1024;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let position = Position {
            end: 0,
            head: Head::new(),
        };
        let mut log = LogWriter::open(&path, MAX, position, 13, vec![Algorithm::Sha256]).unwrap();
        let (first, advance) = log.append(&[Event::Ready], Room::Batch).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), first.encode());
        assert_eq!(advance.end, first.encode().len() as u64);
        for (room, limit) in [
            (Room::Batch, 1024),
            (Room::Batch, 1024),
            (Room::Start, 61 * 1024),
            (Room::Batch, 61 * 1024),
            (Room::Last, MAX),
        ] {
            let full = std::iter::from_fn(|| Some(log.append(&[Event::Ready], room)))
                .find_map(Result::err)
                .unwrap();
            assert!(matches!(full, MeasureError::LogFull { max_bytes: MAX, .. }));
            let length = std::fs::metadata(&path).unwrap().len();
            assert!((limit - 250..=limit).contains(&length), "{room:?}: {length}");
        }
    }
}

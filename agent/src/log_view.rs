//! The runtime log as readers see it: exactly what the TPM has been extended with, never half a batch.
//!
//! [`measure`](crate::measure) appends a record to the file and then asks the TPM thread for the extend; that thread
//! moves this view forward right after the TPM said yes, before it takes its next command. A quote takes its
//! [`Snapshot`] on the same thread, so log length and log head in a quote's extraData always belong to the PCR value quoted.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use assay_evidence::digest::Sha256Digest;

/// How far the log had come at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Records in the log.
    pub records: u64,
    /// Log head over these records (zeros while the log is empty).
    pub head: Sha256Digest,
    /// Length of these records in the file, in bytes.
    pub bytes: u64,
}

impl Snapshot {
    /// A log without records.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            records: 0,
            head: Sha256Digest::from([0; 32]),
            bytes: 0,
        }
    }
}

/// A slice of the log was asked for that cannot be given.
#[derive(Debug, thiserror::Error)]
pub enum LogViewError {
    /// The range starts or ends behind the last record, or ends before it starts.
    #[error("log records {from}..{to} were asked for, but the log has {records} records")]
    OutOfRange {
        /// First record asked for.
        from: u64,
        /// End of the range, exclusive.
        to: u64,
        /// Records that the log has.
        records: u64,
    },
    /// The file could not be read.
    #[error("reading the runtime log failed; is the run folder still there?")]
    Read(#[source] std::io::Error),
}

/// Consecutive records of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// Number of the first record.
    pub from: u64,
    /// Records in `data`.
    pub count: u64,
    /// The records, CEL-TLV, one after the other.
    pub data: Vec<u8>,
}

/// A cheap handle to the log for readers.
#[derive(Clone, Debug)]
pub struct LogView(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    boot_id: String,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    file: Option<Arc<File>>,
    /// End of each record in the file; 8 bytes a record is all that the agent keeps of its log in memory.
    ends: Vec<u64>,
    head: Sha256Digest,
}

/// What the log is after one more record; the TPM thread applies it after the extend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advance {
    /// Length of the log with the new record, in bytes.
    pub end: u64,
    /// Log head with the new record.
    pub head: Sha256Digest,
}

impl LogView {
    /// A view of a log that has no record yet, of the boot with this id (`/proc/sys/kernel/random/boot_id`).
    #[must_use]
    pub fn new(boot_id: String) -> Self {
        let state = State {
            file: None,
            ends: Vec::new(),
            head: Snapshot::empty().head,
        };
        Self(Arc::new(Shared {
            boot_id,
            state: Mutex::new(state),
        }))
    }

    /// Boot id of the boot that the log belongs to.
    #[must_use]
    pub fn boot_id(&self) -> &str {
        &self.0.boot_id
    }

    /// Where the log stands now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let state = self.lock();
        Snapshot {
            records: state.ends.len() as u64,
            head: state.head,
            bytes: state.ends.last().copied().unwrap_or(0),
        }
    }

    /// The bytes of records `from..to`, from the log file.
    ///
    /// # Errors
    /// [`LogViewError::OutOfRange`] when there are no such records, [`LogViewError::Read`] when the file cannot be read.
    pub fn read(&self, from: u64, to: u64) -> Result<Vec<u8>, LogViewError> {
        let (file, start, end) = {
            let state = self.lock();
            let records = state.ends.len() as u64;
            let out_of_range = || LogViewError::OutOfRange { from, to, records };
            if from > to {
                return Err(out_of_range());
            }
            let start = state.start_of(from).ok_or_else(out_of_range)?;
            let end = state.start_of(to).ok_or_else(out_of_range)?;
            (state.file.clone(), start, end)
        };
        let length = usize::try_from(end - start).unwrap_or(usize::MAX);
        let mut data = vec![0; length];
        if let Some(file) = file {
            file.read_exact_at(&mut data, start).map_err(LogViewError::Read)?;
        }
        Ok(data)
    }

    /// How many bytes records `from..to` take.
    ///
    /// # Errors
    /// [`LogViewError::OutOfRange`] when there are no such records.
    pub fn length(&self, from: u64, to: u64) -> Result<u64, LogViewError> {
        let state = self.lock();
        let records = state.ends.len() as u64;
        let length = state
            .start_of(to)
            .zip(state.start_of(from))
            .and_then(|(end, start)| end.checked_sub(start));
        length.ok_or(LogViewError::OutOfRange { from, to, records })
    }

    /// Whole records from `from` on, at most `max_bytes` of them, but at least one if there is one.
    ///
    /// # Errors
    /// As [`LogView::read`].
    pub fn page(&self, from: u64, max_bytes: u64) -> Result<Page, LogViewError> {
        let to = {
            let state = self.lock();
            let records = state.ends.len() as u64;
            let start = state.start_of(from).ok_or(LogViewError::OutOfRange {
                from,
                to: records,
                records,
            })?;
            let fit = state
                .ends
                .partition_point(|end| *end <= start.saturating_add(max_bytes)) as u64;
            fit.max(from.saturating_add(1)).min(records)
        };
        Ok(Page {
            from,
            count: to - from,
            data: self.read(from, to)?,
        })
    }

    /// Ties the view to the log's file and the records that are in it and in the TPM already.
    pub(crate) fn attach(&self, file: File, ends: Vec<u64>, head: Sha256Digest) {
        *self.lock() = State {
            file: Some(Arc::new(file)),
            ends,
            head,
        };
    }

    /// One more record is in the log and in the TPM.
    pub(crate) fn advance(&self, advance: Advance) {
        let mut state = self.lock();
        state.ends.push(advance.end);
        state.head = advance.head;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here can panic half-way, and panic = "abort" anyway.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Where record `number` starts; the end of the log for the record after the last.
    fn start_of(&self, number: u64) -> Option<u64> {
        match usize::try_from(number).ok()? {
            0 => Some(0),
            index => self.ends.get(index - 1).copied(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn view(records: &[&[u8]]) -> LogView {
        let view = LogView::new("b".into());
        let mut file = tempfile::tempfile().unwrap();
        let mut ends = Vec::new();
        let mut end = 0;
        for record in records {
            file.write_all(record).unwrap();
            end += record.len() as u64;
            ends.push(end);
        }
        view.attach(file, ends, Sha256Digest::from([1; 32]));
        view
    }

    #[test]
    fn reads_ranges_and_refuses_what_is_not_there() {
        let view = view(&[b"aa", b"bbb", b"c"]);
        assert_eq!(view.read(0, 3).unwrap(), b"aabbbc");
        assert_eq!(view.read(1, 2).unwrap(), b"bbb");
        assert_eq!(view.read(3, 3).unwrap(), b"");
        assert_eq!(view.length(1, 3).unwrap(), 4);
        assert!(view.length(2, 1).is_err());
        assert!(matches!(
            view.read(0, 4),
            Err(LogViewError::OutOfRange { records: 3, .. })
        ));
        assert!(matches!(view.read(2, 1), Err(LogViewError::OutOfRange { .. })));
        assert!(matches!(
            view.read(u64::MAX, u64::MAX),
            Err(LogViewError::OutOfRange { .. })
        ));
    }

    #[test]
    fn pages_hold_whole_records_and_at_least_one() {
        let view = view(&[b"aa", b"bbb", b"c"]);
        assert_eq!(
            view.page(0, 5).unwrap(),
            Page {
                from: 0,
                count: 2,
                data: b"aabbb".to_vec()
            }
        );
        assert_eq!(
            view.page(1, 1).unwrap(),
            Page {
                from: 1,
                count: 1,
                data: b"bbb".to_vec()
            }
        );
        assert_eq!(
            view.page(3, 9).unwrap(),
            Page {
                from: 3,
                count: 0,
                data: Vec::new()
            }
        );
        assert!(view.page(4, 9).is_err());
    }

    #[test]
    fn advance_moves_records_head_and_length_together() {
        let view = LogView::new("b".into());
        assert_eq!(view.snapshot(), Snapshot::empty());
        let head = Sha256Digest::from([7; 32]);
        view.advance(Advance { end: 9, head });
        assert_eq!(
            view.snapshot(),
            Snapshot {
                records: 1,
                head,
                bytes: 9
            }
        );
    }
}

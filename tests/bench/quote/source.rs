//! Kernel records without a kernel: one at a time, so that each becomes a log record of its own.

use std::os::fd::BorrowedFd;

use assay_agent::log_view::LogView;
use assay_agent::measure::source::{EventSource, Refusal, SourceError};
use assay_ebpf::{HASH_ALGO_SHA256, Record, kind};

/// Hands over the next record only when the one before is in the log and the PCR.
pub struct Paced {
    log: LogView,
    seen: u64,
    next: u64,
    until: u64,
}

impl Paced {
    /// Feeds until the log has `until` records.
    pub fn new(log: LogView, until: u64) -> Self {
        Self {
            log,
            seen: 0,
            next: 0,
            until,
        }
    }
}

impl EventSource for Paced {
    fn read(
        &mut self,
        _: usize,
        take: &mut dyn FnMut(&Record) -> Result<(), Refusal>,
    ) -> Result<usize, SourceError> {
        let records = self.log.snapshot().records;
        if records >= self.until || (self.next > 0 && records == self.seen) {
            return Ok(0);
        }
        take(&record(self.next)).map_err(SourceError::Refused)?;
        self.seen = records;
        self.next += 1;
        Ok(1)
    }

    fn lost(&mut self) -> Result<u64, SourceError> {
        Ok(0)
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A library of its own for each number, with a path of usual length.
fn record(number: u64) -> Record {
    let mut record = Record::ZERO;
    let path = format!("/usr/lib/x86_64-linux-gnu/libexample-{number:06}.so.1");
    record.seq = number;
    record.kind = kind::MAPPING;
    record.hash_algo = HASH_ALGO_SHA256;
    record.digest[..8].copy_from_slice(&number.to_be_bytes());
    record.ino = number;
    record.size = 123_456;
    record.path_len = u32::try_from(path.len()).unwrap_or_default();
    record.path[..path.len()].copy_from_slice(path.as_bytes());
    record
}

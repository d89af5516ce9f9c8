//! Kernel records without a kernel: one at a time, so that each becomes a log record of its own.

use std::os::fd::BorrowedFd;

use assay_agent::log_view::LogView;
use assay_agent::measure::source::{EventSource, Refusal, SourceError};
use assay_ebpf::{HASH_ALGO_SHA256, PATH_MAX, Record, kind};

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
    fn read(&mut self, _: usize, take: &mut dyn FnMut(&Record) -> Result<(), Refusal>) -> Result<usize, SourceError> {
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
    let name = format!("/usr/lib/x86_64-linux-gnu/libexample-{number:06}.so.1");
    let mut path = [0; PATH_MAX];
    path.iter_mut().zip(name.as_bytes()).for_each(|(to, from)| *to = *from);
    let mut digest = [1; 32];
    digest
        .iter_mut()
        .zip(number.to_be_bytes())
        .for_each(|(to, from)| *to = from);
    Record {
        seq: number,
        time_ns: number * 1_000_000,
        size: 123_456,
        ino: number + 1,
        change: 1,
        cgroup: 1,
        fs_magic: 0xef53,
        dev: 0x80_0001,
        generation: 1,
        kind: kind::MAPPING,
        flags: 0,
        hash_algo: HASH_ALGO_SHA256,
        hash_error: 0,
        pid: 1000,
        uid: 0,
        digest,
        comm: *b"example\0\0\0\0\0\0\0\0\0",
        path_len: u32::try_from(name.len()).unwrap_or_default(),
        pad: 0,
        path,
    }
}

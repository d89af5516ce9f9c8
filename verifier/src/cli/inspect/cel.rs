//! Runtime logs.

use std::path::Path;

use assay_evidence::cel::{self, CONTENT_ASSAY, CelError, Head, Record};
use serde_json::json;

use super::super::{CliError, print};
use super::{InspectError, text};

/// A record and where it lies in the log.
pub(super) struct Placed {
    /// The record.
    pub record: Record,
    /// Where it begins, in bytes from the log's start.
    pub offset: usize,
    /// Its length in bytes.
    pub len: usize,
}

/// Reads records one by one and checks each as far as it can be checked without a quote: numbers without a gap, digests
/// that are those of the content, events that can be read. Ends after the first error.
pub(super) struct Records<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    offset: usize,
    next: u64,
    failed: bool,
}

impl<'a> Records<'a> {
    /// The records in `bytes`, of which the first has the number `from`; `path` is for errors.
    pub(super) fn new(path: &'a Path, bytes: &'a [u8], from: u64) -> Self {
        Self { path, bytes, offset: 0, next: from, failed: false }
    }

    fn read(&mut self, rest: &[u8]) -> Result<Placed, CelError> {
        let (record, len) = cel::read(rest)?;
        if record.number != self.next {
            return Err(CelError::Number { found: record.number, wanted: self.next });
        }
        record.check_digests()?;
        // Other projects' content is theirs to read.
        if record.content_type == CONTENT_ASSAY {
            record.events()?;
        }
        let placed = Placed { record, offset: self.offset, len };
        self.offset = self.offset.saturating_add(len);
        self.next = self.next.saturating_add(1);
        Ok(placed)
    }
}

impl Iterator for Records<'_> {
    type Item = Result<Placed, InspectError>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.bytes.get(self.offset..).filter(|rest| !rest.is_empty() && !self.failed)?;
        Some(self.read(rest).map_err(|cause| {
            self.failed = true;
            let (path, record, offset) = (self.path.to_owned(), self.next, self.offset);
            InspectError::Record { path, record, offset, cause }
        }))
    }
}

/// Shows a whole log. As text, every record before a damaged one is shown; as JSON, all or nothing.
pub(super) fn run(path: &Path, bytes: &[u8], as_json: bool) -> Result<(), CliError> {
    let head = if as_json {
        // Once over it before the first byte goes out, so that nobody parses half a document.
        Records::new(path, bytes, 0).try_for_each(|placed| placed.map(drop))?;
        print_records_json(path, bytes)?
    } else {
        let mut head = Head::new();
        for placed in Records::new(path, bytes, 0) {
            let placed = placed?;
            push(&mut head, path, &placed)?;
            print(&text::record(&placed))?;
        }
        head
    };
    let (records, value) = (head.records(), head.value());
    if as_json {
        let [records, value] = [json!(records), json!(value)];
        print(&format!("],\n\"count\": {records},\n\"head\": {value}}}\n"))
    } else {
        print(&format!("{records} records, {} bytes, head sha256:{value}\n", bytes.len()))
    }
}

/// Prints the opening of the document and its records, one a line; memory holds one at a time.
fn print_records_json(path: &Path, bytes: &[u8]) -> Result<Head, CliError> {
    let mut head = Head::new();
    print("{\"records\": [\n")?;
    for placed in Records::new(path, bytes, 0) {
        let placed = placed?;
        let comma = if head.records() == 0 { "" } else { ",\n" };
        push(&mut head, path, &placed)?;
        print(&format!("{comma}{}", cel::to_json(&placed.record)))?;
    }
    Ok(head)
}

fn push(head: &mut Head, path: &Path, placed: &Placed) -> Result<(), InspectError> {
    head.push(&placed.record).map_err(|cause| InspectError::Record {
        path: path.to_owned(),
        record: placed.record.number,
        offset: placed.offset,
        cause,
    })
}

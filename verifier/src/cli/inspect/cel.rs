//! Runtime logs.

use std::path::Path;

use assay_evidence::cel::{self, CONTENT_ASSAY, CelError, Head, Record};
use assay_evidence::digest::Sha256Digest;
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
        Self {
            path,
            bytes,
            offset: 0,
            next: from,
            failed: false,
        }
    }

    fn read(&mut self, rest: &[u8]) -> Result<Placed, CelError> {
        let (record, len) = cel::read(rest)?;
        if record.number != self.next {
            return Err(CelError::Number {
                found: record.number,
                wanted: self.next,
            });
        }
        record.check_digests()?;
        // Other projects' content is theirs to read.
        if record.content_type == CONTENT_ASSAY {
            record.events()?;
        }
        let placed = Placed {
            record,
            offset: self.offset,
            len,
        };
        self.offset = self.offset.saturating_add(len);
        self.next = self.next.saturating_add(1);
        Ok(placed)
    }
}

impl Iterator for Records<'_> {
    type Item = Result<Placed, InspectError>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self
            .bytes
            .get(self.offset..)
            .filter(|rest| !rest.is_empty() && !self.failed)?;
        Some(self.read(rest).map_err(|cause| {
            self.failed = true;
            let (path, record, offset) = (self.path.to_owned(), self.next, self.offset);
            InspectError::Record {
                path,
                record,
                offset,
                cause,
            }
        }))
    }
}

/// Shows a whole log. As text, every record before a damaged one is shown; as JSON, all or nothing.
pub(super) fn run(path: &Path, bytes: &[u8], as_json: bool) -> Result<(), CliError> {
    if as_json {
        // Once over it before the first byte goes out, so that nobody parses half a document.
        total(path, bytes)?;
        return print_json(path, bytes);
    }
    let mut total = Total::default();
    for placed in Records::new(path, bytes, 0) {
        let placed = placed?;
        total.push(path, &placed)?;
        print(&text::record(&placed))?;
    }
    let head = total
        .head()
        .map_or_else(|| "none".to_owned(), |head| format!("sha256:{head}"));
    print(&format!(
        "{} records, {} bytes, head {head}\n",
        total.records,
        bytes.len()
    ))
}

fn total(path: &Path, bytes: &[u8]) -> Result<Total, InspectError> {
    let mut total = Total::default();
    for placed in Records::new(path, bytes, 0) {
        total.push(path, &placed?)?;
    }
    Ok(total)
}

/// Prints records one a line; memory holds one at a time.
fn print_json(path: &Path, bytes: &[u8]) -> Result<(), CliError> {
    let mut total = Total::default();
    print("{\"records\": [\n")?;
    for placed in Records::new(path, bytes, 0) {
        let placed = placed?;
        let comma = if total.records == 0 { "" } else { ",\n" };
        total.push(path, &placed)?;
        print(&format!("{comma}{}", cel::to_json(&placed.record)))?;
    }
    let [records, head] = [json!(total.records), json!(total.head())];
    print(&format!("],\n\"count\": {records},\n\"head\": {head}}}\n"))
}

/// What a log comes to. The head is this project's own notion: a log of another one, which may lack the bank that the
/// head is made of, has none.
#[derive(Default)]
struct Total {
    records: u64,
    foreign: bool,
    head: Head,
}

impl Total {
    fn push(&mut self, path: &Path, placed: &Placed) -> Result<(), InspectError> {
        self.records = self.records.saturating_add(1);
        self.foreign |= placed.record.content_type != CONTENT_ASSAY;
        if self.foreign {
            return Ok(());
        }
        self.head.push(&placed.record).map_err(|cause| InspectError::Record {
            path: path.to_owned(),
            record: placed.record.number,
            offset: placed.offset,
            cause,
        })
    }

    fn head(&self) -> Option<Sha256Digest> {
        (!self.foreign).then(|| self.head.value())
    }
}

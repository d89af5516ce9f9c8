//! Reading the log, file by file, with every record checked.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};

use assay_evidence::audit::{AuditError, Checker, Head, MAX_LINE, Record};

use super::error::{AuditLogError, failed};

/// A file of the log.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct LogFile {
    /// Number of its first record, as its name says.
    pub first: u64,
    /// The file.
    pub path: PathBuf,
}

/// The files of a log's directory, oldest first; none if there is no directory.
///
/// # Errors
/// [`AuditLogError::Io`], [`AuditLogError::Strange`].
pub fn files(dir: &Path) -> Result<Vec<LogFile>, AuditLogError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed("list", dir)(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed("list", dir))?.path();
        let first = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok());
        match first.filter(|first| super::file_name(dir, *first) == path) {
            Some(first) => files.push(LogFile { first, path }),
            None => return Err(AuditLogError::Strange(path)),
        }
    }
    files.sort();
    Ok(files)
}

/// Reads files in this order as one log, and gives each record that was checked to `see`. Gives the log's head.
///
/// # Errors
/// [`AuditLogError::Record`] for the first record that is wrong, [`AuditLogError::Io`].
pub fn read(files: &[PathBuf], mut checker: Checker<'_>, see: &mut dyn FnMut(Record)) -> Result<Head, AuditLogError> {
    let (mut rest, mut at) = (Vec::new(), (PathBuf::new(), 0_u64));
    for path in files {
        let file = File::open(path).map_err(failed("open", path))?;
        let mut reader = BufReader::new(file);
        // What the file before ends with, other than a line end, is torn, and not the beginning of this one's first line.
        if !rest.is_empty() {
            break;
        }
        at = (path.clone(), 0);
        while next_line(&mut reader, path, &mut rest)? {
            at.1 = at.1.saturating_add(1);
            let line = rest.strip_suffix(b"\n").unwrap_or(&rest);
            see(checker.line(line).map_err(wrong(&at))?);
            rest.clear();
        }
        if !rest.is_empty() {
            at.1 = at.1.saturating_add(1);
        }
    }
    checker.end(&rest).map_err(wrong(&at))
}

fn wrong(at: &(PathBuf, u64)) -> impl Fn(AuditError) -> AuditLogError {
    let (path, line) = at.clone();
    move |cause| AuditLogError::Record {
        path: path.clone(),
        line,
        cause,
    }
}

/// Reads a line, at most as much of it as shows that it is too long; whether it came with its end.
fn next_line(reader: &mut BufReader<File>, path: &Path, line: &mut Vec<u8>) -> Result<bool, AuditLogError> {
    let limit = u64::try_from(MAX_LINE).unwrap_or(u64::MAX).saturating_add(2);
    let read = reader.by_ref().take(limit).read_until(b'\n', line);
    let read = read.map_err(failed("read", path))?;
    // Too long is as good as whole: the check refuses it.
    Ok(line.ends_with(b"\n") || u64::try_from(read).unwrap_or(u64::MAX) >= limit)
}

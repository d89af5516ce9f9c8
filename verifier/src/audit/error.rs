//! Why the audit log can't be written or read.

use std::io;
use std::path::{Path, PathBuf};

use assay_evidence::audit::AuditError;

use crate::signing::SigningError;

/// A refusal of the audit log.
#[derive(Debug, thiserror::Error)]
pub enum AuditLogError {
    /// The key that signs records.
    #[error(transparent)]
    Signing(#[from] SigningError),
    /// There are records, and no key.
    #[error(
        "{} is missing, and {} has records that it signed: restore it from a backup of the state directory, or move that directory away to begin a new log", .key.display(), .dir.display()
    )]
    KeyMissing {
        /// The key's file.
        key: PathBuf,
        /// The log's directory.
        dir: PathBuf,
    },
    /// The log's end is none that this verifier wrote.
    #[error("the audit log {} cannot be continued: `assay-verifier audit verify` says where it is wrong", .path.display())]
    End {
        /// The last file.
        path: PathBuf,
        /// What is wrong with its last record.
        #[source]
        cause: AuditError,
    },
    /// A record is wrong.
    #[error("{}, line {line}", .path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The line; the first one is 1.
        line: u64,
        /// What is wrong.
        #[source]
        cause: AuditError,
    },
    /// A record cannot be made.
    #[error("a record of the audit log cannot be made")]
    Make(#[from] AuditError),
    /// A file in the directory that is none of the log's.
    #[error("{} is no file of an audit log: move it out of the directory", .0.display())]
    Strange(PathBuf),
    /// A file or directory.
    #[error("audit log: cannot {doing} {}", .path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        cause: io::Error,
    },
}

/// Turns a failed operation into an error that names it.
pub(super) fn failed<'a>(doing: &'static str, path: &'a Path) -> impl Fn(io::Error) -> AuditLogError + 'a {
    move |cause| AuditLogError::Io {
        doing,
        path: path.to_owned(),
        cause,
    }
}

//! Measuring: kernel events become log records, and log records become PCR extends. The only writer of both.
//!
//! The rules, in the order in which a load meets them:
//!
//! 1. An event is written to the [`journal`] before its place in the kernel's queue is freed: `kill -9` loses nothing.
//! 2. While the TPM is busy, events gather; all that gathered share one record and one extend (no timer).
//! 3. A record is appended to the [`log`] first and extended second, one record in flight at a time. So after a crash the PCR
//!    equals the log, or the log without its last record, and [`recovery`] knows which; anything else is a violation.
//! 4. What the kernel could not deliver is counted there and said here, as a violation in the next record; so is a number
//!    that the kernel gave out and that never came.
//! 5. When the log is full, it says so in a last record for which room was kept; nothing is taken from the kernel any more.
//! 6. When the log cannot be written, silence would look clean. So the PCR is extended with [`BROKEN`], which no log
//!    explains: every later quote of this boot fails to replay, and the agent ends with an error.

pub mod complete;
pub mod control;
pub mod convert;
pub mod hold;
pub mod host;
pub mod inventory;
pub mod journal;
pub mod kernel;
mod lock;
pub mod log;
pub mod measurer;
pub mod mounts;
pub mod own;
pub mod probe;
pub mod recovery;
mod sequence;
pub mod source;
pub mod trouble;

use std::path::{Path, PathBuf};

use assay_evidence::cel::CelError;

pub use self::control::{Approval, Control};
pub use self::measurer::{Measurer, Settings};
use crate::tpm::TpmError;
use source::SourceError;

/// What the PCR is extended with (hashed for each bank) when the log can no longer be written.
pub const BROKEN: &[u8] = b"assay/runtime-log-broken/1\0";

/// Measuring cannot start, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// Another agent writes this log.
    #[error(
        "another assay-agent is running (it holds {path}): stop it first, for example with `systemctl stop assay-agent`"
    )]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// A file in the run folder could not be used.
    #[error("cannot {operation} {path}: {}", remedy(.source))]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The log has reached its configured size.
    #[error(
        "the runtime log {path} has reached its limit of {max_bytes} bytes: raise [measure] log_max_mib in agent.toml and restart the \
         host (a log's life is a boot)"
    )]
    LogFull {
        /// The log.
        path: PathBuf,
        /// Its limit in bytes.
        max_bytes: u64,
    },
    /// Something about the host that belongs in the log's first record cannot be read.
    #[error("cannot read {path}, which the log's first record states")]
    HostFact {
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The processes of the host cannot be listed.
    #[error("cannot list the running processes; is /proc mounted, and not with hidepid?")]
    Inventory(#[source] procfs::ProcError),
    /// A record cannot be built.
    #[error("a log record cannot be built")]
    Record(#[from] CelError),
    /// The TPM does not take extends.
    #[error("the log's PCR cannot be extended")]
    Tpm(#[from] TpmError),
    /// The kernel's events cannot be read.
    #[error("the kernel's events cannot be read")]
    Source(#[from] SourceError),
    /// A helper thread could not be started.
    #[error("a thread cannot be started")]
    Thread(#[source] std::io::Error),
    /// Waiting for events failed.
    #[error("waiting for kernel events failed")]
    Wait(#[source] std::io::Error),
}

impl MeasureError {
    pub(crate) fn file(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File {
            operation,
            path,
            source,
        }
    }
}

fn remedy(error: &std::io::Error) -> &'static str {
    use std::io::ErrorKind as Kind;
    match error.kind() {
        Kind::StorageFull | Kind::QuotaExceeded => {
            "its file system is full; free some space there, or name another folder with run_dir in agent.toml"
        }
        Kind::PermissionDenied | Kind::ReadOnlyFilesystem => {
            "the folder must be writable for root; check its permissions and mount options, or name another with run_dir in agent.toml"
        }
        Kind::NotFound => {
            "the folder is missing; create it (systemd does, with RuntimeDirectory=assay), or name another with run_dir in agent.toml"
        }
        _ => "check the folder that run_dir in agent.toml names",
    }
}

//! `assay-verifier inspect`: shows evidence that was saved to a file. It reads formats and checks what a log can be
//! checked for by itself; it trusts nothing and judges nothing, for without the host's attestation key there is nothing
//! to judge by.

mod bundle;
mod cel;
mod quote;
mod text;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use assay_evidence::bootlog::{self, BootLogError};
use assay_evidence::bundle::{BundleError, MAX_BUNDLE, MAX_TPM_PART};
use assay_evidence::cel::CelError;
use assay_evidence::digest::Algorithm;
use assay_evidence::imalog::{self, ImaLogError};
use assay_evidence::tpm::TpmError;
use thiserror::Error;

use super::{CliError, print, print_json};

/// Longest runtime log that is read, in bytes: four times the agent's default limit.
const MAX_CEL: usize = 256 * 1024 * 1024;

/// `inspect …`.
#[derive(Debug, clap::Subcommand)]
pub(super) enum InspectCommand {
    /// The firmware's event log (/sys/kernel/security/tpm0/binary_bios_measurements)
    BootLog(FileArgs),
    /// A runtime log in CEL-TLV (an agent's /run/assay/log.cel)
    Cel(FileArgs),
    /// The kernel's IMA log (/sys/kernel/security/ima/binary_runtime_measurements)
    ImaLog(ImaArgs),
    /// What a TPM signed, a TPMS_ATTEST (as tpm2_quote --message writes it)
    Quote(FileArgs),
    /// An evidence bundle in JSON
    Bundle(FileArgs),
}

/// Options of `inspect ima-log`.
#[derive(Debug, clap::Args)]
pub(super) struct ImaArgs {
    #[command(flatten)]
    file: FileArgs,
    /// Bank of the list's template digests: sha1, or that in the list's name (binary_runtime_measurements_sha256)
    #[arg(long, default_value = "sha1")]
    bank: Algorithm,
}

/// What every form of `inspect` takes.
#[derive(Debug, clap::Args)]
pub(super) struct FileArgs {
    /// The saved evidence
    file: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Why saved evidence can't be shown, or is damaged.
#[derive(Debug, Error)]
pub enum InspectError {
    /// The file can't be read.
    #[error("cannot read {0}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        cause: io::Error,
    },
    /// The file is longer than any evidence of its kind.
    #[error("{0} is longer than the {limit} bytes that are read of this kind of evidence; is it the right file?", .path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        limit: usize,
    },
    /// A record of a runtime log is damaged; those before it are shown.
    #[error("{0}: record {record}, at byte {offset}", .path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The record, counted from the first one in the file.
        record: u64,
        /// Where it begins, in bytes from the log's start.
        offset: usize,
        /// What is wrong with it.
        #[source]
        cause: CelError,
    },
    /// Not a boot log.
    #[error("{0}", .path.display())]
    BootLog {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        cause: BootLogError,
    },
    /// Not an IMA log.
    #[error("{0}", .path.display())]
    ImaLog {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        cause: ImaLogError,
    },
    /// Not a bundle.
    #[error("{0}", .path.display())]
    Bundle {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        cause: BundleError,
    },
    /// A TPM structure can't be read.
    #[error("{0}: {part}", .path.display())]
    Tpm {
        /// The file.
        path: PathBuf,
        /// Which member of a bundle, or what the file should hold.
        part: &'static str,
        /// What is wrong with it.
        #[source]
        cause: TpmError,
    },
    /// A bundle does not hold as many records as it says.
    #[error("{0}: log.records says {wanted}, but log.data ends with record {found} as the next one; the bundle was cut or changed", .path.display())]
    Count {
        /// The file.
        path: PathBuf,
        /// Number of records that the bundle claims.
        wanted: u64,
        /// Number that the next record would have.
        found: u64,
    },
}

pub(super) fn run(command: InspectCommand) -> Result<(), CliError> {
    match command {
        InspectCommand::BootLog(args) => boot_log(&args),
        InspectCommand::ImaLog(args) => ima_log(&args),
        InspectCommand::Quote(args) => quote::run(&args.file, &read(&args.file, MAX_TPM_PART)?, args.json),
        InspectCommand::Cel(args) => cel::run(&args.file, &read(&args.file, MAX_CEL)?, args.json),
        InspectCommand::Bundle(args) => bundle::run(&args.file, &read(&args.file, MAX_BUNDLE)?, args.json),
    }
}

fn boot_log(args: &FileArgs) -> Result<(), CliError> {
    let bytes = read(&args.file, bootlog::MAX_LOG)?;
    let log = bootlog::parse(&bytes).map_err(|cause| InspectError::BootLog {
        path: args.file.clone(),
        cause,
    })?;
    if args.json {
        print_json(&log.to_json())
    } else {
        print(&log.to_string())
    }
}

fn ima_log(args: &ImaArgs) -> Result<(), CliError> {
    let bytes = read(&args.file.file, imalog::MAX_LOG)?;
    let log = imalog::parse(&bytes, args.bank).map_err(|cause| InspectError::ImaLog {
        path: args.file.file.clone(),
        cause,
    })?;
    if args.file.json {
        print_json(&log.to_json())
    } else {
        print(&log.to_string())
    }
}

/// Reads a file of at most `limit` bytes, whatever its metadata says: files under /sys claim to be empty.
fn read(path: &Path, limit: usize) -> Result<Vec<u8>, InspectError> {
    let failed = |cause| InspectError::Read {
        path: path.to_owned(),
        cause,
    };
    let budget = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    let mut bytes = Vec::new();
    File::open(path)
        .map_err(failed)?
        .take(budget)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() > limit {
        return Err(InspectError::TooLong {
            path: path.to_owned(),
            limit,
        });
    }
    Ok(bytes)
}

//! The operator's commands. Each reads the state directory, does one thing, prints what it did, and tells in its exit
//! code whether it worked: 0 done, 1 failed, 2 wrong usage.

use std::error::Error;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use thiserror::Error;

use crate::config::{ConfigError, StateDir};
use crate::store::StoreError;

mod audit;
mod host;
mod image;
pub mod init;
mod inspect;
mod key;
mod policy;
mod serve;

pub use init::InitError;

/// Asks hosts for evidence, judges it, and releases disk keys to hosts that appraise clean.
#[derive(Debug, Parser)]
#[command(
    name = "assay-verifier",
    version,
    max_term_width = 120,
    disable_help_subcommand = true
)]
struct Cli {
    /// Directory that holds the CA, the keys and the database
    #[arg(long, value_name = "DIR", default_value = "/var/lib/assay-verifier", global = true)]
    state: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a new verifier: CA, certificates, key-store master key, join file and configuration
    Init(init::InitArgs),
    /// Ask every host at an interval, and answer requests for disk keys
    Serve,
    /// Enrol, list and remove hosts
    #[command(subcommand)]
    Host(host::HostCommand),
    /// Known-good values: capture them from a good host, show them, allow one more digest
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// Disk images
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Disk keys
    #[command(subcommand)]
    Key(key::KeyCommand),
    /// The signed log of which key went to which host, and who was refused
    #[command(subcommand)]
    Audit(audit::AuditCommand),
    /// Read evidence that was saved to a file
    #[command(subcommand)]
    Inspect(inspect::InspectCommand),
}

/// Why a command failed.
#[derive(Debug, Error)]
pub enum CliError {
    /// Making a new verifier.
    #[error(transparent)]
    Init(#[from] InitError),
    /// The state directory or `config.toml`.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Certificates.
    #[error(transparent)]
    Pki(#[from] crate::pki::PkiError),
    /// Talking to an agent.
    #[error(transparent)]
    Client(#[from] crate::client::ClientError),
    /// Enrolling a host.
    #[error(transparent)]
    Enrol(#[from] crate::enrol::EnrolError),
    /// Looking at a host.
    #[error(transparent)]
    Look(#[from] crate::judge::LookError),
    /// The service.
    #[error(transparent)]
    Serve(#[from] crate::serve::ServeError),
    /// Sealing an image.
    #[error(transparent)]
    Image(#[from] image::ImageError),
    /// The key of a VHD.
    #[error(transparent)]
    VhdKey(key::VhdKeyError),
    /// The key store.
    #[error(transparent)]
    Key(#[from] crate::keystore::KeyStoreError),
    /// The audit log.
    #[error(transparent)]
    Audit(#[from] crate::audit::AuditLogError),
    /// A file that holds no public key.
    #[error("{} holds no public key that records could be checked by", .0.display())]
    AuditKey(PathBuf, #[source] assay_evidence::jws::KeyError),
    /// Reading saved evidence.
    #[error(transparent)]
    Inspect(#[from] inspect::InspectError),
    /// A policy that exists would be replaced.
    #[error(
        "policy {0} exists already; give --add to allow what this host shows as well, --replace to lose what it allows now, or --name for another"
    )]
    PolicyExists(String),
    /// A policy that exists would be replaced by a file.
    #[error("policy {0} exists already; give --replace to lose what it allows now, or --name for another")]
    PolicyThere(String),
    /// A file to be approved cannot be read.
    #[error("cannot read {}", .0.display())]
    FileRead(PathBuf, #[source] io::Error),
    /// A policy's file cannot be read.
    #[error("cannot read {}", .0.display())]
    PolicyRead(PathBuf, #[source] io::Error),
    /// A policy's file cannot be written.
    #[error("cannot write {}", .0.display())]
    PolicyWrite(PathBuf, #[source] io::Error),
    /// A file that holds no policy.
    #[error("{} holds no policy that can be used", .0.display())]
    PolicyFile(PathBuf, #[source] assay_evidence::policy::PolicyError),
    /// A signed policy was to be read as a plain one.
    #[error("{} looks like a signed policy: name the key of the verifier that signed it, with --signer", .0.display())]
    PolicyNeedsSigner(PathBuf),
    /// A file that holds no public key.
    #[error("{} holds no public key that a policy could be checked by", .0.display())]
    PolicyKey(PathBuf, #[source] assay_evidence::jws::KeyError),
    /// A signed policy that is refused.
    #[error("{} cannot be used as a signed policy", .0.display())]
    PolicySigned(PathBuf, #[source] assay_evidence::policy::SignedPolicyError),
    /// No policy can be made from what the host shows.
    #[error("the host's state cannot be captured")]
    Policy(#[source] assay_evidence::policy::PolicyError),
    /// A package or folder to take known-good digests from.
    #[error(transparent)]
    KnownGood(#[from] crate::known_good::ScanError),
    /// Approved lists.
    #[error(transparent)]
    Lists(#[from] crate::lists::ListsError),
    /// A key to sign with.
    #[error(transparent)]
    Signing(#[from] crate::signing::SigningError),
    /// A verdict for relying parties.
    #[error(transparent)]
    Verdict(#[from] crate::verdicts::VerdictError),
    /// A signed list cannot be written.
    #[error("cannot write {}", .0.display())]
    ListWrite(PathBuf, #[source] io::Error),
    /// A file of CA certificates cannot be read.
    #[error("cannot read {}", .0.display())]
    CaRead(PathBuf, #[source] io::Error),
    /// A file of CA certificates holds none.
    #[error("{} cannot be used as CA certificates", .0.display())]
    CaFile(PathBuf, #[source] assay_evidence::ek::EkError),
    /// The runtime could not be started.
    #[error("cannot start the async runtime")]
    Runtime(#[source] io::Error),
    /// The answer could not be printed.
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
}

/// All commands and their options: what manual pages and shell completions are made from.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Parses the command line, runs the command and reports.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nowhere is left to report a failure to report.
            let _closed = writeln!(io::stderr(), "assay-verifier: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<(), CliError> {
    let state = StateDir::new(cli.state);
    match cli.command {
        Command::Init(args) => init::run(&state, args),
        Command::Serve => serve::run(&state),
        Command::Host(command) => host::run(&state, command),
        Command::Policy(command) => policy::run(&state, command),
        Command::Image(command) => image::run(&state, command),
        Command::Key(command) => key::run(&state, command),
        Command::Audit(command) => audit::run(&state, command),
        Command::Inspect(command) => inspect::run(command),
    }
}

/// An error with all of its causes, in one line: `what: because: because`.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _infallible = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

/// Prints a command's answer. A reader that went away (`| head`) is no failure.
pub(crate) fn print(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(CliError::Output(e)),
        _ => Ok(()),
    }
}

/// Prints a command's answer as indented JSON.
pub(crate) fn print_json(value: &serde_json::Value) -> Result<(), CliError> {
    print(&format!("{value:#}\n"))
}

/// Runs an async command on one thread.
pub(crate) fn block_on<T>(work: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(CliError::Runtime)?;
    runtime.block_on(work)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}

//! Commands: their arguments, their exit codes, their words.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the verifier refused or does not trust this host, 4 no verifier was reached in time.

mod approve;
mod client;
mod disks;
mod doctor;
mod hook;
mod join;
mod log;
mod status;
mod verdict;

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

use crate::approved::ApprovedError;
use crate::config::{Config, ConfigError};
use crate::daemon;
use crate::doctor::grub::GrubError;
use crate::early;
use crate::http::chain;
use crate::join::JoinError;
use crate::memory;
use crate::tpm::TpmError;
use crate::unlock::api;

/// The most seconds that `--timeout` takes.
const MAX_TIMEOUT_S: u64 = 3600;

#[derive(Debug, Parser)]
#[command(
    name = "assay-agent",
    version,
    about = "Measures what this host runs, attests to it, and opens sealed disks while it is trusted",
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the verifier refused or does not trust this host, 4 no verifier was reached in time.",
    max_term_width = 120,
    disable_help_subcommand = true
)]
struct Arguments {
    /// Configuration file [default: /etc/assay/agent.toml if it exists]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure, and serve quotes to the verifiers that this host has joined (what the systemd unit runs)
    Run {
        /// In an initramfs: only measure and observe, until the agent of the real root asks for its place
        #[arg(long)]
        early: bool,
    },
    /// Join a verifier: take over its CA and addresses, and make this host's TLS key
    Join {
        /// The join file that `assay-verifier init` made
        file: PathBuf,
        /// Leave the verifier that this host has joined before, and make a new TLS key
        #[arg(long)]
        force: bool,
    },
    /// Show what the running agent measures, and whom it answers to
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the runtime log of this boot
    Log {
        /// Print each record as a line of CEL-JSON
        #[arg(long)]
        json: bool,
    },
    /// Ask the verifier for a sealed disk's key and open the disk; prints its device
    Unlock {
        /// File or block device, sealed by `assay-verifier image seal` as LUKS2, LUKS1 or qcow2
        image: PathBuf,
        /// Name under /dev/mapper [default: assay- and the first 8 digits of the LUKS UUID]
        #[arg(long)]
        name: Option<String>,
        /// How long to keep trying to reach a verifier [default: unlock.timeout_s of the configuration, 60]
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=MAX_TIMEOUT_S))]
        timeout: Option<u64>,
        /// The machine that the disk is for, as the verifier's audit log shall name it
        #[arg(long, value_name = "NAME")]
        vm: Option<String>,
    },
    /// Take an approved list that `assay-verifier policy sign-list` wrote: what may run in enforce mode
    Approve {
        /// The signed list
        file: PathBuf,
    },
    /// Close a disk that `unlock` opened
    Lock {
        /// Its name under /dev/mapper
        name: String,
    },
    /// Ask the verifier how this host stands; fails, with the reasons, when it is not trusted
    Verdict {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// How long to keep trying to reach a verifier [default: unlock.timeout_s of the configuration, 60]
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=MAX_TIMEOUT_S))]
        timeout: Option<u64>,
    },
    /// Say what of this host's boot and run time is measured and what is not, what does not work, and the remedy for each
    Doctor(doctor::DoctorArguments),
    /// Open and close the disks of a table, /etc/assay/disks
    #[command(subcommand)]
    Disks(disks::DisksCommand),
    /// What toolstacks call, through the files in packaging/hooks
    #[command(subcommand)]
    Hook(hook::HookCommand),
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The configuration file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The daemon ended.
    #[error(transparent)]
    Daemon(#[from] daemon::DaemonError),
    /// The join file or the state folder.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The approved list.
    #[error(transparent)]
    Approved(#[from] ApprovedError),
    /// The TPM could not be asked for the endorsement key.
    #[error("the endorsement key could not be read, so nothing was changed")]
    Tpm(#[source] TpmError),
    /// A file could not be read.
    #[error("cannot read {path}; is the agent running, and are you root?")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The log is not what an agent writes.
    #[error("{path} is damaged at byte {offset}")]
    Log {
        /// The log.
        path: PathBuf,
        /// Where.
        offset: usize,
        /// How.
        #[source]
        source: assay_evidence::cel::CelError,
    },
    /// The output could not be written.
    #[error("cannot write the output")]
    Output(#[source] std::io::Error),
    /// Something could not be written as JSON.
    #[error("cannot write JSON")]
    Json(#[source] serde_json::Error),
    /// The daemon could not be asked.
    #[error(transparent)]
    Client(#[from] client::ClientError),
    /// The daemon said no.
    #[error("{message}")]
    Refused {
        /// Its word for programs.
        code: String,
        /// Its words for people.
        message: String,
        /// Single reasons.
        reasons: Vec<String>,
    },
    /// The verifier does not trust this host.
    #[error("host {host} is {state}, says {verifier}")]
    NotTrusted {
        /// The verifier's name for this host.
        host: String,
        /// How it stands.
        state: String,
        /// Which verifier.
        verifier: String,
        /// Single reasons.
        reasons: Vec<String>,
    },
    /// The table of disks.
    #[error(transparent)]
    Table(#[from] disks::TableError),
    /// Some disks of the table.
    #[error("{failed} of {all} disks failed")]
    SomeDisks {
        /// How many.
        failed: usize,
        /// Of how many.
        all: usize,
    },
    /// GRUB's configuration.
    #[error(transparent)]
    Grub(#[from] GrubError),
    /// Doctor found something that does not work.
    #[error("{bad} of the checks above are bad")]
    Unwell {
        /// How many.
        bad: usize,
    },
    /// Nobody agreed.
    #[error("nothing was changed; agree on a terminal, or with --yes")]
    NotAgreed,
    /// A domain of libvirt.
    #[error(transparent)]
    Domain(#[from] hook::DomainError),
    /// A call of the storage interface.
    #[error(transparent)]
    Datapath(#[from] hook::DatapathError),
    /// What a toolstack hands over cannot be read.
    #[error("cannot read standard input")]
    Input(#[source] std::io::Error),
    /// The path cannot be made absolute.
    #[error("cannot find the image {path}")]
    Image {
        /// As given.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// No async runtime.
    #[error("cannot start")]
    Runtime(#[source] std::io::Error),
}

impl CliError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Refused { code, .. } if code == api::KEY_REFUSED => 3,
            Self::NotTrusted { .. } => 3,
            Self::Refused { code, .. } if code == api::VERIFIER_UNREACHABLE => 4,
            _ => 1,
        }
    }
}

/// All commands and their options: what manual pages and shell completions are made from.
#[must_use]
pub fn command() -> clap::Command {
    Arguments::command()
}

/// Reads the command line and does what it says.
#[must_use]
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        // `log | head` is no failure.
        Err(CliError::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

/// An error, its causes and its single reasons, on standard error.
fn complain(error: &CliError) {
    let mut text = format!("assay-agent: {}\n", printable(&chain(error)));
    if let CliError::Refused { reasons, .. } | CliError::NotTrusted { reasons, .. } = error {
        for reason in reasons {
            text.push_str(&format!("  {}\n", printable(reason)));
        }
    }
    // Where standard error is gone nobody reads this; the exit code stays.
    drop(std::io::stderr().write_all(text.as_bytes()));
}

fn run(arguments: Arguments) -> Result<(), CliError> {
    let config = Config::load(arguments.config.as_deref());
    if let Command::Doctor(arguments) = &arguments.command {
        // A configuration that cannot be used is one of the things that it tells.
        return doctor::run(config, arguments);
    }
    let config = config?;
    match arguments.command {
        Command::Run { early } => {
            start_logging(config.log_level);
            // A core file would hold disk keys that are in use at that moment.
            memory::leave_no_core();
            let measured = if early { early::run(config) } else { daemon::run(config) };
            Ok(measured?)
        }
        Command::Join { file, force } => join::run(&config, &file, force),
        Command::Status { json } => status::run(&config, json),
        Command::Log { json } => log::run(&config.log_file(), json),
        Command::Unlock {
            image,
            name,
            timeout: timeout_s,
            vm,
        } => {
            let request = api::UnlockRequest {
                image,
                name,
                timeout_s,
                vm,
            };
            unlock(&config, request)
        }
        Command::Approve { file } => approve::run(&config, &file),
        Command::Lock { name } => {
            let request = api::LockRequest { name };
            let _: api::LockResponse = client::post(&config.socket(), "/v1/lock", &request)?;
            Ok(())
        }
        Command::Verdict { json, timeout } => verdict::run(&config, json, timeout),
        Command::Doctor(arguments) => doctor::run(Ok(config), &arguments),
        Command::Disks(command) => disks::run(&config, command),
        Command::Hook(command) => hook::run(&config, command),
    }
}

fn unlock(config: &Config, mut request: api::UnlockRequest) -> Result<(), CliError> {
    // The daemon's working folder is another one. Links stay: the sidecar of LUKS1 and qcow2 is beside the name that was given.
    let path = request.image;
    let absolute = std::fs::metadata(&path).and_then(|_| std::path::absolute(&path));
    request.image = absolute.map_err(|source| CliError::Image { path, source })?;
    let response: api::UnlockResponse = client::post(&config.socket(), "/v1/unlock", &request)?;
    say(&response.device.display().to_string())
}

/// One line of output.
fn say(line: &str) -> Result<(), CliError> {
    writeln!(std::io::stdout().lock(), "{line}").map_err(CliError::Output)
}

/// A stranger's text, fit for a terminal: control characters are shown, not obeyed.
fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let shown: String = if c.is_control() {
                c.escape_default().collect()
            } else {
                c.into()
            };
            shown.chars().collect::<Vec<_>>()
        })
        .collect()
}

/// Events to standard error: with times for people, without for the journal, which has its own.
fn start_logging(level: tracing::Level) {
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_target(false);
    if std::io::stderr().is_terminal() {
        subscriber.init()
    } else {
        subscriber.without_time().init()
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_timeout_must_be_a_possible_one() {
        assert!(Arguments::try_parse_from(["assay-agent", "unlock", "disk", "--timeout", "5"]).is_ok());
        for bad in ["0", "-1", "3601", "soon"] {
            assert!(
                Arguments::try_parse_from(["assay-agent", "unlock", "disk", "--timeout", bad]).is_err(),
                "{bad}"
            );
        }
        assert!(Arguments::try_parse_from(["assay-agent"]).is_err());
    }

    #[test]
    fn refusals_have_their_exit_codes() {
        let refused = |code: &str| CliError::Refused {
            code: code.into(),
            message: String::new(),
            reasons: vec![],
        };
        assert_eq!(refused("key-refused").exit_code(), 3);
        assert_eq!(refused("verifier-unreachable").exit_code(), 4);
        assert_eq!(refused("not-luks").exit_code(), 1);
    }

    #[test]
    fn control_characters_are_shown() {
        assert_eq!(printable("a\x1b[31m\nb"), "a\\u{1b}[31m\\nb");
    }
}

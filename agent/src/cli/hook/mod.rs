//! `assay-agent hook`: what the files in `packaging/hooks` hand on to, one word for each caller.
//!
//! Every caller waits with a time limit of its own, so each call here ends within `unlock.hook_deadline_s` of the configuration, and by
//! failing if there is nothing better to say.

mod datapath;
mod libvirt;

pub use datapath::DatapathError;
pub use libvirt::DomainError;

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use assay_evidence::wire::MAX_VM;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{CliError, chain, client, complain, say, verdict};
use crate::config::Config;
use crate::unlock::api;

/// A domain of many disks has some 100 KiB.
const MAX_INPUT: u64 = 4 * 1024 * 1024;

/// `hook …`.
#[derive(Debug, clap::Subcommand)]
pub(super) enum HookCommand {
    /// Whether this host is trusted, as its verifier saw it last: for gates that let no VM start otherwise
    Gate,
    /// Opens a sealed image and prints its device, as `unlock` does
    Open {
        /// File or block device, with its absolute path
        image: PathBuf,
        /// The machine that it is for, for the verifier's audit log
        #[arg(long)]
        vm: Option<String>,
    },
    /// Closes it
    Close {
        /// Its device, or the name of that
        device: PathBuf,
    },
    /// /etc/libvirt/hooks/qemu and libxl: opens a domain's disks before it starts, and closes them after it; domain XML on standard input
    Libvirt {
        /// The domain
        domain: String,
        /// What happens to it
        operation: String,
        /// Begin or end, and what may follow
        #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
        rest: Vec<String>,
    },
    /// A method of the SMAPIv3 datapath `assay+crypt`: JSON on standard input and output
    Datapath {
        /// Class.method
        method: String,
        /// `--json`
        #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
        rest: Vec<String>,
    },
}

pub(super) fn run(config: &Config, command: HookCommand) -> Result<(), CliError> {
    let hook = Hook::new(config);
    match command {
        HookCommand::Gate => hook.gate(),
        HookCommand::Open { image, vm } => say(&hook.open(&image, None, vm.as_deref())?.display().to_string()),
        HookCommand::Close { device } => {
            let name = device.file_name().unwrap_or_default();
            hook.close(&name.to_string_lossy())
        }
        HookCommand::Libvirt {
            domain,
            operation,
            rest,
        } => libvirt::run(&hook, &domain, &operation, rest.first().map_or("", String::as_str)),
        HookCommand::Datapath { method, .. } => datapath::run(&hook, &method),
    }
}

/// All of standard input, which a caller may be waiting to get rid of.
fn input() -> Result<String, CliError> {
    let mut text = String::new();
    std::io::stdin()
        .lock()
        .take(MAX_INPUT.saturating_add(1))
        .read_to_string(&mut text)
        .map_err(CliError::Input)?;
    if text.len() as u64 > MAX_INPUT {
        let error = std::io::Error::other(format!("it is longer than {MAX_INPUT} bytes"));
        return Err(CliError::Input(error));
    }
    Ok(text)
}

/// What talks to the agent while a toolstack waits.
struct Hook {
    socket: PathBuf,
    deadline: Duration,
    since: Instant,
}

impl Hook {
    fn new(config: &Config) -> Self {
        Self {
            socket: config.socket(),
            deadline: config.unlock.hook_deadline,
            since: Instant::now(),
        }
    }

    /// How long the agent shall look for a verifier: the rest of the time is for an exchange that begins at its end.
    fn ask_s(&self) -> Option<u64> {
        let left = self.deadline.saturating_sub(self.since.elapsed());
        Some(left.as_secs().checked_div(3).unwrap_or(0).max(1))
    }

    fn post<Q: Serialize, A: DeserializeOwned>(&self, path: &str, request: &Q) -> Result<A, CliError> {
        let left = self.deadline.saturating_sub(self.since.elapsed());
        client::post_within(&self.socket, path, request, left).map_err(|error| match error {
            // Of all that the hook has asked, not of this question alone.
            CliError::Client(client::ClientError::Timeout(_)) => client::ClientError::Timeout(self.deadline).into(),
            error => error,
        })
    }

    fn gate(&self) -> Result<(), CliError> {
        let request = api::VerdictRequest {
            timeout_s: self.ask_s(),
        };
        verdict::show(self.post("/v1/verdict", &request)?, false)
    }

    /// `vm` is what the caller calls the machine: as much of it as an audit record takes is sent.
    fn open(&self, image: &Path, name: Option<&str>, vm: Option<&str>) -> Result<PathBuf, CliError> {
        let request = api::UnlockRequest {
            image: image.to_owned(),
            name: name.map(str::to_owned),
            timeout_s: self.ask_s(),
            vm: vm
                .filter(|vm| !vm.is_empty())
                .map(|vm| vm.chars().take(MAX_VM).collect()),
        };
        let response: api::UnlockResponse = self.post("/v1/unlock", &request)?;
        Ok(response.device)
    }

    /// Closes a disk; that it is not open is as good. What still looks at a device that was in use until now gets a moment.
    fn close(&self, name: &str) -> Result<(), CliError> {
        const ATTEMPTS: u32 = 10;
        let request = api::LockRequest { name: name.to_owned() };
        let mut attempt: u32 = 0;
        loop {
            let closed: Result<api::LockResponse, CliError> = self.post("/v1/lock", &request);
            attempt = attempt.saturating_add(1);
            match closed {
                Ok(_) => return Ok(()),
                Err(CliError::Refused { code, .. }) if code == api::NOT_OPEN => return Ok(()),
                Err(CliError::Refused { code, .. }) if code == api::DISK_BUSY && attempt < ATTEMPTS => {
                    std::thread::sleep(Duration::from_millis(200));
                }
                Err(error) => return Err(error),
            }
        }
    }
}

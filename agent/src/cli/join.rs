//! `assay-agent join`.

use std::path::Path;

use assay_evidence::digest::Sha256Digest;
use assay_evidence::pcr::RuntimePcr;

use super::{CliError, client, say};
use crate::config::Config;
use crate::join::{self, Joined, Membership, Outcome};
use crate::log_view::LogView;
use crate::tpm::{Handle, TpmConfig};
use crate::unlock::api::Status;

/// Joins, and prints what the verifier's operator needs next.
pub(super) fn run(config: &Config, file: &Path, force: bool) -> Result<(), CliError> {
    let membership = Membership::read(file)?;
    // Before anything is written: a host without a TPM cannot be added to any verifier.
    let ek_sha256 = ek_sha256(config)?;
    let outcome = join::join(&config.state_dir, file, &membership, force)?;
    say(match outcome {
        Outcome::Joined => "joined: this host has a new TLS key",
        Outcome::Updated => "joined before: the verifiers and the key for approved lists were brought up to date",
        Outcome::Unchanged => "joined before: nothing to do",
    })?;
    say(&format!("verifiers: {}", membership.verifiers().join(", ")))?;
    if let Some(joined) = Joined::load(&config.state_dir)? {
        say(&format!("tls key:   sha256:{}", joined.spki()))?;
    }
    say(&format!("ek:        sha256:{ek_sha256}"))?;
    if outcome == Outcome::Joined && force {
        say("next, here:            systemctl restart assay-agent")?;
    }
    let name = host_name();
    let port = config.listen.port();
    let pcr = match config.tpm.pcr {
        usual if usual == RuntimePcr::DEFAULT.index() => String::new(),
        other => format!(" --pcr {other}"),
    };
    say(&format!(
        "next, on the verifier: assay-verifier host add {name} {name}:{port} --ek-sha256 {ek_sha256}{pcr}"
    ))
}

/// From the running agent, which owns the TPM; or from the TPM itself where none runs.
fn ek_sha256(config: &Config) -> Result<Sha256Digest, CliError> {
    match client::get::<Status>(&config.socket(), "/v1/status") {
        Ok(status) => return Ok(status.ek_sha256),
        Err(CliError::Client(error)) if error.is_absent() => {}
        Err(error) => return Err(error),
    }
    let tpm = TpmConfig {
        tcti: config.tpm.tcti.clone(),
        pcr: config.tpm.pcr,
        ak_handle: config.tpm.ak_handle,
        timeout: config.tpm.timeout,
    };
    let handle = Handle::open(tpm, LogView::new(String::new())).map_err(CliError::Tpm)?;
    Ok(Sha256Digest::of(&handle.identity().ek_public))
}

/// A suggestion that the operator may change.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "HOST".to_owned(),
        name => name.to_owned(),
    }
}

//! What the log's first record says about the host.

use std::fs::File;
use std::path::Path;

use assay_evidence::event::{AgentStart, MAX_CMDLINE, MAX_TEXT, cut};

use super::{MeasureError, Settings, inventory};
use crate::tpm::BankDigests;

/// The id of this boot, as the kernel made it.
///
/// # Errors
/// [`MeasureError::HostFact`].
pub fn boot_id() -> Result<String, MeasureError> {
    read("/proc/sys/kernel/random/boot_id")
}

/// `uname -r`.
///
/// # Errors
/// [`MeasureError::HostFact`].
pub fn kernel_release() -> Result<String, MeasureError> {
    read("/proc/sys/kernel/osrelease")
}

/// SHA-256 of a file.
///
/// # Errors
/// [`MeasureError::HostFact`].
pub fn file_digest(path: &Path) -> Result<assay_evidence::digest::Sha256Digest, MeasureError> {
    let fact = |source| MeasureError::HostFact {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(fact)?;
    Ok(inventory::hash(&file).map_err(fact)?.0)
}

pub(super) fn agent_start(
    settings: &Settings,
    pcr_start: BankDigests,
    predecessor: Option<u64>,
) -> Result<AgentStart, MeasureError> {
    Ok(AgentStart {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        agent_digest: file_digest(Path::new("/proc/self/exe"))?,
        bpf_digest: settings.bpf_digest,
        boot_id: settings.boot_id.clone(),
        kernel_release: cut(&kernel_release()?, MAX_TEXT).to_owned(),
        cmdline: cut(&read("/proc/cmdline")?, MAX_CMDLINE).to_owned(),
        // Kernels without securityfs or lockdown have neither file.
        lsm: cut(&read("/sys/kernel/security/lsm").unwrap_or_default(), MAX_TEXT).to_owned(),
        lockdown: lockdown(&read("/sys/kernel/security/lockdown").unwrap_or_default()).to_owned(),
        tier: settings.tier,
        mode: settings.mode,
        pcr_start,
        predecessor,
        blind: cut(&settings.blind, MAX_TEXT).to_owned(),
        protected: settings.protected,
    })
}

/// `none [integrity] confidentiality` → `integrity`.
fn lockdown(text: &str) -> &str {
    let inside = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    inside.map_or("", |(state, _)| cut(state, MAX_TEXT))
}

fn read(path: &str) -> Result<String, MeasureError> {
    let text = std::fs::read(path).map_err(|source| MeasureError::HostFact {
        path: path.into(),
        source,
    })?;
    Ok(String::from_utf8_lossy(&text).trim_end_matches(['\n', '\0']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lockdown_state_is_the_one_in_brackets() {
        assert_eq!(lockdown("none [integrity] confidentiality"), "integrity");
        assert_eq!(lockdown("[none] integrity confidentiality"), "none");
        assert_eq!(lockdown(""), "");
    }
}

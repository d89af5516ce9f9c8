//! `assay-agent status`.

use super::{CliError, client, printable, say};
use crate::config::Config;
use crate::leases::DiskState;
use crate::unlock::api::{DiskStatus, Status};

/// Prints the running agent's state.
pub(super) fn run(config: &Config, json: bool) -> Result<(), CliError> {
    let status: Status = client::get(&config.socket(), "/v1/status")?;
    if json {
        return say(&serde_json::to_string_pretty(&status).map_err(CliError::Json)?);
    }
    for (what, value) in lines(&status) {
        say(&format!("{what:<12}{}", printable(&value)))?;
    }
    Ok(())
}

fn line(disk: &DiskStatus) -> String {
    let state = match disk.state {
        DiskState::Opening => "being opened",
        DiskState::Open => "open",
        DiskState::Suspended => "suspended",
        DiskState::Wiped => "suspended, its key wiped",
    };
    let lease = disk.lease_left_s.map(|left| format!(", lease {left} s"));
    let lost = disk.lost.as_ref().map(|why| format!(", key lost: {why}"));
    format!(
        "{}: {state}, key {}{}, on loss {}{}",
        disk.name,
        disk.key_id,
        lease.unwrap_or_default(),
        disk.on_loss,
        lost.unwrap_or_default(),
    )
}

fn lines(status: &Status) -> Vec<(&'static str, String)> {
    let mut lines = vec![
        ("agent", format!("version {}, process {}", status.version, status.pid)),
        ("boot", status.boot_id.clone()),
        (
            "measuring",
            format!("tier {}, mode {}, PCR {}", status.tier, status.mode, status.pcr),
        ),
    ];
    if !status.blind.is_empty() {
        lines.push(("blind", status.blind.clone()));
    }
    if status.log_full {
        let text = "nothing more is recorded: raise [measure] log_max_mib in agent.toml and restart the host";
        lines.push(("log full", text.to_owned()));
    }
    if status.no_room > 0 {
        let text = format!("{} loads, since the kernel's queue was full", status.no_room);
        lines.push(("refused", text));
    }
    lines.extend([
        (
            "log",
            format!(
                "{} records, {} bytes, head {}",
                status.records, status.log_bytes, status.log_head
            ),
        ),
        ("lost", format!("{} kernel records", status.lost)),
        (
            "tpm",
            format!("{}, firmware {}", status.tpm_manufacturer, status.tpm_firmware),
        ),
        ("ek", format!("sha256:{} ({})", status.ek_sha256, status.ek)),
        ("ak", status.ak.clone()),
    ]);
    lines.extend(status.disks.iter().map(|disk| ("disk", line(disk))));
    match &status.joined {
        None => lines.push(("joined", "no verifier: run `assay-agent join FILE`".to_owned())),
        Some(joined) => lines.extend([
            ("joined", joined.verifiers.join(", ")),
            ("ca key", format!("sha256:{}", joined.ca_spki_sha256)),
            ("tls key", format!("sha256:{}", joined.tls_spki_sha256)),
            ("quotes on", joined.listen.clone()),
        ]),
    }
    lines
}

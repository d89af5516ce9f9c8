//! The tier that this kernel is capable of, and the agent that runs.

use super::{Finding, Running};
use crate::config::Config;
use crate::measure::kernel::{KernelError, Preflight};
use crate::measure::probe;

const TIER: &str = "tier";

/// What the agent would choose here, or does.
pub(super) fn tier(config: &Config) -> Finding {
    let wanted = config.measure.tier;
    if wanted == Some(3) {
        return probes(config, "the configuration wants tier 3");
    }
    match Preflight::check(&config.bpf_dir) {
        Ok(found) if found.ima => match wanted {
            Some(2) => Finding::weak(
                TIER,
                "tier 2, as the configuration wants it; this kernel is capable of tier 1",
                "take `tier` out of [measure] in agent.toml",
            ),
            _ => Finding::good(
                TIER,
                format!("tier 1 (LSM {}, lockdown {})", found.lsm, lockdown(&found)),
            ),
        },
        Ok(found) if wanted != Some(1) => Finding::weak(
            TIER,
            format!(
                "tier 2: this kernel has no IMA, so the agent hashes (LSM {})",
                found.lsm
            ),
            "a kernel with CONFIG_IMA=y is measured in tier 1",
        ),
        Ok(found) => match found.tier_1() {
            Ok(_) => Finding::good(TIER, "tier 1"),
            Err(error) => Finding::error(TIER, &error),
        },
        Err(error @ KernelError::BpfLsmMissing { .. }) if wanted.is_none() => {
            probes(config, &crate::http::chain(&error))
        }
        Err(error) => Finding::error(TIER, &error),
    }
}

fn lockdown(found: &Preflight) -> &str {
    if found.lockdown.is_empty() {
        "not built in"
    } else {
        &found.lockdown
    }
}

fn probes(config: &Config, why: &str) -> Finding {
    match probe::preflight(&config.measure.btf) {
        Ok(()) => Finding::weak(
            TIER,
            format!("tier 3, which only detects, and after the fact: {why}"),
            "boot with `bpf` in the kernel option lsm= for tier 1, where the kernel has BPF LSM",
        ),
        Err(error) => Finding {
            found: format!("{why}; and for tier 3: {}", crate::http::chain(&error)),
            ..Finding::error(TIER, &error)
        },
    }
}

/// Whether there is an agent, and what it says of itself.
pub(super) fn agent(running: &Running) -> Vec<Finding> {
    const CHECK: &str = "agent";
    let status = match running {
        Running::Yes(status) => status,
        Running::No => {
            let remedy =
                "start it: `systemctl enable --now assay-agent`; `journalctl -u assay-agent` has what it said before";
            return vec![Finding::bad(CHECK, "it is not running, so nothing is measured", remedy)];
        }
        Running::Silent(why) => {
            let remedy = "run doctor as root; `journalctl -u assay-agent` has the agent's last words";
            return vec![Finding::bad(CHECK, why.clone(), remedy)];
        }
    };
    let state = format!(
        "version {}, tier {}, mode {}, {} records",
        status.version, status.tier, status.mode, status.records
    );
    let mut findings = vec![Finding::good(CHECK, state)];
    if status.version != env!("CARGO_PKG_VERSION") {
        let found = format!(
            "version {} runs, {} is installed",
            status.version,
            env!("CARGO_PKG_VERSION")
        );
        findings.push(Finding::weak("agent-version", found, "`systemctl restart assay-agent`"));
    }
    if !status.blind.is_empty() {
        let found = format!("in tier {} it cannot see: {}", status.tier, status.blind);
        let remedy = "no remedy in this tier; a policy says which tiers it takes";
        findings.push(Finding::weak("agent-blind", found, remedy));
    }
    if status.log_full {
        let remedy = "raise [measure] log_max_mib in agent.toml and restart the host";
        findings.push(Finding::bad(
            "agent-log",
            "the runtime log is full: nothing more is recorded",
            remedy,
        ));
    }
    if status.lost > 0 {
        let found = format!("{} kernel records were lost; each loss is in the log", status.lost);
        let remedy = "the verifier distrusts this host until it restarts; mode hold loses none";
        findings.push(Finding::bad("agent-lost", found, remedy));
    }
    findings
}

//! Approved ways to boot.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{Expiry, MAX_VALUES, PolicyError, check_name};
use crate::bootlog;
use crate::digest::Sha256Digest;
use crate::event::cut;
use crate::quote::{QUOTED_BANK, is_quoted};
use crate::replay::ReplayedLog;

/// Most steps of one boot configuration. A boot log has dozens to hundreds.
pub const MAX_STEPS: usize = 4096;
/// Longest description of a step, in bytes.
pub const MAX_WHAT: usize = 4096;

/// PCRs whose values a capture takes as golden: firmware and its configuration (0-7), boot loader and kernel (8, 9),
/// systemd's stub (11-13), shim (14), a dynamic launch's code and configuration (17, 18; all ones where there was none). Not the one that the host's runtime log is in, whose start has a member of its own;
/// not 10, which the kernel's IMA extends as the host works, nor 15, which systemd extends with the machine's identity.
pub const GOLDEN_PCRS: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 17, 18];

/// One event of a boot: what it was, as far as its digest proves it, and the digest that was extended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootStep {
    /// SHA-256 that was extended.
    pub sha256: Sha256Digest,
    /// For people; it decides nothing.
    pub what: String,
}

/// One way to boot that is approved as a whole: a host must match all of one configuration, never some of each.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfiguration {
    pub(super) name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) expires: Option<Expiry>,
    /// Golden values of the SHA-256 bank; a PCR that is missing or has none is not judged.
    pub(super) pcrs: BTreeMap<u8, BTreeSet<Sha256Digest>>,
    /// The events that led to a PCR's value, where a boot log told: with them a verdict names what changed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) steps: BTreeMap<u8, Vec<BootStep>>,
}

impl BootConfiguration {
    /// The boot of a host, from its quoted PCRs, and from its boot log where it has one that explains them.
    pub(super) fn capture(name: &str, log: &ReplayedLog) -> Self {
        let quoted = |pcr: u8| log.pcr(pcr).and_then(|value| Sha256Digest::try_from(value).ok());
        let pcrs = golden_pcrs(log.runtime_pcr())
            .filter_map(|pcr| Some((pcr, BTreeSet::from([quoted(pcr)?]))))
            .collect();
        Self {
            name: name.to_owned(),
            expires: None,
            pcrs,
            steps: steps(log),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// From when on it is not approved any more.
    #[must_use]
    pub const fn expires(&self) -> Option<Expiry> {
        self.expires
    }

    /// Golden values of PCRs, SHA-256 bank. A PCR that is missing or has no values is not judged by value, nor is the one
    /// that a host's runtime log is in.
    #[must_use]
    pub const fn pcrs(&self) -> &BTreeMap<u8, BTreeSet<Sha256Digest>> {
        &self.pcrs
    }

    /// The events that lead to a PCR's value; empty where no boot log told.
    #[must_use]
    pub fn steps(&self, pcr: u8) -> &[BootStep] {
        self.steps.get(&pcr).map(Vec::as_slice).unwrap_or_default()
    }

    pub(super) fn check(&self) -> Result<(), PolicyError> {
        check_name(&self.name, "a boot configuration")?;
        for pcr in self.pcrs.keys().chain(self.steps.keys()) {
            if !is_quoted(*pcr) {
                return Err(PolicyError::Pcr(*pcr));
            }
        }
        let values = self.pcrs.values().map(BTreeSet::len).max().unwrap_or(0);
        let steps = self.steps.values().map(Vec::len).fold(0, usize::saturating_add);
        for (list, found, limit) in [("pcrs", values, MAX_VALUES), ("steps", steps, MAX_STEPS)] {
            if found > limit {
                return Err(PolicyError::TooMany { list, found, limit });
            }
        }
        let whats = self.steps.values().flatten().map(|step| step.what.len());
        match whats.max() {
            Some(found) if found > MAX_WHAT => Err(PolicyError::TooMany {
                list: "description of a step",
                found,
                limit: MAX_WHAT,
            }),
            _ => Ok(()),
        }
    }

    /// Takes over values and steps of a configuration of the same name.
    pub(super) fn merge(&mut self, other: &Self) {
        for (pcr, values) in &other.pcrs {
            self.pcrs.entry(*pcr).or_default().extend(values);
        }
        for (pcr, steps) in &other.steps {
            self.steps.entry(*pcr).or_insert_with(|| steps.clone());
        }
        self.expires = later(self.expires, other.expires);
    }

    /// Whether it approves the same boots, under whatever name.
    pub(super) fn is_same_boot(&self, other: &Self) -> bool {
        self.pcrs == other.pcrs
    }
}

/// Of two times the later; none is later than any.
pub(super) fn later(one: Option<Expiry>, other: Option<Expiry>) -> Option<Expiry> {
    Some(one?.max(other?))
}

/// [`GOLDEN_PCRS`] of a host whose runtime log is in `runtime`.
pub(crate) fn golden_pcrs(runtime: crate::pcr::RuntimePcr) -> impl Iterator<Item = u8> {
    GOLDEN_PCRS.into_iter().filter(move |pcr| *pcr != runtime.index())
}

/// What a boot log says of each golden PCR that it leads to; nothing of the others.
pub(crate) fn steps(log: &ReplayedLog) -> BTreeMap<u8, Vec<BootStep>> {
    let Some(parsed) = log.boot_log().and_then(|bytes| bootlog::parse(bytes).ok()) else {
        return BTreeMap::new();
    };
    let Ok(replayed) = parsed.replay(QUOTED_BANK) else {
        return BTreeMap::new();
    };
    // The digest alone of the kernel's command line is in the log; what the agent says that it is either has that digest or not.
    let command_line = &log.agent_start().cmdline;
    let Ok(proven) = parsed.proven(QUOTED_BANK, Some(command_line)) else {
        return BTreeMap::new();
    };
    let explained = |pcr: u8| replayed.get(&u32::from(pcr)).map(Vec::as_slice) == log.pcr(pcr);
    let mut steps: BTreeMap<u8, Vec<BootStep>> = BTreeMap::new();
    for event in proven {
        let pcr = u8::try_from(event.pcr()).ok();
        let pcr = pcr.filter(|pcr| GOLDEN_PCRS.contains(pcr) && explained(*pcr));
        if let (Some(pcr), Ok(sha256)) = (pcr, Sha256Digest::try_from(event.digest())) {
            let what = cut(&event.describe(), MAX_WHAT).to_owned();
            steps.entry(pcr).or_default().push(BootStep { sha256, what });
        }
    }
    steps
}

//! The verdict: does this policy allow what this host booted and ran?
//!
//! All that a policy refuses is listed, nothing is hidden behind the first failure: an operator who sees one reason would
//! repair it and meet the next. An [`Appraisal`] can only be made by [`ReplayedLog::appraise`], and is what
//! [`release`](crate::release::release) demands for a key.

mod failure;
mod runtime;

pub use failure::{Failure, Rule};
pub(crate) use runtime::did_not_run;

use serde::{Deserialize, Serialize};

use crate::bootlog::{self, BootLogError};
use crate::digest::Sha256Digest;
use crate::event::Mode;
use crate::policy::{Policy, golden_pcrs};
use crate::quote::QUOTED_BANK;
use crate::replay::ReplayedLog;

use runtime::Seen;

/// PCRs that belong to the firmware alone: if there is a boot log, it must explain each of them.
const FIRMWARE_PCRS: core::ops::RangeInclusive<u8> = 0..=7;
/// PCRs of boot loader, kernel stub and shim: a boot log explains them if it mentions them. Nothing extends them once the
/// firmware's log is closed.
const LOADER_PCRS: [u8; 3] = [8, 9, 14];

/// Whether a host is trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// Nothing was refused.
    Trusted,
    /// Something was.
    Untrusted,
}

impl core::fmt::Display for Status {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Trusted => "trusted",
            Self::Untrusted => "untrusted",
        })
    }
}

/// The verdict on one piece of evidence, under one policy.
#[derive(Debug, Clone, Serialize)]
pub struct Appraisal {
    status: Status,
    policy: String,
    boot_id: String,
    records: u64,
    reset_count: u32,
    tier: u8,
    mode: Mode,
    protected: bool,
    failures: Vec<Failure>,
    notes: Vec<String>,
    #[serde(skip)]
    extra_data: [u8; 32],
}

impl Appraisal {
    /// Trusted exactly if there is no failure.
    #[must_use]
    pub const fn status(&self) -> Status {
        self.status
    }

    /// Whether the status is [`Status::Trusted`].
    #[must_use]
    pub fn is_trusted(&self) -> bool {
        self.status == Status::Trusted
    }

    /// Everything that was refused, in the order of checks; equal ones are one failure with a count.
    #[must_use]
    pub fn failures(&self) -> &[Failure] {
        &self.failures
    }

    /// The failures as text, a line each.
    #[must_use]
    pub fn reasons(&self) -> Vec<String> {
        self.failures.iter().map(ToString::to_string).collect()
    }

    /// What this verdict does not rest on, a line each, such as a missing boot log. No refusal.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Name of the policy.
    #[must_use]
    pub fn policy(&self) -> &str {
        &self.policy
    }

    /// The host's boot.
    #[must_use]
    pub fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// Records that were judged.
    #[must_use]
    pub const fn records(&self) -> u64 {
        self.records
    }

    /// The TPM's reset count.
    #[must_use]
    pub const fn reset_count(&self) -> u32 {
        self.reset_count
    }

    /// The tier that the host measures by since the agent's last start, 1 to 3.
    #[must_use]
    pub const fn tier(&self) -> u8 {
        self.tier
    }

    /// The mode that the host is in since the agent's last start.
    #[must_use]
    pub const fn mode(&self) -> Mode {
        self.mode
    }

    /// Whether the agent keeps root away from itself since its last start.
    #[must_use]
    pub const fn protected(&self) -> bool {
        self.protected
    }

    /// The `extraData` of the quote that was judged: which question it answered.
    #[must_use]
    pub(crate) const fn extra_data(&self) -> &[u8; 32] {
        &self.extra_data
    }
}

impl ReplayedLog {
    /// Judges the boot and everything in the runtime log by a policy.
    #[must_use]
    pub fn appraise(&self, policy: &Policy) -> Appraisal {
        let mut judge = Judge {
            policy,
            failures: Vec::new(),
            unlisted: 0,
            seen: Seen::default(),
            notes: Vec::new(),
        };
        judge.golden_pcrs(self);
        judge.boot_log(self);
        judge.runtime_start(self);
        judge.events(self);
        let start = self.last_agent_start();
        Appraisal {
            status: if judge.failures.is_empty() {
                Status::Trusted
            } else {
                Status::Untrusted
            },
            policy: policy.name().to_owned(),
            boot_id: self.boot_id().to_owned(),
            records: self.records(),
            reset_count: self.reset_count(),
            tier: start.tier,
            mode: start.mode,
            protected: start.protected,
            failures: judge.failures,
            notes: judge.notes,
            extra_data: *self.extra_data(),
        }
    }
}

/// Failures in one verdict; more are counted. A log that nothing approves of has half a million.
const MAX_FAILURES: usize = 10_000;

struct Judge<'a> {
    policy: &'a Policy,
    failures: Vec<Failure>,
    /// Failures beyond the limit.
    unlisted: u64,
    seen: Seen<'a>,
    notes: Vec<String>,
}

impl<'a> Judge<'a> {
    fn refuse(&mut self, failure: Failure) {
        if self.failures.len() < MAX_FAILURES {
            self.failures.push(failure);
        } else {
            self.unlisted = self.unlisted.saturating_add(1);
        }
    }

    /// PCRs with golden values must have one of them. The runtime PCR moves with every load: replay has judged it.
    fn golden_pcrs(&mut self, log: &ReplayedLog) {
        let runtime = log.runtime_pcr().index();
        let mut unjudged = Vec::new();
        for pcr in golden_pcrs(log.runtime_pcr()) {
            if self.policy.pcrs().get(&pcr).is_none_or(|values| values.is_empty()) {
                unjudged.push(pcr.to_string());
            }
        }
        if !unjudged.is_empty() {
            self.notes
                .push(format!("the policy has no values for PCR {}", unjudged.join(", ")));
        }
        for (pcr, golden) in self.policy.pcrs().iter().filter(|(_, golden)| !golden.is_empty()) {
            if *pcr == runtime {
                let note = format!("the policy's values for PCR {pcr} are not for this host: its runtime log is there");
                self.notes.push(note);
                continue;
            }
            let quoted = log.pcr(*pcr).and_then(|value| Sha256Digest::try_from(value).ok());
            if !quoted.is_some_and(|value| golden.contains(&value)) {
                let nearest = golden.first().map(|value| format!("the policy has sha256:{value}"));
                self.failures.push(Failure {
                    pcr: Some(*pcr),
                    digest: quoted,
                    nearest,
                    ..Failure::new(Rule::PcrValue, String::new())
                });
            }
        }
    }

    /// The boot log, if there is one, must lead to the quoted PCRs.
    fn boot_log(&mut self, log: &ReplayedLog) {
        let Some(bytes) = log.boot_log() else {
            self.notes
                .push("no boot log with this evidence: the boot is judged by golden PCR values alone".into());
            return;
        };
        let parsed = bootlog::parse(bytes);
        let replayed = match parsed
            .as_ref()
            .map_err(Clone::clone)
            .and_then(|parsed| parsed.replay(QUOTED_BANK))
        {
            Ok(replayed) => replayed,
            // Nothing wrong with the log, but it says nothing about what was quoted.
            Err(error @ BootLogError::NoBank(..)) => {
                self.notes
                    .push(format!("{error}: the boot is judged by golden PCR values alone"));
                return;
            }
            Err(error) => {
                self.failures.push(Failure::new(Rule::BootLog, error.to_string()));
                return;
            }
        };
        let mentioned = parsed.map(|parsed| parsed.extended_pcrs()).unwrap_or_default();
        let loader = LOADER_PCRS
            .into_iter()
            .filter(|pcr| mentioned.contains(&u32::from(*pcr)));
        for pcr in FIRMWARE_PCRS.chain(loader) {
            // What the agent found there is what the firmware left.
            let quoted = if log.runtime_pcr().index() == pcr {
                log.pcr_start()
            } else {
                log.pcr(pcr).unwrap_or_default()
            };
            let value = replayed.get(&u32::from(pcr)).map(Vec::as_slice).unwrap_or_default();
            if value != quoted {
                self.failures.push(Failure {
                    pcr: Some(pcr),
                    digest: Sha256Digest::try_from(quoted).ok(),
                    nearest: Some(format!("the log leads to sha256:{}", hex::encode(value))),
                    ..Failure::new(Rule::BootLogPcr, String::new())
                });
            }
        }
    }

    /// A log that begins on an extended PCR may have a predecessor that someone removed.
    fn runtime_start(&mut self, log: &ReplayedLog) {
        let start = Sha256Digest::try_from(log.pcr_start()).ok();
        let zero = Sha256Digest::ZERO;
        if !start.is_some_and(|start| start == zero || self.policy.runtime_start().contains(&start)) {
            self.failures.push(Failure {
                pcr: Some(log.runtime_pcr().index()),
                record: Some(0),
                digest: start,
                ..Failure::new(Rule::RuntimeStart, String::new())
            });
        }
    }
}

#[cfg(test)]
mod tests;

//! The verdict: does this policy allow what this host booted and ran?
//!
//! All that a policy refuses is listed, nothing is hidden behind the first failure: an operator who sees one reason would
//! repair it and meet the next. An [`Appraisal`] can only be made by [`ReplayedLog::appraise`], and is what
//! [`release`](crate::release::release) demands for a key.

mod boot;
mod failure;
mod ima;
mod runtime;

pub use failure::{Failure, Rule};
pub(crate) use ima::{VIOLATION as IMA_VIOLATION, ima_files};
pub(crate) use runtime::did_not_run;

use serde::{Deserialize, Serialize};

use crate::digest::Sha256Digest;
use crate::event::{Event, Mode};
use crate::policy::{FlagBits, Policy, RuntimeSet};
use crate::replay::ReplayedLog;

use runtime::Seen;

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
    tags: Vec<String>,
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

    /// What a host that meets the policy is known as: the policy's tags. Of one that doesn't, they say nothing.
    #[must_use]
    pub fn tags(&self) -> &[String] {
        &self.tags
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
    /// Judges the boot and everything in the logs by a policy, as it is at `now` (Unix time, seconds).
    #[must_use]
    pub fn appraise(&self, policy: &Policy, now: u64) -> Appraisal {
        let mut judge = Judge::new(policy, now);
        judge.policy_itself();
        judge.boot(self);
        judge.events(self);
        judge.ima_log(self);
        judge.count_unlisted();
        // What stands in the log is in its PCR.
        let pcr = self.runtime_pcr().index();
        for failure in judge.failures.iter_mut().filter(|failure| failure.record.is_some()) {
            failure.pcr = Some(pcr);
        }
        let start = self.last_agent_start();
        Appraisal {
            status: if judge.failures.is_empty() {
                Status::Trusted
            } else {
                Status::Untrusted
            },
            policy: policy.name().to_owned(),
            tags: policy.tags().iter().cloned().collect(),
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
    /// Its sets that have not expired.
    sets: Vec<&'a RuntimeSet>,
    flags: FlagBits,
    now: u64,
    failures: Vec<Failure>,
    /// Failures beyond the limit.
    unlisted: u64,
    seen: Seen<'a>,
    notes: Vec<String>,
}

impl Policy {
    /// Which events leave a verdict that trusts by this policy, at `now` (Unix time), as it is: code that ran and is approved. Of
    /// such a verdict, only the number of records is another after them.
    pub fn passes(&self, now: u64) -> impl Fn(&Event) -> bool {
        let judge = Judge::new(self, now);
        move |event| judge.passes(event)
    }
}

impl<'a> Judge<'a> {
    fn new(policy: &'a Policy, now: u64) -> Self {
        Self {
            policy,
            sets: policy.live_sets(now).collect(),
            flags: policy.rules().flag_bits(),
            now,
            failures: Vec::new(),
            unlisted: 0,
            seen: Seen::default(),
            notes: Vec::new(),
        }
    }

    fn refuse(&mut self, failure: Failure) {
        if self.failures.len() < MAX_FAILURES {
            self.failures.push(failure);
        } else {
            self.unlisted = self.unlisted.saturating_add(1);
        }
    }

    fn count_unlisted(&mut self) {
        if self.unlisted > 0 {
            self.notes
                .push(format!("failures beyond the first {MAX_FAILURES}: {}", self.unlisted));
        }
    }

    /// A policy that has expired trusts nobody.
    fn policy_itself(&mut self) {
        if let Some(at) = self.policy.expires().filter(|at| at.is_past(self.now)) {
            let detail = format!("policy {}, approved until {at}", self.policy.name());
            self.failures.push(Failure::new(Rule::Expired, detail));
        }
    }

    /// Whether code with this digest is approved now.
    fn allows(&self, digest: &Sha256Digest) -> bool {
        self.sets.iter().any(|set| set.allows(digest))
    }

    /// What the policy knows that is next to this: most often the file was updated, or tampered with.
    fn nearest(&self, path: &str, digest: &Sha256Digest) -> Option<String> {
        let past = self.policy.sets().iter().find(|set| set.allows(digest));
        if let Some(set) = past {
            let at = set.expires().map(|at| at.to_string()).unwrap_or_default();
            return Some(format!("it was approved until {at} by set {}", set.name()));
        }
        if path.is_empty() {
            return None;
        }
        let known = self.sets.iter().find_map(|set| set.approved_at(path).next())?;
        Some(format!("approved at this path is sha256:{}", known.sha256))
    }
}

#[cfg(test)]
mod tests;

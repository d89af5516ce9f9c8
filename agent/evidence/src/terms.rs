//! What a key demands beside its policy and its tags: of which hosts, when, on how many at once, and for how long; and what a host
//! does with a disk whose key it may not hold any more.
//!
//! The verifier keeps the terms in the key's file, under its authentication, and judges by them at each release and each renewal.

mod hours;
#[cfg(test)]
mod tests;

pub use hours::{Hours, HoursError};

use core::fmt;
use core::str::FromStr;
use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::policy::{Expiry, is_name};

/// Most groups of one key.
pub const MAX_GROUPS: usize = 64;
/// Most weekly hours of one key.
pub const MAX_HOURS: usize = 16;
/// Most hosts at once that can be asked for.
pub const MAX_HOSTS: u32 = 10_000;
/// Shortest and longest lease, in seconds: a second, and 31 days.
pub const LEASE_RANGE: core::ops::RangeInclusive<u64> = 1..=31 * 86_400;

/// What a host does with an open disk when the verifier calls it untrusted, or the lease has run out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnLoss {
    /// Nothing.
    #[default]
    Nothing,
    /// Says so in its journal and its status.
    Tell,
    /// Suspends the device: whoever reads or writes waits. The key stays in the kernel; a good verdict resumes it.
    Suspend,
    /// Suspends the device and wipes its key from the kernel. Another release resumes it.
    Wipe,
}

/// The terms of one key. Those of a key that nobody set any for demand nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Terms {
    /// Hosts that are judged by one of these policies; every host if there is none.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub groups: BTreeSet<String>,
    /// Not before this moment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_before: Option<Expiry>,
    /// Not from this moment on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<Expiry>,
    /// In these hours of the week; at any if there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hours: Vec<Hours>,
    /// On so many hosts at once. A host counts until it gives the key back, or its lease has run out: so there must be one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts_at_once: Option<u32>,
    /// For so many seconds, unless a good verdict renews it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_s: Option<u64>,
    /// What a host does that may not hold it any more.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub on_loss: OnLoss,
}

/// Why terms can't be kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TermsError {
    /// Not the names of policies.
    #[error("groups are names of policies: at most {MAX_GROUPS}, each 1 to 64 letters, digits, '-', '_' or '.'")]
    Groups,
    /// No moment is left.
    #[error("not before {not_before} and not after {not_after} leaves no time at all")]
    Never {
        /// The first moment.
        not_before: Expiry,
        /// The end.
        not_after: Expiry,
    },
    /// Too many hours.
    #[error("{0} weekly hours: at most {MAX_HOURS} are kept")]
    Hours(usize),
    /// Not a number of hosts.
    #[error("{0} hosts at once: give 1 to {MAX_HOSTS}")]
    Hosts(u32),
    /// A host that is gone would count for ever.
    #[error("a number of hosts at once needs a lease: a host that is gone would count for ever")]
    HostsWithoutLease,
    /// Not a lease.
    #[error("a lease of {0} s: give {start} to {end} seconds", start = LEASE_RANGE.start(), end = LEASE_RANGE.end())]
    Lease(u64),
}

/// Why a host does not get a key, or may not hold it any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unmet {
    /// The host is judged by another policy.
    #[error("it is for hosts that are judged by policy {}, and this one is judged by {found}", groups.join(" or "))]
    Group {
        /// The policies that it is for.
        groups: Vec<String>,
        /// The host's.
        found: String,
    },
    /// Too early.
    #[error("it is not released before {0}")]
    NotYet(Expiry),
    /// Too late.
    #[error("it is not released any more since {0}")]
    Over(Expiry),
    /// Not in this hour.
    #[error("it is released only {}", hours.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))]
    Hours {
        /// When it is.
        hours: Vec<Hours>,
    },
    /// Other hosts hold it.
    #[error(
        "as many hosts hold it as may at once ({limit}): close the disk there, or wait {wait_s} s for the first lease to run out"
    )]
    TooManyHosts {
        /// How many may.
        limit: u32,
        /// Seconds until the first of them holds it no more.
        wait_s: u64,
    },
}

impl Unmet {
    /// Its name, for programs.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Group { .. } => "other-group",
            Self::NotYet(_) => "not-yet",
            Self::Over(_) => "key-expired",
            Self::Hours { .. } => "outside-hours",
            Self::TooManyHosts { .. } => "too-many-hosts",
        }
    }
}

impl Terms {
    /// Whether they can be kept.
    ///
    /// # Errors
    /// [`TermsError`].
    pub fn check(&self) -> Result<(), TermsError> {
        if self.groups.len() > MAX_GROUPS || self.groups.iter().any(|name| !is_name(name)) {
            return Err(TermsError::Groups);
        }
        if let (Some(not_before), Some(not_after)) = (self.not_before, self.not_after)
            && not_before >= not_after
        {
            return Err(TermsError::Never { not_before, not_after });
        }
        if self.hours.len() > MAX_HOURS {
            return Err(TermsError::Hours(self.hours.len()));
        }
        if let Some(lease) = self.lease_s
            && !LEASE_RANGE.contains(&lease)
        {
            return Err(TermsError::Lease(lease));
        }
        match self.hosts_at_once {
            Some(hosts) if !(1..=MAX_HOSTS).contains(&hosts) => Err(TermsError::Hosts(hosts)),
            Some(_) if self.lease_s.is_none() => Err(TermsError::HostsWithoutLease),
            _ => Ok(()),
        }
    }

    /// Whether a host that is judged by this policy may hold the key at this Unix time. How many others hold it is for the store.
    ///
    /// # Errors
    /// [`Unmet`].
    pub fn allow(&self, policy: &str, now: u64) -> Result<(), Unmet> {
        if !self.groups.is_empty() && !self.groups.contains(policy) {
            return Err(Unmet::Group {
                groups: self.groups.iter().cloned().collect(),
                found: policy.to_owned(),
            });
        }
        if let Some(from) = self.not_before.filter(|from| !from.is_past(now)) {
            return Err(Unmet::NotYet(from));
        }
        if let Some(end) = self.not_after.filter(|end| end.is_past(now)) {
            return Err(Unmet::Over(end));
        }
        if self.hours.is_empty() || self.hours.iter().any(|hours| hours.include(now)) {
            Ok(())
        } else {
            Err(Unmet::Hours {
                hours: self.hours.clone(),
            })
        }
    }

    /// Whether a host that holds the key is to be watched: it has a lease, or something to do when it is lost.
    #[must_use]
    pub fn are_watched(&self) -> bool {
        self.lease_s.is_some() || self.on_loss != OnLoss::Nothing
    }
}

impl fmt::Display for Terms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if !self.groups.is_empty() {
            let names: Vec<_> = self.groups.iter().map(String::as_str).collect();
            parts.push(format!("groups {}", names.join(", ")));
        }
        parts.extend(self.not_before.map(|at| format!("not before {at}")));
        parts.extend(self.not_after.map(|at| format!("not after {at}")));
        parts.extend(self.hours.iter().map(|hours| format!("hours {hours}")));
        parts.extend(self.hosts_at_once.map(|count| format!("hosts at once {count}")));
        parts.extend(self.lease_s.map(|seconds| format!("lease {seconds} s")));
        if self.on_loss != OnLoss::Nothing {
            parts.push(format!("on loss {}", self.on_loss));
        }
        if parts.is_empty() {
            return f.write_str("none");
        }
        f.write_str(&parts.join("; "))
    }
}

impl OnLoss {
    /// Every one, the mildest first.
    pub const ALL: [Self; 4] = [Self::Nothing, Self::Tell, Self::Suspend, Self::Wipe];

    const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Tell => "tell",
            Self::Suspend => "suspend",
            Self::Wipe => "wipe",
        }
    }
}

impl fmt::Display for OnLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for OnLoss {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|rule| rule.name() == text);
        found.ok_or_else(|| "it is nothing, tell, suspend or wipe".to_owned())
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the shape that serde asks for")]
const fn is_nothing(rule: &OnLoss) -> bool {
    matches!(rule, OnLoss::Nothing)
}

//! The trustworthiness vector (draft-ietf-rats-ar4si section 2.3): what each refusal means in everybody's terms.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::appraise::{Failure, Rule};

/// A claim of the vector. Of the others (runtime-opaque, storage-opaque, sourced-data) nothing is known here, and nothing said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Claim {
    /// Whether this is the host that was enrolled, with an agent that is known.
    InstanceIdentity,
    /// Whether it is set up as it must be.
    Configuration,
    /// What was booted and what ran.
    Executables,
    /// What is stored.
    FileSystem,
    /// Hardware and firmware.
    Hardware,
}

/// A tier of trust (section 3.2). A claim of 2 to 31 is affirming, up to 95 warning, above that contraindicated, and below nothing is
/// claimed; the negative numbers, for values that only one verifier knows, are not used here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tier {
    /// Nothing is claimed.
    None,
    /// Good.
    Affirming,
    /// Not known to be good.
    Warning,
    /// Refused.
    Contraindicated,
}

impl Tier {
    /// As in the claims.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Affirming => "affirming",
            Self::Warning => "warning",
            Self::Contraindicated => "contraindicated",
        }
    }

    const fn of(value: u8) -> Self {
        match value {
            2..=31 => Self::Affirming,
            32..=95 => Self::Warning,
            96.. => Self::Contraindicated,
            _ => Self::None,
        }
    }
}

/// No claim is made.
const NOTHING: u8 = 0;
/// Recognised, approved, genuine: the best value of each claim.
const GOOD: u8 = 2;
/// Recognised code with known bugs; file systems with content that is not recognised.
const OUTDATED: u8 = 32;
const UNKNOWN_FILES: u8 = 32;
/// Code that is not recognised.
const UNKNOWN_CODE: u8 = 33;
/// What must not be.
const REFUSED: u8 = 96;
/// An attesting environment, or hardware and firmware, that is not recognised.
const UNKNOWN: u8 = 97;
/// Evidence that does not stand up to its cryptographic check.
const NOT_PROVED: u8 = 99;

/// The worst value found for each claim; the numbers are those of the draft.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Vector(BTreeMap<Claim, u8>);

impl Vector {
    /// Of evidence that was judged: good, but for what was refused.
    pub(super) fn of(failures: &[Failure]) -> Self {
        let good = [
            Claim::InstanceIdentity,
            Claim::Configuration,
            Claim::Executables,
            Claim::Hardware,
        ];
        let mut vector: BTreeMap<_, _> = good.into_iter().map(|claim| (claim, GOOD)).collect();
        for failure in failures {
            let (claim, value) = meaning(failure.rule(), failure.pcr());
            let worst = vector.entry(claim).or_insert(value);
            *worst = value.max(*worst);
        }
        Self(vector)
    }

    /// Of a host that proved who it is, and of which no more can be said.
    pub(super) fn identified() -> Self {
        Self(BTreeMap::from([
            (Claim::InstanceIdentity, GOOD),
            (Claim::Hardware, GOOD),
        ]))
    }

    /// Of a host whose evidence does not verify.
    pub(super) fn bad_evidence() -> Self {
        Self(BTreeMap::from([(Claim::InstanceIdentity, NOT_PROVED)]))
    }

    /// Of a host that gave none. A vector must have a member.
    pub(super) fn nothing() -> Self {
        Self(BTreeMap::from([(Claim::InstanceIdentity, NOTHING)]))
    }

    /// The tier of the worst claim.
    #[must_use]
    pub fn tier(&self) -> Tier {
        self.0
            .values()
            .map(|value| Tier::of(*value))
            .max()
            .unwrap_or(Tier::None)
    }
}

/// Which claim a refusal is about, and its value. A new rule does not compile until it has its place here and in formats.md.
const fn meaning(rule: Rule, pcr: Option<u8>) -> (Claim, u8) {
    match rule {
        Rule::NotApproved
        | Rule::NotHashed
        | Rule::Unstable
        | Rule::Modified
        | Rule::Anonymous
        | Rule::ImaNotApproved
        | Rule::ImaViolation
        // Some of what ran is not known.
        | Rule::Violation
        | Rule::NotReady
        | Rule::AgentStopped => (Claim::Executables, UNKNOWN_CODE),
        Rule::KexecLoad | Rule::Attempt | Rule::KindRefused | Rule::FlagRefused => (Claim::Executables, REFUSED),
        Rule::AgentVersion | Rule::Kernel => (Claim::Executables, OUTDATED),
        Rule::RuntimeStart | Rule::BootLog | Rule::BootLogPcr | Rule::ImaLog => (Claim::Executables, NOT_PROVED),
        // What may be written there runs later.
        Rule::BlockWrite | Rule::CodeWrite => (Claim::FileSystem, UNKNOWN_FILES),
        Rule::Agent | Rule::KernelPrograms => (Claim::InstanceIdentity, UNKNOWN),
        Rule::Device
        | Rule::Tier
        | Rule::Mode
        | Rule::NotProtected
        | Rule::Lockdown
        | Rule::Expired => (Claim::Configuration, REFUSED),
        Rule::PcrValue => match pcr {
            // TCG PC Client Platform Firmware Profile, section 2.3.4: code of firmware and option ROMs, then their settings;
            // Secure Boot is in 7.
            Some(0 | 2) => (Claim::Hardware, UNKNOWN),
            Some(1 | 3 | 5 | 6 | 7) => (Claim::Configuration, REFUSED),
            _ => (Claim::Executables, UNKNOWN_CODE),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiers_have_the_limits_of_the_draft() {
        for (value, tier) in [
            (0, Tier::None),
            (1, Tier::None),
            (2, Tier::Affirming),
            (31, Tier::Affirming),
            (32, Tier::Warning),
            (95, Tier::Warning),
            (96, Tier::Contraindicated),
            (127, Tier::Contraindicated),
        ] {
            assert_eq!(Tier::of(value), tier, "{value}");
        }
    }

    #[test]
    fn firmware_its_settings_and_boot_loaders_are_told_apart() {
        let claim = |pcr| meaning(Rule::PcrValue, Some(pcr)).0;
        let wanted = [
            Claim::Hardware,
            Claim::Configuration,
            Claim::Hardware,
            Claim::Configuration,
            Claim::Executables,
            Claim::Configuration,
            Claim::Configuration,
            Claim::Configuration,
            Claim::Executables,
        ];
        for (pcr, wanted) in (0..).zip(wanted) {
            assert_eq!(claim(pcr), wanted, "PCR {pcr}");
        }
        assert_eq!(claim(17), Claim::Executables);
    }
}

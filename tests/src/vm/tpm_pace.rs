//! How long a machine's TPM takes for its commands, and what it has done.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::proxy::CC_PCR_EXTEND;

/// `TPM2_CC_CreatePrimary` and further command codes (TPM 2.0 part 2, 6.5.2).
pub const CC_CREATE_PRIMARY: u32 = 0x131;
const CC_CERTIFY: u32 = 0x148;
const CC_ECDH_ZGEN: u32 = 0x154;
const CC_QUOTE: u32 = crate::proxy::CC_QUOTE;
const CC_CONTEXT_LOAD: u32 = 0x161;
const CC_CONTEXT_SAVE: u32 = 0x162;
const CC_START_AUTH_SESSION: u32 = 0x176;

/// Of the commands that an agent's day is made of, for people to read.
const NAMES: [(u32, &str); 13] = [
    (CC_CREATE_PRIMARY, "CreatePrimary"),
    (CC_CERTIFY, "Certify"),
    (CC_ECDH_ZGEN, "ECDH_ZGen"),
    (CC_QUOTE, "Quote"),
    (CC_CONTEXT_LOAD, "ContextLoad"),
    (CC_CONTEXT_SAVE, "ContextSave"),
    (CC_START_AUTH_SESSION, "StartAuthSession"),
    (CC_PCR_EXTEND, "PCR_Extend"),
    (0x165, "FlushContext"),
    (0x17a, "GetCapability"),
    (0x17b, "GetRandom"),
    (0x17e, "PCR_Read"),
    (0x17f, "PolicyPCR"),
];

/// What a quick discrete TPM takes, in microseconds. No hardware is as quick as this table in all of it.
///
/// For keys: Infineon's SLB9672 makes one of P-256 in 136 ms, does ECDH in 66 and signs in 36; the quickest chip of the same list
/// (NS350) signs in 17, and for it there is no more than that (wolfTPM, docs/benchmarks.md). So this is the SLB9672, all of it quicker by
/// as much as the NS350 signs. The salt of a session is an ECDH of the TPM's, too.
/// For contexts: the SLB9672 enciphers 86 KB/s, so that half a kilobyte takes 6 ms.
/// For extends: 5.4 to 7 ms were measured of TPM 1.2, before and after Linux asked them more often (commit 424eaf910c32).
/// For all else: a wish for 32 random bytes takes the SLB9672 1.4 ms, most of it the way there and back.
const DISCRETE_US: [(u32, u64); 8] = [
    (CC_CREATE_PRIMARY, 60_000),
    (CC_ECDH_ZGEN, 30_000),
    (CC_START_AUTH_SESSION, 30_000),
    (CC_QUOTE, 15_000),
    (CC_CERTIFY, 15_000),
    (CC_CONTEXT_LOAD, 5_000),
    (CC_CONTEXT_SAVE, 5_000),
    (CC_PCR_EXTEND, 5_000),
];
/// And for any other command.
const DISCRETE_REST_US: u64 = 1_500;

/// How long each command waits before the TPM gets it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Delays {
    of: BTreeMap<u32, Duration>,
    rest: Duration,
}

impl Delays {
    /// Extends wait, nothing else.
    #[must_use]
    pub fn extends(delay: Duration) -> Self {
        Self {
            of: BTreeMap::from([(CC_PCR_EXTEND, delay)]),
            rest: Duration::ZERO,
        }
    }

    /// Commands wait as long as a quick discrete TPM works, times `factor`: for a machine that is that much slower than a computer.
    #[must_use]
    pub fn discrete(factor: f64) -> Self {
        let scaled = |us| Duration::from_micros(us).mul_f64(factor);
        Self {
            of: DISCRETE_US.map(|(code, us)| (code, scaled(us))).into(),
            rest: scaled(DISCRETE_REST_US),
        }
    }

    /// How long a command with this code waits.
    #[must_use]
    pub fn of(&self, code: u32) -> Duration {
        self.of.get(&code).copied().unwrap_or(self.rest)
    }
}

/// What a TPM has done since it was counted anew, whoever asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Done(BTreeMap<u32, Command>);

/// All commands of one code.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Command {
    count: u64,
    busy: Duration,
    /// From the answer before to this command's coming.
    idle: Duration,
}

impl Done {
    /// One more command, for how long the TPM had done nothing when it came, and how long it took from then on to its answer.
    pub(super) fn add(&mut self, code: u32, idle: Duration, busy: Duration) {
        let command = self.0.entry(code).or_default();
        command.count += 1;
        command.busy += busy;
        command.idle += idle;
    }

    /// How many commands.
    #[must_use]
    pub fn commands(&self) -> u64 {
        self.0.values().map(|command| command.count).sum()
    }

    /// How many commands with this code.
    #[must_use]
    pub fn count(&self, code: u32) -> u64 {
        self.0.get(&code).map_or(0, |command| command.count)
    }

    /// How long they took, waiting before the TPM included.
    #[must_use]
    pub fn busy(&self) -> Duration {
        self.0.values().map(|command| command.busy).sum()
    }

    /// How long the same commands would wait with such delays.
    #[must_use]
    pub fn with(&self, delays: &Delays) -> Duration {
        let waits = self.0.iter().map(|(&code, command)| {
            let count = u32::try_from(command.count).unwrap_or(u32::MAX);
            delays.of(code).saturating_mul(count)
        });
        waits.sum()
    }

    /// How long the TPM did nothing before the commands of each name, longest first.
    #[must_use]
    pub fn idle(&self) -> Vec<(String, Duration)> {
        let mut idle: Vec<_> = self
            .0
            .iter()
            .map(|(&code, command)| (name(code), command.idle))
            .collect();
        idle.sort_by_key(|(_, idle)| std::cmp::Reverse(*idle));
        idle
    }
}

/// Counts by command, the most frequent first.
impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut counts: Vec<_> = self.0.iter().map(|(&code, command)| (command.count, code)).collect();
        counts.sort_by_key(|&(count, code)| (std::cmp::Reverse(count), code));
        let counts: Vec<_> = counts
            .into_iter()
            .map(|(count, code)| format!("{count} {}", name(code)))
            .collect();
        f.write_str(&counts.join(", "))
    }
}

fn name(code: u32) -> String {
    let found = NAMES.iter().find(|(of, _)| *of == code);
    found.map_or_else(|| format!("{code:#x}"), |(_, name)| (*name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn what_was_done_is_told_by_command_and_what_it_would_take() {
        let mut done = Done::default();
        done.add(CC_QUOTE, MS, 2 * MS);
        done.add(CC_PCR_EXTEND, 2 * MS, 3 * MS);
        done.add(CC_PCR_EXTEND, 2 * MS, 3 * MS);
        done.add(0x199, Duration::ZERO, 4 * MS);
        assert_eq!((done.commands(), done.count(CC_PCR_EXTEND)), (4, 2));
        assert_eq!(done.busy(), 12 * MS);
        assert_eq!(done.to_string(), "2 PCR_Extend, 1 Quote, 1 0x199");
        let idle = [("PCR_Extend", 4 * MS), ("Quote", MS), ("0x199", Duration::ZERO)];
        assert_eq!(done.idle(), idle.map(|(name, idle)| (name.to_owned(), idle)));
        assert_eq!(done.with(&Delays::extends(7 * MS)), 14 * MS);
        assert_eq!(done.with(&Delays::discrete(10.0)), 265 * MS);
    }
}

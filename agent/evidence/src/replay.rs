//! Does the log lead to the quoted PCR, and does it say what it must?
//!
//! Replay recomputes every digest from the content, extends the runtime PCR's starting value with them, and demands
//! the quoted value at the end. Whether what the log tells is acceptable is for the policy.

use std::collections::{HashMap, HashSet};

use crate::bundle::Pcrs;
use crate::cel::{CelError, Record, Register};
use crate::digest::{Algorithm, Sha256Digest};
use crate::event::{AgentStart, Event, LoadKind};
use crate::pcr::RuntimePcr;
use crate::quote::{Judged, MAX_WHOLE_LOG, QUOTED_BANK, VerifiedQuote};

pub use crate::quote::HeldLog;

/// Most events in a log. Each measurement takes more than 128 bytes, so that no log which is short enough to be judged has
/// more of them; smaller events by the million, each of which is larger in memory, are only good for filling that.
pub const MAX_LOG_EVENTS: usize = MAX_WHOLE_LOG / MIN_EVENT;
/// No measurement takes fewer bytes.
const MIN_EVENT: usize = 128;

/// Why a log does not explain the quoted PCR.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplayError {
    /// No record at all: a host that measures has at least its agent's start.
    #[error("the runtime log is empty: the agent does not measure")]
    Empty,
    /// A record of another PCR than the one pinned for this host: perhaps a clean log, begun in a PCR that was unused.
    #[error(
        "record {record} was extended into {register} {found}; this host's runtime log is pinned to PCR {wanted}. If its \
         agent is meant to use another PCR (tpm.pcr), remove the host and add it again with --pcr"
    )]
    PcrIndex {
        /// The record.
        record: u64,
        /// The kind of its register.
        register: Register,
        /// Its index.
        found: u8,
        /// The pinned PCR.
        wanted: RuntimePcr,
    },
    /// A digest is not that of the content, or the content cannot be read.
    #[error("the runtime log does not hold what was measured")]
    Record(#[from] CelError),
    /// Records of one log are extended into the same banks.
    #[error("record {record} has digests of other banks than record 0")]
    Banks {
        /// The record.
        record: u64,
    },
    /// More than [`MAX_LOG_EVENTS`].
    #[error(
        "the log has more than {MAX_LOG_EVENTS} events by record {record}: no agent writes so many; reboot the host"
    )]
    TooManyEvents {
        /// The record at which they are too many.
        record: u64,
    },
    /// The first event is not the agent's start.
    #[error("the log begins with {found}, not with agent-start: its beginning is missing")]
    NoAgentStart {
        /// Name of the first event.
        found: &'static str,
    },
    /// The log was written in another boot than the bundle names.
    #[error(
        "record {record} was written in boot {found}, the host is in boot {wanted}: the log is from before a reboot"
    )]
    LogFromAnotherBoot {
        /// The record with the agent's start.
        record: u64,
        /// Boot id in the log.
        found: String,
        /// Boot id of the bundle.
        wanted: String,
    },
    /// The agent's start names no starting value of the quoted bank.
    #[error("agent-start does not name the runtime PCR's starting value in the sha256 bank")]
    NoPcrStart,
    /// The agent was restarted, and does not say where its predecessor stopped.
    #[error("the agent restarted at record {record} without naming its predecessor's last measurement")]
    NoPredecessor {
        /// The record with the agent's start.
        record: u64,
    },
    /// The log does not lead to the quoted value.
    #[error("the log leads PCR {pcr} to {replayed}, the quote has {quoted}: something extended it past the log")]
    PcrMismatch {
        /// The runtime PCR.
        pcr: RuntimePcr,
        /// Value after replay, hex.
        replayed: String,
        /// Value in the quote, hex.
        quoted: String,
    },
}

/// Evidence whose runtime log leads to the quoted PCR: what it says is what was measured.
#[derive(Debug)]
pub struct ReplayedLog {
    quote: VerifiedQuote,
    pcr: RuntimePcr,
    banks: Vec<Algorithm>,
    events: Vec<(u64, Event)>,
    start: AgentStart,
}

impl VerifiedQuote {
    /// Replays the runtime log against the quoted value of `pcr`, the one pinned for this host.
    ///
    /// # Errors
    /// A [`ReplayError`] naming the record and the reason.
    pub fn replay(mut self, pcr: RuntimePcr) -> Result<ReplayedLog, ReplayError> {
        // Records go as their events come: of a long log, there is no room for both.
        let records = std::mem::take(&mut self.records);
        let bytes: usize = records.iter().map(|record| record.content.len()).sum();
        let mut events = Vec::with_capacity(bytes.div_ceil(MIN_EVENT).min(MAX_LOG_EVENTS));
        let mut digests = Vec::with_capacity(records.len());
        let banks = records.first().map(banks);
        for record in records {
            check_record(&record, pcr)?;
            if banks.as_ref() != Some(&self::banks(&record)) {
                return Err(ReplayError::Banks { record: record.number });
            }
            record.check_digests()?;
            record.each_event(|event| events.push((record.number, event)))?;
            if events.len() > MAX_LOG_EVENTS {
                return Err(ReplayError::TooManyEvents { record: record.number });
            }
            digests.extend(record.digest(QUOTED_BANK).map(<[u8]>::to_vec));
        }
        let start = self.check_starts(&events)?;
        self.check_pcr(&start, pcr, &digests)?;
        Ok(ReplayedLog {
            quote: self,
            pcr,
            banks: banks.unwrap_or_default(),
            events,
            start,
        })
    }

    /// The first event is the agent's start; each start is of this boot; a later one names its predecessor's end, if
    /// anything was measured before it.
    fn check_starts(&self, events: &[(u64, Event)]) -> Result<AgentStart, ReplayError> {
        let (_, first) = events.first().ok_or(ReplayError::Empty)?;
        let Event::AgentStart(start) = first else {
            return Err(ReplayError::NoAgentStart { found: first.name() });
        };
        let mut measured = false;
        for (record, event) in events {
            match event {
                Event::AgentStart(later) => {
                    self.check_boot(*record, later)?;
                    if measured && later.predecessor.is_none() {
                        return Err(ReplayError::NoPredecessor { record: *record });
                    }
                }
                Event::Load(load) => measured |= load.seq.is_some(),
                Event::Inventory(_) | Event::Ready | Event::Violation(_) | Event::AgentStop | Event::Notice(_) => {}
            }
        }
        Ok(AgentStart::clone(start))
    }

    fn check_boot(&self, record: u64, start: &AgentStart) -> Result<(), ReplayError> {
        if start.boot_id != self.boot_id {
            let (found, wanted) = (start.boot_id.clone(), self.boot_id.clone());
            return Err(ReplayError::LogFromAnotherBoot { record, found, wanted });
        }
        Ok(())
    }

    fn check_pcr(&self, start: &AgentStart, pcr: RuntimePcr, digests: &[Vec<u8>]) -> Result<(), ReplayError> {
        let start = start.pcr_start.iter().find(|(bank, _)| *bank == QUOTED_BANK);
        let (_, start) = start.ok_or(ReplayError::NoPcrStart)?;
        let extend = |value: Vec<u8>, digest: &Vec<u8>| QUOTED_BANK.extend(&value, digest);
        let replayed = digests.iter().fold(start.clone(), extend);
        let quoted = self.pcrs.get(&QUOTED_BANK).and_then(|bank| bank.get(&pcr.index()));
        let quoted = quoted.map(AsRef::as_ref).unwrap_or_default();
        if replayed != quoted {
            return Err(ReplayError::PcrMismatch {
                pcr,
                replayed: hex::encode(replayed),
                quoted: hex::encode(quoted),
            });
        }
        Ok(())
    }
}

fn banks(record: &Record) -> Vec<Algorithm> {
    record.digests.iter().map(|(bank, _)| *bank).collect()
}

fn check_record(record: &Record, wanted: RuntimePcr) -> Result<(), ReplayError> {
    if !record.is_in(wanted) {
        return Err(ReplayError::PcrIndex {
            record: record.number,
            register: record.register,
            found: record.pcr,
            wanted,
        });
    }
    Ok(())
}

impl ReplayedLog {
    /// Records in the log.
    #[must_use]
    pub const fn records(&self) -> u64 {
        self.quote.head.records()
    }

    /// All events in order, each with the number of its record.
    pub fn events(&self) -> impl Iterator<Item = (u64, &Event)> {
        self.events.iter().map(|(record, event)| (*record, event))
    }

    /// The agent's first start in this log.
    #[must_use]
    pub const fn agent_start(&self) -> &AgentStart {
        &self.start
    }

    /// The agent's last start in this log: how the host measures now.
    #[must_use]
    pub fn last_agent_start(&self) -> &AgentStart {
        let mut starts = self.events.iter().rev().filter_map(|(_, event)| match event {
            Event::AgentStart(start) => Some(start.as_ref()),
            _ => None,
        });
        // The first event is one, so there is always a last.
        starts.next().unwrap_or(&self.start)
    }

    /// Where the programs with these digests were started from, as far as the log tells; the first path of each.
    pub(crate) fn programs(&self, wanted: &HashSet<Sha256Digest>) -> HashMap<Sha256Digest, &str> {
        let mut paths = HashMap::new();
        for (_, event) in &self.events {
            if let Event::Inventory(code) | Event::Load(code) = event
                && code.kind == LoadKind::Program
                && !code.path.is_empty()
                && let Some(digest) = code.digest.filter(|digest| wanted.contains(digest))
            {
                paths.entry(digest).or_insert(code.path.as_str());
            }
        }
        paths
    }

    /// The PCR that the log is in: the pinned one.
    #[must_use]
    pub const fn runtime_pcr(&self) -> RuntimePcr {
        self.pcr
    }

    /// The banks that each of its records has a digest for.
    pub(crate) fn banks(&self) -> &[Algorithm] {
        &self.banks
    }

    /// Value of the runtime PCR before the first record, SHA-256 bank. Other than zero, something extended it before
    /// the agent, perhaps a log that is gone: for the policy to judge.
    #[must_use]
    pub fn pcr_start(&self) -> &[u8] {
        let start = self.start.pcr_start.iter().find(|(bank, _)| *bank == QUOTED_BANK);
        start.map(|(_, value)| value.as_slice()).unwrap_or_default()
    }

    /// The quoted PCR values.
    #[must_use]
    pub const fn pcrs(&self) -> &Pcrs {
        &self.quote.pcrs
    }

    /// The quoted value of one PCR of the SHA-256 bank.
    #[must_use]
    pub fn pcr(&self, index: u8) -> Option<&[u8]> {
        self.quote.pcrs.get(&QUOTED_BANK)?.get(&index).map(AsRef::as_ref)
    }

    /// The quote that this log was replayed against.
    #[must_use]
    pub const fn quote(&self) -> &VerifiedQuote {
        &self.quote
    }

    /// The kernel's boot id.
    #[must_use]
    pub fn boot_id(&self) -> &str {
        &self.quote.boot_id
    }

    /// The `extraData` of the quote.
    #[must_use]
    pub const fn extra_data(&self) -> &[u8; 32] {
        &self.quote.extra_data
    }

    /// TPM resets.
    #[must_use]
    pub const fn reset_count(&self) -> u32 {
        self.quote.clock.reset_count
    }

    /// TPM restarts since the reset.
    #[must_use]
    pub const fn restart_count(&self) -> u32 {
        self.quote.clock.restart_count
    }

    /// The TPM's clock in milliseconds.
    #[must_use]
    pub const fn clock(&self) -> u64 {
        self.quote.clock.clock
    }

    /// The TPM's firmware version.
    #[must_use]
    pub const fn firmware_version(&self) -> u64 {
        self.quote.firmware_version
    }

    /// The firmware's log, raw, if it came along. The policy's appraisal holds it against the quoted PCRs.
    #[must_use]
    pub fn boot_log(&self) -> Option<&[u8]> {
        self.quote.boot_log.as_ref().map(AsRef::as_ref)
    }

    /// The IMA log, raw, if it came along.
    #[must_use]
    pub fn ima_log(&self) -> Option<&[u8]> {
        self.quote.ima_log.as_ref().map(AsRef::as_ref)
    }

    /// What a verifier remembers of what it has judged here.
    #[must_use]
    pub fn judged(&self) -> Judged {
        Judged::of(self)
    }

    /// What a verifier keeps for the next question.
    #[must_use]
    pub fn to_held(&self) -> HeldLog {
        self.quote.held(self.quote.log.clone())
    }

    /// As [`ReplayedLog::to_held`], without the copy.
    #[must_use]
    pub fn into_held(mut self) -> HeldLog {
        let log = std::mem::take(&mut self.quote.log);
        self.quote.held(log)
    }
}

#[cfg(test)]
mod tests;

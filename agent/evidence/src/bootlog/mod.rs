//! The firmware's event log: what the TPM's boot PCRs were extended with.
//!
//! Linux shows it as `/sys/kernel/security/tpm0/binary_bios_measurements`. Two forms exist (TCG PC Client Platform
//! Firmware Profile §10; TCG EFI Protocol §5): the TPM 1.2 form with one SHA-1 digest an event, and the crypto-agile
//! form, whose first event ("Spec ID Event03") lists the banks.
//!
//! The log proves nothing by itself: whoever holds the host can write any log. It counts only so far as its replay
//! equals quoted PCR values, and even then the replay proves PCR index and digests, **not** the event's type and data,
//! which the firmware may have hashed differently than logged. So those are shown to people ([`BootEvent::untrusted_type`],
//! [`BootEvent::untrusted_data`]) and judge nothing. What the digests do prove is what [`BootLog::proven`] tells.

mod describe;
mod facts;
mod names;
mod parse;
mod proven;
mod show;
mod text;
mod uefi;

pub use describe::MAX_DESCRIPTION;
pub use facts::{BootFacts, CommandLine, GrubFile, KeyDatabase, Loaded, Role, Section, SecureBoot};
pub use names::event_name;
pub use parse::parse;
pub use proven::{Claim, Meaning, Proven};
pub use uefi::{Keys, Variable};

use crate::digest::Algorithm;
use std::collections::{BTreeMap, BTreeSet};

/// Longest log, in bytes. Firmware reserves 64 KiB to a few hundred.
pub const MAX_LOG: usize = crate::bundle::MAX_BOOT_LOG;

/// Most events in a log.
pub const MAX_EVENTS: usize = 16_384;

/// Longest data of one event, in bytes (a revocation list is the longest seen: tens of KiB).
pub const MAX_EVENT_DATA: usize = 512 * 1024;

/// The event that is never extended: it carries notes, such as the log's own header.
pub const EV_NO_ACTION: u32 = 3;

/// Why bytes are no boot log, or why a boot log can't be replayed. Event numbers count from 0.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BootLogError {
    /// No bytes at all.
    #[error("the boot log is empty")]
    Empty,
    /// Longer than [`MAX_LOG`].
    #[error("the boot log is {0} bytes long, at most {MAX_LOG} are read")]
    TooLong(usize),
    /// More than [`MAX_EVENTS`].
    #[error("the boot log has more than {MAX_EVENTS} events")]
    TooManyEvents,
    /// The log ends inside an event.
    #[error("the boot log ends inside event {event}, which begins at byte {at}, at its {field}")]
    Short {
        /// The event.
        event: usize,
        /// The byte where it begins.
        at: usize,
        /// What was being read.
        field: &'static str,
    },
    /// A PCR that no TPM has.
    #[error("event {event} of the boot log, at byte {at}, names PCR {pcr}: this is not a boot log, or it is damaged")]
    NoSuchPcr {
        /// The event.
        event: usize,
        /// The byte where it begins.
        at: usize,
        /// The number found.
        pcr: u32,
    },
    /// An event's data is longer than [`MAX_EVENT_DATA`].
    #[error("event {event} of the boot log, at byte {at}, has {size} bytes of data, at most {MAX_EVENT_DATA} are read")]
    EventTooLong {
        /// The event.
        event: usize,
        /// The byte where it begins.
        at: usize,
        /// Its claimed size.
        size: u32,
    },
    /// The crypto-agile header is not of the layout of "Spec ID Event03".
    #[error("the boot log's header, at byte 0, has an impossible {0}")]
    Header(&'static str),
    /// A digest of an algorithm that the header does not list, so its size is unknown.
    #[error(
        "event {event} of the boot log, at byte {at}, has a digest of algorithm {algorithm:#06x}, which its header does not list"
    )]
    UnlistedAlgorithm {
        /// The event.
        event: usize,
        /// The byte where it begins.
        at: usize,
        /// The TPM's number for the algorithm.
        algorithm: u16,
    },
    /// Two digests of one algorithm in one event.
    #[error("event {event} of the boot log, at byte {at}, has two digests of algorithm {algorithm:#06x}")]
    RepeatedAlgorithm {
        /// The event.
        event: usize,
        /// The byte where it begins.
        at: usize,
        /// The TPM's number for the algorithm.
        algorithm: u16,
    },
    /// More than one event sets the TPM's start-up locality, or one comes after PCR 0 was extended.
    #[error("event {event} of the boot log sets the start-up locality, which was settled before")]
    Locality {
        /// The event.
        event: usize,
    },
    /// The log has no digests of this bank.
    #[error("the boot log has no {} digests, only {}", .0, banks_text(.1))]
    NoBank(Algorithm, Vec<Algorithm>),
    /// An extended event lacks a digest of this bank.
    #[error("event {event} of the boot log has no {} digest", .bank)]
    NoDigest {
        /// The event.
        event: usize,
        /// The bank.
        bank: Algorithm,
    },
}

/// Which of the two forms a log has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One SHA-1 digest an event.
    Tpm12,
    /// Digests of several banks an event.
    CryptoAgile,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootEvent {
    at: usize,
    pcr: u32,
    event_type: u32,
    digests: Vec<(Algorithm, Vec<u8>)>,
    data: Vec<u8>,
}

impl BootEvent {
    /// The byte of the log where it begins.
    #[must_use]
    pub const fn at(&self) -> usize {
        self.at
    }

    /// The PCR: 0 to 23, or any number for an event that is not extended.
    #[must_use]
    pub fn pcr(&self) -> u32 {
        self.pcr
    }

    /// Whether the event is extended into its PCR.
    #[must_use]
    pub fn is_extended(&self) -> bool {
        self.event_type != EV_NO_ACTION
    }

    /// The digests in the banks that this program knows. A replay that matches a quote proves them.
    #[must_use]
    pub fn digests(&self) -> &[(Algorithm, Vec<u8>)] {
        &self.digests
    }

    /// The digest in one bank.
    #[must_use]
    pub fn digest(&self, bank: Algorithm) -> Option<&[u8]> {
        self.digests
            .iter()
            .find(|(algorithm, _)| *algorithm == bank)
            .map(|(_, digest)| digest.as_slice())
    }

    /// The event's type as logged. No replay proves it: for people, never for a judgement.
    #[must_use]
    pub fn untrusted_type(&self) -> u32 {
        self.event_type
    }

    /// The event's data as logged. No replay proves it: for people, never for a judgement.
    #[must_use]
    pub fn untrusted_data(&self) -> &[u8] {
        &self.data
    }
}

/// A log that is well-formed; not yet one that anything proves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootLog {
    format: Format,
    banks: Vec<Algorithm>,
    locality: u8,
    events: Vec<BootEvent>,
}

impl BootLog {
    /// The log's form.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// The banks that the log has digests for and that this program knows.
    #[must_use]
    pub fn banks(&self) -> &[Algorithm] {
        &self.banks
    }

    /// The locality that started the TPM: PCR 0 begins with it as its last byte (PC Client PFP, "StartupLocality").
    #[must_use]
    pub fn startup_locality(&self) -> u8 {
        self.locality
    }

    /// The events, the crypto-agile header included.
    #[must_use]
    pub fn events(&self) -> &[BootEvent] {
        &self.events
    }

    /// The PCRs that the log's events extend.
    #[must_use]
    pub fn extended_pcrs(&self) -> BTreeSet<u32> {
        self.events
            .iter()
            .filter(|event| event.is_extended())
            .map(BootEvent::pcr)
            .collect()
    }

    /// The values that PCRs 0 to 23 of a bank have after all events.
    ///
    /// # Errors
    /// [`BootLogError::NoBank`], or [`BootLogError::NoDigest`] for an event without a digest in this bank.
    pub fn replay(&self, bank: Algorithm) -> Result<BTreeMap<u32, Vec<u8>>, BootLogError> {
        if !self.banks.contains(&bank) {
            return Err(BootLogError::NoBank(bank, self.banks.clone()));
        }
        let mut pcrs: BTreeMap<u32, Vec<u8>> = (0..24)
            .map(|pcr| (pcr, initial(pcr, bank.size(), self.locality)))
            .collect();
        for (number, event) in self.events.iter().enumerate().filter(|(_, event)| event.is_extended()) {
            let digest = event
                .digest(bank)
                .ok_or(BootLogError::NoDigest { event: number, bank })?;
            let value = pcrs.get_mut(&event.pcr).ok_or(BootLogError::NoSuchPcr {
                event: number,
                at: event.at,
                pcr: event.pcr,
            })?;
            *value = bank.extend(value, digest);
        }
        Ok(pcrs)
    }
}

/// A PCR's value after a TPM reset: the dynamic-launch PCRs 17 to 22 all ones, PCR 0 the start-up locality, all others 0
/// (PC Client Platform TPM Profile, "PCR attributes").
fn initial(pcr: u32, size: usize, locality: u8) -> Vec<u8> {
    let mut value = vec![if (17..=22).contains(&pcr) { 0xFF } else { 0 }; size];
    if pcr == 0
        && let Some(last) = value.last_mut()
    {
        *last = locality;
    }
    value
}

fn banks_text(banks: &[Algorithm]) -> String {
    banks.iter().map(|bank| bank.name()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;

//! A boot log for people and their scripts.

use super::proven::Proven;
use super::text::summary;
use super::{BootEvent, BootFacts, BootLog, Format, banks_text, event_name};
use crate::digest::Algorithm;
use serde_json::{Value, json};
use std::fmt;

impl fmt::Display for BootLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let form = match self.format {
            Format::Tpm12 => "TPM 1.2",
            Format::CryptoAgile => "crypto-agile",
        };
        writeln!(
            f,
            "{form} boot log: {} events, banks {}, start-up locality {}",
            self.events.len(),
            banks_text(&self.banks),
            self.locality
        )?;
        let bank = self.best_bank();
        let proven = self.proven(bank, None).unwrap_or_default();
        for (number, event) in self.events.iter().enumerate() {
            write!(
                f,
                "{number:4} pcr {:>2} {:34}",
                pcr_text(event),
                event_name(event.event_type)
            )?;
            if let Some(digest) = event.digest(bank).filter(|_| event.is_extended()) {
                write!(f, " {bank}:{}", hex::encode(digest))?;
            }
            writeln!(f, " {}", description(event, number, &proven))?;
        }
        write!(f, "{}", BootFacts::of(&proven))?;
        for &bank in &self.banks {
            match self.replay(bank) {
                Err(error) => writeln!(f, "replay {}: {error}", bank)?,
                Ok(pcrs) => {
                    for pcr in self.extended_pcrs() {
                        let value = pcrs.get(&pcr).map(hex::encode).unwrap_or_default();
                        writeln!(f, "replay {} pcr {pcr:>2} {value}", bank)?;
                    }
                }
            }
        }
        Ok(())
    }
}

impl BootLog {
    /// The log as one JSON object: form, banks, events with type names (claims), digests and what those prove, the boot in
    /// short, and the replayed PCR values a bank (those PCRs that some event extends).
    #[must_use]
    pub fn to_json(&self) -> Value {
        let proven = self.proven(self.best_bank(), None).unwrap_or_default();
        let events: Vec<Value> = self
            .events
            .iter()
            .enumerate()
            .map(|(number, event)| {
                let digests: serde_json::Map<String, Value> = event
                    .digests
                    .iter()
                    .map(|(bank, digest)| (bank.name().to_owned(), hex::encode(digest).into()))
                    .collect();
                json!({
                    "event": number, "at": event.at, "pcr": event.pcr, "type": event_name(event.event_type),
                    "extended": event.is_extended(), "digests": digests, "size": event.data.len(),
                    "description": description(event, number, &proven),
                })
            })
            .collect();
        let replay: serde_json::Map<String, Value> = self
            .banks
            .iter()
            .filter_map(|&bank| {
                let pcrs = self.replay(bank).ok()?;
                let values: serde_json::Map<String, Value> = self
                    .extended_pcrs()
                    .into_iter()
                    .filter_map(|pcr| Some((pcr.to_string(), hex::encode(pcrs.get(&pcr)?).into())))
                    .collect();
                Some((bank.name().to_owned(), values.into()))
            })
            .collect();
        json!({
            "format": match self.format { Format::Tpm12 => "tpm-1.2", Format::CryptoAgile => "crypto-agile" },
            "banks": self.banks.iter().map(|bank| bank.name()).collect::<Vec<_>>(),
            "startup_locality": self.locality,
            "events": events,
            "facts": BootFacts::of(&proven),
            "pcrs": replay,
        })
    }

    /// SHA-256 where the log has it, for a line has room for one digest.
    fn best_bank(&self) -> Algorithm {
        let best = self.banks.iter().find(|&&bank| bank == Algorithm::Sha256);
        best.or(self.banks.first()).copied().unwrap_or(Algorithm::Sha256)
    }
}

/// What an event proves and claims; of one that is not extended, and so proves nothing, its data in short.
fn description(event: &BootEvent, number: usize, proven: &[Proven<'_>]) -> String {
    let found = proven.binary_search_by_key(&number, Proven::number);
    match found.ok().and_then(|at| proven.get(at)) {
        Some(proven) => proven.describe(),
        None if event.data.is_empty() => "claimed".into(),
        None => format!("claimed {}", summary(&event.data)),
    }
}

/// The PCR, or "-" where an event that is not extended names none.
fn pcr_text(event: &BootEvent) -> String {
    if event.pcr < 24 {
        event.pcr.to_string()
    } else {
        "-".into()
    }
}

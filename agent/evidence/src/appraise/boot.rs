//! The part of the verdict that is about the boot: its PCRs, the firmware's log, and what the runtime log began on.

use super::{Failure, Judge, Rule};
use crate::bootlog::{self, BootLogError};
use crate::digest::Sha256Digest;
use crate::policy::{BootConfiguration, BootStep, golden_pcrs, steps};
use crate::quote::QUOTED_BANK;
use crate::replay::ReplayedLog;

/// PCRs that belong to the firmware alone: if there is a boot log, it must explain each of them.
const FIRMWARE_PCRS: core::ops::RangeInclusive<u8> = 0..=7;
/// PCRs of boot loader, kernel stub and shim: a boot log explains them if it mentions them. Nothing extends them once the
/// firmware's log is closed.
const LOADER_PCRS: [u8; 3] = [8, 9, 14];

impl Judge<'_> {
    pub(super) fn boot(&mut self, log: &ReplayedLog) {
        self.configuration(log);
        self.boot_log(log);
        self.runtime_start(log);
    }

    /// The PCRs must be those of one configuration. Where they are those of none, the one with the fewest differences tells
    /// what is wrong.
    fn configuration(&mut self, log: &ReplayedLog) {
        let policy = self.policy;
        let expired = |boot: &BootConfiguration| boot.expires().is_some_and(|at| at.is_past(self.now));
        let differing = |boot: &BootConfiguration| differing(boot, log);
        let (past, live): (Vec<_>, Vec<_>) = policy.boots().iter().partition(|boot| expired(boot));
        if let Some(fits) = live.iter().find(|boot| differing(boot).is_empty()) {
            self.note_unjudged(fits, log);
            return;
        }
        if let Some(late) = past.iter().find(|boot| differing(boot).is_empty()) {
            let at = late.expires().map(|at| at.to_string()).unwrap_or_default();
            let detail = format!("boot configuration {}, approved until {at}", late.name());
            self.failures.push(Failure::new(Rule::Expired, detail));
            return;
        }
        // Of equals the last one: it was added last.
        let nearest = live.iter().rev().min_by_key(|boot| differing(boot).len());
        let nearest = nearest.or_else(|| past.iter().rev().min_by_key(|boot| differing(boot).len()));
        let Some(nearest) = nearest else {
            self.notes
                .push("the policy has no boot configuration: the boot is not judged by PCR values".into());
            return;
        };
        self.note_unjudged(nearest, log);
        let found = steps(log);
        for pcr in differing(nearest) {
            let golden = nearest.pcrs().get(&pcr).and_then(|values| values.first());
            let golden = golden.map(|value| format!("boot configuration {} has sha256:{value}", nearest.name()));
            let found = found.get(&pcr).map(Vec::as_slice).unwrap_or_default();
            self.failures.push(Failure {
                pcr: Some(pcr),
                digest: log.pcr(pcr).and_then(|value| Sha256Digest::try_from(value).ok()),
                nearest: golden,
                detail: first_difference(found, nearest.steps(pcr)).unwrap_or_default(),
                ..Failure::new(Rule::PcrValue, String::new())
            });
        }
    }

    /// What the configuration at hand says nothing about.
    fn note_unjudged(&mut self, boot: &BootConfiguration, log: &ReplayedLog) {
        let unjudged = |pcr: &u8| boot.pcrs().get(pcr).is_none_or(|values| values.is_empty());
        let unjudged: Vec<_> = golden_pcrs(log.runtime_pcr()).filter(unjudged).collect();
        if !unjudged.is_empty() {
            let list: Vec<_> = unjudged.iter().map(u8::to_string).collect();
            let name = boot.name();
            self.notes.push(format!(
                "boot configuration {name} has no values for PCR {}",
                list.join(", ")
            ));
        }
        let runtime = log.runtime_pcr().index();
        if boot.pcrs().get(&runtime).is_some_and(|values| !values.is_empty()) {
            self.notes.push(format!(
                "the policy's values for PCR {runtime} are not for this host: its runtime log is there"
            ));
        }
    }

    /// The boot log, if there is one, must lead to the quoted PCRs.
    fn boot_log(&mut self, log: &ReplayedLog) {
        let Some(bytes) = log.boot_log() else {
            self.unexplained("no boot log with this evidence".to_owned());
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
                self.unexplained(error.to_string());
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

    /// No log explains the boot: a note, or a failure where the policy demands one.
    fn unexplained(&mut self, why: String) {
        if self.policy.rules().boot_log {
            let detail = format!("{why}, and the policy demands that one explains the boot");
            self.failures.push(Failure::new(Rule::BootLog, detail));
        } else {
            self.notes
                .push(format!("{why}: the boot is judged by golden PCR values alone"));
        }
    }

    /// A log that begins on an extended PCR may have a predecessor that someone removed.
    fn runtime_start(&mut self, log: &ReplayedLog) {
        let start = Sha256Digest::try_from(log.pcr_start()).ok();
        let known = |start: &Sha256Digest| self.sets.iter().any(|set| set.runtime_start().contains(start));
        if !start.is_some_and(|start| start == Sha256Digest::ZERO || known(&start)) {
            self.failures.push(Failure {
                pcr: Some(log.runtime_pcr().index()),
                record: Some(0),
                digest: start,
                ..Failure::new(Rule::RuntimeStart, String::new())
            });
        }
    }
}

/// The PCRs of which a configuration has values, and not the quoted one. The runtime PCR moves with every load: replay has
/// judged it.
fn differing(boot: &BootConfiguration, log: &ReplayedLog) -> Vec<u8> {
    let runtime = log.runtime_pcr().index();
    let judged = boot
        .pcrs()
        .iter()
        .filter(|(pcr, golden)| **pcr != runtime && !golden.is_empty());
    judged
        .filter(|(pcr, golden)| {
            let quoted = log.pcr(**pcr).and_then(|value| Sha256Digest::try_from(value).ok());
            !quoted.is_some_and(|value| golden.contains(&value))
        })
        .map(|(pcr, _)| *pcr)
        .collect()
}

/// A description as a policy's file has it, whoever wrote that.
fn one_line(what: &str) -> String {
    what.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Which event of a PCR is the first that is not the approved one, in words; nothing where one side has no events. With as
/// many events on both sides those that differ are counted; otherwise all later ones may have moved.
fn first_difference(found: &[BootStep], approved: &[BootStep]) -> Option<String> {
    if found.is_empty() || approved.is_empty() {
        return None;
    }
    let pairs = found.iter().zip(approved);
    let same = pairs
        .take_while(|(found, approved)| found.sha256 == approved.sha256)
        .count();
    let tell = |step: Option<&BootStep>| {
        step.map_or_else(
            || "nothing".to_owned(),
            |step| format!("{} (sha256:{})", one_line(&step.what), step.sha256),
        )
    };
    let mut text = format!(
        "its event {same} is {}, approved is {}",
        tell(found.get(same)),
        tell(approved.get(same))
    );
    if found.len() == approved.len() {
        let pairs = found.iter().zip(approved);
        let more = pairs
            .filter(|(found, approved)| found.sha256 != approved.sha256)
            .count();
        if more > 1 {
            text.push_str(&format!(", and {} more differ", more.saturating_sub(1)));
        }
    } else {
        text.push_str(&format!(", of {} events instead of {}", found.len(), approved.len()));
    }
    Some(text)
}

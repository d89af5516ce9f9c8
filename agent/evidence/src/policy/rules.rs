//! What is demanded of a host beside known digests.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{MAX_VALUES, PolicyError};
use crate::appraise::IMA_VIOLATION;
use crate::event::{LoadKind, Mode, Violation, flag_bit, flags};

/// Longest text that a rule compares with, in bytes.
const MAX_TEXT: usize = 256;

/// What becomes of a kind of record, a flag or a violation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Allowed where its digest is approved: what holds for every kind that has no rule.
    Approved,
    /// Allowed whatever it is.
    Any,
    /// Never allowed, approved or not.
    Refuse,
}

/// Demands on how a host measures, and exceptions from what holds for all records. An empty list of `lockdown`,
/// `agent_versions` or `kernels` demands nothing; an empty list of `tiers` or `modes` allows none.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rules {
    /// Measuring tiers that are allowed, 1 to 3.
    pub tiers: BTreeSet<u8>,
    /// Modes that are allowed.
    pub modes: BTreeSet<Mode>,
    /// The agent must keep the rest of the host away from itself.
    #[serde(default, skip_serializing_if = "is_false")]
    pub protected: bool,
    /// The boot must be explained by the firmware's log, beside its PCR values.
    #[serde(default, skip_serializing_if = "is_false")]
    pub boot_log: bool,
    /// States of the kernel's lockdown that are allowed: `none`, `integrity`, `confidentiality`.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub lockdown: BTreeSet<String>,
    /// Versions of the agent that are allowed, beside the digests of its executable.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub agent_versions: BTreeSet<String>,
    /// Kernel releases (`uname -r`) that are allowed.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub kernels: BTreeSet<String>,
    /// By kind of record.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub kinds: BTreeMap<LoadKind, Answer>,
    /// By flag, as in the log: `memfd`, `tmpfs`, `script`, …; `refuse` for any, `any` for those two that are refused without
    /// a rule (`open for writing`, `modified in memory`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub flags: BTreeMap<String, Answer>,
    /// By violation, `ima` for those in the IMA log: `any` makes one a note.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub violations: BTreeMap<String, Answer>,
    /// What is in the kernel's IMA log: `approved` judges it as the runtime log; `any` shows it only.
    #[serde(default = "any", skip_serializing_if = "is_any")]
    pub ima_log: Answer,
}

impl Default for Answer {
    fn default() -> Self {
        any()
    }
}

const fn any() -> Answer {
    Answer::Any
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
fn is_any(answer: &Answer) -> bool {
    *answer == Answer::Any
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
const fn is_false(value: &bool) -> bool {
    !*value
}

impl Rules {
    /// What holds for this kind.
    #[must_use]
    pub fn kind(&self, kind: LoadKind) -> Answer {
        self.kinds.get(&kind).copied().unwrap_or(Answer::Approved)
    }

    /// Whether this violation is tolerated.
    #[must_use]
    pub fn tolerates(&self, violation: &Violation) -> bool {
        self.violations.get(violation.name()) == Some(&Answer::Any)
    }

    /// The flags that are never allowed, and those that are allowed though they are refused without a rule.
    pub(crate) fn flag_bits(&self) -> FlagBits {
        let bits = |wanted| {
            let those = self.flags.iter().filter(|(_, answer)| **answer == wanted);
            those
                .filter_map(|(name, _)| flag_bit(name))
                .fold(0, |all, bit| all | bit)
        };
        FlagBits {
            refused: bits(Answer::Refuse),
            tolerated: bits(Answer::Any),
        }
    }

    /// Takes over what others demand: where two say different things, both are allowed.
    pub(super) fn merge(&mut self, other: &Self) {
        self.tiers.extend(&other.tiers);
        self.modes.extend(&other.modes);
        self.protected &= other.protected;
        self.boot_log &= other.boot_log;
        merge_texts(&mut self.lockdown, &other.lockdown);
        merge_texts(&mut self.agent_versions, &other.agent_versions);
        merge_texts(&mut self.kernels, &other.kernels);
        merge_answers(&mut self.kinds, &other.kinds, Answer::Approved);
        merge_answers(&mut self.flags, &other.flags, Answer::Approved);
        merge_answers(&mut self.violations, &other.violations, Answer::Refuse);
        self.ima_log = wider(self.ima_log, other.ima_log);
    }

    pub(super) fn check(&self) -> Result<(), PolicyError> {
        if let Some(tier) = self.tiers.iter().find(|tier| !(1..=3).contains(*tier)) {
            return Err(PolicyError::Tier(*tier));
        }
        for (list, texts) in [
            ("lockdown states", &self.lockdown),
            ("agent versions", &self.agent_versions),
            ("kernels", &self.kernels),
        ] {
            if texts.len() > MAX_VALUES {
                let (found, limit) = (texts.len(), MAX_VALUES);
                return Err(PolicyError::TooMany { list, found, limit });
            }
            if let Some(long) = texts.iter().find(|text| text.is_empty() || text.len() > MAX_TEXT) {
                return Err(rule(list, long, format!("1 to {MAX_TEXT} bytes")));
            }
        }
        self.check_kinds()?;
        self.check_flags()?;
        self.check_violations()?;
        if self.ima_log == Answer::Refuse {
            return Err(rule("ima_log", "refuse", "'approved' or 'any'".into()));
        }
        Ok(())
    }

    fn check_kinds(&self) -> Result<(), PolicyError> {
        match self.kinds.get(&LoadKind::KexecLoad) {
            Some(Answer::Any | Answer::Approved) => Err(PolicyError::NeverAllowed(LoadKind::KexecLoad)),
            _ => Ok(()),
        }
    }

    fn check_flags(&self) -> Result<(), PolicyError> {
        for (name, answer) in &self.flags {
            let bit = flag_bit(name)
                .ok_or_else(|| rule("the flag", name, format!("there are {}", flags::names().join(", "))))?;
            let makes_sense = match answer {
                // What was not hashed is refused as such, and what did not run is not judged.
                Answer::Refuse => bit & (flags::NOT_HASHED | flags::REFUSED | flags::IDLE) == 0,
                Answer::Any => bit & (flags::UNSTABLE | flags::MODIFIED) != 0,
                Answer::Approved => false,
            };
            if !makes_sense {
                return Err(rule(
                    "this answer for the flag",
                    name,
                    "'refuse', or 'any' for those that are refused without a rule".into(),
                ));
            }
        }
        Ok(())
    }

    fn check_violations(&self) -> Result<(), PolicyError> {
        for (name, answer) in &self.violations {
            if name != IMA_VIOLATION && !Violation::NAMES.contains(&name.as_str()) {
                let known = Violation::NAMES.join(", ");
                return Err(rule(
                    "the violation",
                    name,
                    format!("there are {known}, {IMA_VIOLATION}"),
                ));
            }
            if *answer == Answer::Approved {
                return Err(rule(
                    "'approved' for the violation",
                    name,
                    "'any' or 'refuse': it has no digest".into(),
                ));
            }
        }
        Ok(())
    }
}

/// See [`Rules::flag_bits`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct FlagBits {
    /// Never allowed.
    pub(crate) refused: u32,
    /// Allowed though there is a rule of their own.
    pub(crate) tolerated: u32,
}

fn rule(what: &'static str, name: &str, remedy: String) -> PolicyError {
    PolicyError::Rule {
        what,
        name: name.chars().take(80).collect(),
        remedy,
    }
}

/// An empty list demands nothing, and so does its union with any other.
fn merge_texts(texts: &mut BTreeSet<String>, others: &BTreeSet<String>) {
    if others.is_empty() {
        texts.clear();
    } else if !texts.is_empty() {
        texts.extend(others.iter().cloned());
    }
}

fn merge_answers<K: Ord + Clone>(answers: &mut BTreeMap<K, Answer>, others: &BTreeMap<K, Answer>, otherwise: Answer) {
    let keys: BTreeSet<K> = answers.keys().chain(others.keys()).cloned().collect();
    for key in keys {
        let of = |map: &BTreeMap<K, Answer>| map.get(&key).copied().unwrap_or(otherwise);
        let both = wider(of(answers), of(others));
        if both == otherwise {
            answers.remove(&key);
        } else {
            answers.insert(key, both);
        }
    }
}

const fn wider(one: Answer, other: Answer) -> Answer {
    match (one, other) {
        (Answer::Any, _) | (_, Answer::Any) => Answer::Any,
        (Answer::Approved, _) | (_, Answer::Approved) => Answer::Approved,
        (Answer::Refuse, Answer::Refuse) => Answer::Refuse,
    }
}

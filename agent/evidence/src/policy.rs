//! What a host may run: the known-good values that evidence is appraised against.
//!
//! A policy is a JSON file of the operator's, strict and versioned. Code is approved by digest, whatever its path and
//! kind; those two stand in the file for people. A deed (a device opened, memory made executable) has the digest of the
//! program that did it, which may be approved code: it is allowed by kind and digest together. Everything is kept sorted, so that two captures of one state are the
//! same bytes and a change shows as one line of a diff.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use serde::{Deserialize, Serialize};

use crate::appraise::did_not_run;
use crate::digest::{DigestError, Sha256Digest};
use crate::event::{Event, LoadKind, MAX_PATH, Measurement, Mode, flags};
use crate::pcr::RuntimePcr;
use crate::replay::ReplayedLog;

/// The version of the format that this crate reads and writes.
pub const VERSION: u32 = 1;
/// Longest policy file, in bytes.
pub const MAX_JSON: usize = 64 * 1024 * 1024;
/// Most approved entries.
pub const MAX_ENTRIES: usize = 250_000;
/// Most values of any other list.
pub const MAX_VALUES: usize = 256;
/// Longest name of a policy, in bytes.
pub const MAX_NAME: usize = 64;

/// PCRs whose values a capture takes as golden: firmware and its configuration (0-7), boot loader and kernel (8, 9),
/// systemd's stub (11-13), shim (14). Not the one that the host's runtime log is in, whose start has a member of its own;
/// not 10, which the kernel's IMA extends as the host works, nor 15, which systemd extends with the machine's identity.
pub const GOLDEN_PCRS: [u8; 14] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14];

/// Why a policy can't be read, made or changed.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// Longer than [`MAX_JSON`].
    #[error("the policy is {0} bytes long, at most {MAX_JSON} are read")]
    TooLong(usize),
    /// Not JSON, or a member is missing, unknown, or of another type.
    #[error("the policy is not JSON of the expected form")]
    Json(#[source] serde_json::Error),
    /// Another version of the format.
    #[error("the policy has version {0}, this program reads version {VERSION}")]
    Version(u32),
    /// A name that is empty, too long, or has characters beyond letters, digits, `-`, `_` and `.`.
    #[error("{0:?} is no name for a policy: 1 to {MAX_NAME} letters, digits, '-', '_' or '.'")]
    Name(String),
    /// A list is longer than its limit.
    #[error("the policy's {list} has {found} entries, at most {limit} are allowed")]
    TooMany {
        /// Name of the list.
        list: &'static str,
        /// Its length.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// A path is longer than a log can have.
    #[error("the path {0:?}… is longer than {MAX_PATH} bytes")]
    Path(String),
    /// A PCR that no quote covers.
    #[error("the policy has values for PCR {0}; it can have them for 0 to 15")]
    Pcr(u8),
    /// A PCR value that is no SHA-256 digest.
    #[error("the policy's value for PCR {pcr} is no value of the sha256 bank")]
    PcrValue {
        /// The PCR.
        pcr: u8,
        /// What is wrong with it.
        #[source]
        source: DigestError,
    },
    /// A tier that does not exist.
    #[error("the policy allows tier {0}; there are tiers 1, 2 and 3")]
    Tier(u8),
    /// The log to capture from is not complete.
    #[error("the host's inventory is not complete yet: wait until its agent reports ready, then capture")]
    NotReady,
    /// The log to capture from has a hole, so that it says nothing about a good host.
    #[error(
        "the host's log has a violation ({0}): a policy is made from a host without one, reboot it and capture then"
    )]
    Violation(String),
    /// Code in the log to capture from was not hashed.
    #[error("the host runs {0:?}, which could not be hashed: a policy can't approve it")]
    NotHashed(String),
    /// Code in the log to capture from could change while it was hashed.
    #[error(
        "the host loaded {0:?} while somebody had it open for writing: reboot the host, and capture before it is written to"
    )]
    Unstable(String),
    /// Code in the log to capture from had pages that were changed in memory.
    #[error("the host made {0:?} executable with pages that were changed in memory: a policy can't approve that")]
    Modified(String),
    /// Somebody tried to get at the agent of the host to capture from.
    #[error(
        "the host's log has an attempt on its agent ({kind} by task {task:?}): find out who tried, reboot the host, and capture then"
    )]
    Attempt {
        /// What was tried.
        kind: LoadKind,
        /// Name of the task that tried.
        task: String,
    },
    /// A kind that has no digest, so that none can be approved.
    #[error("{0} can't be approved: nobody can measure what it loads; use kexec_file_load, as kexec -s does")]
    NeverAllowed(LoadKind),
}

/// One approved piece of code: the digest approves, kind and path are where it was seen. Or a permitted deed
/// ([`LoadKind::is_deed`]): kind and digest of the program that may do it approve together.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Approved {
    // Order matters: the set below is sorted by path first, so that look-ups by path are ranges.
    /// Where it was seen; empty when the operator named none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub path: String,
    /// What it was loaded as; or the deed that is permitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<LoadKind>,
    /// The digest.
    pub sha256: Sha256Digest,
}

/// Known-good values. What is in none of its lists is not allowed; a PCR without values is not judged by value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    name: String,
    runtime: BTreeSet<Approved>,
    approved: HashSet<Sha256Digest>,
    deeds: HashSet<(LoadKind, Sha256Digest)>,
    agents: BTreeSet<Sha256Digest>,
    kernel_programs: BTreeSet<Sha256Digest>,
    tiers: BTreeSet<u8>,
    modes: BTreeSet<Mode>,
    pcrs: BTreeMap<u8, BTreeSet<Sha256Digest>>,
    runtime_start: BTreeSet<Sha256Digest>,
}

/// The file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    name: String,
    tiers: Vec<u8>,
    modes: Vec<Mode>,
    agents: Vec<Sha256Digest>,
    kernel_programs: Vec<Sha256Digest>,
    pcrs: BTreeMap<u8, Vec<String>>,
    runtime_pcr_start: Vec<Sha256Digest>,
    runtime: Vec<Approved>,
}

impl Policy {
    /// A policy that allows nothing.
    ///
    /// # Errors
    /// [`PolicyError::Name`].
    pub fn new(name: &str) -> Result<Self, PolicyError> {
        if !is_name(name) {
            return Err(PolicyError::Name(name.chars().take(MAX_NAME).collect()));
        }
        Ok(Self {
            name: name.to_owned(),
            runtime: BTreeSet::new(),
            approved: HashSet::new(),
            deeds: HashSet::new(),
            agents: BTreeSet::new(),
            kernel_programs: BTreeSet::new(),
            tiers: BTreeSet::new(),
            modes: BTreeSet::new(),
            pcrs: BTreeMap::new(),
            runtime_start: BTreeSet::new(),
        })
    }

    /// Takes everything that a good host runs, and how it booted, as known-good. What enforce mode refused did not run, so
    /// it is not taken.
    ///
    /// # Errors
    /// [`PolicyError::NotReady`], [`PolicyError::Violation`], [`PolicyError::NotHashed`], [`PolicyError::Unstable`],
    /// [`PolicyError::Modified`], [`PolicyError::Attempt`], [`PolicyError::NeverAllowed`]: no host to learn from.
    /// [`PolicyError::TooMany`], [`PolicyError::Name`].
    pub fn capture(name: &str, log: &ReplayedLog) -> Result<Self, PolicyError> {
        let mut policy = Self::new(name)?;
        let mut ready = false;
        let mut deeds = BTreeSet::new();
        for (_, event) in log.events() {
            match event {
                Event::AgentStart(start) => {
                    policy.agents.insert(start.agent_digest);
                    policy.kernel_programs.insert(start.bpf_digest);
                    policy.tiers.insert(start.tier);
                    policy.modes.insert(start.mode);
                }
                Event::Inventory(code) | Event::Load(code) if did_not_run(code) => {}
                Event::Inventory(code) | Event::Load(code) => {
                    let digest = learnable(code)?;
                    if code.kind.is_deed() && code.path.is_empty() {
                        deeds.insert((code.kind, digest));
                    } else {
                        policy.allow(digest, Some(code.kind), Some(&code.path))?;
                    }
                }
                Event::Violation(violation) => return Err(PolicyError::Violation(violation.to_string())),
                Event::Ready => ready = true,
                Event::AgentStop | Event::Notice(_) => {}
            }
        }
        if !ready {
            return Err(PolicyError::NotReady);
        }
        // A deed that says nothing of a path gets its program's.
        let programs = log.programs(&deeds.iter().map(|(_, digest)| *digest).collect());
        for (kind, digest) in deeds {
            policy.allow(digest, Some(kind), programs.get(&digest).copied())?;
        }
        for pcr in golden_pcrs(log.runtime_pcr()) {
            let value = log.pcr(pcr).and_then(|value| Sha256Digest::try_from(value).ok());
            policy.pcrs.entry(pcr).or_default().extend(value);
        }
        policy
            .runtime_start
            .extend(Sha256Digest::try_from(log.pcr_start()).ok());
        policy.check()?;
        Ok(policy)
    }

    /// Approves one more digest; returns whether it was not approved before. With the kind of a deed, permits that deed to
    /// the program with this digest, and does not approve the program.
    ///
    /// # Errors
    /// [`PolicyError::TooMany`], [`PolicyError::Path`], [`PolicyError::NeverAllowed`].
    pub fn allow(
        &mut self,
        digest: Sha256Digest,
        kind: Option<LoadKind>,
        path: Option<&str>,
    ) -> Result<bool, PolicyError> {
        if let Some(kind @ LoadKind::KexecLoad) = kind {
            return Err(PolicyError::NeverAllowed(kind));
        }
        let path = path.unwrap_or_default().to_owned();
        if path.len() > MAX_PATH {
            return Err(PolicyError::Path(path.chars().take(80).collect()));
        }
        let new = Approved {
            path,
            kind,
            sha256: digest,
        };
        if self.runtime.len() >= MAX_ENTRIES && !self.runtime.contains(&new) {
            return Err(PolicyError::TooMany {
                list: "runtime",
                found: MAX_ENTRIES + 1,
                limit: MAX_ENTRIES,
            });
        }
        self.runtime.insert(new);
        Ok(match kind {
            Some(kind) if kind.is_deed() => self.deeds.insert((kind, digest)),
            _ => self.approved.insert(digest),
        })
    }

    /// Takes over everything that another policy allows: known-good values of several hosts, or of before and after an
    /// update.
    ///
    /// # Errors
    /// [`PolicyError::TooMany`]; the policy is then unchanged.
    pub fn merge(&mut self, other: &Self) -> Result<(), PolicyError> {
        let mut merged = self.clone();
        merged.runtime.extend(other.runtime.iter().cloned());
        merged.approved.extend(&other.approved);
        merged.deeds.extend(&other.deeds);
        merged.agents.extend(&other.agents);
        merged.kernel_programs.extend(&other.kernel_programs);
        merged.tiers.extend(&other.tiers);
        merged.modes.extend(&other.modes);
        merged.runtime_start.extend(&other.runtime_start);
        for (pcr, values) in &other.pcrs {
            merged.pcrs.entry(*pcr).or_default().extend(values);
        }
        merged.check()?;
        *self = merged;
        Ok(())
    }

    /// Reads a policy file.
    ///
    /// # Errors
    /// One variant of [`PolicyError`] for each reason.
    pub fn from_json(json: &[u8]) -> Result<Self, PolicyError> {
        if json.len() > MAX_JSON {
            return Err(PolicyError::TooLong(json.len()));
        }
        let file: File = serde_json::from_slice(json).map_err(PolicyError::Json)?;
        if file.version != VERSION {
            return Err(PolicyError::Version(file.version));
        }
        let mut policy = Self::new(&file.name)?;
        let found = file.runtime.len();
        if found > MAX_ENTRIES {
            return Err(PolicyError::TooMany {
                list: "runtime",
                found,
                limit: MAX_ENTRIES,
            });
        }
        for entry in file.runtime {
            policy.allow(entry.sha256, entry.kind, Some(&entry.path))?;
        }
        policy.agents.extend(file.agents);
        policy.kernel_programs.extend(file.kernel_programs);
        policy.tiers.extend(file.tiers);
        policy.modes.extend(file.modes);
        policy.runtime_start.extend(file.runtime_pcr_start);
        for (pcr, values) in file.pcrs {
            let values: Result<BTreeSet<_>, _> = values.iter().map(|value| value.parse()).collect();
            policy
                .pcrs
                .insert(pcr, values.map_err(|source| PolicyError::PcrValue { pcr, source })?);
        }
        policy.check()?;
        Ok(policy)
    }

    /// The policy file: indented, every list sorted.
    #[must_use]
    pub fn to_json(&self) -> String {
        let file = serde_json::json!({
            "version": VERSION,
            "name": self.name,
            "tiers": self.tiers,
            "modes": self.modes,
            "agents": self.agents,
            "kernel_programs": self.kernel_programs,
            "pcrs": self.pcrs,
            "runtime_pcr_start": self.runtime_start,
            "runtime": self.runtime,
        });
        format!("{file:#}\n")
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether code with this digest may run. That a program may do a deed does not let it run.
    #[must_use]
    pub fn allows(&self, digest: &Sha256Digest) -> bool {
        self.approved.contains(digest)
    }

    /// Whether the program with this digest may do this deed. That it may run does not permit it.
    #[must_use]
    pub fn allows_deed(&self, kind: LoadKind, digest: &Sha256Digest) -> bool {
        self.deeds.contains(&(kind, *digest))
    }

    /// Approved code, sorted by path. One digest can be there several times, with each kind and path it was seen with.
    pub fn runtime(&self) -> impl ExactSizeIterator<Item = &Approved> {
        self.runtime.iter()
    }

    /// What a host in enforce mode may run: all approved code, and the agents and kernel programs themselves. Sorted, each
    /// once.
    #[must_use]
    pub fn enforced(&self) -> Vec<Sha256Digest> {
        let all = self.approved.iter().chain(&self.agents).chain(&self.kernel_programs);
        let mut digests: Vec<_> = all.copied().collect();
        digests.sort_unstable();
        digests.dedup();
        digests
    }

    /// How many digests are approved.
    #[must_use]
    pub fn digests(&self) -> usize {
        self.approved.len()
    }

    /// How many deeds are permitted, each to one program.
    #[must_use]
    pub fn deeds(&self) -> usize {
        self.deeds.len()
    }

    /// Allowed agents, by the digest of their executable.
    #[must_use]
    pub const fn agents(&self) -> &BTreeSet<Sha256Digest> {
        &self.agents
    }

    /// Allowed objects with kernel programs, by digest.
    #[must_use]
    pub const fn kernel_programs(&self) -> &BTreeSet<Sha256Digest> {
        &self.kernel_programs
    }

    /// Allowed measuring tiers.
    #[must_use]
    pub const fn tiers(&self) -> &BTreeSet<u8> {
        &self.tiers
    }

    /// Allowed modes.
    #[must_use]
    pub const fn modes(&self) -> &BTreeSet<Mode> {
        &self.modes
    }

    /// Golden values of PCRs, SHA-256 bank. A PCR that is missing or has no values is not judged by value, nor is the one
    /// that a host's runtime log is in.
    #[must_use]
    pub const fn pcrs(&self) -> &BTreeMap<u8, BTreeSet<Sha256Digest>> {
        &self.pcrs
    }

    /// Allowed values of the runtime PCR before the log's first record. All zero is always allowed.
    #[must_use]
    pub const fn runtime_start(&self) -> &BTreeSet<Sha256Digest> {
        &self.runtime_start
    }

    /// What is approved for a path, if anything: the first step when code at that path is not approved.
    pub(crate) fn approved_at<'a>(&'a self, path: &'a str) -> impl Iterator<Item = &'a Approved> {
        let from = Approved {
            path: path.to_owned(),
            kind: None,
            sha256: Sha256Digest::ZERO,
        };
        let here = self.runtime.range(from..).take_while(move |entry| entry.path == path);
        here.filter(|entry| !entry.kind.is_some_and(LoadKind::is_deed))
    }

    fn check(&self) -> Result<(), PolicyError> {
        let lists = [
            ("runtime", self.runtime.len(), MAX_ENTRIES),
            ("agents", self.agents.len(), MAX_VALUES),
            ("kernel_programs", self.kernel_programs.len(), MAX_VALUES),
            ("runtime_pcr_start", self.runtime_start.len(), MAX_VALUES),
            (
                "pcrs",
                self.pcrs.values().map(BTreeSet::len).max().unwrap_or(0),
                MAX_VALUES,
            ),
        ];
        for (list, found, limit) in lists {
            if found > limit {
                return Err(PolicyError::TooMany { list, found, limit });
            }
        }
        if let Some(tier) = self.tiers.iter().find(|tier| !(1..=3).contains(*tier)) {
            return Err(PolicyError::Tier(*tier));
        }
        match self.pcrs.keys().find(|pcr| **pcr > 15) {
            Some(pcr) => Err(PolicyError::Pcr(*pcr)),
            None => Ok(()),
        }
    }
}

/// The digest of what a good host loaded or did; refused when no policy could approve it.
fn learnable(code: &Measurement) -> Result<Sha256Digest, PolicyError> {
    let path = || match code.path.as_str() {
        "" => format!("task {}", code.comm),
        path => path.to_owned(),
    };
    let flagged = |flag| code.flags & flag != 0;
    let kind = code.kind;
    match code.digest {
        _ if kind.is_attempt() => Err(PolicyError::Attempt {
            kind,
            task: code.comm.clone(),
        }),
        _ if kind == LoadKind::KexecLoad => Err(PolicyError::NeverAllowed(kind)),
        Some(_) if flagged(flags::UNSTABLE) => Err(PolicyError::Unstable(path())),
        Some(_) if flagged(flags::MODIFIED) => Err(PolicyError::Modified(path())),
        Some(digest) if !flagged(flags::NOT_HASHED) => Ok(digest),
        _ => Err(PolicyError::NotHashed(path())),
    }
}

/// Whether a policy can have this name.
pub(crate) fn is_name(name: &str) -> bool {
    let character = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && name.len() <= MAX_NAME && name.chars().all(character)
}

/// [`GOLDEN_PCRS`] of a host whose runtime log is in `runtime`.
pub(crate) fn golden_pcrs(runtime: RuntimePcr) -> impl Iterator<Item = u8> {
    GOLDEN_PCRS.into_iter().filter(move |pcr| *pcr != runtime.index())
}

#[cfg(test)]
mod tests;

//! The part of the verdict that is about the kernel's own log: what IMA measured, judged by the same known-good values.

use std::collections::BTreeMap;

use super::{Failure, Judge, Rule};
use crate::digest::{Algorithm, Sha256Digest};
use crate::imalog::{self, Extension, ImaEntry, ImaLog};
use crate::policy::Answer;
use crate::quote::QUOTED_BANK;
use crate::replay::ReplayedLog;

/// The PCR that IMA extends, unless the kernel was built otherwise (CONFIG_IMA_MEASURE_PCR_IDX).
const IMA_PCR: u8 = 10;
/// Name of the violations in a policy's rules.
pub(crate) const VIOLATION: &str = "ima";
/// The first entry of each list: what the boot PCRs showed, which the quote has.
const BOOT_AGGREGATE: &[u8] = b"boot_aggregate";

/// The list with the digests of a bank, as the kernel shows it in two forms: old kernels have SHA-1 alone.
const LISTS: [Algorithm; 2] = [Algorithm::Sha1, Algorithm::Sha256];

/// A log that leads to the quoted PCR, as far as it does: entries that IMA wrote after the quote are for the next one.
struct Proven<'a> {
    log: ImaLog<'a>,
    entries: usize,
}

impl Proven<'_> {
    fn entries(&self) -> impl Iterator<Item = (usize, &ImaEntry<'_>)> {
        self.log.entries().iter().take(self.entries).enumerate()
    }
}

/// The log that came along, proven; `None` where none came.
fn proven(log: &ReplayedLog) -> Result<Option<Proven<'_>>, String> {
    let Some(bytes) = log.ima_log() else { return Ok(None) };
    let quoted = log.pcr(IMA_PCR).unwrap_or_default();
    let mut error = String::new();
    for bank in LISTS {
        let parsed = match imalog::parse(bytes, bank) {
            Ok(parsed) => parsed,
            Err(cause) => {
                error = cause.to_string();
                continue;
            }
        };
        for extension in [Extension::OwnDigest, Extension::PaddedSha1] {
            if let Some(entries) = parsed.leads_to(u32::from(IMA_PCR), QUOTED_BANK, extension, quoted) {
                return Ok(Some(Proven { log: parsed, entries }));
            }
        }
        error = format!(
            "the IMA log's {} entries do not lead to PCR {IMA_PCR}: it was changed, or its beginning is missing",
            parsed.entries().len()
        );
        break;
    }
    Err(error)
}

/// Path and SHA-256 of every file in a host's IMA log, for a policy to learn; `None` where none came.
///
/// # Errors
/// In words, why there is nothing to learn from.
pub(crate) fn ima_files(log: &ReplayedLog) -> Result<Option<BTreeMap<String, Sha256Digest>>, String> {
    let Some(proven) = proven(log)? else { return Ok(None) };
    let mut files = BTreeMap::new();
    for (number, entry) in proven.entries() {
        let path = String::from_utf8_lossy(entry.path()).into_owned();
        match digest(number, entry) {
            Found::Aggregate | Found::Violation => {}
            Found::Sha256(sha256) => {
                files.insert(path, sha256);
            }
            Found::Other(what) => {
                return Err(format!(
                    "entry {number}, {path}, has {what}; boot the host with ima_hash=sha256"
                ));
            }
        }
    }
    Ok(Some(files))
}

impl ReplayedLog {
    /// Why no policy could judge the IMA log that came along; `None` where one can, and where none came.
    #[must_use]
    pub fn ima_problem(&self) -> Option<String> {
        ima_files(self).err()
    }
}

/// What an entry says of its file.
enum Found {
    Aggregate,
    Violation,
    Sha256(Sha256Digest),
    /// No digest that known-good values have.
    Other(String),
}

fn digest(number: usize, entry: &ImaEntry<'_>) -> Found {
    if entry.is_violation() {
        return Found::Violation;
    }
    if number == 0 && entry.path() == BOOT_AGGREGATE {
        return Found::Aggregate;
    }
    let Some(file) = entry.file_digest() else {
        return Found::Other("no digest of a file".into());
    };
    match Sha256Digest::try_from(file.digest) {
        Ok(sha256) if file.algorithm == "sha256" && !file.verity => Found::Sha256(sha256),
        _ if file.verity => Found::Other("a digest of fs-verity's".into()),
        _ => Found::Other(format!("a {} digest", file.algorithm.escape_debug())),
    }
}

impl Judge<'_> {
    /// Every file of the IMA log must be approved code, if the policy judges that log.
    pub(super) fn ima_log(&mut self, log: &ReplayedLog) {
        let judged = self.policy.rules().ima_log == Answer::Approved;
        let proven = match proven(log) {
            Ok(Some(proven)) => proven,
            Ok(None) if judged => {
                let detail = "no IMA log with this evidence, and the policy judges it";
                self.refuse_ima(Rule::ImaLog, detail.to_owned());
                return;
            }
            Ok(None) => return,
            Err(detail) if judged => {
                self.refuse_ima(Rule::ImaLog, detail);
                return;
            }
            Err(detail) => {
                self.notes.push(format!("{detail}; the policy does not judge it"));
                return;
            }
        };
        if !judged {
            self.notes.push(format!(
                "the IMA log has {} entries, which the policy does not judge",
                proven.entries
            ));
            return;
        }
        for (number, entry) in proven.entries() {
            self.ima_entry(number, entry);
        }
        self.notes
            .push(format!("judged by the IMA log, too: {} entries", proven.entries));
    }

    fn ima_entry(&mut self, number: usize, entry: &ImaEntry<'_>) {
        let path = String::from_utf8_lossy(entry.path()).into_owned();
        let place = format!("IMA entry {number}");
        let (rule, sha256, detail) = match digest(number, entry) {
            Found::Aggregate => return,
            Found::Violation if self.policy.rules().violations.get(VIOLATION) == Some(&Answer::Any) => return,
            Found::Violation => (Rule::ImaViolation, None, place),
            Found::Sha256(sha256) if self.allows(&sha256) => return,
            Found::Sha256(sha256) => (Rule::ImaNotApproved, Some(sha256), place),
            Found::Other(what) => (Rule::ImaNotApproved, None, format!("{place}: {what}")),
        };
        let nearest = sha256.and_then(|sha256| self.nearest(&path, &sha256));
        self.refuse(Failure {
            pcr: Some(IMA_PCR),
            path: Some(path),
            digest: sha256,
            nearest,
            ..Failure::new(rule, detail)
        });
    }

    fn refuse_ima(&mut self, rule: Rule, detail: String) {
        self.failures.push(Failure {
            pcr: Some(IMA_PCR),
            ..Failure::new(rule, detail)
        });
    }
}

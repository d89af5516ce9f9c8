//! What a host may be and run: the known-good values that evidence is appraised against.
//!
//! A policy is a JSON file of the operator's, strict and versioned, for one group of hosts. It has any number of boot
//! configurations, of which a host must match one as a whole; any number of sets of approved code, of which each piece must be
//! in one; and rules. Configurations, sets and the policy itself can expire: a fleet in the middle of an update has two good
//! states, and for some time only.
//!
//! Code is approved by digest, whatever its path and kind; those two stand in the file for people. A deed (a device opened,
//! memory made executable) has the digest of the program that did it, which may be approved code: it is allowed by kind and
//! digest together. Everything is kept sorted, so that two captures of one state are the same bytes and a change shows as one
//! line of a diff.

mod boot;
mod capture;
mod diff;
mod error;
mod expiry;
mod file;
mod rules;
mod set;
mod signed;

use std::collections::BTreeSet;

pub use boot::{BootConfiguration, BootStep, GOLDEN_PCRS, MAX_STEPS, MAX_WHAT};
pub(crate) use boot::{golden_pcrs, steps};
pub use diff::{Change, Difference};
pub use error::PolicyError;
pub use expiry::{Expiry, NotATime};
pub(crate) use rules::FlagBits;
pub use rules::{Answer, Rules};
pub use set::{Approved, RuntimeSet};
pub use signed::{MAX_SIGNED, SignedPolicyError};

use crate::digest::Sha256Digest;
use crate::event::LoadKind;

/// The version of the format that this crate writes. It reads version 1, too: one boot configuration, one set, no names.
pub const VERSION: u32 = 2;
/// Longest policy file, in bytes.
pub const MAX_JSON: usize = 64 * 1024 * 1024;
/// Most approved entries, over all sets.
pub const MAX_ENTRIES: usize = 250_000;
/// Most values of any other list.
pub const MAX_VALUES: usize = 256;
/// Most boot configurations, and most sets.
pub const MAX_PARTS: usize = 64;
/// Longest name of a policy, of a part of one, and longest tag, in bytes.
pub const MAX_NAME: usize = 64;
/// The set that single digests are allowed in, where no other is named.
pub const ALLOWED: &str = "allowed";

/// Known-good values. What is in none of its lists is not allowed; a PCR without values is not judged by value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    name: String,
    expires: Option<Expiry>,
    tags: BTreeSet<String>,
    boots: Vec<BootConfiguration>,
    sets: Vec<RuntimeSet>,
    rules: Rules,
}

impl Policy {
    /// A policy that allows nothing.
    ///
    /// # Errors
    /// [`PolicyError::Name`].
    pub fn new(name: &str) -> Result<Self, PolicyError> {
        check_name(name, "a policy")?;
        Ok(Self {
            name: name.to_owned(),
            expires: None,
            tags: BTreeSet::new(),
            boots: Vec::new(),
            sets: Vec::new(),
            rules: Rules::default(),
        })
    }

    /// Approves one more digest, in the set [`ALLOWED`]; returns whether it was in no set before. With the kind of a deed,
    /// permits that deed to the program with this digest, and does not approve the program.
    ///
    /// # Errors
    /// [`PolicyError::TooMany`], [`PolicyError::Path`], [`PolicyError::NeverAllowed`].
    pub fn allow(
        &mut self,
        digest: Sha256Digest,
        kind: Option<LoadKind>,
        path: Option<&str>,
    ) -> Result<bool, PolicyError> {
        let entry = Approved {
            path: path.unwrap_or_default().into(),
            kind,
            sha256: digest,
        };
        Ok(self.allow_all(ALLOWED, vec![entry])? == 1)
    }

    /// Approves these in a set, which is made if there is none of this name; returns how many digests (deeds) were in no set
    /// before.
    ///
    /// # Errors
    /// As [`Policy::allow`], and [`PolicyError::Name`]; the policy is then unchanged.
    pub fn allow_all(&mut self, set: &str, entries: Vec<Approved>) -> Result<usize, PolicyError> {
        let mut changed = self.clone();
        let target = changed.set_mut(set)?;
        let mut new = 0_usize;
        for entry in entries {
            let (digest, deed) = (entry.sha256, entry.deed());
            let mut others = self.sets.iter().filter(|known| known.name() != set);
            let elsewhere = others.any(|known| match deed {
                Some(kind) => known.allows_deed(kind, &digest),
                None => known.allows(&digest),
            });
            if target.allow(entry)? && !elsewhere {
                new = new.saturating_add(1);
            }
        }
        changed.check()?;
        *self = changed;
        Ok(new)
    }

    /// Approves an agent and the kernel programs that it loads, each where it is given, in a set, which is made if there is none
    /// of this name: they may measure, and run. Returns whether anything was new in that set.
    ///
    /// # Errors
    /// [`PolicyError::Name`], [`PolicyError::TooMany`]; the policy is then unchanged.
    pub fn allow_agent(
        &mut self,
        set: &str,
        agent: Option<Sha256Digest>,
        kernel_programs: Option<Sha256Digest>,
    ) -> Result<bool, PolicyError> {
        let mut changed = self.clone();
        let known = changed.set_mut(set)?;
        known.agents.extend(agent);
        known.kernel_programs.extend(kernel_programs);
        if let Some(sha256) = agent {
            let (path, kind) = (Box::default(), Some(LoadKind::Program));
            known.allow(Approved { path, kind, sha256 })?;
        }
        changed.check()?;
        let new = changed != *self;
        *self = changed;
        Ok(new)
    }

    /// The set of this name, made if there is none.
    fn set_mut(&mut self, name: &str) -> Result<&mut RuntimeSet, PolicyError> {
        check_name(name, "a set")?;
        let at = self.sets.iter().position(|set| set.name() == name);
        let at = at.unwrap_or_else(|| {
            self.sets.push(RuntimeSet::new(name));
            self.sets.len().saturating_sub(1)
        });
        // It is there: found, or just put there.
        self.sets
            .get_mut(at)
            .ok_or_else(|| PolicyError::Name(name.to_owned(), "a set"))
    }

    /// Takes over everything that another policy allows: known-good values of several hosts, or of before and after an
    /// update. Parts of the same name become one. What one of the two demands alone is not demanded any more.
    ///
    /// # Errors
    /// [`PolicyError::TooMany`]; the policy is then unchanged.
    pub fn merge(&mut self, other: &Self) -> Result<(), PolicyError> {
        let mut merged = self.clone();
        for boot in &other.boots {
            match merged.boots.iter_mut().find(|known| known.name() == boot.name()) {
                Some(known) => known.merge(boot),
                None => merged.boots.push(boot.clone()),
            }
        }
        for set in &other.sets {
            match merged.sets.iter_mut().find(|known| known.name() == set.name()) {
                Some(known) => known.merge(set),
                None => merged.sets.push(set.clone()),
            }
        }
        merged.rules.merge(&other.rules);
        merged.tags.extend(other.tags.iter().cloned());
        merged.expires = boot::later(merged.expires, other.expires);
        merged.check()?;
        *self = merged;
        Ok(())
    }

    /// Takes over what another policy, captured from a host, allows beyond this one: its boot as a configuration and its code
    /// as a set of their own, each only if there is anything new in it. Rules get wider as far as that host needs it.
    ///
    /// # Errors
    /// [`PolicyError::TooMany`], [`PolicyError::Twice`] for a name that is taken; the policy is then unchanged.
    pub fn learn(&mut self, captured: &Self) -> Result<(), PolicyError> {
        let mut learnt = self.clone();
        for boot in &captured.boots {
            if !learnt.boots.iter().any(|known| known.is_same_boot(boot)) {
                learnt.boots.push(boot.clone());
            }
        }
        for set in &captured.sets {
            let mut set = set.clone();
            if set.keep_news(&learnt.sets.iter().collect::<Vec<_>>()) {
                learnt.sets.push(set);
            }
        }
        learnt.rules.tiers.extend(&captured.rules.tiers);
        learnt.rules.modes.extend(&captured.rules.modes);
        learnt.check()?;
        *self = learnt;
        Ok(())
    }

    /// Whether a boot configuration or a set has this name.
    #[must_use]
    pub fn has_part(&self, name: &str) -> bool {
        self.boots.iter().any(|boot| boot.name() == name) || self.sets.iter().any(|set| set.name() == name)
    }

    /// Removes a boot configuration or a set.
    ///
    /// # Errors
    /// [`PolicyError::NoSuchPart`].
    pub fn drop_part(&mut self, part: &str) -> Result<(), PolicyError> {
        if !self.has_part(part) {
            return Err(self.no_such_part(part));
        }
        self.boots.retain(|boot| boot.name() != part);
        self.sets.retain(|set| set.name() != part);
        Ok(())
    }

    /// Sets until when a part is approved, or the whole policy where none is named; `None` for ever.
    ///
    /// # Errors
    /// [`PolicyError::NoSuchPart`].
    pub fn expire(&mut self, part: Option<&str>, at: Option<Expiry>) -> Result<(), PolicyError> {
        let Some(part) = part else {
            self.expires = at;
            return Ok(());
        };
        if !self.has_part(part) {
            return Err(self.no_such_part(part));
        }
        let boots = self.boots.iter_mut().filter(|boot| boot.name() == part);
        let sets = self.sets.iter_mut().filter(|set| set.name() == part);
        let parts = boots.map(|boot| &mut boot.expires);
        for expires in parts.chain(sets.map(|set| &mut set.expires)) {
            *expires = at;
        }
        Ok(())
    }

    fn no_such_part(&self, part: &str) -> PolicyError {
        PolicyError::NoSuchPart {
            policy: self.name.clone(),
            part: part.chars().take(MAX_NAME).collect(),
        }
    }

    /// The same under another name.
    ///
    /// # Errors
    /// [`PolicyError::Name`].
    pub fn renamed(mut self, name: &str) -> Result<Self, PolicyError> {
        check_name(name, "a policy")?;
        name.clone_into(&mut self.name);
        Ok(self)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// From when on no host meets it any more.
    #[must_use]
    pub const fn expires(&self) -> Option<Expiry> {
        self.expires
    }

    /// What hosts that meet it are known as, for keys that demand it.
    #[must_use]
    pub const fn tags(&self) -> &BTreeSet<String> {
        &self.tags
    }

    /// The rules.
    #[must_use]
    pub const fn rules(&self) -> &Rules {
        &self.rules
    }

    /// The rules, to be changed; [`Policy::check`] tells whether the result makes sense.
    pub const fn rules_mut(&mut self) -> &mut Rules {
        &mut self.rules
    }

    /// All boot configurations, those that have expired included.
    #[must_use]
    pub fn boots(&self) -> &[BootConfiguration] {
        &self.boots
    }

    /// All sets, those that have expired included.
    #[must_use]
    pub fn sets(&self) -> &[RuntimeSet] {
        &self.sets
    }

    /// The sets that approve anything at this Unix time.
    pub fn live_sets(&self, now: u64) -> impl Iterator<Item = &RuntimeSet> {
        let live = move |set: &&RuntimeSet| !set.expires().is_some_and(|at| at.is_past(now));
        self.sets.iter().filter(live)
    }

    /// Whether code with this digest may run at this Unix time.
    #[must_use]
    pub fn allows(&self, digest: &Sha256Digest, now: u64) -> bool {
        self.live_sets(now).any(|set| set.allows(digest))
    }

    /// When a verdict by this policy can change next though nothing else does, as Unix time.
    #[must_use]
    pub fn next_expiry(&self, now: u64) -> Option<u64> {
        let boots = self.boots.iter().filter_map(BootConfiguration::expires);
        let sets = self.sets.iter().filter_map(RuntimeSet::expires);
        let all = boots.chain(sets).chain(self.expires);
        all.filter(|at| !at.is_past(now)).map(Expiry::unix).min()
    }

    /// What a host in enforce mode may run at this Unix time: all approved code, and the agents and kernel programs
    /// themselves. Sorted, each once.
    #[must_use]
    pub fn enforced(&self, now: u64) -> Vec<Sha256Digest> {
        let mut digests = Vec::new();
        for set in self.live_sets(now) {
            digests.extend(set.digests().chain(set.agents()).chain(set.kernel_programs()));
        }
        digests.sort_unstable();
        digests.dedup();
        digests
    }

    /// How many pieces of code are approved in all sets; what is in two counts twice.
    #[must_use]
    pub fn digests(&self) -> usize {
        let each = self.sets.iter().map(|set| set.digests().len());
        each.fold(0, usize::saturating_add)
    }

    /// How many deeds are permitted in all sets, each to one program.
    #[must_use]
    pub fn deeds(&self) -> usize {
        let each = self.sets.iter().map(RuntimeSet::deeds);
        each.fold(0, usize::saturating_add)
    }

    /// Whether everything in it is within its limits and makes sense together.
    ///
    /// # Errors
    /// A [`PolicyError`] that names the part.
    pub fn check(&self) -> Result<(), PolicyError> {
        check_name(&self.name, "a policy")?;
        let entries = self.sets.iter().map(|set| set.code().len());
        let entries = entries.fold(0, usize::saturating_add);
        for (list, found, limit) in [
            ("code", entries, MAX_ENTRIES),
            ("boots", self.boots.len(), MAX_PARTS),
            ("sets", self.sets.len(), MAX_PARTS),
            ("tags", self.tags.len(), MAX_PARTS),
        ] {
            if found > limit {
                return Err(PolicyError::TooMany { list, found, limit });
            }
        }
        self.tags.iter().try_for_each(|tag| check_name(tag, "a tag"))?;
        self.boots.iter().try_for_each(BootConfiguration::check)?;
        self.sets.iter().try_for_each(RuntimeSet::check)?;
        each_once(self.boots.iter().map(BootConfiguration::name), "boot configurations")?;
        each_once(self.sets.iter().map(RuntimeSet::name), "sets")?;
        self.rules.check()
    }
}

fn each_once<'a>(names: impl Iterator<Item = &'a str>, what: &'static str) -> Result<(), PolicyError> {
    let mut seen = BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(PolicyError::Twice(name.to_owned(), what));
        }
    }
    Ok(())
}

fn check_name(name: &str, what: &'static str) -> Result<(), PolicyError> {
    if is_name(name) {
        Ok(())
    } else {
        Err(PolicyError::Name(name.chars().take(MAX_NAME).collect(), what))
    }
}

/// Whether a policy, a part of one, or a tag can have this name.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let character = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && name.len() <= MAX_NAME && name.chars().all(character)
}

#[cfg(test)]
mod tests;

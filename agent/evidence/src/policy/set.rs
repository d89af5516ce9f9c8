//! Approved code, in sets that come and go as a whole: what an image was installed with, what an update brings.

use std::collections::{BTreeSet, HashSet};

use serde::{Deserialize, Serialize};

use super::boot::later;
use super::{Expiry, MAX_VALUES, PolicyError, check_name};
use crate::digest::Sha256Digest;
use crate::event::{LoadKind, MAX_PATH};

/// One approved piece of code: the digest approves, kind and path are where it was seen. Or a permitted deed
/// ([`LoadKind::is_deed`]): kind and digest of the program that may do it approve together.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Approved {
    // Order matters: the set below is sorted by path first, so that look-ups by path are ranges.
    /// Where it was seen; empty when the operator named none.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub path: Box<str>,
    /// What it was loaded as; or the deed that is permitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<LoadKind>,
    /// The digest.
    pub sha256: Sha256Digest,
}

impl Approved {
    /// The deed that it permits, if it is not about code.
    pub(super) fn deed(&self) -> Option<LoadKind> {
        self.kind.filter(|kind| kind.is_deed())
    }

    fn check(&self) -> Result<(), PolicyError> {
        match self.kind {
            Some(kind @ LoadKind::KexecLoad) => Err(PolicyError::NeverAllowed(kind)),
            _ if self.path.len() > MAX_PATH => Err(PolicyError::Path(self.path.chars().take(80).collect())),
            _ => Ok(()),
        }
    }
}

/// Code and agents that are approved together.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RuntimeSet {
    pub(super) name: String,
    pub(super) expires: Option<Expiry>,
    pub(super) agents: BTreeSet<Sha256Digest>,
    pub(super) kernel_programs: BTreeSet<Sha256Digest>,
    pub(super) starts: BTreeSet<Sha256Digest>,
    pub(super) code: BTreeSet<Approved>,
    approved: HashSet<Sha256Digest>,
    deeds: HashSet<(LoadKind, Sha256Digest)>,
}

/// Its form in the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SetFile {
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires: Option<Expiry>,
    #[serde(default)]
    agents: BTreeSet<Sha256Digest>,
    #[serde(default)]
    kernel_programs: BTreeSet<Sha256Digest>,
    #[serde(default)]
    runtime_pcr_start: BTreeSet<Sha256Digest>,
    #[serde(default)]
    code: Vec<Approved>,
}

impl RuntimeSet {
    /// A set with nothing in it.
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ..Self::default()
        }
    }

    pub(super) fn from_file(file: SetFile) -> Result<Self, PolicyError> {
        let mut set = Self {
            name: file.name,
            expires: file.expires,
            agents: file.agents,
            kernel_programs: file.kernel_programs,
            starts: file.runtime_pcr_start,
            ..Self::default()
        };
        set.put(file.code)?;
        set.check()?;
        Ok(set)
    }

    pub(super) fn to_file(&self) -> serde_json::Value {
        let mut file = serde_json::json!({
            "name": self.name,
            "agents": self.agents,
            "kernel_programs": self.kernel_programs,
            "runtime_pcr_start": self.starts,
            "code": self.code,
        });
        if let (Some(expires), Some(file)) = (self.expires, file.as_object_mut()) {
            file.insert("expires".into(), expires.to_string().into());
        }
        file
    }

    /// Replaces all code. In one go: nodes of the tree are then full, which a long list notices.
    pub(super) fn put(&mut self, code: Vec<Approved>) -> Result<(), PolicyError> {
        code.iter().try_for_each(Approved::check)?;
        let deeds = code.iter().filter_map(|entry| Some((entry.deed()?, entry.sha256)));
        self.deeds = deeds.collect();
        let approved = code.iter().filter(|entry| entry.deed().is_none());
        self.approved = approved.map(|entry| entry.sha256).collect();
        self.code = code.into_iter().collect();
        Ok(())
    }

    /// Approves one more; returns whether it was not approved in this set.
    pub(super) fn allow(&mut self, entry: Approved) -> Result<bool, PolicyError> {
        entry.check()?;
        let (deed, digest) = (entry.deed(), entry.sha256);
        self.code.insert(entry);
        Ok(match deed {
            Some(kind) => self.deeds.insert((kind, digest)),
            None => self.approved.insert(digest),
        })
    }

    /// Takes over everything of another set.
    pub(super) fn merge(&mut self, other: &Self) {
        self.agents.extend(&other.agents);
        self.kernel_programs.extend(&other.kernel_programs);
        self.starts.extend(&other.starts);
        self.code.extend(other.code.iter().cloned());
        self.approved.extend(&other.approved);
        self.deeds.extend(&other.deeds);
        self.expires = later(self.expires, other.expires);
    }

    /// Drops everything that `known` says is approved elsewhere; returns whether anything is left.
    pub(super) fn keep_news(&mut self, known: &[&Self]) -> bool {
        let in_any = |has: &dyn Fn(&Self) -> bool| known.iter().any(|set| has(set));
        self.agents.retain(|digest| !in_any(&|set| set.agents.contains(digest)));
        self.kernel_programs
            .retain(|digest| !in_any(&|set| set.kernel_programs.contains(digest)));
        self.starts.retain(|digest| !in_any(&|set| set.starts.contains(digest)));
        let news = std::mem::take(&mut self.code)
            .into_iter()
            .filter(|entry| match entry.deed() {
                Some(kind) => !in_any(&|set| set.allows_deed(kind, &entry.sha256)),
                None => !in_any(&|set| set.allows(&entry.sha256)),
            });
        // What was checked when it came in is good still.
        let _checked = self.put(news.collect());
        !(self.agents.is_empty() && self.kernel_programs.is_empty() && self.starts.is_empty() && self.code.is_empty())
    }

    pub(super) fn check(&self) -> Result<(), PolicyError> {
        check_name(&self.name, "a set")?;
        for (list, found) in [
            ("agents", self.agents.len()),
            ("kernel_programs", self.kernel_programs.len()),
            ("runtime_pcr_start", self.starts.len()),
        ] {
            if found > MAX_VALUES {
                let limit = MAX_VALUES;
                return Err(PolicyError::TooMany { list, found, limit });
            }
        }
        Ok(())
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// From when on it approves nothing any more.
    #[must_use]
    pub const fn expires(&self) -> Option<Expiry> {
        self.expires
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
    pub fn code(&self) -> impl ExactSizeIterator<Item = &Approved> {
        self.code.iter()
    }

    /// The digests of approved code, each once.
    pub fn digests(&self) -> impl ExactSizeIterator<Item = &Sha256Digest> {
        self.approved.iter()
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

    /// Allowed values of the runtime PCR before the log's first record. All zero is always allowed.
    #[must_use]
    pub const fn runtime_start(&self) -> &BTreeSet<Sha256Digest> {
        &self.starts
    }

    /// What is approved for a path, if anything: the first step when code at that path is not approved.
    pub(crate) fn approved_at<'a>(&'a self, path: &'a str) -> impl Iterator<Item = &'a Approved> {
        let from = Approved {
            path: path.into(),
            kind: None,
            sha256: Sha256Digest::ZERO,
        };
        let here = self.code.range(from..).take_while(move |entry| &*entry.path == path);
        here.filter(|entry| entry.deed().is_none())
    }
}

//! The policy as a file: JSON, strict, in two versions.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::set::SetFile;
use super::{
    Approved, BootConfiguration, Expiry, MAX_JSON, MAX_PARTS, Policy, PolicyError, Rules, RuntimeSet, VERSION,
};
use crate::digest::Sha256Digest;
use crate::event::Mode;

/// What both parts of a policy of version 1 are called.
const FIRST: &str = "default";

/// Only the version: what else is there depends on it.
#[derive(Deserialize)]
struct Head {
    version: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "version")]
    _version: u32,
    name: String,
    #[serde(default)]
    expires: Option<Expiry>,
    #[serde(default)]
    tags: BTreeSet<String>,
    boots: Vec<BootConfiguration>,
    sets: Vec<SetFile>,
    rules: Rules,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FirstFile {
    #[serde(rename = "version")]
    _version: u32,
    name: String,
    tiers: BTreeSet<u8>,
    modes: BTreeSet<Mode>,
    agents: BTreeSet<Sha256Digest>,
    kernel_programs: BTreeSet<Sha256Digest>,
    pcrs: BTreeMap<u8, BTreeSet<Sha256Digest>>,
    runtime_pcr_start: BTreeSet<Sha256Digest>,
    runtime: Vec<Approved>,
}

impl Policy {
    /// Reads a policy file.
    ///
    /// # Errors
    /// One variant of [`PolicyError`] for each reason.
    pub fn from_json(json: &[u8]) -> Result<Self, PolicyError> {
        if json.len() > MAX_JSON {
            return Err(PolicyError::TooLong(json.len()));
        }
        let Head { version } = serde_json::from_slice(json).map_err(PolicyError::Json)?;
        let policy = match version {
            1 => serde_json::from_slice::<FirstFile>(json)
                .map_err(PolicyError::Json)?
                .policy()?,
            VERSION => serde_json::from_slice::<File>(json)
                .map_err(PolicyError::Json)?
                .policy()?,
            version => return Err(PolicyError::Version(version)),
        };
        policy.check()?;
        Ok(policy)
    }

    /// The policy file: indented, every list sorted.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut file = serde_json::json!({
            "version": VERSION,
            "name": self.name,
            "boots": self.boots,
            "sets": self.sets.iter().map(RuntimeSet::to_file).collect::<Vec<_>>(),
            "rules": self.rules,
        });
        if let Some(file) = file.as_object_mut() {
            if !self.tags.is_empty() {
                file.insert("tags".into(), self.tags.iter().cloned().collect());
            }
            if let Some(expires) = self.expires {
                file.insert("expires".into(), expires.to_string().into());
            }
        }
        format!("{file:#}\n")
    }
}

impl File {
    fn policy(self) -> Result<Policy, PolicyError> {
        if self.sets.len() > MAX_PARTS {
            let (found, limit) = (self.sets.len(), MAX_PARTS);
            return Err(PolicyError::TooMany {
                list: "sets",
                found,
                limit,
            });
        }
        let sets: Result<_, _> = self.sets.into_iter().map(RuntimeSet::from_file).collect();
        Ok(Policy {
            expires: self.expires,
            tags: self.tags,
            boots: self.boots,
            sets: sets?,
            rules: self.rules,
            ..Policy::new(&self.name)?
        })
    }
}

impl FirstFile {
    fn policy(self) -> Result<Policy, PolicyError> {
        let mut policy = Policy::new(&self.name)?;
        policy.boots.push(BootConfiguration {
            name: FIRST.to_owned(),
            pcrs: self.pcrs,
            ..BootConfiguration::default()
        });
        let mut set = RuntimeSet::new(FIRST);
        set.agents = self.agents;
        set.kernel_programs = self.kernel_programs;
        set.starts = self.runtime_pcr_start;
        set.put(self.runtime)?;
        policy.sets.push(set);
        policy.rules.tiers = self.tiers;
        policy.rules.modes = self.modes;
        Ok(policy)
    }
}

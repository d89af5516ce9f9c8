//! Known-good values from a host that is known to be good.

use std::collections::BTreeSet;

use super::set::RuntimeSet;
use super::{Answer, Approved, BootConfiguration, Policy, PolicyError, check_name};
use crate::appraise::{did_not_run, ima_files};
use crate::digest::Sha256Digest;
use crate::event::{Event, LoadKind, Measurement, flags};
use crate::replay::ReplayedLog;

impl Policy {
    /// Takes everything that a good host runs, and how it booted, as known-good: a boot configuration and a set, both named
    /// `part`. What enforce mode refused did not run, so it is not taken. Where the kernel's IMA log came along and can be judged,
    /// its files are approved and it is judged from now on; [`ReplayedLog::ima_problem`] says why not.
    ///
    /// # Errors
    /// [`PolicyError::NotReady`], [`PolicyError::Violation`], [`PolicyError::NotHashed`], [`PolicyError::Unstable`],
    /// [`PolicyError::Modified`], [`PolicyError::Attempt`], [`PolicyError::NeverAllowed`]: no host to learn from.
    /// [`PolicyError::TooMany`], [`PolicyError::Name`].
    pub fn capture(name: &str, part: &str, log: &ReplayedLog) -> Result<Self, PolicyError> {
        check_name(part, "a boot configuration")?;
        let mut policy = Self::new(name)?;
        let mut set = RuntimeSet::new(part);
        policy.learn_runtime(&mut set, log)?;
        if let Ok(Some(files)) = ima_files(log) {
            for (path, sha256) in files {
                let path = path.as_str().into();
                set.allow(Approved {
                    path,
                    kind: None,
                    sha256,
                })?;
            }
            policy.rules.ima_log = Answer::Approved;
        }
        set.starts.extend(Sha256Digest::try_from(log.pcr_start()).ok());
        policy.boots.push(BootConfiguration::capture(part, log));
        policy.sets.push(set);
        policy.check()?;
        Ok(policy)
    }

    fn learn_runtime(&mut self, set: &mut RuntimeSet, log: &ReplayedLog) -> Result<(), PolicyError> {
        let mut ready = false;
        let mut deeds = BTreeSet::new();
        for (_, event) in log.events() {
            match event {
                Event::AgentStart(start) => {
                    set.agents.insert(start.agent_digest);
                    set.kernel_programs.insert(start.bpf_digest);
                    self.rules.tiers.insert(start.tier);
                    self.rules.modes.insert(start.mode);
                }
                Event::Inventory(code) | Event::Load(code) if did_not_run(code) => {}
                Event::Inventory(code) | Event::Load(code) => {
                    let digest = learnable(code)?;
                    if code.kind.is_deed() && code.path.is_empty() {
                        deeds.insert((code.kind, digest));
                    } else {
                        set.allow(approved(digest, code.kind, &code.path))?;
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
            let path = programs.get(&digest).copied().unwrap_or_default();
            set.allow(approved(digest, kind, path))?;
        }
        Ok(())
    }
}

fn approved(sha256: Sha256Digest, kind: LoadKind, path: &str) -> Approved {
    Approved {
        path: path.into(),
        kind: Some(kind),
        sha256,
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
            task: code.comm.to_string(),
        }),
        _ if kind == LoadKind::KexecLoad => Err(PolicyError::NeverAllowed(kind)),
        Some(_) if flagged(flags::UNSTABLE) => Err(PolicyError::Unstable(path())),
        Some(_) if flagged(flags::MODIFIED) => Err(PolicyError::Modified(path())),
        Some(digest) if !flagged(flags::NOT_HASHED) => Ok(digest),
        _ => Err(PolicyError::NotHashed(path())),
    }
}

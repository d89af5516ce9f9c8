//! The part of the verdict that is about the runtime log: who measured, what was loaded, what was done.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::{Failure, Judge, MAX_FAILURES, Rule};
use crate::digest::Sha256Digest;
use crate::event::{AgentStart, Event, LoadKind, Measurement, Notice, Violation, flags};
use crate::policy::{Answer, Approved, RuntimeSet};
use crate::replay::ReplayedLog;

/// Where in the failures code that was refused before stands: a program run a thousand times is one line.
pub(super) type Seen<'a> = HashMap<Key<'a>, usize>;

/// Ways of measuring in the notes.
const MAX_STARTS: usize = 16;
/// Refused pieces of code in the notes.
const MAX_REFUSED: usize = 100;

/// What makes two failures about code equal.
type Key<'a> = (Rule, LoadKind, &'a str, Option<Sha256Digest>, u32);

/// What the log says beside the code, gathered for the notes.
#[derive(Default)]
struct Told<'a> {
    /// Each way of measuring, once.
    starts: BTreeSet<String>,
    /// What the hooks refused, with the first record and how often.
    refused: BTreeMap<Refused<'a>, (u64, u64)>,
    /// Refusals of code for which there was no room there.
    refused_beyond: u64,
    /// Files measured ahead of a load that are not approved.
    ahead: u64,
    /// Violations that the policy tolerates, by name, with the first record and how often.
    tolerated: BTreeMap<&'static str, (u64, u64)>,
    slow: u64,
    slowest_millis: u64,
    list: Option<&'a Notice>,
}

/// Path and task; these first, since the notes are sorted by them. The task only where there is no path.
type Refused<'a> = (&'a str, &'a str, LoadKind, Option<Sha256Digest>);

impl<'a> Judge<'a> {
    pub(super) fn events(&mut self, log: &'a ReplayedLog) {
        let (mut ready, mut stopped) = (false, None);
        let mut told = Told::default();
        for (record, event) in log.events() {
            match event {
                Event::AgentStart(start) => {
                    stopped = None;
                    told.start(start);
                    self.agent(record, start);
                }
                Event::Inventory(code) | Event::Load(code) if did_not_run(code) => {
                    if code.flags & flags::REFUSED != 0 {
                        told.refused(record, code);
                    }
                }
                // Its load, if there is one, has a record of its own.
                Event::Load(code) if code.flags & flags::AHEAD != 0 => {
                    let approved = code.digest.is_some_and(|digest| self.allows(&digest));
                    told.ahead = told.ahead.saturating_add(u64::from(!approved));
                }
                Event::Inventory(code) | Event::Load(code) => self.code(record, code),
                Event::Violation(violation) if self.policy.rules().tolerates(violation) => {
                    told.tolerated(record, violation);
                }
                Event::Violation(violation) => {
                    let failure = Failure::new(Rule::Violation, violation.to_string());
                    self.refuse(Failure {
                        record: Some(record),
                        ..failure
                    });
                }
                Event::Ready => ready = true,
                Event::AgentStop => stopped = Some(record),
                Event::Notice(notice) => told.notice(notice),
            }
        }
        self.name_programs(log);
        if !ready {
            self.failures.push(Failure::new(Rule::NotReady, String::new()));
        }
        if stopped.is_some() {
            self.failures.push(Failure {
                record: stopped,
                ..Failure::new(Rule::AgentStopped, String::new())
            });
        }
        told.write(&mut self.notes);
    }

    /// Who measured, and how: each start of the agent is judged, a restart can be another program.
    fn agent(&mut self, record: u64, start: &AgentStart) {
        let rules = self.policy.rules();
        let in_any = |has: &dyn Fn(&RuntimeSet) -> bool| self.sets.iter().any(|set| has(set));
        let other = |texts: &BTreeSet<String>, text: &String| !texts.is_empty() && !texts.contains(text);
        let mut refused = Vec::new();
        let mut refuse = |rule, digest, detail| refused.push((rule, digest, detail));
        if !in_any(&|set| set.agents().contains(&start.agent_digest)) {
            refuse(Rule::Agent, Some(start.agent_digest), start.agent_version.clone());
        }
        if other(&rules.agent_versions, &start.agent_version) {
            refuse(Rule::AgentVersion, None, start.agent_version.clone());
        }
        if !in_any(&|set| set.kernel_programs().contains(&start.bpf_digest)) {
            refuse(Rule::KernelPrograms, Some(start.bpf_digest), String::new());
        }
        if !rules.tiers.contains(&start.tier) {
            refuse(Rule::Tier, None, start.tier.to_string());
        }
        if !rules.modes.contains(&start.mode) {
            refuse(Rule::Mode, None, start.mode.to_string());
        }
        if rules.protected && !start.protected {
            refuse(Rule::NotProtected, None, String::new());
        }
        if other(&rules.lockdown, &start.lockdown) {
            refuse(Rule::Lockdown, None, start.lockdown.clone());
        }
        if other(&rules.kernels, &start.kernel_release) {
            refuse(Rule::Kernel, None, start.kernel_release.clone());
        }
        for (rule, digest, detail) in refused {
            self.refuse(Failure {
                record: Some(record),
                digest,
                ..Failure::new(rule, detail)
            });
        }
    }

    fn code(&mut self, record: u64, code: &'a Measurement) {
        let Some(rule) = self.rule(code) else { return };
        // That an attempt was refused goes without saying.
        let told = match code.flags & flags::TOLD {
            all if code.kind.is_attempt() => all & !flags::REFUSED,
            all => all,
        };
        let key = (rule, code.kind, code.path.as_str(), code.digest, told);
        if let Some(failure) = self.seen.get(&key).and_then(|at| self.failures.get_mut(*at)) {
            failure.times = failure.times.saturating_add(1);
            return;
        }
        if self.failures.len() < MAX_FAILURES {
            self.seen.insert(key, self.failures.len());
        }
        let nearest = match rule {
            Rule::NotApproved => code.digest.and_then(|digest| self.nearest(&code.path, &digest)),
            _ => None,
        };
        self.refuse(Failure {
            record: Some(record),
            kind: Some(code.kind),
            path: Some(code.path.to_string()),
            digest: code.digest,
            flags: told,
            comm: code.kind.is_deed().then(|| code.comm.to_string()),
            nearest,
            ..Failure::new(rule, String::new())
        });
    }

    /// A deed has the digest of a program and not its path; where that program ran, the log says.
    fn name_programs(&mut self, log: &ReplayedLog) {
        let wanted = self.failures.iter().filter(|failure| failure.is_by_program());
        let wanted: HashSet<_> = wanted.filter_map(Failure::digest).collect();
        if wanted.is_empty() {
            return;
        }
        let paths = log.programs(&wanted);
        // One walk for all: a log can have thousands of deeds, and a policy a hundred thousand entries.
        let entries = self.sets.iter().flat_map(|set| set.code());
        let known: HashMap<_, _> = entries
            .filter(|entry| wanted.contains(&entry.sha256))
            .map(|entry| (entry.sha256, entry))
            .collect();
        for failure in self.failures.iter_mut().filter(|failure| failure.is_by_program()) {
            let path = failure.digest.and_then(|digest| paths.get(&digest));
            failure.program = path.map(|path| (*path).to_owned());
            let known = failure.digest.and_then(|digest| known.get(&digest));
            failure.nearest = known.map(|entry| allowed_instead(entry));
        }
    }

    /// Which rule refuses this, if one does.
    fn rule(&self, code: &Measurement) -> Option<Rule> {
        let answer = self.policy.rules().kind(code.kind);
        if answer == Answer::Refuse {
            return Some(deed(code.kind).unwrap_or(Rule::KindRefused));
        }
        if let Some(rule) = deed(code.kind) {
            let allowed = |digest: &Sha256Digest| self.sets.iter().any(|set| set.allows_deed(code.kind, digest));
            let allowed = answer == Answer::Any || code.digest.is_some_and(|digest| allowed(&digest));
            return (!allowed).then_some(rule);
        }
        let flagged = |flag| code.flags & flag != 0;
        let flagged_and_judged = |flag| flagged(flag & !self.flags.tolerated);
        match &code.digest {
            // Whatever it says: no hook sees what `kexec_load` loads.
            _ if code.kind == LoadKind::KexecLoad => Some(Rule::KexecLoad),
            _ if flagged(self.flags.refused) => Some(Rule::FlagRefused),
            _ if answer == Answer::Any => None,
            None => Some(Rule::NotHashed),
            Some(_) if flagged(flags::NOT_HASHED) => Some(Rule::NotHashed),
            Some(digest) if !self.allows(digest) => Some(Rule::NotApproved),
            Some(_) if flagged_and_judged(flags::UNSTABLE) => Some(Rule::Unstable),
            Some(_) if flagged_and_judged(flags::MODIFIED) => Some(Rule::Modified),
            Some(_) => None,
        }
    }
}

impl Judge<'_> {
    /// Whether an event leaves a verdict that trusts as it is, word for word: code that ran and is approved.
    pub(super) fn passes(&self, event: &Event) -> bool {
        match event {
            Event::Inventory(code) | Event::Load(code) => {
                !did_not_run(code) && code.flags & flags::AHEAD == 0 && self.rule(code).is_none()
            }
            _ => false,
        }
    }
}

/// What the policy allows a program that did something else.
fn allowed_instead(entry: &Approved) -> String {
    let path = entry.path.escape_debug();
    match entry.kind {
        Some(deed) if deed.is_deed() => format!("the policy allows this program {deed}, at {path}"),
        _ => format!("the policy allows this program to run, at {path}, and not to do this"),
    }
}

/// The rule about a deed or an attempt; none for what is loaded.
const fn deed(kind: LoadKind) -> Option<Rule> {
    match kind {
        LoadKind::Anonymous => Some(Rule::Anonymous),
        LoadKind::Device => Some(Rule::Device),
        LoadKind::BlockWrite => Some(Rule::BlockWrite),
        LoadKind::CodeWrite => Some(Rule::CodeWrite),
        _ if kind.is_attempt() => Some(Rule::Attempt),
        _ => None,
    }
}

/// Whether there is nothing to judge: the hook kept it from happening, or it was done to a disk that nobody uses. What hold refuses may run when it is tried again, which is a record of its own.
/// An attempt on the agent was made though it failed.
pub(crate) const fn did_not_run(code: &Measurement) -> bool {
    code.flags & (flags::REFUSED | flags::IDLE) != 0 && !code.kind.is_attempt()
}

impl<'a> Told<'a> {
    fn start(&mut self, start: &AgentStart) {
        let protected = if start.protected {
            "kept away from the rest of the host"
        } else {
            "not protected from root"
        };
        let mut text = format!(
            "measured by tier {} in mode {}, the agent {protected}",
            start.tier, start.mode
        );
        if !start.blind.is_empty() {
            text.push_str("; it cannot see: ");
            text.extend(start.blind.escape_debug());
        }
        // An honest log has a few; what is beyond says nothing new.
        if self.starts.len() < MAX_STARTS {
            self.starts.insert(text);
        }
    }

    fn refused(&mut self, record: u64, code: &'a Measurement) {
        let comm = if code.path.is_empty() { code.comm.as_str() } else { "" };
        let key = (code.path.as_str(), comm, code.kind, code.digest);
        if self.refused.len() >= MAX_FAILURES && !self.refused.contains_key(&key) {
            self.refused_beyond = self.refused_beyond.saturating_add(1);
            return;
        }
        let (_, times) = self.refused.entry(key).or_insert((record, 0));
        *times = times.saturating_add(1);
    }

    fn tolerated(&mut self, record: u64, violation: &Violation) {
        let (_, times) = self.tolerated.entry(violation.name()).or_insert((record, 0));
        *times = times.saturating_add(1);
    }

    fn notice(&mut self, notice: &'a Notice) {
        match notice {
            Notice::TpmSlow { millis } => {
                self.slow = self.slow.saturating_add(1);
                self.slowest_millis = self.slowest_millis.max(*millis);
            }
            Notice::ListInForce { .. } => self.list = Some(notice),
        }
    }

    fn write(self, notes: &mut Vec<String>) {
        notes.extend(self.starts);
        notes.extend(self.list.map(ToString::to_string));
        if self.slow > 0 {
            notes.push(format!(
                "slow extends of the TPM: {}, the slowest took {} ms",
                self.slow, self.slowest_millis
            ));
        }
        for (name, (record, times)) in self.tolerated {
            notes.push(format!(
                "tolerated: violation {name}, {times} times, the first in record {record}"
            ));
        }
        if self.ahead > 0 {
            notes.push(format!(
                "measured ahead of a load and not approved: {} files",
                self.ahead
            ));
        }
        let more = u64::try_from(self.refused.len().saturating_sub(MAX_REFUSED)).unwrap_or(u64::MAX);
        let more = more.saturating_add(self.refused_beyond);
        notes.extend(self.refused.into_iter().take(MAX_REFUSED).map(refusal));
        if more > 0 {
            notes.push(format!("refused: {more} more; the log has them all"));
        }
    }
}

fn refusal(((path, comm, kind, digest), (record, times)): (Refused<'_>, (u64, u64))) -> String {
    let digest = digest.map_or_else(|| "without a digest".to_owned(), |digest| format!("sha256:{digest}"));
    let path = match path {
        "" => format!("by task {}", comm.escape_debug()),
        path => path.escape_debug().to_string(),
    };
    let mut text = format!("refused: {kind} {path} {digest} (record {record})");
    if times > 1 {
        text.push_str(&format!("; {times} times"));
    }
    text
}

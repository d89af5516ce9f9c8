//! What one policy allows and another doesn't.

use core::fmt;
use std::collections::BTreeSet;

use serde::Serialize;

use super::{BootConfiguration, Policy, RuntimeSet};

/// Which of the two has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// The old one alone.
    Removed,
    /// The new one alone.
    Added,
}

/// One line that is in one of the two alone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Difference {
    /// Where: `set base code`, `boot 2026-11 PCR 9`, `rules`, ….
    pub place: String,
    /// Which of the two has it.
    pub change: Change,
    /// What, in one line.
    pub what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = match self.change {
            Change::Removed => '-',
            Change::Added => '+',
        };
        write!(f, "{sign} {}: {}", self.place, self.what)
    }
}

impl Policy {
    /// What turns this policy into the other, sorted by place. Names of the policies themselves are not compared.
    #[must_use]
    pub fn differences(&self, new: &Self) -> Vec<Difference> {
        let (old, new) = (self.lines(), new.lines());
        let one_sided = |from: &BTreeSet<(String, String)>, without: &BTreeSet<(String, String)>, change| {
            let lines = from.difference(without);
            lines
                .map(|(place, what)| Difference {
                    place: place.clone(),
                    change,
                    what: what.clone(),
                })
                .collect::<Vec<_>>()
        };
        let mut all = one_sided(&old, &new, Change::Removed);
        all.extend(one_sided(&new, &old, Change::Added));
        all.sort();
        all
    }

    /// Everything in it, a line each.
    fn lines(&self) -> BTreeSet<(String, String)> {
        let mut lines = BTreeSet::new();
        let mut put = |place: &str, what: String| lines.insert((place.to_owned(), what));
        if let Some(expires) = self.expires {
            put("policy", format!("expires {expires}"));
        }
        for tag in &self.tags {
            put("policy", format!("tag {tag}"));
        }
        if let Ok(serde_json::Value::Object(rules)) = serde_json::to_value(&self.rules) {
            for (name, rule) in rules {
                put("rules", format!("{name} {rule}"));
            }
        }
        for boot in &self.boots {
            boot_lines(boot, &mut put);
        }
        for set in &self.sets {
            set_lines(set, &mut put);
        }
        lines
    }
}

fn boot_lines(boot: &BootConfiguration, put: &mut impl FnMut(&str, String) -> bool) {
    let name = format!("boot {}", boot.name());
    if let Some(expires) = boot.expires() {
        put(&name, format!("expires {expires}"));
    }
    for (pcr, values) in boot.pcrs() {
        let place = format!("{name} PCR {pcr}");
        for value in values {
            put(&place, format!("sha256:{value}"));
        }
        for step in boot.steps(*pcr) {
            put(&place, format!("sha256:{} {}", step.sha256, step.what.escape_debug()));
        }
    }
}

fn set_lines(set: &RuntimeSet, put: &mut impl FnMut(&str, String) -> bool) {
    let name = format!("set {}", set.name());
    if let Some(expires) = set.expires() {
        put(&name, format!("expires {expires}"));
    }
    for (what, digests) in [
        ("agent", set.agents()),
        ("kernel programs", set.kernel_programs()),
        ("runtime PCR's start", set.runtime_start()),
    ] {
        for digest in digests {
            put(&name, format!("{what} sha256:{digest}"));
        }
    }
    let place = format!("{name} code");
    for entry in set.code() {
        let kind = entry.kind.map_or("any", crate::event::LoadKind::name);
        put(
            &place,
            format!("{} {kind} sha256:{}", entry.path.escape_debug(), entry.sha256),
        );
    }
}

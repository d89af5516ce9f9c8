//! `policy show`: a policy for people.

use std::fmt::Write as _;

use assay_evidence::event::LoadKind;
use assay_evidence::policy::{BootConfiguration, Expiry, Policy, RuntimeSet};

use crate::cli::{CliError, print, print_json};
use crate::store::Store;
use crate::time::{rfc3339, unix_now};

/// All policies, a line each.
pub(super) fn list(store: &Store, json: bool) -> Result<(), CliError> {
    let policies = store.policies()?;
    if json {
        return print_json(
            &policies
                .iter()
                .map(|(name, at)| serde_json::json!({"name": name, "updated": rfc3339(*at)}))
                .collect(),
        );
    }
    if policies.is_empty() {
        return print("no policies: make one with `assay-verifier policy capture HOST`\n");
    }
    let width = policies.iter().map(|(name, _)| name.len()).max().unwrap_or(0).max(4);
    let mut text = format!("{:width$}  CHANGED\n", "NAME");
    for (name, at) in &policies {
        let _infallible = writeln!(text, "{name:width$}  {}", rfc3339(*at));
    }
    print(&text)
}

/// Everything in one.
pub(super) fn show(policy: &Policy, json: bool) -> Result<(), CliError> {
    if json {
        return print(&policy.to_json());
    }
    let mut text = format!("{}: {}\n", policy.name(), summary(policy));
    line(
        &mut text,
        "tags",
        &policy.tags().iter().cloned().collect::<Vec<_>>().join(" "),
    );
    line(&mut text, "approved", &until(policy.expires()));
    if let Ok(serde_json::Value::Object(rules)) = serde_json::to_value(policy.rules()) {
        for (name, rule) in rules {
            line(&mut text, &name, &rule.to_string());
        }
    }
    for boot in policy.boots() {
        show_boot(&mut text, boot);
    }
    for set in policy.sets() {
        show_set(&mut text, set);
    }
    print(&text)
}

fn show_boot(text: &mut String, boot: &BootConfiguration) {
    let _infallible = writeln!(text, "\nboot configuration {}{}", boot.name(), comma(boot.expires()));
    for (pcr, values) in boot.pcrs() {
        for value in values {
            line(text, &format!("PCR {pcr}"), &value.to_string());
        }
        for step in boot.steps(*pcr) {
            line(
                text,
                "",
                &format!("sha256:{}  {}", step.sha256, step.what.escape_debug()),
            );
        }
    }
}

fn show_set(text: &mut String, set: &RuntimeSet) {
    let _infallible = writeln!(text, "\nset {}{}", set.name(), comma(set.expires()));
    for (title, digests) in [("agent", set.agents()), ("kernel programs", set.kernel_programs())] {
        for digest in digests {
            line(text, title, &format!("sha256:{digest}"));
        }
    }
    for entry in set.code() {
        let kind = entry.kind.map_or("any", LoadKind::name);
        line(
            text,
            kind,
            &format!("sha256:{}  {}", entry.sha256, entry.path.escape_debug()),
        );
    }
}

fn line(text: &mut String, title: &str, what: &str) {
    if !what.is_empty() {
        let _infallible = writeln!(text, "{title:15}  {what}");
    }
}

fn comma(expires: Option<Expiry>) -> String {
    match until(expires).as_str() {
        "" => String::new(),
        text => format!(", {text}"),
    }
}

fn until(expires: Option<Expiry>) -> String {
    match expires {
        None => String::new(),
        Some(at) if at.is_past(unix_now()) => format!("until {at}: it has EXPIRED"),
        Some(at) => format!("until {at}"),
    }
}

/// What there is, in numbers.
pub(super) fn summary(policy: &Policy) -> String {
    let boots = policy.boots().len();
    let deeds = match policy.deeds() {
        0 => String::new(),
        number => format!(", {number} permitted deeds"),
    };
    let plural = if boots == 1 { "" } else { "s" };
    format!(
        "{} digests{deeds}, {boots} boot configuration{plural}",
        policy.digests()
    )
}

//! `assay-verifier key terms`: what a key demands beside its policy and tags.

use assay_evidence::audit::Event;
use assay_evidence::policy::Expiry;
use assay_evidence::terms::{Hours, OnLoss, Terms};
use assay_evidence::uuid::Uuid;
use clap::{ArgGroup, Args};
use serde_json::json;

use crate::audit::AuditLog;
use crate::cli::{CliError, policy, print, print_json};
use crate::config::{Config, StateDir};
use crate::keystore::{FileKeyStore, KeySource, KeyStoreError};

/// Options of `key terms`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("change").multiple(true)))]
pub(in crate::cli) struct TermsArgs {
    /// The key, as `key list` shows it
    #[arg(value_name = "ID")]
    key_id: Uuid,
    /// Take all terms away first
    #[arg(long, group = "change")]
    clear: bool,
    /// Release it only to hosts that are judged by this policy; may be given several times
    #[arg(long, value_name = "POLICY", value_parser = policy::part_name, group = "change")]
    group: Vec<String>,
    /// Not before this time (UTC): 2027-01-31 or 2027-01-31T12:00:00Z
    #[arg(long, value_name = "TIME", group = "change")]
    not_before: Option<Expiry>,
    /// Not from this time on
    #[arg(long, value_name = "TIME", group = "change")]
    not_after: Option<Expiry>,
    /// Only in these hours of the week (UTC): "mon-fri 08:00-18:00"; may be given several times
    #[arg(long, value_name = "HOURS", group = "change")]
    hours: Vec<Hours>,
    /// On at most so many hosts at once; needs a lease
    #[arg(long, value_name = "N", group = "change")]
    hosts_at_once: Option<u32>,
    /// For so many seconds, which every poll with a good verdict renews
    #[arg(long, value_name = "SECONDS", group = "change")]
    lease: Option<u64>,
    /// What a host does that turns untrusted, or whose lease runs out: nothing, tell, suspend (the disk waits), wipe (and its
    /// key is gone from the kernel)
    #[arg(long, value_name = "RULE", group = "change")]
    on_loss: Option<OnLoss>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(state: &StateDir, args: TermsArgs) -> Result<(), CliError> {
    Config::load(state)?;
    let keys = FileKeyStore::open(state.path())?;
    let (key_id, json) = (args.key_id, args.json);
    let before = keys.describe(key_id)?.terms;
    let terms = args.change(before.clone());
    if terms != before {
        terms
            .check()
            .map_err(|source| KeyStoreError::Terms { key_id, source })?;
        // First: no change without a record.
        AuditLog::open(state)?.append(Event::Terms {
            key_id,
            terms: terms.to_string(),
        })?;
        keys.set_terms(key_id, &terms)?;
    }
    if json {
        return print_json(&json!({"key_id": key_id, "terms": terms}));
    }
    print(&format!("key {key_id}: {terms}\n"))
}

impl TermsArgs {
    /// The terms with what the options say.
    fn change(self, before: Terms) -> Terms {
        let before = if self.clear { Terms::default() } else { before };
        Terms {
            groups: if self.group.is_empty() {
                before.groups
            } else {
                self.group.into_iter().collect()
            },
            not_before: self.not_before.or(before.not_before),
            not_after: self.not_after.or(before.not_after),
            hours: if self.hours.is_empty() {
                before.hours
            } else {
                self.hours
            },
            hosts_at_once: self.hosts_at_once.or(before.hosts_at_once),
            lease_s: self.lease.or(before.lease_s),
            on_loss: self.on_loss.unwrap_or(before.on_loss),
        }
    }
}

//! Commands that change a policy: merge, expire, drop.

use assay_evidence::policy::{Expiry, Policy};
use clap::{ArgGroup, Args};

use super::{existing, show};
use crate::cli::{CliError, print};
use crate::store::Store;

/// Options of `policy merge`.
#[derive(Debug, Args)]
pub(in crate::cli) struct Merge {
    /// The policy that grows
    into: String,
    /// Policies whose boot configurations, sets and rules it takes over; parts of one name become one
    #[arg(required = true)]
    from: Vec<String>,
}

pub(super) fn merge(store: &Store, args: &Merge) -> Result<(), CliError> {
    let others: Vec<Policy> = args
        .from
        .iter()
        .map(|name| existing(store, name))
        .collect::<Result<_, _>>()?;
    store.edit_policy(&args.into, |policy| {
        others.iter().try_for_each(|other| policy.merge(other))
    })?;
    let policy = existing(store, &args.into)?;
    print(&format!("policy {}: {}\n", args.into, show::summary(&policy)))
}

/// Options of `policy expire`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("when").required(true).args(["at", "never"])))]
pub(in crate::cli) struct Expire {
    /// The policy
    name: String,
    /// Boot configuration or set, or both of this name; without it, the whole policy
    #[arg(long, value_name = "NAME")]
    part: Option<String>,
    /// The moment from which on it approves nothing: 2027-01-31 (UTC) or 2027-01-31T18:00:00Z
    #[arg(long, value_name = "TIME")]
    at: Option<Expiry>,
    /// It stays approved
    #[arg(long)]
    never: bool,
}

pub(super) fn expire(store: &Store, args: &Expire) -> Result<(), CliError> {
    store.edit_policy(&args.name, |policy| policy.expire(args.part.as_deref(), args.at))?;
    let what = match &args.part {
        Some(part) => format!("{part} of policy {}", args.name),
        None => format!("policy {}", args.name),
    };
    let until = match args.at {
        Some(at) => format!("is approved until {at}"),
        None => "stays approved".to_owned(),
    };
    print(&format!("{what} {until}\n"))
}

/// Options of `policy drop`.
#[derive(Debug, Args)]
pub(in crate::cli) struct Drop {
    /// The policy
    name: String,
    /// Boot configuration or set, or both of this name
    part: String,
}

pub(super) fn drop_part(store: &Store, args: &Drop) -> Result<(), CliError> {
    store.edit_policy(&args.name, |policy| policy.drop_part(&args.part))?;
    let policy = existing(store, &args.name)?;
    print(&format!(
        "policy {} has no {} any more: {}\n",
        args.name,
        args.part,
        show::summary(&policy)
    ))
}

//! Commands that change a policy: allow-agent, merge, expire, drop.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use assay_evidence::digest::Sha256Digest;
use assay_evidence::policy::{ALLOWED, Expiry, Policy};
use clap::{ArgGroup, Args};

use super::{existing, part_name, show};
use crate::cli::{CliError, print};
use crate::store::Store;

/// Options of `policy allow-agent`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("what").required(true).multiple(true).args(["agent", "kernel_programs"])))]
pub(in crate::cli) struct AllowAgent {
    /// The agent's executable, as it will be installed (/usr/bin/assay-agent)
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// The object with the kernel programs, as it will be installed (/usr/lib/assay/assay-ebpf.o)
    #[arg(long, value_name = "FILE")]
    kernel_programs: Option<PathBuf>,
    /// Set of the policy that they are added to; made if there is none
    #[arg(long, value_name = "NAME", default_value = ALLOWED, value_parser = part_name)]
    set: String,
    /// Name of the policy
    #[arg(long, default_value = "default")]
    name: String,
}

pub(super) fn allow_agent(store: &Store, args: &AllowAgent) -> Result<(), CliError> {
    let hashed = |file: &Option<PathBuf>| file.as_deref().map(sha256_of).transpose();
    let (agent, programs) = (hashed(&args.agent)?, hashed(&args.kernel_programs)?);
    let mut new = false;
    store.edit_policy(&args.name, |policy| {
        new = policy.allow_agent(&args.set, agent, programs)?;
        Ok(())
    })?;
    let what = if new { "now allows" } else { "allowed already" };
    for (title, digest) in [("agent", agent), ("kernel programs", programs)] {
        if let Some(digest) = digest {
            print(&format!("policy {} {what} {title} sha256:{digest}\n", args.name))?;
        }
    }
    Ok(())
}

fn sha256_of(path: &Path) -> Result<Sha256Digest, CliError> {
    let failed = |e| CliError::FileRead(path.to_owned(), e);
    let mut file = File::open(path).map_err(failed)?;
    let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => break,
            read => hash.update(buffer.get(..read).unwrap_or_default()),
        }
    }
    let digest = hash.finish();
    Sha256Digest::try_from(digest.as_ref()).map_err(|_| failed(io::ErrorKind::InvalidData.into()))
}

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

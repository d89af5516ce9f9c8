//! Policies as files: written, read, compared.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use assay_evidence::policy::{MAX_JSON, Policy};
use clap::Args;

use super::{existing, show};
use crate::cli::{CliError, print, print_json};
use crate::files::create_private;
use crate::store::Store;

/// Options of `policy diff`.
#[derive(Debug, Args)]
pub(in crate::cli) struct Diff {
    /// A policy, or a file that holds one: with a `/` in it, or ending in .json
    old: String,
    /// Likewise
    new: String,
    /// As JSON, for programs
    #[arg(long)]
    json: bool,
}

pub(super) fn diff(store: &Store, args: &Diff) -> Result<(), CliError> {
    let (old, new) = (named(store, &args.old)?, named(store, &args.new)?);
    let differences = old.differences(&new);
    if args.json {
        return print_json(&serde_json::to_value(&differences).unwrap_or_default());
    }
    if differences.is_empty() {
        return print("no difference\n");
    }
    let lines: String = differences.iter().map(|difference| format!("{difference}\n")).collect();
    print(&lines)
}

/// A stored policy, or one in a file.
fn named(store: &Store, name: &str) -> Result<Policy, CliError> {
    if name.contains('/') || name.ends_with(".json") {
        read(Path::new(name))
    } else {
        existing(store, name)
    }
}

/// Options of `policy export`.
#[derive(Debug, Args)]
pub(in crate::cli) struct Export {
    /// The policy
    name: String,
    /// File to write; must not exist
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub(super) fn export(store: &Store, args: &Export) -> Result<(), CliError> {
    let policy = existing(store, &args.name)?;
    create_private(&args.out, policy.to_json().as_bytes()).map_err(|e| CliError::PolicyWrite(args.out.clone(), e))?;
    print(&format!(
        "policy {}, {}, is in {}\n",
        args.name,
        show::summary(&policy),
        args.out.display()
    ))
}

/// Options of `policy import`.
#[derive(Debug, Args)]
pub(in crate::cli) struct Import {
    /// The file
    file: PathBuf,
    /// Name of the policy [default: the one that the file says]
    #[arg(long)]
    name: Option<String>,
    /// Replace a policy of this name, with everything that it allows
    #[arg(long)]
    replace: bool,
}

pub(super) fn import(store: &Store, args: &Import) -> Result<(), CliError> {
    let unusable = |e| CliError::PolicyFile(args.file.clone(), e);
    let mut policy = read(&args.file)?;
    if let Some(name) = &args.name {
        policy = policy.renamed(name).map_err(unusable)?;
    }
    let name = policy.name().to_owned();
    if !store.put_policy(&name, &policy, args.replace)? {
        return Err(CliError::PolicyThere(name));
    }
    print(&format!("policy {name}: {}\n", show::summary(&policy)))
}

fn read(path: &Path) -> Result<Policy, CliError> {
    let failed = |e| CliError::PolicyRead(path.to_owned(), e);
    let mut bytes = Vec::new();
    let limit = u64::try_from(MAX_JSON).unwrap_or(u64::MAX).saturating_add(1);
    File::open(path)
        .and_then(|file| file.take(limit).read_to_end(&mut bytes))
        .map_err(failed)?;
    Policy::from_json(&bytes).map_err(|e| CliError::PolicyFile(path.to_owned(), e))
}

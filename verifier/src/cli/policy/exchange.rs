//! Policies as files: written, read, compared.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use assay_evidence::jws::{Key, KeyError};
use assay_evidence::policy::{MAX_JSON, MAX_SIGNED, Policy};
use clap::Args;
use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::pki_types::pem::PemObject as _;

use super::{existing, show};
use crate::cli::{CliError, print, print_json};
use crate::config::StateDir;
use crate::files::create_private;
use crate::lists;
use crate::store::Store;

/// Longest file with a public key that is read, in bytes.
const MAX_KEY: usize = 16 * 1024;

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
    /// Signed by this verifier, for another one to import: it can't be edited then
    #[arg(long)]
    sign: bool,
}

pub(super) fn export(state: &StateDir, store: &Store, args: &Export) -> Result<(), CliError> {
    let policy = existing(store, &args.name)?;
    let text = if args.sign {
        let unusable = |e| CliError::PolicySigned(args.out.clone(), e);
        let signed = policy.sign(&lists::read_key(state)?).map_err(unusable)?;
        format!("{signed}\n")
    } else {
        policy.to_json()
    };
    create_private(&args.out, text.as_bytes()).map_err(|e| CliError::PolicyWrite(args.out.clone(), e))?;
    print(&format!(
        "policy {}, {}, is in {}\n",
        args.name,
        show::summary(&policy),
        args.out.display()
    ))?;
    if args.sign {
        let key = "Whoever imports it names this verifier's key, which `assay-verifier policy key` shows\n";
        print(key)?;
    }
    Ok(())
}

/// The key that lists and policies are signed with, in PEM.
pub(super) fn key(state: &StateDir) -> Result<(), CliError> {
    print(&lists::read_key(state)?.public().pem())
}

/// Options of `policy import`.
#[derive(Debug, Args)]
pub(in crate::cli) struct Import {
    /// The file
    file: PathBuf,
    /// The public key (PEM) of the verifier that signed it; a file that is not signed by it is refused
    #[arg(long, value_name = "FILE")]
    signer: Option<PathBuf>,
    /// Name of the policy [default: the one that the file says]
    #[arg(long)]
    name: Option<String>,
    /// Replace a policy of this name, with everything that it allows
    #[arg(long)]
    replace: bool,
}

pub(super) fn import(store: &Store, args: &Import) -> Result<(), CliError> {
    let unusable = |e| CliError::PolicyFile(args.file.clone(), e);
    let mut policy = match &args.signer {
        Some(signer) => read_signed(&args.file, signer)?,
        None => read(&args.file)?,
    };
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
    let bytes = read_at_most(path, MAX_JSON)?;
    // A policy is an object; what is not, and has a dot in it, is most likely a signed one.
    if bytes.first() == Some(&b'e') && bytes.contains(&b'.') {
        return Err(CliError::PolicyNeedsSigner(path.to_owned()));
    }
    Policy::from_json(&bytes).map_err(|e| CliError::PolicyFile(path.to_owned(), e))
}

fn read_signed(path: &Path, signer: &Path) -> Result<Policy, CliError> {
    let key = read_public_key(signer, CliError::PolicyKey)?;
    let bytes = read_at_most(path, MAX_SIGNED)?;
    Policy::from_signed(&bytes, &key).map_err(|e| CliError::PolicySigned(path.to_owned(), e))
}

/// A public key in PEM.
pub(in crate::cli) fn read_public_key(
    path: &Path,
    unusable: fn(PathBuf, KeyError) -> CliError,
) -> Result<Key, CliError> {
    let unusable = |e| unusable(path.to_owned(), e);
    let der = SubjectPublicKeyInfoDer::from_pem_slice(&read_at_most(path, MAX_KEY)?);
    Key::from_spki(&der.map_err(|_| unusable(KeyError::Public))?).map_err(unusable)
}

/// A file up to one byte more than this; what reads it says that it is too long.
fn read_at_most(path: &Path, limit: usize) -> Result<Vec<u8>, CliError> {
    let mut bytes = Vec::new();
    let limit = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    let read = File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes));
    read.map_err(|e| CliError::PolicyRead(path.to_owned(), e))?;
    Ok(bytes)
}

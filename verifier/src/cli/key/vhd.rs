//! `assay-verifier key make-vhd`, `key import-vhd`: keys of encrypted VHDs on XCP-ng and XenServer.
//!
//! The storage manager makes and reads such VHDs by itself, and asks on each activation for the key by its hash; on a host with
//! Assay its plugin gets it here. So nothing but the key is made here, and nothing but its hash is printed.

use std::fs::File;
use std::io::{self, Read, Write as _};
use std::path::{Path, PathBuf};

use assay_evidence::terms::Terms;
use assay_evidence::vhd::KeyHash;
use thiserror::Error;
use zeroize::Zeroizing;

use super::super::{CliError, policy, print};
use crate::config::{Config, StateDir};
use crate::keystore::{self, KeyInfo, KeyKind, KeySource, NO_DISK, Passphrase};
use crate::store::Store;

/// Longer than any key: whatever has more is something else.
const MAX_KEY_FILE: u64 = 4096;

/// Why a VHD's key was not taken.
#[derive(Debug, Error)]
pub enum VhdKeyError {
    /// The storage manager would take the hash, and encrypt nothing.
    #[error(
        "a QCOW2 disk is not encrypted by a key hash: XCP-ng's storage manager accepts sm-config:key_hash on it and writes the data in clear; use a VHD (sm-config:image-format=vhd, up to 2040 GiB), and nothing was kept"
    )]
    Qcow2,
    /// The key file cannot be read.
    #[error("cannot read the key from {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// The key is text.
    #[error(
        "{} holds text, not a key: a VHD's key is 32 or 64 random bytes, raw (`head -c 64 /dev/urandom`), neither hex nor base64", .0.display()
    )]
    Text(PathBuf),
    /// All bytes are the same.
    #[error("{} holds one byte over and over, which is no key: the hash of a weak key tells the key", .0.display())]
    Weak(PathBuf),
}

/// What the disk will be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(in super::super) enum VdiType {
    /// A VHD: encrypted by tapdisk
    Vhd,
    /// Refused: the storage manager does not encrypt it
    Qcow2,
}

/// Options of both commands.
#[derive(Debug, clap::Args)]
pub(in super::super) struct VhdArgs {
    /// What the key is for, as `key list` shows it
    #[arg(value_name = "NAME")]
    pub(in super::super) name: String,
    /// The policy that a host must meet to get the key
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub(in super::super) policy: String,
    /// Give the key only to hosts with this tag (`host tag`, or the policy's own tags); may be given several times
    #[arg(long, value_name = "TAG", value_parser = policy::part_name)]
    pub(in super::super) require_tag: Vec<String>,
    /// What the disk will be; qcow2 is refused, since the storage manager would not encrypt it
    #[arg(long, value_name = "TYPE", value_enum, default_value = "vhd")]
    pub(in super::super) vdi_type: VdiType,
}

/// `key make-vhd`.
#[derive(Debug, clap::Args)]
pub(in super::super) struct MakeArgs {
    #[command(flatten)]
    common: VhdArgs,
    /// Length of the key: 64 for AES-256-XTS, 32 for AES-128-XTS
    #[arg(long, value_name = "BYTES", default_value = "64", value_parser = ["32", "64"])]
    bytes: String,
}

/// `key import-vhd`.
#[derive(Debug, clap::Args)]
pub(in super::super) struct ImportArgs {
    #[command(flatten)]
    common: VhdArgs,
    /// The key: 32 or 64 raw bytes; `-` reads standard input
    #[arg(value_name = "KEYFILE")]
    file: PathBuf,
}

pub(super) fn make(state: &StateDir, args: &MakeArgs) -> Result<(), CliError> {
    let length = if args.bytes == "32" { 32 } else { 64 };
    let hash = keep(state, &args.common, 0, || Ok(Passphrase::generate_vhd(length)?))?;
    print(&told(&args.common, &hash, "SIZE", "filename=plain.raw format=raw"))
}

/// `image seal --format vhd`: a key for this disk, and what the operator runs on the pool to encrypt it.
pub(in super::super) fn seal(state: &StateDir, args: &VhdArgs, size: u64, import: &str) -> Result<(), CliError> {
    let hash = keep(state, args, size, || Ok(Passphrase::generate_vhd(64)?))?;
    print(&told(args, &hash, &size.to_string(), import))?;
    print("There is no recovery key: back up the key store, nothing else opens this disk\n")
}

fn told(args: &VhdArgs, hash: &KeyHash, size: &str, import: &str) -> String {
    format!(
        "{head}Make the disk on the pool, and copy into it through the storage manager, which encrypts:\n  \
           {create}\n  xe vdi-import uuid=VDI {import}\n",
        head = head(args, hash),
        create = create_command(hash, size),
    )
}

pub(super) fn import(state: &StateDir, args: &ImportArgs) -> Result<(), CliError> {
    let hash = keep(state, &args.common, 0, || {
        let key = read_key(&args.file).map_err(CliError::VhdKey)?;
        Ok(Passphrase::from_vhd(key)?)
    })?;
    print(&format!(
        "{head}Make an empty disk on the pool with\n  {create}\n\
         or encrypt a VHD file wherever vhd-util and the key are, and nobody else is, with\n  \
         vhd-util copy -n plain.vhd -N encrypted.vhd -E < KEYFILE\n\
         Then remove the key file: `shred -u KEYFILE`\n",
        head = head(&args.common, &hash),
        create = create_command(&hash, "SIZE"),
    ))
}

/// Checks what can be checked without the key, then keeps it. The disk's size is 0 where nobody knows it yet.
fn keep(
    state: &StateDir,
    args: &VhdArgs,
    size: u64,
    key: impl FnOnce() -> Result<(Passphrase, KeyHash), CliError>,
) -> Result<KeyHash, CliError> {
    if args.vdi_type == VdiType::Qcow2 {
        return Err(CliError::VhdKey(VhdKeyError::Qcow2));
    }
    let config = Config::load(state)?;
    let keys = keystore::open(state.path(), config.key_source.as_ref())?;
    let policy_missing = Store::open(&state.database())?.policy(&args.policy)?.is_none();
    let (key, hash) = key()?;
    let info = KeyInfo {
        terms: Terms::default(),
        key_id: hash.key_id(),
        kind: KeyKind::Vhd(hash),
        disk_uuid: NO_DISK,
        policy: args.policy.clone(),
        tags: args.require_tag.iter().cloned().collect(),
        image: args.name.clone(),
        size,
        created: crate::time::now(),
        header: None,
        replaces: None,
    };
    keys.put(&info, &key)?;
    if policy_missing {
        // Nowhere is left to report a failure to report.
        let _closed = writeln!(
            io::stderr(),
            "There is no policy {0} yet; until there is, no host gets this key: assay-verifier policy capture HOST --name {0}",
            args.policy
        );
    }
    Ok(hash)
}

/// At most the longest key is read, into memory that is wiped.
fn read_key(path: &Path) -> Result<Zeroizing<Vec<u8>>, VhdKeyError> {
    let failed = |error| VhdKeyError::Read(path.to_owned(), error);
    // Not through the library's standard input, whose buffer nobody wipes.
    let name = if path == Path::new("-") {
        Path::new("/dev/stdin")
    } else {
        path
    };
    let source = File::open(name).map_err(failed)?;
    // Room for all of it at once: a vector that grows leaves unwiped copies behind.
    let mut key = Zeroizing::new(Vec::with_capacity(usize::try_from(MAX_KEY_FILE).unwrap_or(0)));
    source.take(MAX_KEY_FILE).read_to_end(&mut key).map_err(failed)?;
    if !key.is_empty()
        && key
            .iter()
            .all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace())
    {
        return Err(VhdKeyError::Text(path.to_owned()));
    }
    if key.len() > 1 && key.iter().all(|byte| Some(byte) == key.first()) {
        return Err(VhdKeyError::Weak(path.to_owned()));
    }
    Ok(key)
}

fn head(args: &VhdArgs, hash: &KeyHash) -> String {
    format!(
        "Kept the key of {name:?}\nkey {key}\nkey_hash {hash}\npolicy {policy}\n\n",
        name = args.name,
        key = hash.key_id(),
        policy = args.policy,
    )
}

/// The format is said, since 8.3 makes large disks, or all of an SR that prefers it, QCOW2, which would stay in clear.
fn create_command(hash: &KeyHash, size: &str) -> String {
    format!(
        "xe vdi-create sr-uuid=SR name-label=NAME type=user virtual-size={size} sm-config:image-format=vhd sm-config:key_hash={hash}"
    )
}

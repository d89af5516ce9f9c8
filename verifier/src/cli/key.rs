//! `assay-verifier key`: disk keys.

use std::collections::BTreeMap;
use std::io::{self, Write as _};

use assay_evidence::uuid::Uuid;
use serde_json::json;

use super::{CliError, chain, print, print_json};
use crate::config::{Config, StateDir};
use crate::keystore::{FileKeyStore, Held, KeyInfo, KeyKind, KeySource, Listing};
use crate::time::rfc3339;

mod place;
mod terms;
pub(super) mod vhd;

pub use vhd::VhdKeyError;

/// `key …`.
#[derive(Debug, clap::Subcommand)]
pub(super) enum KeyCommand {
    /// List every key with the disk and policy that it belongs to; never the secrets
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make and keep a key for an encrypted VHD (XCP-ng, XenServer); prints its hash, and the commands that make the disk
    MakeVhd(vhd::MakeArgs),
    /// Keep the key of an encrypted VHD that exists, or that `vhd-util` is to make
    ImportVhd(vhd::ImportArgs),
    /// Show what a key demands beside its policy and tags, or change it: each option sets one term, the others stay
    Terms(terms::TermsArgs),
    /// Move the secrets of keys into the key source that config.toml names, or back into files; what the keys demand stays as it is
    Move(place::MoveArgs),
    /// Forget a key for good, here and in the key source: what it encrypts is lost, but for those with its recovery key
    Remove(place::RemoveArgs),
}

pub(super) fn run(state: &StateDir, command: KeyCommand) -> Result<(), CliError> {
    match command {
        KeyCommand::List { json } => list(state, json),
        KeyCommand::MakeVhd(args) => vhd::make(state, &args),
        KeyCommand::ImportVhd(args) => vhd::import(state, &args),
        KeyCommand::Terms(args) => terms::run(state, args),
        KeyCommand::Move(args) => place::run(state, &args),
        KeyCommand::Remove(args) => place::remove(state, &args),
    }
}

fn list(state: &StateDir, json: bool) -> Result<(), CliError> {
    // Says so, if there is no verifier here at all.
    Config::load(state)?;
    let Listing {
        keys,
        held,
        mut damaged,
    } = FileKeyStore::open(state.path())?.list()?;
    if json {
        let broken: Vec<String> = damaged.iter().map(|error| chain(error)).collect();
        print_json(
            &json!({"keys": keys.iter().map(|key| as_json(key, held.get(&key.key_id))).collect::<Vec<_>>(), "damaged": broken}),
        )?;
    } else {
        print(&as_text(&keys, &held))?;
    }
    // What can be shown was shown; the command still fails, and names each damaged file but the last here.
    let last = damaged.pop();
    for error in &damaged {
        // Nowhere is left to report a failure to report.
        let _closed = writeln!(io::stderr(), "assay-verifier: {}", chain(error));
    }
    last.map_or(Ok(()), |error| Err(error.into()))
}

fn as_json(key: &KeyInfo, held: Option<&Held>) -> serde_json::Value {
    json!({
        "key_id": key.key_id,
        "kind": match key.kind {
            KeyKind::Luks => "luks",
            KeyKind::Vhd(_) => "vhd",
        },
        "key_hash": match key.kind {
            KeyKind::Luks => None,
            KeyKind::Vhd(hash) => Some(hash),
        },
        "disk_uuid": matches!(key.kind, KeyKind::Luks).then_some(key.disk_uuid),
        "policy": key.policy,
        "tags": key.tags,
        "image": key.image,
        "size": key.size,
        "created": rfc3339(key.created),
        "terms": key.terms,
        "held": held.map(Held::engine),
    })
}

fn as_text(keys: &[KeyInfo], held: &BTreeMap<Uuid, Held>) -> String {
    if keys.is_empty() {
        return "No keys: `assay-verifier image seal IN OUT` makes an image and its key\n".to_owned();
    }
    let mut text = format!(
        "{:36}  {:36}  {:20}  {:>15}  {:16}  {:16}  {:7}  IMAGE\n",
        "KEY", "DISK", "CREATED", "BYTES", "POLICY", "TAGS", "SECRET"
    );
    for key in keys {
        let (key_id, disk) = match key.kind {
            KeyKind::Luks => (key.key_id.to_string(), key.disk_uuid.to_string()),
            KeyKind::Vhd(_) => (key.key_id.to_string(), format!("{:36}", "every VHD with its hash")),
        };
        let created = rfc3339(key.created);
        text.push_str(&format!(
            "{key_id}  {disk}  {created:20}  {size:>15}  {policy:16}  {tags:16}  {secret:7}  {image}\n",
            size = key.size,
            policy = key.policy,
            tags = key.tags.iter().map(String::as_str).collect::<Vec<_>>().join(","),
            secret = held.get(&key.key_id).map_or("files", Held::engine),
            image = key.image.escape_debug(),
        ));
    }
    text
}

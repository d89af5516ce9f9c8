//! `assay-verifier key`: disk keys.

use std::io::{self, Write as _};

use serde_json::json;

use super::{CliError, chain, print, print_json};
use crate::config::{Config, StateDir};
use crate::keystore::{FileKeyStore, KeyInfo, KeySource, Listing};
use crate::time::rfc3339;

/// `key …`.
#[derive(Debug, clap::Subcommand)]
pub(super) enum KeyCommand {
    /// List every key with the disk and policy that it belongs to; never the secrets
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

pub(super) fn run(state: &StateDir, command: KeyCommand) -> Result<(), CliError> {
    let KeyCommand::List { json } = command;
    // Says so, if there is no verifier here at all.
    Config::load(state)?;
    let Listing { keys, mut damaged } = FileKeyStore::open(state.path())?.list()?;
    if json {
        let broken: Vec<String> = damaged.iter().map(|error| chain(error)).collect();
        print_json(&json!({"keys": keys.iter().map(as_json).collect::<Vec<_>>(), "damaged": broken}))?;
    } else {
        print(&as_text(&keys))?;
    }
    // What can be shown was shown; the command still fails, and names each damaged file but the last here.
    let last = damaged.pop();
    for error in &damaged {
        // Nowhere is left to report a failure to report.
        let _closed = writeln!(io::stderr(), "assay-verifier: {}", chain(error));
    }
    last.map_or(Ok(()), |error| Err(error.into()))
}

fn as_json(key: &KeyInfo) -> serde_json::Value {
    json!({
        "key_id": key.key_id,
        "disk_uuid": key.disk_uuid,
        "policy": key.policy,
        "tags": key.tags,
        "image": key.image,
        "size": key.size,
        "created": rfc3339(key.created),
    })
}

fn as_text(keys: &[KeyInfo]) -> String {
    if keys.is_empty() {
        return "No keys: `assay-verifier image seal IN OUT` makes an image and its key\n".to_owned();
    }
    let mut text = format!(
        "{:36}  {:36}  {:20}  {:>15}  {:16}  {:16}  IMAGE\n",
        "KEY", "DISK", "CREATED", "BYTES", "POLICY", "TAGS"
    );
    for key in keys {
        let [key_id, disk] = [key.key_id.to_string(), key.disk_uuid.to_string()];
        let created = rfc3339(key.created);
        text.push_str(&format!(
            "{key_id}  {disk}  {created:20}  {size:>15}  {policy:16}  {tags:16}  {image}\n",
            size = key.size,
            policy = key.policy,
            tags = key.tags.iter().map(String::as_str).collect::<Vec<_>>().join(","),
            image = key.image.escape_debug(),
        ));
    }
    text
}

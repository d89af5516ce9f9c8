//! `assay-verifier key move` and `key remove`: where secrets are, and their end.

use assay_evidence::audit::Event;
use assay_evidence::uuid::Uuid;
use clap::{Args, ValueEnum};

use crate::audit::AuditLog;
use crate::cli::image::ImageError;
use crate::cli::{CliError, print};
use crate::config::{Config, StateDir};
use crate::keystore::{self, KeySource as _, KeyStoreError, Listing, Place};
use crate::seal::InPlace;

/// Options of `key move`.
#[derive(Debug, Args)]
pub(in crate::cli) struct MoveArgs {
    /// The keys, as `key list` shows them
    #[arg(value_name = "ID", required_unless_present = "all", conflicts_with = "all")]
    keys: Vec<Uuid>,
    /// All keys that are not there yet
    #[arg(long)]
    all: bool,
    /// Where to
    #[arg(long, value_name = "PLACE", value_enum)]
    to: To,
}

/// `--to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum To {
    /// The key store's own files
    Files,
    /// The key source that config.toml names
    Source,
}

/// Options of `key remove`.
#[derive(Debug, Args)]
pub(in crate::cli) struct RemoveArgs {
    /// The key, as `key list` shows it
    #[arg(value_name = "ID")]
    key_id: Uuid,
    /// Yes, no host shall ever open what it encrypts
    #[arg(long, required = true)]
    forever: bool,
    /// Even if a sealing in place that was interrupted needs it: that image is lost
    #[arg(long)]
    force: bool,
}

pub(super) fn run(state: &StateDir, args: &MoveArgs) -> Result<(), CliError> {
    let config = Config::load(state)?;
    let keys = keystore::open(state.path(), config.key_source.as_ref())?;
    let place = match args.to {
        To::Files => Place::Files,
        To::Source => Place::Source,
    };
    let wanted = if args.all {
        let Listing { keys, held, .. } = keys.list()?;
        keys.into_iter()
            .map(|key| key.key_id)
            .filter(|key_id| held.contains_key(key_id) == (place == Place::Files))
            .collect()
    } else {
        args.keys.clone()
    };
    for key_id in wanted {
        keys.move_to(key_id, place)?;
        // One at a time: after a failure, those before are where they shall be.
        print(&format!("key {key_id}: moved\n"))?;
    }
    Ok(())
}

pub(super) fn remove(state: &StateDir, args: &RemoveArgs) -> Result<(), CliError> {
    let config = Config::load(state)?;
    let keys = keystore::open(state.path(), config.key_source.as_ref())?;
    let key_id = args.key_id;
    if !args.force && InPlace::needs(key_id, &state.sealing()).map_err(ImageError::Seal)? {
        return Err(ImageError::KeyNeeded(key_id).into());
    }
    // A damaged key can be removed as well; one that is not there cannot.
    if let Err(error @ KeyStoreError::NotFound { .. }) = keys.describe(key_id) {
        return Err(error.into());
    }
    // First: no change without a record.
    AuditLog::open(state)?.append(Event::Removed { key_id })?;
    keys.remove(key_id)?;
    print(&format!("key {key_id}: removed; no host can open what it encrypts\n"))
}

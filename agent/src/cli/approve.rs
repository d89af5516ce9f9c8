//! `assay-agent approve`: an approved list from a file, for hosts that no verifier reaches.

use std::path::Path;

use assay_evidence::wire::ListHead;

use super::{CliError, client, say};
use crate::approved::{self, ApprovedError, ApprovedStore};
use crate::config::Config;

/// Hands the list to the running agent; without one, stores it for the next.
pub(super) fn run(config: &Config, file: &Path) -> Result<(), CliError> {
    let list = approved::read(file).map_err(|source| ApprovedError::Read {
        path: file.to_owned(),
        source,
    })?;
    let (head, holder) = match client::put::<ListHead>(&config.socket(), "/v1/approved", list.clone()) {
        Err(CliError::Client(error)) if error.is_absent() => {
            let store = ApprovedStore::open(&config.state_dir);
            (
                store.accept(&list, approved::now())?,
                "stored for the next start of the agent",
            )
        }
        told => (told?, "held by the agent"),
    };
    say(&format!(
        "approved list {} with {} digests is {holder} (sha256:{})",
        head.serial, head.entries, head.sha256
    ))
}

//! Does with open disks what is due when their keys are lost.

use std::convert::Infallible;
use std::time::Duration;

use super::luks::DiskThreads;
use crate::http::chain;
use crate::leases::{Deed, DiskState, Leases, OpenDisk, boot_seconds};

/// How often leases are looked at while there are any. A timer of its own length would not see that the machine slept.
const TICK: Duration = Duration::from_millis(500);

/// Guards the open disks for as long as the daemon runs.
pub async fn guard(leases: Leases, disks: DiskThreads) -> Infallible {
    loop {
        super::forget_closed(&leases);
        let (due, mut again) = leases.due(boot_seconds());
        for (disk, deed) in due {
            again |= !act(&leases, &disks, &disk, deed).await;
        }
        if again {
            tokio::select! {
                () = leases.changed() => {}
                () = tokio::time::sleep(TICK) => {}
            }
        } else {
            leases.changed().await;
        }
    }
}

/// Whether it was done.
async fn act(leases: &Leases, disks: &DiskThreads, disk: &OpenDisk, deed: Deed) -> bool {
    let name = disk.name.clone();
    let (done, state, what) = match deed {
        Deed::Tell => {
            tracing::warn!(
                name,
                why = disk.why(),
                "the key of an open disk may not be held any more"
            );
            leases.was_told(&name);
            return true;
        }
        Deed::Suspend => (disks.suspend(name.clone()).await, DiskState::Suspended, "suspended"),
        Deed::Wipe => (
            disks.wipe(name.clone()).await,
            DiskState::Wiped,
            "suspended, and its key wiped",
        ),
        Deed::Resume => {
            let resumed = disks.resume(name.clone()).await;
            if resumed.is_ok() {
                tracing::info!(name, "the disk goes on: its key may be held again");
            }
            return settle(leases, &name, resumed, DiskState::Open);
        }
    };
    if done.is_ok() {
        tracing::warn!(
            name,
            why = disk.why(),
            "the disk was {what}: its key may not be held any more"
        );
    }
    settle(leases, &name, done, state)
}

fn settle(leases: &Leases, name: &str, done: Result<(), super::luks::DiskError>, state: DiskState) -> bool {
    match done {
        Ok(()) => {
            leases.is_now(name, state);
            true
        }
        Err(error) => {
            tracing::error!(name, "what is due cannot be done, it is tried again: {}", chain(&error));
            false
        }
    }
}

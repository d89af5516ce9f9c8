//! The disks that are open on this host, and for how long it may hold their keys.
//!
//! The verifier says so with each poll ([`Leases::tell`]); when a lease ends, or the verifier calls the host untrusted, what the
//! key's rule says is due ([`Leases::due`]), and is done by `unlock`. What is open is in the run folder as well, without any
//! secret, so that an agent that was restarted knows it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use assay_evidence::terms::OnLoss;
use assay_evidence::uuid::Uuid;
use assay_evidence::wire::{HeldKey, KeyNews, Lease, LeaseAnswer, LeaseNews};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::files::replace_private;

#[cfg(test)]
mod tests;

/// In the run folder.
const FILE: &str = "disks.json";
/// More reasons than these are not kept.
const MAX_REASONS: usize = 20;

/// How an open disk stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskState {
    /// Its key is on the way, or the kernel opens it.
    Opening,
    /// It can be read and written.
    #[default]
    Open,
    /// It waits; its key is in the kernel.
    Suspended,
    /// It waits, without a key.
    Wiped,
}

/// An open disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenDisk {
    /// Its name under `/dev/mapper`.
    pub name: String,
    /// The image.
    pub image: PathBuf,
    /// The LUKS UUID.
    pub disk: Uuid,
    /// The key.
    pub key_id: String,
    /// How it stands.
    pub state: DiskState,
    /// When its lease ends, in seconds since boot, sleep included; none without a lease.
    pub until: Option<u64>,
    /// What is done when the key is lost.
    pub on_loss: OnLoss,
    /// Why the verifier says that the key may not be held any more; empty while it may.
    pub lost: Vec<String>,
    /// Whether that the key is lost was said already.
    pub told: bool,
}

/// Something to do with an open disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// Say that its key is lost.
    Tell,
    /// Make it wait.
    Suspend,
    /// Make it wait, and take its key out of the kernel.
    Wipe,
    /// Let it go on.
    Resume,
}

impl OpenDisk {
    /// Takes over what a release or the verifier says. `since` is when that was asked, in seconds since boot.
    fn hold(&mut self, lease: &Lease, since: u64) {
        self.until = lease.seconds.map(|seconds| since.saturating_add(seconds));
        self.on_loss = lease.on_loss;
        self.lost = Vec::new();
        self.told = false;
    }

    /// Whether its key may not be held any more, at so many seconds since boot.
    #[must_use]
    pub fn is_lost(&self, now: u64) -> bool {
        !self.lost.is_empty() || self.until.is_some_and(|until| now >= until)
    }

    /// What is to be done with it.
    #[must_use]
    pub fn due(&self, now: u64) -> Option<Deed> {
        match (self.is_lost(now), self.on_loss, self.state) {
            (true, OnLoss::Suspend, DiskState::Open) => Some(Deed::Suspend),
            (true, OnLoss::Wipe, DiskState::Open | DiskState::Suspended) => Some(Deed::Wipe),
            (true, OnLoss::Tell, DiskState::Open) if !self.told => Some(Deed::Tell),
            (false, _, DiskState::Suspended) => Some(Deed::Resume),
            _ => None,
        }
    }

    /// Why its key is lost, in words.
    #[must_use]
    pub fn why(&self) -> String {
        if self.lost.is_empty() {
            "its lease ran out".to_owned()
        } else {
            self.lost.join("; ")
        }
    }
}

/// The open disks; clones share them.
#[derive(Clone)]
pub struct Leases(Arc<Shared>);

struct Shared {
    run_dir: PathBuf,
    disks: Mutex<Vec<OpenDisk>>,
    changed: Notify,
}

impl Leases {
    /// Those that are known in this run folder, which lives as long as a boot. Those of them that are gone meanwhile go with
    /// [`Leases::retain`].
    #[must_use]
    pub fn open(run_dir: &Path) -> Self {
        let path = run_dir.join(FILE);
        let disks = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::warn!("{} cannot be read, open disks are not known: {error}", path.display());
                Vec::new()
            }),
            Err(_) => Vec::new(),
        };
        Self(Arc::new(Shared {
            run_dir: run_dir.to_owned(),
            disks: Mutex::new(disks),
            changed: Notify::new(),
        }))
    }

    /// The run folder.
    #[must_use]
    pub fn run_dir(&self) -> &Path {
        &self.0.run_dir
    }

    /// Keeps only the disks of which `is_open` says so, and those that are being opened.
    pub fn retain(&self, is_open: impl Fn(&OpenDisk) -> bool) {
        let mut disks = self.lock();
        let before = disks.len();
        disks.retain(|disk| disk.state == DiskState::Opening || is_open(disk));
        if disks.len() != before {
            self.keep(&disks);
        }
    }

    /// What was being opened when an agent before this one ended is open by now, or never will be.
    pub fn opening_is_over(&self) {
        let mut disks = self.lock();
        for disk in disks.iter_mut().filter(|disk| disk.state == DiskState::Opening) {
            disk.state = DiskState::Open;
        }
    }

    /// A disk's key was released, and the disk is being opened. `asked` is when it was asked for, in seconds since boot.
    pub fn opening(&self, mut disk: OpenDisk, lease: Option<&Lease>, asked: u64) {
        disk.state = DiskState::Opening;
        if let Some(lease) = lease {
            disk.hold(lease, asked);
        }
        let mut disks = self.lock();
        disks.retain(|other| other.name != disk.name);
        disks.push(disk);
        self.keep(&disks);
    }

    /// A disk is in this state now.
    pub fn is_now(&self, name: &str, state: DiskState) {
        self.edit(name, |disk| disk.state = state);
    }

    /// It was said that a disk's key is lost.
    pub fn was_told(&self, name: &str) {
        self.edit(name, |disk| disk.told = true);
    }

    /// A disk is closed.
    pub fn closed(&self, name: &str) {
        let mut disks = self.lock();
        disks.retain(|disk| disk.name != name);
        self.keep(&disks);
    }

    /// What the verifier says, and what it is answered: all that is held. `now` is in seconds since boot.
    #[must_use]
    pub fn tell(&self, news: &LeaseNews, now: u64) -> LeaseAnswer {
        let mut disks = self.lock();
        for news in &news.keys {
            let theirs = |disk: &&mut OpenDisk| disk.key_id == news.key_id && disk.disk == news.disk_uuid;
            disks.iter_mut().filter(theirs).for_each(|disk| take(disk, news, now));
        }
        if !news.keys.is_empty() {
            self.keep(&disks);
        }
        let held = |disk: &OpenDisk| HeldKey {
            key_id: disk.key_id.clone(),
            disk_uuid: disk.disk,
        };
        LeaseAnswer {
            held: disks.iter().map(held).collect(),
        }
    }

    /// Whether a disk is open that is to wait, or to lose its key, when that may not be held any more.
    #[must_use]
    pub fn any_to_stop(&self) -> bool {
        let open = |disk: &OpenDisk| matches!(disk.state, DiskState::Opening | DiskState::Open);
        let stops = |disk: &OpenDisk| matches!(disk.on_loss, OnLoss::Suspend | OnLoss::Wipe);
        self.lock().iter().any(|disk| stops(disk) && open(disk))
    }

    /// All open disks.
    #[must_use]
    pub fn list(&self) -> Vec<OpenDisk> {
        self.lock().clone()
    }

    /// The name under which a disk waits for its key.
    #[must_use]
    pub fn wiped(&self, disk: &Uuid) -> Option<String> {
        let disks = self.lock();
        let wiped = disks
            .iter()
            .find(|open| open.disk == *disk && open.state == DiskState::Wiped);
        wiped.map(|disk| disk.name.clone())
    }

    /// The LUKS UUID of the disk that was opened under this name.
    #[must_use]
    pub fn disk(&self, name: &str) -> Option<Uuid> {
        let disks = self.lock();
        disks.iter().find(|open| open.name == name).map(|open| open.disk)
    }

    /// What is to be done now, and whether there is anything that time alone can make due.
    #[must_use]
    pub fn due(&self, now: u64) -> (Vec<(OpenDisk, Deed)>, bool) {
        let disks = self.lock();
        let due = disks.iter().filter_map(|disk| Some((disk.clone(), disk.due(now)?)));
        let later = disks.iter().any(|disk| disk.until.is_some());
        (due.collect(), later)
    }

    /// Returns once something has changed since the last call.
    pub async fn changed(&self) {
        self.0.changed.notified().await;
    }

    fn edit(&self, name: &str, edit: impl FnOnce(&mut OpenDisk)) {
        let mut disks = self.lock();
        if let Some(disk) = disks.iter_mut().find(|disk| disk.name == name) {
            edit(disk);
        }
        self.keep(&disks);
    }

    /// Writes down what is open, and wakes who acts on it.
    fn keep(&self, disks: &[OpenDisk]) {
        let written = serde_json::to_vec(disks)
            .map_err(std::io::Error::other)
            .and_then(|json| replace_private(&self.0.run_dir, FILE, &json));
        if let Err(error) = written {
            tracing::warn!("open disks cannot be written down, a restarted agent will not know them: {error}");
        }
        self.0.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<OpenDisk>> {
        self.0.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn take(disk: &mut OpenDisk, news: &KeyNews, now: u64) {
    match &news.lease {
        Some(lease) => disk.hold(lease, now),
        None => {
            disk.on_loss = news.on_loss.unwrap_or(disk.on_loss);
            disk.lost = news.reasons.iter().take(MAX_REASONS).cloned().collect();
            if disk.lost.is_empty() {
                disk.lost.push("the verifier gives no reason".to_owned());
            }
        }
    }
}

/// Seconds since boot, sleep included: what leases are counted in.
#[must_use]
pub fn boot_seconds() -> u64 {
    use nix::time::{ClockId, clock_gettime};
    // It does not fail on any kernel that runs the agent; if it did, every lease would be over.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(u64::MAX, |time| u64::try_from(time.tv_sec()).unwrap_or(u64::MAX))
}

//! What was judged of each host last, in memory: a host on which nothing has happened since is asked for a quote, and needs no more.
//! After a restart of the verifier each host is judged whole once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use assay_evidence::quote::{HeldLog, Judged};
use assay_evidence::wire::{B64, ListStatus};

use crate::store::{Host, NewHost, Verdict};

/// The memory, by row id.
#[derive(Default)]
pub struct Memory(Mutex<HashMap<i64, Arc<Remembered>>>);

/// A verdict, and all that it came from.
#[derive(Clone)]
pub struct Remembered {
    /// How the host was pinned.
    pub pinned: NewHost,
    /// Version of its policy, see [`Store::policy_version`](crate::store::Store::policy_version).
    pub policy: i64,
    /// When that policy says something else by itself, as Unix time: something in it expires.
    pub until: Option<u64>,
    /// What was quoted.
    pub judged: Judged,
    /// The firmware's log; shared, since it stays the same for a whole boot.
    pub boot_log: Option<Arc<B64>>,
    /// How the agent stood with approved lists; it was as it should be.
    pub status: Option<ListStatus>,
    /// The verdict.
    pub verdict: Verdict,
}

impl Remembered {
    /// The same, at a later quote.
    #[must_use]
    pub fn at(&self, judged: Judged) -> Self {
        Self { judged, ..self.clone() }
    }
}

impl Memory {
    /// What is remembered, if it is of this very host, policy and log, and still holds at this Unix time.
    pub fn of(&self, host: &Host, policy: Option<i64>, held: &HeldLog, now: u64) -> Option<Arc<Remembered>> {
        let remembered = self.lock().get(&host.id)?.clone();
        let last = remembered.judged.held();
        let seen = |held: &HeldLog| (held.reset_count, held.restart_count, held.clock, held.records);
        // Whoever else has looked at the host since, for a key, has seen a later clock.
        let same = remembered.pinned == host.pinned
            && Some(remembered.policy) == policy
            && remembered.until.is_none_or(|until| now < until)
            && last.boot_id == held.boot_id
            && seen(last) == seen(held);
        same.then_some(remembered)
    }

    /// Remembers this instead of what was before.
    pub fn put(&self, id: i64, remembered: Remembered) {
        self.lock().insert(id, Arc::new(remembered));
    }

    /// Forgets a host.
    pub fn forget(&self, id: i64) {
        self.lock().remove(&id);
    }

    /// Forgets all hosts but these.
    pub fn retain(&self, hosts: &[Host]) {
        self.lock().retain(|id, _| hosts.iter().any(|host| host.id == *id));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<i64, Arc<Remembered>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

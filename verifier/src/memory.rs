//! What was judged of each host last, in memory: a host on which nothing has happened since is asked for a quote, and needs no more;
//! one that ran approved code since is judged by that alone.
//! After a restart of the verifier each host is judged whole once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use assay_evidence::policy::Policy;
use assay_evidence::quote::{HeldLog, Judged};
use assay_evidence::wire::{B64, ListStatus};

use crate::store::{Host, NewHost, Store, StoreError, Verdict};

/// The memory.
#[derive(Default)]
pub struct Memory {
    /// By row id.
    hosts: Mutex<HashMap<i64, Arc<Remembered>>>,
    /// Policies by name, each with its version: reading a large one takes longer than what it is read for.
    policies: Mutex<HashMap<String, (i64, Arc<Policy>)>>,
}

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
        let mut verdict = self.verdict.clone();
        if let Some(quoted) = &mut verdict.quoted {
            quoted.records = judged.held().records;
            verdict.submod.went_on(quoted.records);
        }
        Self {
            judged,
            verdict,
            ..self.clone()
        }
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

    /// The policy of this name in this version; `None` if it has another by now.
    ///
    /// # Errors
    /// The database's.
    pub fn policy(&self, store: &Store, name: &str, version: i64) -> Result<Option<Arc<Policy>>, StoreError> {
        let known = self.policies().get(name).cloned();
        if let Some((_, policy)) = known.filter(|(known, _)| *known == version) {
            return Ok(Some(policy));
        }
        let read = store.policy(name)?.map(Arc::new);
        // Whoever changes it after this makes the version another one.
        if store.policy_version(name)? != Some(version) {
            return Ok(None);
        }
        if let Some(policy) = &read {
            self.policies().insert(name.to_owned(), (version, policy.clone()));
        }
        Ok(read)
    }

    /// Forgets a host.
    pub fn forget(&self, id: i64) {
        self.lock().remove(&id);
    }

    /// Forgets all hosts but these, and the policies of the others.
    pub fn retain(&self, hosts: &[Host]) {
        self.lock().retain(|id, _| hosts.iter().any(|host| host.id == *id));
        let in_use = |name: &String| hosts.iter().any(|host| host.pinned.policy == *name);
        self.policies().retain(|name, _| in_use(name));
    }

    fn policies(&self) -> MutexGuard<'_, HashMap<String, (i64, Arc<Policy>)>> {
        self.policies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i64, Arc<Remembered>>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

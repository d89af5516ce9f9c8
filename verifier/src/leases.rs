//! What a look at a host means for the keys that it holds: each good verdict renews their leases, a bad one withdraws them, and
//! both are told to the host over the connection that it was judged on.
//!
//! The rule of a renewal is that of a release: the host meets the key's policy, by evidence that was fresh at this look, it has the
//! key's tags, and the key's terms allow it now. A key that is gone from the key store is withdrawn. A host that is not reached is told
//! nothing: its leases run out, here and there.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use assay_evidence::audit::{Event, Taken};
use assay_evidence::wire::{KeyNews, Lease, LeaseAnswer, LeaseNews};

use crate::audit::AuditLog;
use crate::client::Agent;
use crate::judge::{missing_tags, reason};
use crate::keystore::{KeyInfo, KeySource, KeyStoreError};
use crate::serve::shorten;
use crate::store::{Holding, Host, HostState, Store, StoreError, Taking, Verdict};
use crate::time::now;

/// Keys of one message: with their reasons it stays below what an agent reads.
const KEYS_AT_ONCE: usize = 32;
/// Of one key, in one message.
const MAX_REASONS: usize = 5;
const MAX_REASON: usize = 200;
/// In the audit log, of a key whose terms went with it: the host has them from before.
const UNKNOWN_RULE: &str = "as the host knows";
/// So old is a release before a host that does not name its disk is believed: the disk is opened meanwhile.
const SETTLED: i64 = 60;

/// Renews and withdraws.
pub struct Leases {
    keys: Arc<dyn KeySource>,
    audit: Arc<AuditLog>,
    /// The answer to a renewal may be this late.
    timeout: Duration,
}

/// A key that the host holds, with what it demands; nothing of a key that is gone from the key store.
pub struct Watched {
    held: Holding,
    key: Option<KeyInfo>,
}

/// How a host stands by a policy.
pub enum Standing {
    /// It meets it, and has these tags for that.
    Met(Vec<String>),
    /// It does not, for these reasons.
    Unmet(Vec<String>),
}

/// What a look found, for each policy that matters.
#[derive(Default)]
pub struct Found(HashMap<String, Standing>);

/// What is told of a key.
struct Decided {
    held: Holding,
    news: KeyNews,
    /// The host meets the policy: it is believed what it says of its disks.
    believed: bool,
}

impl Found {
    /// Of the host's own policy.
    #[must_use]
    pub fn new(policy: &str, verdict: &Verdict) -> Self {
        let mut found = Self::default();
        match verdict.state {
            HostState::Trusted => found.put(policy, Standing::Met(verdict.tags.clone())),
            HostState::Untrusted => found.put(policy, Standing::Unmet(verdict.reasons.clone())),
            HostState::Unknown | HostState::Unreachable => {}
        }
        found
    }

    /// Of another one.
    pub fn put(&mut self, policy: &str, standing: Standing) {
        self.0.insert(policy.to_owned(), standing);
    }

    /// Evidence that is none speaks against every key.
    pub fn put_for_all(&mut self, watched: &[Watched], verdict: &Verdict) {
        if verdict.state == HostState::Untrusted {
            for policy in watched.iter().filter_map(Watched::policy) {
                self.0
                    .entry(policy.to_owned())
                    .or_insert_with(|| Standing::Unmet(verdict.reasons.clone()));
            }
        }
    }

    /// Whether any policy is not met.
    #[must_use]
    pub fn speaks_against(&self) -> bool {
        self.0.values().any(|standing| matches!(standing, Standing::Unmet(_)))
    }
}

impl Watched {
    /// The policy that its key demands; none if the key is gone.
    #[must_use]
    pub fn policy(&self) -> Option<&str> {
        self.key.as_ref().map(|key| key.policy.as_str())
    }
}

impl Leases {
    /// Of keys that are kept there; what is withdrawn and returned is written down.
    #[must_use]
    pub fn new(keys: Arc<dyn KeySource>, audit: Arc<AuditLog>, timeout: Duration) -> Self {
        Self { keys, audit, timeout }
    }

    /// What a host holds. Blocks.
    pub fn watched(&self, store: &Store, host: &Host) -> Result<Vec<Watched>, StoreError> {
        let mut watched = Vec::new();
        for held in store.holdings(host.id)? {
            let key = match self.keys.describe(held.key_id) {
                Ok(key) => Some(key),
                Err(KeyStoreError::NotFound { .. }) => None,
                // The key may be there: nothing is said of it, and its leases run out if that lasts.
                Err(error) => {
                    tracing::error!("{}", crate::cli::chain(&error));
                    continue;
                }
            };
            watched.push(Watched { held, key });
        }
        Ok(watched)
    }

    /// Tells a host what becomes of its keys, and writes down what follows from its answer.
    pub async fn settle(
        self: &Arc<Self>,
        store: &Store,
        host: &Host,
        agent: &mut Agent,
        watched: Vec<Watched>,
        found: Found,
    ) -> Result<(), StoreError> {
        let (leases, row) = (self.clone(), host.clone());
        let decided = store.run(move |s| leases.decide(s, &row, watched, &found)).await?;
        let mut told = Vec::new();
        for part in decided.chunks(KEYS_AT_ONCE) {
            let keys = part.iter().map(|decided| decided.news.clone()).collect();
            match agent.leases(&LeaseNews { keys }).await {
                Ok(answer) => told.push(answer),
                // An agent of before there were leases, or one that is gone: they run out.
                Err(error) => {
                    tracing::warn!("host {}: its keys' leases: {}", host.pinned.name, reason(&error));
                    return Ok(());
                }
            }
        }
        let Some(answer) = told.pop() else { return Ok(()) };
        let (leases, row) = (self.clone(), host.clone());
        store.run(move |s| leases.take_answer(s, &row, &decided, &answer)).await
    }

    /// What is told of each key; written down first, so that nothing that a host holds is forgotten here.
    fn decide(
        &self,
        store: &Store,
        host: &Host,
        watched: Vec<Watched>,
        found: &Found,
    ) -> Result<Vec<Decided>, StoreError> {
        let mut decided = Vec::new();
        for Watched { mut held, key } in watched {
            let policy = key.as_ref().map_or(&host.pinned.policy, |key| &key.policy);
            let standing = found.0.get(policy);
            let unmet = match (&key, standing) {
                (None, _) => Some(vec![format!("key {}: it is no longer in the key store", held.key_id)]),
                (Some(_), None) => continue,
                (Some(_), Some(Standing::Unmet(reasons))) => Some(reasons.clone()),
                (Some(key), Some(Standing::Met(tags))) => self.renew(store, host, key, &held, tags)?,
            };
            let lease = key.map(|key| Lease {
                seconds: key.terms.lease_s,
                on_loss: key.terms.on_loss,
            });
            let withdrawn = unmet.is_some();
            let reasons: Vec<_> = shorten(&unmet.unwrap_or_default(), MAX_REASONS)
                .iter()
                .map(|reason| reason.chars().take(MAX_REASON).collect())
                .collect();
            if withdrawn != held.withdrawn {
                held.withdrawn = withdrawn;
                store.withdraw_holding(host.id, &held)?;
                if withdrawn {
                    self.record(Event::Withdrawn {
                        key: taken(host, &held),
                        reasons: reasons.clone(),
                        on_loss: lease.map_or_else(|| UNKNOWN_RULE.to_owned(), |lease| lease.on_loss.to_string()),
                    });
                }
            }
            let news = KeyNews {
                key_id: held.key_id.to_string(),
                disk_uuid: held.disk,
                lease: lease.filter(|_| !withdrawn),
                on_loss: lease.map(|lease| lease.on_loss),
                reasons,
            };
            let believed = matches!(standing, Some(Standing::Met(_)));
            decided.push(Decided { held, news, believed });
        }
        Ok(decided)
    }

    /// Renews a lease, or gives the reason why not.
    fn renew(
        &self,
        store: &Store,
        host: &Host,
        key: &KeyInfo,
        held: &Holding,
        tags: &[String],
    ) -> Result<Option<Vec<String>>, StoreError> {
        if let Some(unmet) = missing_tags(key, host, tags) {
            return Ok(Some(vec![unmet]));
        }
        if let Err(unmet) = key.terms.allow(&host.pinned.policy, crate::time::unix_now()) {
            return Ok(Some(vec![format!("key {}: {unmet}", key.key_id)]));
        }
        // The host counts from when it is told.
        let lease = key.terms.lease_s.map(|s| s.saturating_add(self.timeout.as_secs()));
        let taking = Taking {
            key_id: held.key_id,
            disk: held.disk,
            now: now(),
            lease_s: lease,
            hosts_at_once: key.terms.hosts_at_once,
        };
        Ok(match store.renew_key(host.id, &taking)? {
            Ok(()) => None,
            Err(_) => Some(vec![format!(
                "key {}: its lease ran out, and other hosts hold it now",
                key.key_id
            )]),
        })
    }

    /// A trusted host that does not name a disk does not hold its key; of one that is not, no word counts.
    fn take_answer(
        &self,
        store: &Store,
        host: &Host,
        decided: &[Decided],
        answer: &LeaseAnswer,
    ) -> Result<(), StoreError> {
        for Decided { held, news, believed } in decided {
            let named = |other: &assay_evidence::wire::HeldKey| {
                other.key_id == news.key_id && other.disk_uuid == news.disk_uuid
            };
            let settled = now().saturating_sub(held.since) >= SETTLED;
            if !believed || !settled || answer.held.iter().any(named) {
                continue;
            }
            if store.drop_holding(host.id, held)? {
                self.record(Event::Returned {
                    key: taken(host, held),
                    why: "the host, trusted, does not have the disk open".to_owned(),
                });
            }
        }
        Ok(())
    }

    /// What happened happened, whether it can be written down or not.
    fn record(&self, event: Event) {
        if let Err(error) = self.audit.append(event) {
            tracing::error!("{}", crate::cli::chain(&error));
        }
    }
}

fn taken(host: &Host, held: &Holding) -> Taken {
    Taken {
        host: host.pinned.name.clone(),
        key_id: held.key_id,
        disk: held.disk,
    }
}

//! Hosts that asked to be looked at before their next poll.
//!
//! A host may ask as often as it likes: it is looked at twice a second at most, and each look covers all that was asked before it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::store::Host;

/// Between two looks that a host asked for.
const PAUSE: Duration = Duration::from_millis(500);

/// The hosts that asked.
#[derive(Default)]
pub struct Nudges {
    /// By row id.
    hosts: Mutex<HashMap<i64, Nudged>>,
    asked: Notify,
}

struct Nudged {
    /// The host, if it waits for a look.
    waiting: Option<Host>,
    /// When the last look that it asked for began.
    last: Option<Instant>,
}

impl Nudged {
    fn left(&self, now: Instant) -> Duration {
        let due = self.last.map(|last| last + PAUSE);
        due.map_or(Duration::ZERO, |due| due.saturating_duration_since(now))
    }
}

impl Nudges {
    /// A host asks for a look; tells how long it waits for that.
    pub fn ask(&self, host: Host, now: Instant) -> Duration {
        let mut hosts = self.lock();
        // Those of the last pause alone: what was before it limits nothing.
        hosts.retain(|_, nudged| nudged.waiting.is_some() || !nudged.left(now).is_zero());
        let nudged = hosts.entry(host.id).or_insert(Nudged {
            waiting: None,
            last: None,
        });
        nudged.waiting = Some(host);
        let left = nudged.left(now);
        drop(hosts);
        self.asked.notify_one();
        left
    }

    /// Returns once a host has asked since the last call.
    pub async fn asked(&self) {
        self.asked.notified().await;
    }

    /// The hosts that are to be looked at now, and how long until the next one is. Those that `is_busy` with a look wait for its end.
    pub fn take(&self, now: Instant, is_busy: impl Fn(i64) -> bool) -> (Vec<Host>, Option<Duration>) {
        let (mut due, mut next) = (Vec::new(), None);
        for (id, nudged) in self.lock().iter_mut() {
            if nudged.waiting.is_none() || is_busy(*id) {
                continue;
            }
            let left = nudged.left(now);
            if left.is_zero() {
                due.extend(nudged.waiting.take());
                nudged.last = Some(now);
            } else {
                next = Some(next.map_or(left, |next: Duration| next.min(left)));
            }
        }
        (due, next)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i64, Nudged>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

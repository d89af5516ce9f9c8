//! Who asks for a key next, which verifier is asked first, and how long each may take, when many machines start at once.
//!
//! The TPM has one release key at a time. Whoever cannot have it yet would hold a connection and a challenge that grow old meanwhile; so
//! only as many ask at once as keep the TPM busy, and the others wait here, in the order in which they came.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Requests under way at once: one has the TPM, the next one connects and gets its challenge meanwhile. More would not make the TPM
/// busier, and would wait for longer than one other's release key may live: a verifier hangs up on a connection that says nothing for ten
/// seconds, and what the TPM then does for a connection that is gone keeps the next one waiting for longer still.
const AT_ONCE: usize = 2;
/// So long a verifier that was not reached is asked last.
const SILENT_FOR: Duration = Duration::from_secs(30);
/// What a handshake takes: the very last try still gets it.
pub(super) const HANDSHAKE: Duration = Duration::from_secs(1);

/// The turns of one agent; clones share them.
#[derive(Debug, Clone)]
pub struct Turns(Arc<Shared>);

/// One's turn, until it is dropped.
#[derive(Debug)]
#[must_use]
pub struct Turn(#[expect(dead_code, reason = "it is there to be dropped")] OwnedSemaphorePermit);

#[derive(Debug)]
struct Shared {
    turns: Arc<Semaphore>,
    /// Since when a verifier has not been reached.
    silent: Mutex<HashMap<String, Instant>>,
}

impl Default for Turns {
    fn default() -> Self {
        Self(Arc::new(Shared {
            turns: Arc::new(Semaphore::new(AT_ONCE)),
            silent: Mutex::default(),
        }))
    }
}

impl Turns {
    /// Waits for a turn, at most so long; it ends when the answer is dropped.
    pub async fn take(&self, within: Duration) -> Option<Turn> {
        // The semaphore is never closed.
        let turn = Arc::clone(&self.0.turns).acquire_owned();
        tokio::time::timeout(within, turn).await.ok()?.ok().map(Turn)
    }

    /// A verifier was not reached.
    pub fn silent(&self, verifier: &str, now: Instant) {
        self.lock().insert(verifier.to_owned(), now);
    }

    /// A verifier was reached.
    pub fn heard(&self, verifier: &str) {
        self.lock().remove(verifier);
    }

    /// These verifiers, those last that were silent a moment ago: each start of a machine would wait for them anew.
    #[must_use]
    pub fn order(&self, mut verifiers: Vec<String>, now: Instant) -> Vec<String> {
        let mut silent = self.lock();
        silent.retain(|_, since| now.saturating_duration_since(*since) < SILENT_FOR);
        verifiers.sort_by_key(|verifier| silent.contains_key(verifier));
        verifiers
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.0.silent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long the verifier at this place among so many may take for an answer, so that those after it have their time, too: its share of
/// what is left, and never less than `least`.
pub(super) fn share(left: Duration, place: usize, verifiers: usize, least: Duration) -> Duration {
    let to_ask = u32::try_from(verifiers.saturating_sub(place)).unwrap_or(u32::MAX);
    left.checked_div(to_ask).unwrap_or(left).max(least)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_after_a_verifier_have_their_time_and_the_last_one_all_that_is_left() {
        let of_three = |left, place| share(Duration::from_secs(left), place, 3, HANDSHAKE).as_secs();
        assert_eq!([0, 1, 2].map(|place| of_three(30, place)), [10, 15, 30]);
        assert_eq!(of_three(2, 0), 1, "the least");
        assert_eq!(of_three(0, 2), 1, "the very last try");
        assert_eq!(of_three(30, 3), 30, "nobody is left to have a share");
    }

    #[test]
    fn a_silent_verifier_is_asked_last_for_a_while() {
        let (turns, now) = (Turns::default(), Instant::now());
        let both = || vec!["a".to_owned(), "b".to_owned()];
        assert_eq!(turns.order(both(), now), ["a", "b"]);
        turns.silent("a", now);
        assert_eq!(turns.order(both(), now), ["b", "a"]);
        turns.silent("b", now);
        assert_eq!(turns.order(both(), now), ["a", "b"], "none is better than the other");
        turns.heard("b");
        assert_eq!(turns.order(both(), now), ["b", "a"]);
        assert_eq!(turns.order(both(), now + SILENT_FOR), ["a", "b"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_is_waited_for_and_not_longer_than_said() {
        let turns = Turns::default();
        let mut taken = Vec::new();
        for _ in 0..AT_ONCE {
            taken.push(turns.take(Duration::ZERO).await.unwrap());
        }
        assert!(turns.take(Duration::from_secs(60)).await.is_none());
        taken.pop();
        assert!(turns.take(Duration::ZERO).await.is_some());
    }
}

//! Those who wait, by the digest that must be extended first.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::fanotify::{Fanotify, FanotifyEvent, FanotifyResponse, MarkFlags, MaskFlags, Response};

use super::HoldError;
use crate::measure::kernel::{Answers, Key};

/// Held programs, and the group through which they are answered.
pub struct Waiting {
    group: Arc<Fanotify>,
    inner: Mutex<Inner>,
    over: AtomicBool,
}

struct Inner {
    answers: Answers,
    by_digest: HashMap<Key, Vec<FanotifyEvent>>,
}

impl Waiting {
    pub(super) fn new(group: Arc<Fanotify>, answers: Answers) -> Self {
        let inner = Inner {
            answers,
            by_digest: HashMap::new(),
        };
        Self {
            group,
            inner: Mutex::new(inner),
            over: AtomicBool::new(false),
        }
    }

    /// Lets it wait for this digest, unless that has been extended in the meantime.
    pub(super) fn wait(&self, digest: Key, event: FanotifyEvent) -> Result<(), HoldError> {
        // Under the lock: a release that comes between the look and the entry would never be seen.
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.answers.is_extended(&digest)? {
            drop(inner);
            return self.let_pass(&event);
        }
        if self.is_over() {
            drop(inner);
            return self.answer(&event, Response::FAN_ALLOW);
        }
        inner.by_digest.entry(digest).or_default().push(event);
        Ok(())
    }

    /// Nobody waits any more: the gate answers, also those who wait now.
    pub(super) fn give_up(&self) -> Result<(), HoldError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        self.over.store(true, Ordering::Relaxed);
        let waiting = std::mem::take(&mut inner.by_digest);
        drop(inner);
        let mut events = waiting.values().flatten();
        events.try_for_each(|event| self.answer(event, Response::FAN_ALLOW))
    }

    /// Whether nobody may wait any more.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Answers all who wait for one of these digests.
    pub(super) fn release(&self, digests: &[Key]) -> Result<(), HoldError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let released: Vec<FanotifyEvent> = digests
            .iter()
            .filter_map(|digest| inner.by_digest.remove(digest))
            .flatten()
            .collect();
        if inner.by_digest.is_empty() {
            inner.by_digest.shrink_to(0);
        }
        drop(inner);
        released.iter().try_for_each(|event| self.let_pass(event))
    }

    /// Allows, and asks for no more events of this file until it is changed: from now on the gate alone looks at it.
    pub(super) fn let_pass(&self, event: &FanotifyEvent) -> Result<(), HoldError> {
        let flags = MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_IGNORED_MASK | MarkFlags::FAN_MARK_EVICTABLE;
        let mask = MaskFlags::FAN_OPEN_EXEC_PERM | MaskFlags::FAN_OPEN_PERM;
        if let Some(file) = event.fd() {
            // Without the mark every open is an event: slower, and no less safe.
            let _slower = self.group.mark(flags, mask, file, None::<&std::path::Path>);
        }
        self.answer(event, Response::FAN_ALLOW)
    }

    /// Answers one event.
    pub(super) fn answer(&self, event: &FanotifyEvent, response: Response) -> Result<(), HoldError> {
        let Some(file) = event.fd() else { return Ok(()) };
        match self.group.write_response(FanotifyResponse::new(file, response)) {
            // It was killed while it waited.
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(source) => Err(HoldError::Events {
                step: "answered",
                source,
            }),
        }
    }
}

//! What waits for the TPM, and in which order it gets its turn.
//!
//! One TPM, one command at a time. Extends go first, for programs may be waiting for them; but an extend and another command
//! that both wait take turns, so that a quote never waits for more than one batch. While a release key lives, extends stay in
//! the queue, for the key is bound to the PCRs as they are; no extend waits for more than one such key.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::TpmError;

/// Commands that may wait at once; above it they are refused. The agent takes 64 connections, each waits for one command.
const MAX_WAITING: usize = 256;

/// Which line a piece of work waits in; first come, first served within each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// PCR extends.
    Extend,
    /// Anything that neither changes PCRs nor makes a release key.
    Command,
    /// Wishes for a release key: extends are held from here on.
    Begin,
}

/// The TPM thread's next step.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next<W> {
    /// A piece of work.
    Work(W),
    /// The hold's deadline passed.
    HoldExpired,
    /// All work is done, and nobody can ask for anything any more.
    Closed,
}

/// The lines in front of the TPM.
pub(super) struct Queue<W> {
    state: Mutex<State<W>>,
    wake: Condvar,
}

struct State<W> {
    extends: VecDeque<W>,
    commands: VecDeque<W>,
    begins: VecDeque<W>,
    extend_was_last: bool,
    begin_was_last: bool,
    busy_since: Option<Instant>,
    /// Time spent on work that is done.
    worked: Duration,
    closed: bool,
}

impl<W> Queue<W> {
    pub(super) fn new() -> Self {
        let state = State {
            extends: VecDeque::new(),
            commands: VecDeque::new(),
            begins: VecDeque::new(),
            extend_was_last: false,
            begin_was_last: false,
            busy_since: None,
            worked: Duration::ZERO,
            closed: false,
        };
        Self {
            state: Mutex::new(state),
            wake: Condvar::new(),
        }
    }

    /// Queues a piece of work.
    pub(super) fn push(&self, line: Line, work: W) -> Result<(), TpmError> {
        let mut state = self.lock();
        if state.closed {
            return Err(TpmError::Stopped);
        }
        let waiting = state.commands.len() + state.begins.len();
        match line {
            // `measure` has one extend in flight at a time, and it must never be refused for others' sake.
            Line::Extend => state.extends.push_back(work),
            _ if waiting >= MAX_WAITING => return Err(TpmError::QueueFull { waiting }),
            Line::Command => state.commands.push_back(work),
            Line::Begin => state.begins.push_back(work),
        }
        drop(state);
        self.wake.notify_one();
        Ok(())
    }

    /// Waits for work. With a `hold`, extends and further release keys wait until it is over.
    pub(super) fn next(&self, hold: Option<Instant>) -> Next<W> {
        let mut state = self.lock();
        let worked = state.busy_since.take().map_or(Duration::ZERO, |since| since.elapsed());
        state.worked += worked;
        loop {
            if hold.is_some_and(|deadline| Instant::now() >= deadline) {
                return Next::HoldExpired;
            }
            if let Some(work) = state.take(hold.is_some()) {
                state.busy_since = Some(Instant::now());
                return Next::Work(work);
            }
            if state.closed {
                return Next::Closed;
            }
            state = match hold {
                None => self.wake.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    self.wake
                        .wait_timeout(state, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
    }

    /// Since when the thread has been working on one piece of work.
    pub(super) fn busy_since(&self) -> Option<Instant> {
        self.lock().busy_since
    }

    /// How long the thread has worked in all, what it is at now not included.
    pub(super) fn worked(&self) -> Duration {
        self.lock().worked
    }

    /// Takes no more work; [`Queue::next`] returns [`Next::Closed`] when the rest is done.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.wake.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State<W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<W> State<W> {
    fn take(&mut self, held: bool) -> Option<W> {
        let others_turn = held || self.extend_was_last || self.extends.is_empty();
        if others_turn && let Some(work) = self.take_other(held) {
            self.extend_was_last = false;
            return Some(work);
        }
        let extend = if held { None } else { self.extends.pop_front() };
        self.extend_was_last |= extend.is_some();
        extend
    }

    /// Commands and release keys take turns as well: neither can keep the other out for long.
    fn take_other(&mut self, held: bool) -> Option<W> {
        let begins_turn = !held && (!self.begin_was_last || self.commands.is_empty());
        if begins_turn && let Some(begin) = self.begins.pop_front() {
            self.begin_was_last = true;
            return Some(begin);
        }
        self.begin_was_last = false;
        self.commands.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extends_first_but_all_take_turns() {
        let queue = Queue::new();
        for n in 0..2 {
            queue.push(Line::Begin, (Line::Begin, n)).unwrap();
            queue.push(Line::Command, (Line::Command, n)).unwrap();
            queue.push(Line::Extend, (Line::Extend, n)).unwrap();
        }
        queue.close();
        let expected = [
            (Line::Extend, 0),
            (Line::Begin, 0),
            (Line::Extend, 1),
            (Line::Command, 0),
            (Line::Begin, 1),
            (Line::Command, 1),
        ];
        for work in expected {
            assert_eq!(queue.next(None), Next::Work(work));
        }
        assert_eq!(queue.next(None), Next::Closed);
        assert!(matches!(
            queue.push(Line::Command, (Line::Command, 2)),
            Err(TpmError::Stopped)
        ));
    }

    #[test]
    fn a_hold_keeps_extends_back_and_ends_at_its_deadline() {
        let queue = Queue::new();
        queue.push(Line::Extend, 0).unwrap();
        queue.push(Line::Command, 1).unwrap();
        let deadline = Instant::now() + Duration::from_millis(20);
        assert_eq!(queue.next(Some(deadline)), Next::Work(1));
        assert!(queue.busy_since().is_some());
        assert_eq!(queue.worked(), Duration::ZERO, "it is at it still");
        assert_eq!(queue.next(Some(deadline)), Next::HoldExpired);
        let worked = queue.worked();
        assert!(worked > Duration::ZERO);
        assert_eq!(queue.next(None), Next::Work(0));
        assert_eq!(queue.worked(), worked, "waiting is not work");
    }

    #[test]
    fn a_full_queue_refuses_all_but_extends() {
        let queue = Queue::new();
        for _ in 0..MAX_WAITING {
            queue.push(Line::Command, 0).unwrap();
        }
        assert!(matches!(
            queue.push(Line::Command, 0),
            Err(TpmError::QueueFull { waiting: MAX_WAITING })
        ));
        queue.push(Line::Extend, 0).unwrap();
    }
}

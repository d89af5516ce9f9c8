//! Are the kernel's records all there? Each that found room in the kernel's queue has a number, one after the other.
//!
//! Records of the same instant on several CPUs may come in swapped order, so a missing number gets time to come. What is
//! still missing then was taken out of the queue by somebody else: a violation.

use std::collections::{BTreeSet, HashSet};
use std::time::{Duration, Instant};

/// A number is missed for good when this many later ones have come,
const WINDOW: usize = 4096;

/// or after this time.
const PATIENCE: Duration = Duration::from_secs(5);

/// Most of the time between two looks that counts: a host that was paused did not wait.
const STEP: Duration = Duration::from_secs(1);

/// Numbers that are missing: from `expected` up to, and without, `found`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The number that was due.
    pub expected: u64,
    /// The number that came.
    pub found: u64,
}

/// The numbers seen so far.
#[derive(Debug)]
pub struct Sequence {
    /// The first number that was not seen.
    next: u64,
    /// Numbers beyond it that were seen.
    ahead: BTreeSet<u64>,
    /// Gaps that an earlier agent told of.
    told: Vec<Gap>,
    /// How long `next` has been missing while later ones were there.
    missing_for: Duration,
    looked: Instant,
}

impl Sequence {
    /// Goes on after an earlier agent that saw `seen`, and told of `told` already. Nothing seen: begins with 0.
    pub fn after(seen: &HashSet<u64>, told: Vec<Gap>, now: Instant) -> Self {
        let mut sequence = Self {
            next: 0,
            ahead: seen.iter().copied().collect(),
            told,
            missing_for: Duration::ZERO,
            looked: now,
        };
        sequence.advance();
        sequence
    }

    /// Notes a number that came.
    pub fn saw(&mut self, seq: u64) {
        if seq >= self.next {
            self.ahead.insert(seq);
            self.advance();
        }
    }

    /// Numbers that will not come any more, each told once. Asked again until nothing is left.
    pub fn overdue(&mut self, now: Instant) -> Option<Gap> {
        let passed = now.saturating_duration_since(self.looked).min(STEP);
        self.looked = now;
        let found = *self.ahead.first()?;
        self.missing_for = self.missing_for.saturating_add(passed);
        if self.missing_for < PATIENCE && self.ahead.len() < WINDOW {
            return None;
        }
        let expected = std::mem::replace(&mut self.next, found);
        self.advance();
        Some(Gap { expected, found })
    }

    fn advance(&mut self) {
        let before = self.next;
        loop {
            if self.ahead.remove(&self.next) {
                self.next = self.next.saturating_add(1);
            } else if let Some(gap) = self
                .told
                .iter()
                .find(|gap| (gap.expected..gap.found).contains(&self.next))
            {
                self.next = gap.found;
                self.ahead = self.ahead.split_off(&gap.found);
            } else {
                break;
            }
        }
        if self.next != before {
            self.missing_for = Duration::ZERO;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begun() -> (Sequence, Instant) {
        let now = Instant::now();
        (Sequence::after(&HashSet::new(), Vec::new(), now), now)
    }

    /// Looks every half second for so long.
    fn wait(sequence: &mut Sequence, now: &mut Instant, time: Duration) -> Vec<Gap> {
        let end = *now + time;
        let mut gaps = Vec::new();
        while *now < end {
            *now += Duration::from_millis(500);
            gaps.extend(std::iter::from_fn(|| sequence.overdue(*now)));
        }
        gaps
    }

    #[test]
    fn swapped_records_are_no_gap() {
        let (mut sequence, mut now) = begun();
        for seq in [1, 0, 3, 4, 2, 5] {
            sequence.saw(seq);
            assert_eq!(wait(&mut sequence, &mut now, PATIENCE / 4), []);
        }
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE * 10), []);
    }

    #[test]
    fn a_number_that_does_not_come_in_time_is_told_once() {
        let (mut sequence, mut now) = begun();
        for seq in [0, 3, 4, 6] {
            sequence.saw(seq);
        }
        let (first, second) = (Gap { expected: 1, found: 3 }, Gap { expected: 5, found: 6 });
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE * 4), [first, second]);
        sequence.saw(2);
        sequence.saw(7);
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE * 4), []);
    }

    #[test]
    fn a_number_that_many_have_overtaken_is_not_waited_for() {
        let (mut sequence, now) = begun();
        (1..WINDOW as u64).for_each(|seq| sequence.saw(seq));
        assert_eq!(sequence.overdue(now), None);
        sequence.saw(WINDOW as u64);
        assert_eq!(sequence.overdue(now), Some(Gap { expected: 0, found: 1 }));
        assert_eq!(sequence.overdue(now), None);
    }

    #[test]
    fn a_pause_of_the_host_is_no_waiting() {
        let (mut sequence, now) = begun();
        sequence.saw(1);
        assert_eq!(sequence.overdue(now + Duration::from_secs(3600)), None);
        sequence.saw(0);
        assert_eq!(sequence.overdue(now + Duration::from_secs(9999)), None);
    }

    #[test]
    fn a_successor_goes_on_where_the_log_ends() {
        let mut now = Instant::now();
        // 1 and 2 are missing, and were told; 4 was on its way when the agent was killed.
        let seen = HashSet::from([0, 3, 5, 6]);
        let told = vec![Gap { expected: 1, found: 3 }];
        let mut sequence = Sequence::after(&seen, told.clone(), now);
        (7..10).for_each(|seq| sequence.saw(seq));
        sequence.saw(4);
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE * 2), []);
        sequence.saw(11);
        let gap = Gap {
            expected: 10,
            found: 11,
        };
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE * 2), [gap]);
        let mut sequence = Sequence::after(&seen, told, now);
        let gap = Gap { expected: 4, found: 5 };
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE * 2), [gap], "it never came");

        // Somebody removed the log: what it held is missing.
        let mut sequence = Sequence::after(&HashSet::new(), Vec::new(), now);
        sequence.saw(500);
        let gap = Gap {
            expected: 0,
            found: 500,
        };
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE * 2), [gap]);
    }
}

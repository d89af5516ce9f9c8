//! Are the kernel's records all there? Each that found room in the kernel's queue has a number: its CPU, and one after the
//! other on that CPU.
//!
//! Records of the same instant on one CPU may come in swapped order, so a missing number gets time to come. What is
//! still missing then was taken out of the queue by somebody else: a violation. The kernel also tells how far each CPU has
//! counted, so that the last of them are missed, too.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::{Duration, Instant};

use assay_ebpf::seq;

/// A number is missed for good when this many later ones of its CPU have come,
const WINDOW: usize = 4096;

/// or after this time.
const PATIENCE: Duration = Duration::from_secs(5);

/// Most of the time between two looks that counts: a host that was paused did not wait.
const STEP: Duration = Duration::from_secs(1);

/// Numbers of one CPU that are missing: from `expected` up to, and without, `found`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The number that was due.
    pub expected: u64,
    /// The number that came, or that is the next to come.
    pub found: u64,
}

/// The numbers seen so far.
#[derive(Debug)]
pub struct Sequence {
    cpus: BTreeMap<u64, Stream>,
    looked: Instant,
}

/// One CPU's numbers, each with the CPU in it.
#[derive(Debug)]
struct Stream {
    /// The first number that was not seen.
    next: u64,
    /// Numbers beyond it that were seen.
    ahead: BTreeSet<u64>,
    /// The next number that the CPU will give out, as far as it was asked.
    due: u64,
    /// Gaps that an earlier agent told of.
    told: Vec<Gap>,
    /// How long `next` has been missing while later ones were there.
    missing_for: Duration,
}

impl Sequence {
    /// Goes on after an earlier agent that saw `seen`, and told of `told` already. Nothing seen: each CPU begins with 0.
    pub fn after(seen: &HashSet<u64>, told: &[Gap], now: Instant) -> Self {
        let mut sequence = Self {
            cpus: BTreeMap::new(),
            looked: now,
        };
        for number in seen {
            sequence.stream(seq::split(*number).0).ahead.insert(*number);
        }
        for gap in told {
            sequence.stream(seq::split(gap.expected).0).told.push(*gap);
        }
        sequence.cpus.values_mut().for_each(Stream::advance);
        sequence
    }

    /// Notes a number that came.
    pub fn saw(&mut self, number: u64) {
        let stream = self.stream(seq::split(number).0);
        if number >= stream.next {
            stream.ahead.insert(number);
            stream.advance();
        }
    }

    /// All that was numbered before the queue was found empty: how many records, by CPU.
    pub fn numbered(&mut self, counts: &[u64]) {
        for (cpu, count) in (0..).zip(counts).filter(|(_, count)| **count > 0) {
            self.stream(u64::from(cpu)).due = seq::of(cpu, *count);
        }
    }

    /// Numbers that will not come any more, each told once. Asked again until nothing is left.
    pub fn overdue(&mut self, now: Instant) -> Option<Gap> {
        let passed = now.saturating_duration_since(self.looked).min(STEP);
        self.looked = now;
        let mut gap = None;
        for stream in self.cpus.values_mut() {
            stream.wait(passed);
            gap = gap.or_else(|| stream.overdue());
        }
        gap
    }

    fn stream(&mut self, cpu: u64) -> &mut Stream {
        self.cpus.entry(cpu).or_insert_with(|| Stream::new(cpu))
    }
}

impl Stream {
    fn new(cpu: u64) -> Self {
        Self {
            next: cpu << seq::BITS,
            ahead: BTreeSet::new(),
            due: 0,
            told: Vec::new(),
            missing_for: Duration::ZERO,
        }
    }

    /// The first number beyond those that are missing, if any are.
    fn found(&self) -> Option<u64> {
        let due = Some(self.due).filter(|due| *due > self.next);
        self.ahead.first().copied().or(due)
    }

    fn wait(&mut self, passed: Duration) {
        if self.found().is_some() {
            self.missing_for = self.missing_for.saturating_add(passed);
        }
    }

    fn overdue(&mut self) -> Option<Gap> {
        let found = self.found()?;
        if self.missing_for < PATIENCE && self.ahead.len() < WINDOW {
            return None;
        }
        let expected = std::mem::replace(&mut self.next, found);
        self.missing_for = Duration::ZERO;
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
        (Sequence::after(&HashSet::new(), &[], now), now)
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
        let mut sequence = Sequence::after(&seen, &told, now);
        (7..10).for_each(|seq| sequence.saw(seq));
        sequence.saw(4);
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE * 2), []);
        sequence.saw(11);
        let gap = Gap {
            expected: 10,
            found: 11,
        };
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE * 2), [gap]);
        let mut sequence = Sequence::after(&seen, &told, now);
        let gap = Gap { expected: 4, found: 5 };
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE * 2), [gap], "it never came");

        // Somebody removed the log: what it held is missing.
        let mut sequence = Sequence::after(&HashSet::new(), &[], now);
        sequence.saw(500);
        let gap = Gap {
            expected: 0,
            found: 500,
        };
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE * 2), [gap]);
    }

    #[test]
    fn each_cpu_counts_for_itself() {
        let (mut sequence, mut now) = begun();
        let on = |cpu, positions: &[u64]| positions.iter().map(|n| seq::of(cpu, *n)).collect::<Vec<_>>();
        for number in [
            on(1, &[0, 1]),
            on(0, &[0]),
            on(8191, &[1, 0, 2]),
            on(1, &[2]),
            on(0, &[1]),
        ]
        .concat()
        {
            sequence.saw(number);
        }
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE * 2), []);
        for number in [on(0, &[2, 4]), on(1, &[4])].concat() {
            sequence.saw(number);
        }
        let gap = |cpu| Gap {
            expected: seq::of(cpu, 3),
            found: seq::of(cpu, 4),
        };
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE * 2), [gap(0), gap(1)]);

        // A successor that knows all but one gap.
        let seen = [on(0, &[0, 1, 2, 4]), on(1, &[0, 1, 2, 4])]
            .concat()
            .into_iter()
            .collect();
        let mut sequence = Sequence::after(&seen, &[gap(1)], now);
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE * 2), [gap(0)]);
    }

    #[test]
    fn the_last_numbers_are_missed_when_the_kernel_has_counted_further() {
        let (mut sequence, mut now) = begun();
        sequence.saw(0);
        sequence.numbered(&[1, 0]);
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE * 2), []);
        // Numbered, but on its way.
        sequence.numbered(&[2, 1]);
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE / 2), []);
        sequence.saw(1);
        sequence.saw(seq::of(1, 0));
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE * 2), []);
        // Never seen, and nothing comes after it.
        sequence.numbered(&[2, 3]);
        let gap = Gap {
            expected: seq::of(1, 1),
            found: seq::of(1, 3),
        };
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE * 4), [gap], "told once");
        sequence.saw(seq::of(1, 3));
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE * 4), []);
        let mut sequence = Sequence::after(&HashSet::from([0, 1, seq::of(1, 0)]), &[gap], now);
        sequence.numbered(&[2, 3]);
        assert_eq!(wait(&mut sequence, &mut now, PATIENCE * 4), [], "nor by a successor");
    }
}

//! What comes from the kernel: its events, how many it lost, and which are missing among them.

use std::collections::HashSet;
use std::time::Instant;

use assay_ebpf::Record as KernelRecord;
use assay_evidence::event::{Event, Violation};

use super::{MAX_PENDING, Measurer, Stopping, TICK};
use crate::measure::sequence::Gap;
use crate::measure::source::{Refusal, SourceError};
use crate::measure::{MeasureError, complete};

/// Events taken from the kernel before the loop looks at anything else.
const READ_AT_ONCE: usize = 1024;

/// A killed agent may have journaled this many records whose places it had not freed: the kernel delivers them again.
const MOST_REPEATED: usize = 4 * READ_AT_ONCE;

impl Measurer {
    /// Takes events from the kernel into journal and queue. True when there may be more at once.
    pub(super) fn take_events(&mut self) -> Result<bool, MeasureError> {
        let room = MAX_PENDING.saturating_sub(self.pending.len()).min(READ_AT_ONCE);
        // AGENT_STOP is the last event: what comes after it stays in the kernel for the next agent.
        if room == 0 || self.full || self.stopping != Stopping::No {
            return Ok(false);
        }
        if self.taken > MOST_REPEATED {
            self.known = HashSet::new();
        }
        // Asked before the queue is read to its end: all that is counted by then must have come.
        let counted = match self.compared.elapsed() >= TICK {
            true => Some(self.source.numbered()?),
            false => None,
        };
        let Self {
            source,
            journal,
            pending,
            known,
            sequence,
            ..
        } = self;
        let mut take = |record: &KernelRecord| -> Result<(), Refusal> {
            if known.remove(&record.seq) {
                return Ok(());
            }
            let event = complete::event(record);
            journal.append(&event)?;
            pending.push_back(event);
            sequence.saw(record.seq);
            Ok(())
        };
        match source.read(room, &mut take) {
            Ok(taken) => {
                self.taken = self.taken.saturating_add(taken);
                if let Some(counted) = counted.filter(|_| taken < room) {
                    self.sequence.numbered(&counted);
                    self.compared = Instant::now();
                }
                Ok(taken == room)
            }
            Err(SourceError::Refused(refusal)) => Err(match refusal.downcast::<MeasureError>() {
                Ok(error) => *error,
                Err(refusal) => SourceError::Refused(refusal).into(),
            }),
            Err(error) => Err(error.into()),
        }
    }

    /// What the kernel could not deliver since the last report becomes part of the next record.
    pub(super) fn report_lost(&mut self) -> Result<(), MeasureError> {
        if self.stopping != Stopping::No {
            // The next agent finds it in the counter: AGENT_STOP is the last word of this one.
            return Ok(());
        }
        let lost = self.source.lost()?;
        self.control.set_lost(lost);
        self.control.set_no_room(self.source.refused_for_room()?);
        if self.full {
            return Ok(());
        }
        if lost < self.lost_seen {
            // The programs were replaced: their counter began anew.
            self.lost_reported = 0;
        }
        self.lost_seen = lost;
        if let Some(count) = lost.checked_sub(self.lost_reported).filter(|count| *count > 0) {
            tracing::error!(
                count,
                "the kernel could not deliver measurements: recorded as a violation"
            );
            self.pending.push_back(Event::Violation(Violation::Lost { count }));
            self.lost_reported = lost;
        }
        Ok(())
    }

    /// Records that the kernel numbered and that never came: somebody else took them out of its queue.
    pub(super) fn report_gaps(&mut self) {
        // As with losses, AGENT_STOP is the last word: the next agent misses them, too.
        while self.stopping == Stopping::No
            && !self.full
            && let Some(Gap { expected, found }) = self.sequence.overdue(Instant::now())
        {
            tracing::error!(
                expected,
                found,
                "records of the kernel are missing: recorded as a violation"
            );
            let gap = Violation::SequenceGap { expected, found };
            self.pending.push_back(Event::Violation(gap));
        }
    }
}

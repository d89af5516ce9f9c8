//! A machine's runtime log, read with `assay-evidence`: what the agent says of itself is not asked.

use std::collections::HashSet;

use assay_evidence::cel::{self, CelError};
use assay_evidence::digest::Sha256Digest;
use assay_evidence::event::{Event, Violation};

use crate::Outcome;
use crate::machine::Machine;

/// Where the agent writes its log by default.
const LOG: &str = "/run/assay/log.cel";

/// What a log holds, in numbers.
#[derive(Debug, Default)]
pub struct Log {
    /// Events in all its records.
    pub events: u64,
    /// Loads, by the kernel programs.
    pub loads: u64,
    /// Digests of them.
    pub digests: HashSet<Sha256Digest>,
    /// Loads that it says are missing from it.
    pub lost: u64,
    /// Everything else that it says went wrong, in words.
    pub violations: Vec<String>,
}

impl Log {
    /// Reads the log as it is now.
    pub fn read(machine: &Machine) -> Outcome<Self> {
        let bytes = machine.guest().get(LOG)?;
        let (mut log, mut rest) = (Self::default(), bytes.as_slice());
        while !rest.is_empty() {
            let (record, used) = match cel::read(rest) {
                Err(CelError::Short(_)) => break,
                other => other?,
            };
            for event in record.events()? {
                log.take(event);
            }
            rest = rest.get(used..).unwrap_or_default();
        }
        Ok(log)
    }

    fn take(&mut self, event: Event) {
        self.events = self.events.saturating_add(1);
        match event {
            Event::Load(load) => {
                self.loads = self.loads.saturating_add(1);
                self.digests.extend(load.digest);
            }
            Event::Violation(Violation::Lost { count }) => self.lost = self.lost.saturating_add(count),
            Event::Violation(other) => self.violations.push(other.to_string()),
            _ => {}
        }
    }
}

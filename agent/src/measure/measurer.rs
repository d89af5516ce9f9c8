//! The measuring loop: one thread that reads the kernel's events and keeps log and PCR in step.

mod intake;
mod start;

use std::collections::{HashSet, VecDeque};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use assay_ebpf::flags;
use assay_evidence::cel::{self, MAX_EVENTS};
use assay_evidence::digest::Sha256Digest;
use assay_evidence::event::{Event, Mode, Notice, Violation};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::control::{Control, Mailbox, Message};
use super::journal::Journal;
use super::lock::Lock;
use super::log::{LogWriter, Room};
use super::sequence::Sequence;
use super::source::EventSource;
use super::trouble::{FailureNote, Slowest};
use super::{BROKEN, MeasureError};
use crate::http::chain;
use crate::tpm::{self, TpmError};

/// Events that may wait for the TPM in memory and journal; beyond it they wait in the kernel's queue, and then are counted as lost.
const MAX_PENDING: usize = 32 * 1024;

/// The loop turns at least this often, to look at the lost counter and to show that it lives.
const TICK: Duration = Duration::from_secs(1);

/// How often it is looked whether the agent's own files have changed.
const OWN_FILES: Duration = Duration::from_secs(5);

/// How often a source without a descriptor is asked.
const BLIND_TICK: Duration = Duration::from_millis(5);

/// What measuring needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where log, journal and lock file live; a folder that lives as long as a boot.
    pub run_dir: PathBuf,
    /// Size that the log may reach, in bytes.
    pub log_max_bytes: u64,
    /// The PCR.
    pub pcr: u8,
    /// This boot's id.
    pub boot_id: String,
    /// SHA-256 of the object with the kernel programs.
    pub bpf_digest: Sha256Digest,
    /// Measuring tier.
    pub tier: u8,
    /// What happens to a load before it is extended.
    pub mode: Mode,
    /// What this tier cannot see, for the log's first record; empty when it sees all that is promised.
    pub blind: String,
    /// Other processes are kept away from the agent.
    pub protected: bool,
    /// The hooks were attached just now. False when they are those of an earlier agent of this boot, and have queued all along.
    pub fresh_hooks: bool,
}

/// The measuring loop, ready to run.
pub struct Measurer {
    source: Box<dyn EventSource>,
    tpm: tpm::Handle,
    log: LogWriter,
    journal: Journal,
    pending: VecDeque<Event>,
    /// Events at the front of the queue that are in the record that is being extended.
    in_flight: Option<Flight>,
    /// Kernel records that a predecessor took over: the kernel may deliver the last of them once more.
    known: HashSet<u64>,
    /// Whether the kernel's records come without a gap.
    sequence: Sequence,
    /// When the queue was last found empty and compared with the kernel's count.
    compared: Instant,
    /// Records taken from the kernel by this agent.
    taken: usize,
    /// When the source was last told that time passes.
    ticked: Instant,
    lost_reported: u64,
    lost_seen: u64,
    inventory: Inventory,
    /// The log has said that it is full: what comes stays in the kernel, the journal and `pending`.
    full: bool,
    slowest: Slowest,
    note: FailureNote,
    stopping: Stopping,
    mailbox: Mailbox,
    control: Control,
    /// Held as long as this agent writes the log.
    _lock: Lock,
}

struct Flight {
    events: Vec<Event>,
    since: Instant,
}

/// How far the start of the log is.
enum Inventory {
    /// Being taken.
    Running,
    /// READY is queued or in flight.
    Queued,
    /// READY is in log and PCR.
    Done,
}

/// How far the end of the log is.
#[derive(PartialEq, Eq)]
enum Stopping {
    No,
    /// AGENT_STOP comes next.
    Asked,
    /// AGENT_STOP is queued or in flight.
    Queued,
    /// AGENT_STOP is in log and PCR.
    Said,
}

impl Measurer {
    /// A handle to stop the loop and to see that it lives.
    #[must_use]
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Measures until [`Control::stop`]. `ready` is called once, when READY is in log and PCR.
    ///
    /// # Errors
    /// Any [`MeasureError`] ends measuring. When the log could not be written the PCR has been extended with [`BROKEN`].
    pub fn run(mut self, mut ready: impl FnMut()) -> Result<(), MeasureError> {
        let result = self.turn_until_stopped(&mut ready);
        if let Err(error) = &result {
            self.leave_note(error);
            self.mark_broken(error);
        }
        result
    }

    fn turn_until_stopped(&mut self, ready: &mut impl FnMut()) -> Result<(), MeasureError> {
        if self.full {
            ready();
        }
        loop {
            self.control.beat();
            if self.ticked.elapsed() > OWN_FILES && matches!(self.inventory, Inventory::Done) && !self.full {
                self.source.tick()?;
                self.ticked = Instant::now();
            }
            while let Some(message) = self.mailbox.next() {
                self.handle(message, ready)?;
            }
            let more = self.take_events()?;
            self.report_lost()?;
            self.report_gaps();
            if self.stop_if_asked() {
                return Ok(());
            }
            self.next_batch()?;
            self.check_flight()?;
            if !more {
                self.wait()?;
            }
        }
    }

    fn handle(&mut self, message: Message, ready: &mut impl FnMut()) -> Result<(), MeasureError> {
        match message {
            Message::Extended(result) => {
                self.slowest.took(result?);
                let landed = self.in_flight.take().map(|flight| flight.events).unwrap_or_default();
                self.source.landed(&mut landed.iter().filter_map(Event::code))?;
                self.control.landed(landed.iter().any(is_alarm));
                let open: Vec<&Event> = self.pending.iter().filter(|event| is_journaled(event)).collect();
                self.journal.covered(&open)?;
                if landed.contains(&Event::Ready) {
                    self.inventory = Inventory::Done;
                    self.source.ready()?;
                    ready();
                } else if self.full && !matches!(self.inventory, Inventory::Done) {
                    // It will never be complete; what the log has to say, quotes shall say.
                    self.inventory = Inventory::Done;
                    ready();
                }
                if landed.contains(&Event::AgentStop) {
                    self.stopping = Stopping::Said;
                }
            }
            Message::Inventory(_) if self.stopping != Stopping::No || self.full => {}
            Message::Inventory(events) => {
                self.pending.extend(events?);
                self.pending.push_back(Event::Ready);
                self.inventory = Inventory::Queued;
            }
            Message::Approve(approval) => {
                self.source
                    .approve(&mut approval.digests.iter().map(|digest| *digest.as_bytes()))?;
                if self.stopping == Stopping::No && !self.full {
                    self.pending.push_back(Event::Notice(Notice::ListInForce {
                        serial: approval.serial,
                        digest: approval.list,
                        entries: approval.digests.len() as u64,
                    }));
                }
            }
            Message::Stop if self.full => self.stopping = Stopping::Asked,
            Message::Stop => {
                if self.stopping == Stopping::No {
                    // The last chance for what a successor needs: it comes before AGENT_STOP.
                    self.source.tick()?;
                    while self.take_events()? {}
                    self.stopping = Stopping::Asked;
                }
            }
        }
        Ok(())
    }

    /// True when AGENT_STOP is in log and PCR, or a full log has said its last word.
    fn stop_if_asked(&mut self) -> bool {
        if self.full {
            return self.stopping != Stopping::No && self.in_flight.is_none();
        }
        if self.stopping == Stopping::Asked {
            self.pending.push_back(Event::AgentStop);
            self.stopping = Stopping::Queued;
        }
        self.stopping == Stopping::Said
    }

    /// If the TPM is free and something waits: one record, one extend.
    fn next_batch(&mut self) -> Result<(), MeasureError> {
        if self.in_flight.is_some() || self.pending.is_empty() || self.full {
            return Ok(());
        }
        // With something to say anyway: a record of its own would be one more slow extend to tell of.
        if let Some(millis) = self.slowest.tell(Instant::now()) {
            self.pending.push_front(Event::Notice(Notice::TpmSlow { millis }));
        }
        let mut events: Vec<Event> = self.pending.iter().take(MAX_EVENTS).cloned().collect();
        events.truncate(cel::batch_len(&events));
        let (record, advance) = match self.log.append(&events, Room::Batch) {
            Err(MeasureError::LogFull { max_bytes, .. }) => {
                self.stand_still()?;
                events = vec![Event::Violation(Violation::LogFull { max_bytes })];
                self.log.append(&events, Room::Last)?
            }
            appended => appended?,
        };
        let control = self.control.clone();
        self.tpm.extend(record.digests, Some(advance), move |result| {
            control.send(Message::Extended(result))
        })?;
        if !self.full {
            self.pending.drain(..events.len());
        }
        self.in_flight = Some(Flight {
            events,
            since: Instant::now(),
        });
        Ok(())
    }

    /// The log takes no more events: none is taken from the kernel, where new code finds no room in time, which hold and enforce
    /// refuse. Quotes go on, and say why.
    fn stand_still(&mut self) -> Result<(), MeasureError> {
        tracing::error!(
            max_bytes = self.log.max_bytes(),
            "the runtime log is full: nothing more is recorded, and no verifier trusts this boot any more; raise [measure] log_max_mib in \
             agent.toml and restart the host"
        );
        self.full = true;
        self.control.set_log_full();
        Ok(self.source.full()?)
    }

    fn check_flight(&self) -> Result<(), MeasureError> {
        let limit = self.tpm.extend_limit();
        match &self.in_flight {
            Some(flight) if flight.since.elapsed() > limit => Err(TpmError::Timeout {
                operation: "TPM2_PCR_Extend",
                after: limit,
            }
            .into()),
            _ => Ok(()),
        }
    }

    fn wait(&mut self) -> Result<(), MeasureError> {
        let readable = {
            let wake = PollFd::new(self.mailbox.as_fd(), PollFlags::POLLIN);
            let full = self.full || self.pending.len() >= MAX_PENDING || self.stopping != Stopping::No;
            let (mut fds, tick) = match self.source.as_fd() {
                Some(fd) if !full => (vec![wake, PollFd::new(fd, PollFlags::POLLIN)], TICK),
                Some(_) => (vec![wake], TICK),
                None => (vec![wake], BLIND_TICK),
            };
            let timeout = PollTimeout::try_from(tick).unwrap_or(PollTimeout::ZERO);
            match poll(&mut fds, timeout) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(MeasureError::Wait(error.into())),
            }
            fds.first().and_then(PollFd::any).unwrap_or(false)
        };
        if readable {
            self.mailbox.opened().map_err(MeasureError::Wait)?;
        }
        Ok(())
    }

    /// So that the next agent can say what this one cannot.
    fn leave_note(&self, error: &MeasureError) {
        if let MeasureError::Tpm(error) = error {
            self.note.leave(error);
        }
    }

    /// Rule 6 of the module: a log that cannot go on must not look like one that has nothing to say.
    fn mark_broken(&self, error: &MeasureError) {
        if matches!(error, MeasureError::Tpm(_)) {
            // The TPM itself is what failed, and a record that is in the log but not in the PCR shows it.
            return;
        }
        tracing::error!(error = %chain(error), "measuring has failed: the PCR is extended so that no later quote of this boot fits the log");
        let digests = self
            .tpm
            .identity()
            .banks
            .iter()
            .map(|bank| (*bank, bank.hash(BROKEN)))
            .collect();
        if let Err(error) = self.tpm.extend_blocking(digests, None) {
            tracing::error!(error = %chain(&error), "the PCR cannot be extended either");
        }
    }
}

/// What goes through the journal: everything that only the kernel could tell once more.
fn is_journaled(event: &Event) -> bool {
    matches!(event, Event::Load(_) | Event::Violation(Violation::NotHashed { .. }))
}

/// What a verifier should look at now rather than with its next poll.
fn is_alarm(event: &Event) -> bool {
    match event {
        Event::Violation(_) => true,
        Event::Load(load) => load.flags & flags::REFUSED != 0,
        _ => false,
    }
}

//! The first thread: takes what the probes said, in order of time, and opens the files before they are gone.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use assay_ebpf::probe_record::Record;
use aya::maps::perf::PerfEvent;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::ProbeError;
use super::ask::Asker;
use super::find::{Found, find, open};
use super::hasher::Job;
use super::load::{Answers, Buffer, Counters, Loaded};
use super::shared::Shared;
use super::sighting::Sighting;

/// How often a probe is asked whether it still answers.
const TICK: Duration = Duration::from_millis(500);

/// A process that is on its way to run a file without a name is given so long to get there,
const ON_ITS_WAY: Duration = Duration::from_millis(300);

/// and is looked at this often.
const LOOK: Duration = Duration::from_millis(3);

/// Sightings that may wait for that; more are given up at once.
const WAITING: usize = 128;

/// Takes records out of the CPUs' buffers.
pub struct Reader {
    buffers: Vec<Buffer>,
    counters: Counters,
    answers: Option<Answers>,
    jobs: SyncSender<Job>,
    /// What was read and not worked on yet.
    sightings: VecDeque<Sighting>,
    waiting: VecDeque<(Instant, Sighting)>,
    shared: Arc<Shared>,
}

impl Reader {
    /// Makes the buffers and attaches the probes.
    pub fn new(loaded: &mut Loaded, jobs: SyncSender<Job>, shared: Arc<Shared>) -> Result<Self, ProbeError> {
        let buffers = loaded.buffers()?;
        loaded.attach()?;
        Ok(Self {
            buffers,
            counters: loaded.counters()?,
            answers: Some(loaded.answers()?),
            jobs,
            sightings: VecDeque::new(),
            waiting: VecDeque::new(),
            shared,
        })
    }

    /// Until it is asked to stop.
    pub fn run(mut self, shared: &Shared) -> Result<(), ProbeError> {
        let Some(answers) = self.answers.take() else {
            return Ok(());
        };
        let mut asker = Asker::for_this_thread(answers);
        let own = own_program()?;
        let mut asked = Instant::now();
        while !shared.is_stopping() {
            self.wait()?;
            self.drain()?;
            while let Some(sighting) = self.sightings.pop_front() {
                self.look_for(sighting, Instant::now(), &mut asker)?;
            }
            self.look_again(&mut asker)?;
            if asked.elapsed() >= TICK {
                asker.ask(&own)?;
                asked = Instant::now();
            }
        }
        Ok(())
    }

    /// Waits for the next record, but not for long.
    pub fn wait(&self) -> Result<(), ProbeError> {
        let mut fds: Vec<PollFd<'_>> = self
            .buffers
            .iter()
            .map(|buffer| PollFd::new(buffer.records.as_fd(), PollFlags::POLLIN))
            .collect();
        let limit = if self.waiting.is_empty() { TICK } else { LOOK };
        match poll(&mut fds, PollTimeout::try_from(limit).unwrap_or(PollTimeout::ZERO)) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(ProbeError::Wait(error.into())),
        }
    }

    /// Takes all records that there are, sorts them by time, and counts those that are missing.
    pub fn drain(&mut self) -> Result<(), ProbeError> {
        // A number is given out after its record was written: what has one by now is read below, or was lost.
        let numbered = self.counters.next()?;
        let mut found = Vec::new();
        // Twice: what came to one CPU while another's were read may be older than those.
        self.take_all(&mut found)?;
        self.take_all(&mut found)?;
        for buffer in &mut self.buffers {
            let next = usize::try_from(buffer.cpu).ok().and_then(|cpu| numbered.get(cpu));
            let missing = next.map_or(0, |next| next.saturating_sub(buffer.next));
            if missing > 0 {
                self.shared.add_gap(missing);
                buffer.next = buffer.next.saturating_add(missing);
            }
        }
        found.sort_by_key(|sighting| sighting.time_ns);
        self.sightings.extend(found);
        Ok(())
    }

    /// What was read and not worked on yet.
    pub fn sightings(&self) -> impl Iterator<Item = &Sighting> {
        self.sightings.iter()
    }

    fn take_all(&mut self, found: &mut Vec<Sighting>) -> Result<(), ProbeError> {
        for buffer in &mut self.buffers {
            let Buffer { cpu, records, next } = buffer;
            let mut foreign = None;
            records.for_each(|event| {
                // Lost ones lack their number, or are counted by the probe.
                let PerfEvent::Sample { head, tail } = event else {
                    return;
                };
                let joined;
                let bytes = if tail.is_empty() {
                    head
                } else {
                    joined = [head, tail].concat();
                    joined.as_slice()
                };
                let Some(record) = Record::read(bytes) else {
                    foreign = Some(bytes.len());
                    return;
                };
                self.shared.add_gap(record.seq.saturating_sub(*next));
                *next = record.seq.saturating_add(1);
                found.push(Sighting::from(&record));
            });
            if let Some(length) = foreign {
                return Err(ProbeError::Foreign { cpu: *cpu, length });
            }
        }
        Ok(())
    }

    fn look_for(&mut self, sighting: Sighting, since: Instant, asker: &mut Asker) -> Result<(), ProbeError> {
        let found = self.shared.reading.on(|| find(&sighting, asker))?;
        let file = match found {
            Found::File(file) => Ok(file),
            Found::NotYet if since.elapsed() < ON_ITS_WAY && self.waiting.len() < WAITING => {
                self.waiting.push_back((since, sighting));
                return Ok(());
            }
            Found::NotYet | Found::Gone => Err(Errno::ESTALE),
        };
        // Without a hasher there is nobody to tell; its error is on the way.
        drop(self.jobs.send(Job { sighting, file }));
        Ok(())
    }

    fn look_again(&mut self, asker: &mut Asker) -> Result<(), ProbeError> {
        for (since, sighting) in std::mem::take(&mut self.waiting) {
            self.look_for(sighting, since, asker)?;
        }
        Ok(())
    }
}

/// The agent's own program, a file that is always there.
pub fn own_program() -> Result<File, ProbeError> {
    open(Path::new("/proc/self/exe")).map_err(|source| ProbeError::Own {
        operation: "open",
        source,
    })
}

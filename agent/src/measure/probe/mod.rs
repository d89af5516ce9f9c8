//! Tier 3: detection on kernels without the BPF LSM, by probes on the security hooks' own functions.
//!
//! A probe says which file is about to be loaded, and in which state it is. Then, in user space and after the fact:
//!
//! 1. the [`reader`] takes what the probes said out of the CPUs' buffers and opens the file at once, since a process that
//!    ends takes its last name with it;
//! 2. the [`hasher`] asks a probe whether what was opened is that very file in that very state, hashes it, asks again, and
//!    makes a record;
//! 3. the measuring loop takes records as from any other source.
//!
//! What could not be opened, or has changed, is a record that says so, never nothing. The probes end with the agent.

mod ask;
mod check;
mod error;
mod find;
mod hasher;
mod layout;
mod load;
mod preflight;
mod reader;
mod record;
mod shared;
mod sighting;
mod version;

use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};

use assay_ebpf::Record;

pub use self::error::ProbeError;
pub use self::preflight::check as preflight;

use self::hasher::Hasher;
use self::load::{Counters, Loaded};
use self::reader::Reader;
use self::shared::{Pace, Shared};
use super::kernel::Skipped;
use super::source::{EventSource, Refusal, SourceError};

/// What tier 3 cannot see, for the log's first record.
pub const BLIND: &str = "after the fact only: nothing waits or is refused, and a file is hashed after it began to run (one that has changed \
or gone by then is recorded without a valid digest); not seen are the content of modules from memory (init_module) and of kexec_load, BPF \
programs, files that interpreters are named, attempts on the agent, and everything while the agent does not run. Root can switch the probes \
off, which ends the agent";

/// Files that are open and wait to be hashed.
const OPEN_FILES: usize = 128;

/// The running probes, and the threads that complete what they say.
pub struct Probe {
    shared: Arc<Shared>,
    ready: UnixStream,
    counters: Counters,
    skipped: Skipped,
    reading: Pace,
    hashing: Pace,
    object_digest: [u8; 32],
    /// The programs end when this goes.
    _loaded: Loaded,
}

impl Probe {
    /// Loads the probes from the object file at `object`, with the offsets that the BTF file at `btf` gives, attaches them,
    /// shows that they tell the truth, and starts the threads. Who opens one of `devices` is told, too. They measure from before this returns, until it is dropped.
    ///
    /// Run [`preflight`] before, for errors that people can act on.
    ///
    /// # Errors
    /// Any [`ProbeError`].
    pub fn start(object: &Path, btf: &Path, devices: &[PathBuf]) -> Result<Self, ProbeError> {
        let layout = layout::read(btf)?;
        let mut loaded = Loaded::new(object, &layout)?;
        loaded.watch(devices)?;
        let (shared, ready) = Shared::new().map_err(ProbeError::Thread)?;
        let (jobs, work) = mpsc::sync_channel(OPEN_FILES);
        let mut reader = Reader::new(&mut loaded, jobs, Arc::clone(&shared))?;
        check::tell_the_truth(&mut reader, &loaded, btf)?;
        let hasher = Hasher::new(&loaded, work)?;
        shared.spawn("probe-read", move |shared| reader.run(shared))?;
        shared.spawn("probe-hash", move |shared| hasher.run(shared))?;
        Ok(Self {
            ready,
            counters: loaded.counters()?,
            skipped: loaded.skipped()?,
            reading: Pace::default(),
            hashing: Pace::default(),
            object_digest: *loaded.digest(),
            shared,
            _loaded: loaded,
        })
    }

    /// SHA-256 of the object file that the probes were made from.
    #[must_use]
    pub const fn object_digest(&self) -> &[u8; 32] {
        &self.object_digest
    }

    /// A thread that stands still would leave measurements waiting beside quotes that know nothing of them.
    fn check_pace(&mut self) -> Result<(), ProbeError> {
        self.reading.check(&self.shared.reading, "opening")?;
        self.hashing.check(&self.shared.hashing, "hashing")
    }
}

impl EventSource for Probe {
    fn read(&mut self, max: usize, take: &mut dyn FnMut(&Record) -> Result<(), Refusal>) -> Result<usize, SourceError> {
        let mut taken = 0;
        while taken < max {
            let Some(record) = self.shared.first(&self.ready)? else {
                break;
            };
            take(&record).map_err(SourceError::Refused)?;
            self.shared.remove_first();
            taken += 1;
        }
        Ok(taken)
    }

    fn lost(&mut self) -> Result<u64, SourceError> {
        self.check_pace()?;
        // In this order: a question in vain was counted as skipped before it is known to be in vain.
        let skipped = self.skipped.count()?.saturating_sub(ask::in_vain());
        Ok(self
            .counters
            .lost()?
            .saturating_add(self.shared.gaps())
            .saturating_add(skipped))
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.ready.as_fd())
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

impl std::fmt::Debug for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Probe").finish_non_exhaustive()
    }
}

//! Asks a probe which file a descriptor leads to, and in which state it is: in the kernel's own words, so that device
//! numbers of stacked file systems, generations and writers are what a probe saw, and not what stat(2) makes of them.
//!
//! The question is a mapping that this thread makes: the probe on mappings knows the thread, and answers in a map.

use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use assay_ebpf::probe_record::{FILE_SIZE, File};
use aya::maps::{HashMap, MapData};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::gettid;

use super::ProbeError;
use super::load::map_error;

/// The map's name.
pub const ASKED: &str = "ASKED";

/// A kernel that takes the processor from a task in the middle of bpf(2) runs no probe on that processor until the task goes
/// on. Whoever waits lets it.
const TRIES: u32 = 200;
const PAUSE: Duration = Duration::from_millis(5);

/// Questions that got no answer: the kernel counts them among the runs that it skipped, and nothing of the host's is lost.
static IN_VAIN: AtomicU64 = AtomicU64::new(0);

/// How many questions got no answer so far.
pub fn in_vain() -> u64 {
    IN_VAIN.load(Ordering::Relaxed)
}

/// Asks on behalf of one thread.
pub struct Asker {
    answers: HashMap<MapData, u64, [u8; FILE_SIZE]>,
    thread: u64,
}

impl Asker {
    /// For the thread that calls it: no other may use it.
    pub fn for_this_thread(answers: HashMap<MapData, u64, [u8; FILE_SIZE]>) -> Self {
        // As bpf_get_current_pid_tgid puts them together.
        let number = |id: i32| u64::from(id.unsigned_abs());
        let thread = number(std::process::id().cast_signed()) << 32 | number(gettid().as_raw());
        Self { answers, thread }
    }

    /// What file this is, and how it is right now.
    ///
    /// # Errors
    /// [`ProbeError::Silent`] when no probe answers for a second.
    pub fn ask(&mut self, file: impl AsFd) -> Result<File, ProbeError> {
        for _ in 0..TRIES {
            if let Some(answer) = self.ask_once(&file)? {
                return Ok(answer);
            }
            IN_VAIN.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(PAUSE);
        }
        Err(ProbeError::Silent)
    }

    fn ask_once(&mut self, file: impl AsFd) -> Result<Option<File>, ProbeError> {
        self.answers
            .insert(self.thread, [0; FILE_SIZE], 0)
            .map_err(map_error(ASKED))?;
        map_once(file);
        let answer = self.answers.get(&self.thread, 0).map_err(map_error(ASKED))?;
        Ok(File::read(&answer))
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        // Whatever this thread maps from now on counts. Without the entry there is nothing to remove.
        drop(self.answers.remove(&self.thread));
    }
}

/// Whether it succeeds does not matter: the security hook is asked first.
#[expect(
    unsafe_code,
    reason = "mmap(2) and munmap(2): the mapping is gone at once, and never touched"
)]
fn map_once(file: impl AsFd) {
    const LENGTH: NonZeroUsize = NonZeroUsize::MIN;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_EXEC;
    // SAFETY: at an address of the kernel's choice, so nothing is mapped over; nobody learns the address.
    unsafe {
        if let Ok(address) = mmap(None, LENGTH, protection, MapFlags::MAP_PRIVATE, file, 0) {
            let _ = munmap(address, LENGTH.get());
        }
    }
}

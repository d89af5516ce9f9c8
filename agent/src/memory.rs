//! Keeping the daemon small: it runs on every host, all the time.
#![expect(unsafe_code, reason = "mallopt(3) and malloc_trim(3) have no safe wrapper")]

/// A block of this size or more is mapped by itself, and goes back to the system when it is freed. In bytes.
const MAP_FROM: libc::c_int = 64 * 1024;

/// Makes the allocator give memory back. glibc keeps what was freed for the next time, in one pool a thread, and raises the
/// size from which it maps blocks by themselves with each large one it sees: after one verifier asked for a whole log, the
/// daemon would hold a multiple of that log for good.
pub fn give_back_early() {
    for (parameter, value) in [
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, MAP_FROM),
        (libc::M_TRIM_THRESHOLD, MAP_FROM),
    ] {
        // SAFETY: takes two numbers; it must not run while another thread calls it, and only this function does, at start.
        if unsafe { libc::mallopt(parameter, value) } != 1 {
            tracing::debug!(parameter, "the allocator does not know this setting");
        }
    }
}

/// Has no core file made of the daemon, which would hold disk keys that are in use at that moment; nor of what it starts: qemu-nbd holds one.
pub fn leave_no_core() {
    use nix::sys::prctl::set_dumpable;
    use nix::sys::resource::{Resource, setrlimit};
    // A program that is started can be dumped again, but keeps the limit.
    for done in [set_dumpable(false), setrlimit(Resource::RLIMIT_CORE, 0, 0)] {
        if let Err(error) = done {
            tracing::warn!("core dumps cannot be turned off: {error}");
        }
    }
}

/// Keeps what the daemon has in memory from being swapped out: a disk's key passes through it. Only what is used takes memory.
pub fn stay_in_memory() {
    use nix::sys::mman::{MlockAllFlags, mlockall};
    // Without the right to lock as much as it likes, a daemon that locked all would get no more memory at the limit.
    if !may_lock() {
        tracing::warn!("this process has no CAP_IPC_LOCK: what it has in memory may be swapped out");
        return;
    }
    // nix does not know the flag that leaves out what was never touched (mlockall(2)).
    let flags = MlockAllFlags::from_bits_retain(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT);
    if let Err(error) = mlockall(flags) {
        tracing::warn!("what this process has in memory may be swapped out: mlockall: {error}");
    }
}

/// Whether the process has CAP_IPC_LOCK (`CapEff` in proc_pid_status(5)).
fn may_lock() -> bool {
    /// Its number (linux/capability.h).
    const CAP_IPC_LOCK: u64 = 14;
    let effective = procfs::process::Process::myself()
        .and_then(|me| me.status())
        .map(|status| status.capeff);
    effective.is_ok_and(|set| set >> CAP_IPC_LOCK & 1 == 1)
}

/// Gives back what the start has left over between blocks that are still in use.
pub fn give_back_now() {
    // SAFETY: takes the allocator's own lock; may run at any time.
    let _something_was_given_back = unsafe { libc::malloc_trim(0) };
}

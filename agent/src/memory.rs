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

/// Gives back what the start has left over between blocks that are still in use.
pub fn give_back_now() {
    // SAFETY: takes the allocator's own lock; may run at any time.
    let _something_was_given_back = unsafe { libc::malloc_trim(0) };
}

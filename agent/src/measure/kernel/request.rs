//! Asking the kernel programs about an open file: the `ioctl` that only they answer.
#![expect(unsafe_code, reason = "ioctl is a raw system call")]

use std::os::fd::{AsRawFd as _, BorrowedFd};

use assay_ebpf::request;

/// What the kernel programs answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// It may be loaded already.
    Known,
    /// A record is queued: it may be loaded once its digest is extended.
    Queued,
    /// It is not on the approved list, and will be refused.
    NotApproved,
    /// The queue is full: ask again.
    NoRoom,
    /// No digest could be made.
    NotHashed,
    /// It moved while it was hashed, or somebody has it open for writing.
    Unstable,
    /// Tier 2: hash it, then say so.
    HashIt,
    /// Nobody answered: the kernel programs are gone, or do not know this process as the agent.
    Unanswered,
}

/// Asks about `file`; `command` and `argument` as in [`request`].
#[must_use]
pub fn ask(file: BorrowedFd<'_>, command: u32, argument: u64) -> Reply {
    // SAFETY: the descriptor is open; the argument is a number and never a pointer: the hook answers before any driver
    // sees it, and drivers refuse a number that is none of theirs.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), u64::from(command), argument) };
    if answer >= 0 {
        return Reply::Unanswered;
    }
    let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
    match -errno {
        request::KNOWN => Reply::Known,
        request::NOT_APPROVED => Reply::NotApproved,
        request::NO_ROOM => Reply::NoRoom,
        request::NOT_HASHED => Reply::NotHashed,
        request::UNSTABLE => Reply::Unstable,
        request::QUEUED => Reply::Queued,
        request::HASH_IT => Reply::HashIt,
        _ => Reply::Unanswered,
    }
}

//! Asking the kernel programs about an open file: the `ioctl` that only they answer.
#![expect(unsafe_code, reason = "ioctl and fcntl are raw system calls")]

use std::fs::File;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use assay_ebpf::request;

use super::KernelError;
use super::orders::Answers;
use crate::measure::inventory;

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

/// Has `file` measured, with [`request::argument`] saying for whom: by the kernel programs, or where the kernel has no
/// hash for them by this thread (`user_hash`, tier 2). Then the file's state is noted before it is read, and counts only if
/// it is the same afterwards.
///
/// # Errors
/// [`KernelError::Map`]: the digest cannot be handed over.
pub fn measure(
    file: BorrowedFd<'_>,
    argument: u64,
    answers: &mut Answers,
    user_hash: bool,
) -> Result<Reply, KernelError> {
    let lease = Lease::take(file);
    let argument = argument | lease.as_ref().map_or(0, |_| request::ALONE);
    if !user_hash {
        return Ok(ask(file, request::MEASURE, argument));
    }
    match ask(file, request::BEGIN, argument) {
        Reply::HashIt => {}
        reply => return Ok(reply),
    }
    let Ok((digest, _)) = file
        .try_clone_to_owned()
        .and_then(|file| inventory::hash(&File::from(file)))
    else {
        return Ok(Reply::NotHashed);
    };
    answers.hand_over(*digest.as_bytes())?;
    Ok(ask(file, request::FINISH, argument))
}

/// A read lease (fcntl(2)): nobody has the file open for writing, and whoever wants to waits until it is given back. Without
/// it a writer could change the content between the hash and the look at the file's state afterwards.
struct Lease<'file>(BorrowedFd<'file>);

impl<'file> Lease<'file> {
    /// `None`: somebody has it open for writing, or the file system knows no leases.
    fn take(file: BorrowedFd<'file>) -> Option<Self> {
        /// Which signal tells the holder that somebody waits (include/uapi/asm-generic/fcntl.h).
        const F_SETSIG: libc::c_int = 10;
        // It is given back soon anyway: a signal that does nothing to a process that does not care.
        let quiet = Self::control(file, F_SETSIG, libc::SIGURG);
        let taken = quiet && Self::control(file, libc::F_SETLEASE, libc::F_RDLCK);
        taken.then_some(Self(file))
    }

    fn control(file: BorrowedFd<'_>, command: libc::c_int, value: libc::c_int) -> bool {
        // SAFETY: the descriptor is open, and both commands take a number.
        unsafe { libc::fcntl(file.as_raw_fd(), command, value) == 0 }
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        // At the latest it ends with the descriptor.
        let _ = Self::control(self.0, libc::F_SETLEASE, libc::F_UNLCK);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::fd::AsFd as _;
    use std::os::unix::fs::OpenOptionsExt as _;

    use super::*;

    #[test]
    fn a_lease_keeps_writers_out_and_is_not_had_beside_them() {
        let made = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let write = || {
            OpenOptions::new()
                .append(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&made)
        };
        let file = File::open(&made).unwrap();
        let lease = Lease::take(file.as_fd()).expect("nobody writes");
        let refused = write().unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::WouldBlock);
        drop(lease);
        let writer = write().unwrap();
        assert!(Lease::take(file.as_fd()).is_none(), "somebody writes");
        drop(writer);
        assert!(Lease::take(file.as_fd()).is_some());
    }
}

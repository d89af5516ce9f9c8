//! The record that the kernel programs put into the ring buffer, and the tables that the agent hands to them.
//!
//! One definition for both sides. Every field is fixed-width, padding is spelled out, the size is asserted at
//! compile time, and the user side reads a record through [`Record::read`], a checked copy: never by a cast.
#![no_std]

/// Longest path that a record carries, terminating NUL included, in bytes. Longer ones arrive with
/// [`flags::PATH_CUT`].
pub const PATH_MAX: usize = 512;

/// What was about to run. The values are part of the log format: never renumber.
pub mod kind {
    /// A program (`execve`), a `#!` script, or an interpreter on the way to one.
    pub const PROGRAM: u32 = 1;
    /// A file mapped executable: libraries, the ELF interpreter, `dlopen`.
    pub const MAPPING: u32 = 2;
    /// A kernel module from a file (`finit_module`), hashed over the buffer that the kernel loads.
    pub const MODULE_FILE: u32 = 3;
    /// A kernel module from user memory (`init_module`), hashed over the buffer that the kernel loads.
    pub const MODULE_BUFFER: u32 = 4;
    /// The compressed file that a module was unpacked from in the kernel; the image follows as its own record.
    pub const MODULE_COMPRESSED: u32 = 5;
}

/// Circumstances of a record.
pub mod flags {
    /// The path did not fit, or could not be told: `path` is empty or cut.
    pub const PATH_CUT: u32 = 1 << 0;
    /// The file has no name any more (link count zero): deleted, `O_TMPFILE`, or a memfd.
    pub const UNLINKED: u32 = 1 << 1;
    /// No digest could be made; `hash_error` says why. The verifier sees it as a violation.
    pub const NOT_HASHED: u32 = 1 << 2;
    /// The file could change while it was hashed: somebody held it open for writing, or its change cookie moved.
    /// Such a file is measured again at its next load.
    pub const UNSTABLE: u32 = 1 << 3;
    /// Every bit that has a meaning.
    pub const ALL: u32 = PATH_CUT | UNLINKED | NOT_HASHED | UNSTABLE;
}

/// `HASH_ALGO_SHA256` of the kernel's `enum hash_algo` (include/uapi/linux/hash_info.h).
pub const HASH_ALGO_SHA256: u32 = 4;

/// One measurement, as it crosses the ring buffer. Numbers are in the machine's byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Position in the stream of records of this boot, from 0. Only records that found room in the ring buffer have
    /// one: what was lost is counted ([`counter::LOST`]), not numbered. Two records made at the same instant on two
    /// CPUs may arrive in swapped order; none is missing or there twice.
    pub seq: u64,
    /// CLOCK_BOOTTIME in nanoseconds.
    pub time_ns: u64,
    /// Bytes hashed: the file's or the buffer's size.
    pub size: u64,
    /// Inode number; 0 without a file.
    pub ino: u64,
    /// The inode's change cookie (`i_version >> 1`); 0 without a file.
    pub change: u64,
    /// cgroup v2 id of the task.
    pub cgroup: u64,
    /// Magic number of the file system (`statfs(2)`); 0 without a file.
    pub fs_magic: u64,
    /// The kernel's `s_dev` (major << 20 | minor); 0 without a file.
    pub dev: u32,
    /// Inode generation; 0 without a file.
    pub generation: u32,
    /// One of [`kind`].
    pub kind: u32,
    /// Bits of [`flags`].
    pub flags: u32,
    /// The kernel's `enum hash_algo`; only SHA-256 is accepted by the agent.
    pub hash_algo: u32,
    /// 0, or why there is no digest, as a negative errno: what the kernel's hash function answered; `-EBADMSG` for a
    /// digest other than SHA-256 (`hash_algo` tells which); `-ENODEV` for something that is no regular file; `-EFBIG`
    /// above [`HASH_LIMIT`]; `-ENOSPC` when too many modules were loaded at once; `-EFAULT` for an unreadable buffer.
    pub hash_error: i32,
    /// Process (thread group) id.
    pub pid: u32,
    /// Real user id.
    pub uid: u32,
    /// The digest; all zero when [`flags::NOT_HASHED`].
    pub digest: [u8; 32],
    /// Name of the task, NUL-padded.
    pub comm: [u8; 16],
    /// Bytes of `path` in use, without the NUL.
    pub path_len: u32,
    /// Always zero.
    pub pad: u32,
    /// Path as the kernel tells it; a hint for people, never a key.
    pub path: [u8; PATH_MAX],
}

/// Size of a [`Record`] in bytes.
pub const RECORD_SIZE: usize = 656;
const _: () = assert!(core::mem::size_of::<Record>() == RECORD_SIZE);

/// Largest kernel module, and largest file without a name (a memfd), that is hashed, in bytes. A larger one arrives as
/// [`flags::NOT_HASHED`]: the hash runs in the task that loads it, in the first case instruction by instruction.
pub const HASH_LIMIT: u64 = 64 << 20;

/// Size of the ring buffer in bytes: 6,300 records wait there while the agent is away.
pub const RING_BYTES: u32 = 4 << 20;

/// Version of everything that two objects must agree on to share pinned maps: [`Record`], [`counter`], the cache
/// entry and the sizes of the maps. Raise it with every change of one of them.
pub const MAPS_VERSION: u32 = 1;

/// Counters, index in the kernel side's `COUNTERS` array of u64.
pub mod counter {
    /// Records for which the ring buffer had no room: each is a measurement that the log lacks.
    pub const LOST: u32 = 0;
    /// The next record's `seq`.
    pub const SEQ: u32 = 1;
    /// Loads answered from the per-inode cache.
    pub const CACHE_HIT: u32 = 2;
    /// Number of counters.
    pub const COUNT: u32 = 8;
}

mod layout;
mod read;

pub use layout::{ABSENT, Layout};

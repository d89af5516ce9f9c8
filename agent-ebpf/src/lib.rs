//! The record that the kernel programs put into the ring buffer, and the tables that the agent hands to them.
//!
//! One definition for both sides. Every field is fixed-width, padding is spelled out, the size is asserted at
//! compile time, and the user side reads a record through [`Record::read`], a checked copy: never by a cast.
#![no_std]

#[cfg(test)]
extern crate std;

/// Longest path that a record carries, terminating NUL included, in bytes. Longer ones arrive with
/// [`flags::PATH_CUT`].
pub const PATH_MAX: usize = 512;

/// What was about to run, or to happen. The values are part of the log format: never renumber.
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
    /// Firmware for a device, hashed over the buffer that the kernel hands to the driver.
    pub const FIRMWARE: u32 = 6;
    /// The kernel that `kexec_file_load` is about to load, hashed over the buffer.
    pub const KEXEC_IMAGE: u32 = 7;
    /// The initramfs that goes with it.
    pub const KEXEC_INITRAMFS: u32 = 8;
    /// `kexec_load`: a kernel from user memory, in pieces that no hook sees. Never has a digest.
    pub const KEXEC_LOAD: u32 = 9;
    /// A BPF program: digest over its type, its attach type and its instructions, with the descriptors of maps left
    /// out; `path` is its name.
    pub const BPF_PROGRAM: u32 = 10;
    /// A mapping of a file that `mprotect` makes executable: the digest is the file's.
    pub const PROTECT: u32 = 11;
    /// Memory without a file that becomes executable: the digest is that of the program which does it.
    pub const ANONYMOUS: u32 = 12;
    /// A file that an interpreter was named on its command line.
    pub const ARGUMENT: u32 = 13;
    /// A watched device (`/dev/xen/privcmd`) was opened: the digest is that of the program which did it.
    pub const DEVICE: u32 = 14;
    /// A block device was opened for writing: the digest is that of the program which did it; `dev` is the device.
    pub const BLOCK_WRITE: u32 = 15;
    /// A measured file that is mapped somewhere was opened for writing: the digest is the one that it had.
    pub const CODE_WRITE: u32 = 16;
    /// The last of the kinds that are loads, or changes to what was loaded.
    pub const LAST_LOAD: u32 = CODE_WRITE;

    /// The kinds from here to [`LAST_ATTEMPT`] are attempts on the agent itself, all refused. The digest is that of the
    /// program which tried. This one: a signal that would end or stop it.
    pub const ATTEMPT_SIGNAL: u32 = 32;
    /// A debugger, or access to the agent's memory or descriptors.
    pub const ATTEMPT_TRACE: u32 = 33;
    /// The TPM's device was opened by another program.
    pub const ATTEMPT_TPM: u32 = 34;
    /// One of the agent's maps or programs was asked for by another program.
    pub const ATTEMPT_BPF: u32 = 35;
    /// A pin was to be removed or renamed, or its file system unmounted or covered.
    pub const ATTEMPT_PIN: u32 = 36;
    /// The agent's control group was to be frozen or killed.
    pub const ATTEMPT_FREEZE: u32 = 37;
    /// The agent's resource limits or its scheduling were to be changed.
    pub const ATTEMPT_LIMIT: u32 = 38;
    /// The last attempt.
    pub const LAST_ATTEMPT: u32 = ATTEMPT_LIMIT;

    /// Whether a kernel program writes records of this kind.
    #[must_use]
    pub const fn is_known(kind: u32) -> bool {
        (kind >= PROGRAM && kind <= LAST_LOAD) || (kind >= ATTEMPT_SIGNAL && kind <= LAST_ATTEMPT)
    }
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
    /// The file is a memfd: it never had a name.
    pub const MEMFD: u32 = 1 << 4;
    /// The file is on tmpfs (`/dev/shm`, `/run`, `/tmp`): its content came from nowhere that was measured at boot.
    pub const TMPFS: u32 = 1 << 5;
    /// The file is on overlayfs.
    pub const OVERLAY: u32 = 1 << 6;
    /// A `#!` script: its interpreter follows as a record of its own.
    pub const SCRIPT: u32 = 1 << 7;
    /// Run as the interpreter of a script, or by binfmt_misc.
    pub const INTERPRETER: u32 = 1 << 8;
    /// Measured ahead of its first load: it may be loaded from now on, and its load is a record of its own.
    pub const AHEAD: u32 = 1 << 9;
    /// The hook refused it: this time it was not loaded.
    pub const REFUSED: u32 = 1 << 10;
    /// Hashed by the agent and not by the kernel (tiers 2 and 3).
    pub const USER_HASH: u32 = 1 << 11;
    /// On a file system without a change counter: hashed at every load.
    pub const NO_COUNTER: u32 = 1 << 12;
    /// The mapping has pages of its own: what became executable need not be what the file holds.
    pub const MODIFIED: u32 = 1 << 13;
    /// The block device is not in use: nothing on it is mounted. The agent finds out, the kernel programs never set it.
    pub const IDLE: u32 = 1 << 14;
    /// Every bit that has a meaning.
    pub const ALL: u32 = (1 << 15) - 1;
}

/// `HASH_ALGO_SHA256` of the kernel's `enum hash_algo` (include/uapi/linux/hash_info.h).
pub const HASH_ALGO_SHA256: u32 = 4;

/// One measurement, as it crosses the ring buffer. Numbers are in the machine's byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// CPU and position in that CPU's stream of records of this boot, from 0; see [`seq`]. Only records that found room
    /// in the ring buffer have one: what was lost is counted ([`counter::LOST`]), not numbered. Two records that one CPU
    /// made at the same instant may arrive in swapped order; none is missing or there twice.
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
    /// above [`HASH_LIMIT`]; `-ENOSPC` when too many modules were loaded at once; `-EFAULT` for an unreadable buffer. In
    /// tier 3 also `-ESTALE` for a file that was gone or replaced before it could be opened, `-EOPNOTSUPP` for a buffer, `-EPERM` on
    /// FUSE.
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
pub const MAPS_VERSION: u32 = 3;

/// A record's number: its CPU above [`seq::BITS`], below them how many records that CPU numbered before.
///
/// Linux has at most 2^13 CPUs, so that every number is below 2^53 and exact also where JSON's numbers are doubles.
pub mod seq {
    /// Bits of the position: a CPU that numbers 10,000 records a second is through after three years.
    pub const BITS: u32 = 40;

    /// The number of a CPU's record at this position.
    #[must_use]
    pub const fn of(cpu: u32, position: u64) -> u64 {
        (cpu as u64) << BITS | (position & ((1 << BITS) - 1))
    }

    /// CPU and position.
    #[must_use]
    pub const fn split(seq: u64) -> (u64, u64) {
        (seq >> BITS, seq & ((1 << BITS) - 1))
    }
}

/// Counters, index in the kernel side's `COUNTERS` array of u64.
pub mod counter {
    /// Records for which the ring buffer had no room, of loads that went on: each is a measurement that the log lacks.
    pub const LOST: u32 = 0;
    /// Records for which it had no room, of what was refused for that reason (*hold*, *enforce*): nothing is missing.
    pub const NO_ROOM: u32 = 1;
    /// Loads answered from the per-inode cache.
    pub const CACHE_HIT: u32 = 2;
    /// Loads that were refused, those included that need no record of their own.
    pub const REFUSED: u32 = 3;
    /// Number of counters.
    pub const COUNT: u32 = 8;
}

mod layout;
mod orders;
pub mod probe_record;
mod read;

pub use layout::{ABSENT, Layout};
pub use orders::{
    MAX_APPROVED, MAX_CGROUPS, MAX_DEVICES, MAX_EXTENDED, MAX_FOLDERS, MAX_GUARDED, MAX_HEIRS, MAX_INTERPRETERS,
    control, guarded, request,
};

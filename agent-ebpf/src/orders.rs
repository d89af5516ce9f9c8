//! What the agent tells its kernel programs, and asks of them: indices, codes and sizes, one definition for both sides.

/// Indices of the `CONTROL` array of u64, which only the agent writes.
pub mod control {
    /// The mode, as its code in the log: 1 (or 0, before the agent wrote it) observe, 2 hold, 3 enforce.
    pub const MODE: u32 = 0;
    /// Moves whenever mode or list change: what a cache entry says of permission counts for one epoch only.
    pub const EPOCH: u32 = 1;
    /// Thread group id of the agent; 0 = none.
    pub const AGENT: u32 = 2;
    /// When it started, in 1/100 s since boot (field 22 of `/proc/PID/stat`): a reused id is not the agent.
    pub const AGENT_START: u32 = 3;
    /// Not 0: the agent is kept from other processes.
    pub const PROTECT: u32 = 4;
    /// Which list of `APPROVED` is in force: an entry counts if it has this value.
    pub const LIST: u32 = 5;
    /// Not 0: memory without a file does not become executable.
    pub const DENY_ANONYMOUS: u32 = 6;
    /// Not 0: this kernel has no hash for files, the agent hashes (tier 2).
    pub const USER_HASH: u32 = 7;
    /// `s_dev` of the file system that holds the pins; 0 = not known.
    pub const PINS_DEV: u32 = 8;
    /// The agent's id as text, as /proc has it: eight bytes, NUL-padded.
    pub const AGENT_NAME: u32 = 9;
    /// Number of entries.
    pub const COUNT: u32 = 16;

    /// Values of [`MODE`].
    pub const OBSERVE: u64 = 1;
    /// See [`MODE`].
    pub const HOLD: u64 = 2;
    /// See [`MODE`].
    pub const ENFORCE: u64 = 3;
}

/// What the agent asks by `ioctl` on an open file. The hook answers it and the file's own driver never sees it; from any
/// other process it is an unknown `ioctl` like any other.
pub mod request {
    /// Measure this file now: hash it, queue a record, remember its state. The argument says for whom, see [`argument`].
    pub const MEASURE: u32 = 0x4153_5901;
    /// Tier 2, first half of the same: remember the file's state; the agent hashes next.
    pub const BEGIN: u32 = 0x4153_5902;
    /// Tier 2, second half: the digest is in `DIGESTS` under the calling thread; if the file's state has not moved it
    /// counts as measured.
    pub const FINISH: u32 = 0x4153_5903;

    /// Every answer is a negative errno, so that no file system sees the request. This file may be loaded already.
    pub const KNOWN: i32 = -17; // EEXIST
    /// A record is queued; the file may be loaded once it is extended.
    pub const QUEUED: i32 = -115; // EINPROGRESS
    /// Not on the approved list: it will be refused.
    pub const NOT_APPROVED: i32 = -1; // EPERM
    /// The queue is full: ask again.
    pub const NO_ROOM: i32 = -105; // ENOBUFS
    /// No digest could be made; the record says why.
    pub const NOT_HASHED: i32 = -61; // ENODATA
    /// The file moved while it was hashed, or somebody has it open for writing.
    pub const UNSTABLE: i32 = -26; // ETXTBSY
    /// [`BEGIN`] is remembered: hash, then [`FINISH`].
    pub const HASH_IT: i32 = -11; // EAGAIN

    /// In the argument: nobody can open the file for writing until the answer is there (the agent has a lease on it).
    pub const ALONE: u64 = 1 << 56;

    /// For whom: process id, kind (below 256) and flags of the record.
    #[must_use]
    pub const fn argument(pid: u32, kind: u32, flags: u32) -> u64 {
        pid as u64 | (flags as u64 & 0xffff) << 32 | (kind as u64 & 0xff) << 48
    }
}

/// Digests that can be known as extended in one boot. 100,000 are a large host.
pub const MAX_EXTENDED: u32 = 524_288;
/// Digests of an approved list, of which two lie in the map while one replaces the other.
pub const MAX_APPROVED: u32 = 524_288;
/// Devices that are watched or guarded.
pub const MAX_DEVICES: u32 = 64;
/// Maps, programs and links that are guarded.
pub const MAX_GUARDED: u32 = 256;
/// Control groups on the way from the agent's to the root.
pub const MAX_CGROUPS: u32 = 64;
/// Folders with pins.
pub const MAX_FOLDERS: u32 = 64;
/// Programs that may take over from the agent.
pub const MAX_HEIRS: u32 = 64;
/// Interpreters whose arguments are measured.
pub const MAX_INTERPRETERS: u32 = 128;

/// Keys of the `GUARDED` map: `class << 32 | id`.
pub mod guarded {
    /// A map's id.
    pub const MAP: u64 = 1 << 32;
    /// A program's id.
    pub const PROGRAM: u64 = 2 << 32;
    /// A link's id.
    pub const LINK: u64 = 3 << 32;
}

//! The way out: the ring buffer, and the counters that make a loss visible.

use core::arch::asm;
use core::ffi::c_void;

use assay_ebpf::{HASH_ALGO_SHA256, PATH_MAX, RING_BYTES, Record, counter, flags, seq};
use aya_ebpf::helpers::{
    bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_uid_gid, bpf_get_smp_processor_id,
    generated::{bpf_get_current_cgroup_id, bpf_ktime_get_boot_ns},
};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, PerCpuArray, RingBuf};

use crate::gate;
use crate::kernel::{Identity, State};

#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(RING_BYTES, 0);

/// Indexed by [`counter`].
#[map]
static COUNTERS: Array<u64> = Array::with_max_entries(counter::COUNT, 0);

/// How many records each CPU has numbered.
#[map]
static SEQUENCE: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// Adds one to a counter.
#[inline(always)]
pub fn count(index: u32) {
    if let Some(cell) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: a map value is aligned and lives as long as the map; every access to it is atomic.
        unsafe { next(cell) };
    }
}

/// This CPU's next number. A program does not move to another CPU, but another program may come in between: hence atomic,
/// on memory that no other CPU touches.
#[inline(always)]
fn number() -> u64 {
    // SAFETY: the helper takes nothing and returns a number.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let Some(cell) = SEQUENCE.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: as for `count`.
    seq::of(cpu, unsafe { next(cell) })
}

/// Adds one and returns what it was, as one atomic operation. In assembler: Rust's atomics leave `fetch_add` out where a
/// target has no compare-and-swap in its description, as this one.
///
/// # Safety
/// `cell` is a map value of eight bytes that is only accessed like this.
#[inline(always)]
unsafe fn next(cell: *mut u64) -> u64 {
    let mut value = 1_u64;
    unsafe {
        asm!(
            "{value} = atomic_fetch_add((u64 *)({cell} + 0), {value})",
            cell = in(reg) cell,
            value = inout(reg) value,
            options(nostack),
        );
    }
    value
}

/// How a hash ended: a digest, or the reason for its absence.
#[derive(Clone, Copy)]
pub struct Outcome {
    /// The kernel's `enum hash_algo`.
    pub algo: u32,
    /// 0 or a negative errno, as in [`Record::hash_error`].
    pub error: i32,
    /// The digest as four words in memory order, zero without one.
    pub digest: [u64; 4],
}

impl Outcome {
    /// This digest.
    #[inline(always)]
    pub const fn of(digest: [u64; 4]) -> Self {
        Self {
            algo: HASH_ALGO_SHA256,
            error: 0,
            digest,
        }
    }

    /// No digest, for the reason that `errno` (positive) names.
    pub const fn failed(errno: i32) -> Self {
        Self {
            algo: HASH_ALGO_SHA256,
            error: -errno,
            digest: [0; 4],
        }
    }
}

/// What a hook found out, but for the path, which is written straight into the ring buffer.
pub struct Facts {
    pub kind: u32,
    pub flags: u32,
    pub size: u64,
    pub ino: u64,
    pub change: u64,
    pub fs_magic: u64,
    pub dev: u32,
    pub generation: u32,
    /// Whose load it is; 0 = the calling task's.
    pub pid: u32,
    pub hash: Outcome,
}

impl Facts {
    /// Of a file in the state that its inode has now.
    ///
    /// # Safety
    /// `inode` is a `struct inode *` that the verifier tracks.
    #[inline(always)]
    pub unsafe fn of_file(inode: *const c_void, kind: u32, flags: u32, hash: Outcome, pid: u32) -> Self {
        // SAFETY: as for this function.
        let (state, identity) = unsafe { (State::of(inode), Identity::of(inode)) };
        Self {
            kind,
            flags,
            size: state.size,
            ino: identity.ino,
            change: state.change,
            fs_magic: identity.magic,
            dev: identity.dev,
            generation: state.generation,
            pid,
            hash,
        }
    }

    /// Of a buffer in the kernel: all that is known before, or without, a file.
    #[inline(always)]
    pub fn of_buffer(kind: u32, size: u64, hash: Outcome) -> Self {
        Self {
            kind,
            flags: 0,
            size,
            ino: 0,
            change: 0,
            fs_magic: 0,
            dev: 0,
            generation: 0,
            pid: 0,
            hash,
        }
    }
}

/// Queues a record. `path` writes at most [`PATH_MAX`] bytes and returns how many it used, NUL included, or a
/// negative errno. False = there was no room, which is counted: as a loss if the load goes on for all that.
///
/// Everything slow, the hash above all, is done before: a place that is reserved and not yet submitted holds up all
/// records behind it.
#[inline(always)]
pub fn submit(facts: &Facts, path: impl FnOnce(*mut u8) -> i64) -> bool {
    let Some(mut entry) = EVENTS.reserve::<Record>(0) else {
        // In the closed modes every caller refuses what it could not queue: nothing ran unmeasured.
        count(if gate::closed() {
            counter::NO_ROOM
        } else {
            counter::LOST
        });
        return false;
    };
    let record = entry.as_mut_ptr();
    // SAFETY: the place is as large as a record, aligned to 8, and ours until it is submitted; every field is written.
    unsafe {
        (*record).seq = number();
        (*record).time_ns = bpf_ktime_get_boot_ns();
        (*record).size = facts.size;
        (*record).ino = facts.ino;
        (*record).change = facts.change;
        (*record).cgroup = bpf_get_current_cgroup_id();
        (*record).fs_magic = facts.fs_magic;
        (*record).dev = facts.dev;
        (*record).generation = facts.generation;
        (*record).kind = facts.kind;
        (*record).hash_algo = facts.hash.algo;
        (*record).hash_error = facts.hash.error;
        (*record).pid = if facts.pid != 0 {
            facts.pid
        } else {
            (bpf_get_current_pid_tgid() >> 32) as u32
        };
        (*record).uid = bpf_get_current_uid_gid() as u32;
        (&raw mut (*record).digest).cast::<[u64; 4]>().write(facts.hash.digest);
        // On behalf of another task: the agent knows its name.
        (*record).comm = if facts.pid != 0 {
            [0; 16]
        } else {
            bpf_get_current_comm().unwrap_or([0; 16])
        };
        let used = path((&raw mut (*record).path).cast());
        let told = used > 0 && used <= PATH_MAX as i64;
        (*record).path_len = if told { used as u32 - 1 } else { 0 };
        let cut = if told || used == 0 { 0 } else { flags::PATH_CUT };
        let missing = if facts.hash.error == 0 { 0 } else { flags::NOT_HASHED };
        (*record).flags = facts.flags | cut | missing;
        (*record).pad = 0;
    }
    entry.submit(0);
    true
}

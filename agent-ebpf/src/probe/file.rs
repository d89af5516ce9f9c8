//! Which file, in which state; and whether that is known already.

use assay_ebpf::probe_record::{File, Key, Layout, SEEN_ENTRIES, State};
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{HashMap, LruHashMap};

use crate::kernel::{read, read_into};

/// Files whose content in this state is in the log. Filled by the agent, after it has hashed them.
#[map]
static SEEN: LruHashMap<Key, State> = LruHashMap::with_max_entries(SEEN_ENTRIES, 0);

/// Threads of the agent that ask which file they have in hand, by mapping it; here is the answer. What they map is
/// not about to run.
#[map]
static ASKED: HashMap<u64, File> = HashMap::with_max_entries(16, 0);

/// The kernel's `struct inode` of a `struct file`.
#[inline(always)]
pub fn inode_of(layout: &Layout, file: u64) -> u64 {
    read(file, layout.file_inode)
}

/// Fills in what `inode` is and how it is.
///
/// # Safety
/// `out` is writable.
#[inline(always)]
pub unsafe fn describe(layout: &Layout, inode: u64, out: *mut File) {
    let superblock: u64 = read(inode, layout.inode_sb);
    unsafe {
        read_into(&raw mut (*out).ino, inode, layout.inode_ino);
        read_into(&raw mut (*out).size, inode, layout.inode_size);
        read_into(&raw mut (*out).version, inode, layout.inode_version);
        read_into(&raw mut (*out).ctime_sec, inode, layout.inode_ctime_sec);
        // Since 6.13 the highest bit says whether somebody has asked for the time (I_CTIME_QUERIED).
        (*out).ctime_nsec = read::<u32>(inode, layout.inode_ctime_nsec) & !(1 << 31);
        read_into(&raw mut (*out).generation, inode, layout.inode_generation);
        read_into(&raw mut (*out).links, inode, layout.inode_nlink);
        read_into(&raw mut (*out).writers, inode, layout.inode_writecount);
        (*out).mode = read::<u16>(inode, layout.inode_mode) as u32;
        read_into(&raw mut (*out).dev, superblock, layout.super_dev);
        read_into(&raw mut (*out).magic, superblock, layout.super_magic);
        read_into(&raw mut (*out).granularity, superblock, layout.super_granularity);
        (*out).pad = 0;
    }
}

/// Nothing new: recorded in this state, nobody is changing it, and it has a name. (What has none can be changed through
/// a mapping that moves no time.) So many `writers` do not count.
#[inline(always)]
pub fn is_known(file: &File, writers: i32) -> bool {
    if file.writers > writers || file.links == 0 {
        return false;
    }
    // SAFETY: the agent replaces entries whole; a mix of two states would have to equal a third to be mistaken.
    unsafe { SEEN.get(file.key()) }.is_some_and(|state| *state == file.state())
}

/// Where this thread wants the answer, if it is one that asks.
#[inline(always)]
pub fn asked() -> Option<*mut File> {
    ASKED.get_ptr_mut(bpf_get_current_pid_tgid())
}

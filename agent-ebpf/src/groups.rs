//! Control groups: nobody freezes, kills or starves the agent's, and nobody moves it into one that is frozen or about to be.
//!
//! No hook sees a move before it happens, nor a write to a file that was opened before. What a hook does see is that the file
//! is opened, and the kernel itself counts for each file by how many it is open for writing (`i_writecount`, raised before the
//! hook is asked). So nobody gets a group's `cgroup.procs` or `cgroup.threads` while this group or one above it is frozen or has its
//! `cgroup.freeze` or `cgroup.kill` open, and nobody gets one of these while one of those is open in the group or below it. From
//! the moment of a move on the group is guarded. That holds for descriptors that are older than these programs, too: the
//! agent opens each of the files once, so that they are known.
//!
//! The freezer of version 1 is a hierarchy of its own, which anybody may mount beside version 2. Hardly a host uses it any more, so that the
//! rule is simpler there: nobody opens `freezer.state`, and nothing is moved into a group that was frozen before.

use core::arch::asm;
use core::ffi::c_void;

use assay_ebpf::{ABSENT, MAX_CGROUPS, counter, kind};
use aya_ebpf::bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST};
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::HashMap;
use aya_ebpf::programs::BtfTracePointContext;

use crate::file::path_of;
use crate::gate::closed;
use crate::guard::{is_on, refuse};
use crate::kernel::{begins_with, forget, layout, load, peek, writers};
use crate::queue::{Facts, Outcome, count, submit};
use crate::task;

/// Groups above each other that are looked at; systemd's have up to seven. What lies deeper, nothing is moved into.
const MAX_LEVELS: u32 = 32;

/// Groups of which something is known; more than a host has. Beyond them nothing is opened.
const MAX_GROUPS: u32 = 65_536;

/// Files of a group's own by which it is stopped, and places for what a group that went just now left behind.
const STOPPERS: usize = 4;
/// Files by which things are moved into a group or below it, that can be open at once and are told from each other.
const MOVERS: usize = 16;

/// Control groups from the agent's up to the root, by id, which is the inode number of their folder.
#[map]
static CGROUPS: HashMap<u64, u32> = HashMap::with_max_entries(MAX_CGROUPS, 0);

/// What is known of a group: files of which somebody may have a descriptor for writing, each as [`word_of`] has it. Of a file that the
/// kernel has forgotten nobody has one.
#[repr(C)]
#[derive(Clone, Copy)]
struct Group {
    /// `cgroup.freeze` and `cgroup.kill`.
    stoppers: [u64; STOPPERS],
    /// `cgroup.procs` and `cgroup.threads` of the group and those below it.
    movers: [u64; MOVERS],
    /// Not 0: once more of them were open than have a place. Then this group is not frozen by anybody any more.
    crowded: u64,
}

impl Group {
    const EMPTY: Self = Self {
        stoppers: [0; STOPPERS],
        movers: [0; MOVERS],
        crowded: 0,
    };
}

/// By id; until the group is removed.
#[map]
static GROUPS: HashMap<u64, Group> = HashMap::with_max_entries(MAX_GROUPS, BPF_F_NO_PREALLOC);

/// One of a group's files is opened for writing.
///
/// # Safety
/// `file`, `inode` and `dentry` are pointers that the verifier tracks: a file, its inode and its dentry on a file system of
/// control groups, of version 1 or 2.
#[inline(always)]
pub unsafe fn opened(file: *const c_void, inode: *const c_void, dentry: *const c_void, version_1: bool) -> i32 {
    unsafe {
        let name: u64 = load(dentry, layout!(dentry_name));
        // From here on as numbers: some kernels' verifiers do not follow a dentry.
        let dentry = dentry as u64;
        let folder: u64 = peek(dentry, layout!(dentry_parent));
        let agent = task::is_agent();
        if agent && (writers(inode) <= 1 || folder == dentry) {
            // It only asks who else has it open.
            return 0;
        }
        if folder == dentry {
            // By a file handle, and nobody has looked it up by its name: it cannot be told which file of which group it is.
            return refuse(kind::ATTEMPT_FREEZE, 0);
        }
        // The verifier would otherwise go all ways twice, once for the agent and once for all others.
        let agent = forget(u32::from(agent)) != 0;
        let place: u64 = peek(dentry, layout!(dentry_inode));
        let (word, superblock) = (word_of(place), peek(place, layout!(inode_sb)));
        let conflict = if version_1 {
            may_freeze_by_version_1(name, folder)
        } else if begins_with(name, *b"cgroup.procs\0") || begins_with(name, *b"cgroup.threads\0") {
            may_be_stopped(word, folder, superblock, agent)
        } else if begins_with(name, *b"cgroup.freeze\0") || begins_with(name, *b"cgroup.kill\0") {
            may_stop_the_agent(word, folder, superblock, agent)
        } else {
            false
        };
        if conflict {
            return answer(file, agent);
        }
        let starves = begins_with(name, *b"memory.max\0")
            || begins_with(name, *b"memory.high\0")
            || begins_with(name, *b"cpu.max\0");
        if !version_1 && starves && !agent && is_guarded(number_of(peek(folder, layout!(dentry_inode)))) {
            refuse(kind::ATTEMPT_LIMIT, 0)
        } else {
            0
        }
    }
}

/// What to do with whoever would have both: the agent only finds out that somebody has, and records which file it is.
///
/// # Safety
/// As for [`opened`].
#[inline(always)]
unsafe fn answer(file: *const c_void, agent: bool) -> i32 {
    const ENODATA: i32 = 61;
    if !agent {
        return refuse(kind::ATTEMPT_FREEZE, 0);
    }
    // Whose descriptor it is cannot be told from here.
    let facts = Facts::of_buffer(kind::ATTEMPT_FREEZE, 0, Outcome::failed(ENODATA));
    // SAFETY: as for this function.
    if !submit(&facts, |out| unsafe { path_of(file, out) }) && closed() {
        // Nobody refused it for want of room.
        count(counter::LOST);
    }
    0
}

/// `cgroup.procs` or `cgroup.threads` is opened by others than the agent, or has been: whether what is moved by it could be stopped
/// there.
#[inline(always)]
fn may_be_stopped(file: u64, folder: u64, superblock: u64, agent: bool) -> bool {
    let mut folder = folder;
    for _ in 0..MAX_LEVELS {
        let parent: u64 = peek(folder, layout!(dentry_parent));
        if parent == folder {
            // The root, which cannot be frozen.
            return false;
        }
        let place: u64 = peek(folder, layout!(dentry_inode));
        match assay_group_with_mover(place, file, superblock) {
            CANNOT => {}
            CAN => return true,
            _ => return !agent && !is_gone(place),
        }
        folder = parent;
    }
    !agent
}

/// Answers of the functions for one group, which the verifier checks once each, whatever they are called with, and not at each level.
const CANNOT: i32 = 0;
const CAN: i32 = 1;
/// See [`Group::crowded`].
const CROWDED: i32 = 2;
/// There is no room for the group, or it is gone.
const UNKNOWN: i32 = 3;

/// Whether the group whose folder has the inode at this address is stopped or could be, now that this file is open by which
/// something is moved into it or below it.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn assay_group_with_mover(place: u64, file: u64, superblock: u64) -> i32 {
    let Some(group) = known(place) else {
        return UNKNOWN;
    };
    // SAFETY: a group's words are read and written one by one, by programs that expect that of each other.
    let stopped = unsafe {
        if !remember((&raw mut (*group).movers).cast(), MOVERS, file, superblock) {
            swap_if(&raw mut (*group).crowded, 0, 1);
        }
        // In this order: whoever froze the group and closed the file has done the one before the other.
        any_is_open((&raw const (*group).stoppers).cast(), STOPPERS, superblock)
    };
    if stopped || is_frozen(place) { CAN } else { CANNOT }
}

/// `cgroup.freeze` or `cgroup.kill` is opened by others than the agent, or has been: whether the agent is in that group, or could be
/// moved into it.
#[inline(always)]
fn may_stop_the_agent(file: u64, folder: u64, superblock: u64, agent: bool) -> bool {
    let place: u64 = peek(folder, layout!(dentry_inode));
    match assay_group_with_stopper(place, file, superblock) {
        CANNOT => false,
        CAN => true,
        CROWDED => !agent,
        _ => !agent && !is_gone(place),
    }
}

/// Whether the agent is in the group whose folder has the inode at this address, or could be moved into it, now that this file is open
/// by which it is stopped.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn assay_group_with_stopper(place: u64, file: u64, superblock: u64) -> i32 {
    let Some(group) = known(place) else {
        return UNKNOWN;
    };
    // SAFETY: as in `assay_group_with_mover`.
    unsafe {
        let remembered = remember((&raw mut (*group).stoppers).cast(), STOPPERS, file, superblock);
        if !remembered
            || is_guarded(number_of(place))
            || any_is_open((&raw const (*group).movers).cast(), MOVERS, superblock)
        {
            CAN
        } else if (&raw const (*group).crowded).read_volatile() != 0 {
            CROWDED
        } else {
            CANNOT
        }
    }
}

/// The file of version 1 with its name at this address is opened by others than the agent, or has been: whether it is a freezer, or
/// moves something to where it is frozen.
#[inline(always)]
fn may_freeze_by_version_1(name: u64, folder: u64) -> bool {
    if begins_with(name, *b"freezer.state\0") {
        return true;
    }
    let moves = begins_with(name, *b"tasks\0") || begins_with(name, *b"cgroup.procs\0");
    moves && is_frozen_by_version_1(peek(folder, layout!(dentry_inode)))
}

/// What is known of the group whose folder has the inode at this address, at first nothing. None if there is no room for it, or if
/// the group is gone: then nothing can be done to it any more.
#[inline(always)]
fn known(folder: u64) -> Option<*mut Group> {
    let number = number_of(folder);
    if let Some(group) = GROUPS.get_ptr_mut(number) {
        return Some(group);
    }
    let _there_or_full = GROUPS.insert(number, Group::EMPTY, u64::from(BPF_NOEXIST));
    if is_gone(folder) {
        let _ = GROUPS.remove(number);
    }
    GROUPS.get_ptr_mut(number)
}

/// A group was removed. The kernel does that one by one, so that this program is never left out.
#[btf_tracepoint(function = "cgroup_rmdir")]
pub fn gone(ctx: BtfTracePointContext) -> i32 {
    let group: *const c_void = ctx.arg(0);
    // SAFETY: the tracepoint's argument is a `struct cgroup *`, which has its node and its root.
    unsafe {
        if is_version_2(group) {
            let node: *const c_void = load(group, layout!(cgroup_node));
            let _unknown = GROUPS.remove(load::<u64>(node, layout!(node_id)));
        }
    }
    0
}

/// Hierarchies of version 1 number their groups by themselves: nothing is known of those by id.
///
/// # Safety
/// `group` is a `struct cgroup *` that the verifier tracks.
#[inline(always)]
unsafe fn is_version_2(group: *const c_void) -> bool {
    unsafe {
        let root: *const c_void = load(group, layout!(cgroup_root));
        load::<u32>(root, layout!(root_hierarchy)) == 0
    }
}

/// The number of the inode at this address; a group's folder has that of the group.
#[inline(always)]
fn number_of(inode: u64) -> u64 {
    peek(inode, layout!(inode_ino))
}

/// Of an inode's number, what a file's word has: with its address that tells it from those that got the same memory later. Files of one
/// group are numbered one after the other (kernfs), and so are those of the next.
const NUMBER: u64 = (1 << 11) - 1;

/// A file as one word, since only one can be swapped: its inode's address without the highest byte, which is 0xff (the kernel's half,
/// also with five levels of page tables), nor the three lowest bits, which are 0; and the end of its number.
#[inline(always)]
fn word_of(inode: u64) -> u64 {
    inode << 8 & !NUMBER | number_of(inode) & NUMBER
}

/// Gives this file one of a group's places, that of a file which nobody has open. False if there is none.
///
/// # Safety
/// `cells` are so many words of a [`Group`].
#[inline(always)]
unsafe fn remember(cells: *mut u64, length: usize, file: u64, superblock: u64) -> bool {
    unsafe {
        for number in 0..length {
            let cell = cells.add(number);
            let there = cell.read_volatile();
            if there == file {
                return true;
            }
            if !is_open(there, superblock) && swap_if(cell, there, file) == there {
                // Who opened that one just now may have found it in its place.
                return !is_open(there, superblock);
            }
        }
        false
    }
}

/// # Safety
/// As for [`remember`].
#[inline(always)]
unsafe fn any_is_open(cells: *const u64, length: usize, superblock: u64) -> bool {
    let mut open = 0;
    for number in 0..length {
        // SAFETY: as for this function.
        let closed = closedness(unsafe { cells.add(number).read_volatile() }, superblock);
        // 1 for 0, and 0 for all others.
        open |= !(closed | closed.wrapping_neg()) >> 63;
    }
    open != 0
}

/// Whether somebody has this file open for writing.
#[inline(always)]
fn is_open(file: u64, superblock: u64) -> bool {
    closedness(file, superblock) == 0
}

/// Not 0 if nobody has this file open for writing, or if the memory is another's by now; also for a place without a file, as nothing can be
/// read at the address that it stands for. In one sum: with branches the verifier would have eight ways to go for each file. And not inlined:
/// what it reads would have its place on the stack once for each of a group's files.
#[inline(never)]
fn closedness(file: u64, superblock: u64) -> u64 {
    let inode = 0xff << 56 | (file & !NUMBER) >> 8;
    let another = peek::<u64>(inode, layout!(inode_sb)) ^ superblock | (number_of(inode) ^ file) & NUMBER;
    let writers = i64::from(peek::<i32>(inode, layout!(inode_writecount)));
    another | (writers - 1) as u64 >> 63
}

/// Whether the group whose folder has the inode at this address is to be frozen itself, whatever those above it are.
#[inline(always)]
fn is_frozen(folder: u64) -> bool {
    peek::<u8>(group_of(folder), layout!(cgroup_freeze)) != 0
}

/// The same for version 1, where this holds for the groups below as well. Groups of other hierarchies have no freezer.
#[inline(always)]
fn is_frozen_by_version_1(folder: u64) -> bool {
    /// `CGROUP_FREEZING_SELF` and `CGROUP_FREEZING_PARENT` (kernel/cgroup/legacy_freezer.c).
    const FREEZING: u32 = 1 << 1 | 1 << 2;
    if layout!(freezer_id) == ABSENT {
        return false;
    }
    let controller = layout!(cgroup_subsys) + layout!(freezer_id) * 8;
    // Of a controller that is not there, nothing can be read. A `struct freezer` begins with what is pointed to.
    let freezer: u64 = peek(group_of(folder), controller);
    peek::<u32>(freezer, layout!(freezer_state)) & FREEZING != 0
}

/// Whether the group was removed, which this shows before [`gone`] is called.
#[inline(always)]
fn is_gone(folder: u64) -> bool {
    /// `CSS_ONLINE` (include/linux/cgroup-defs.h).
    const ONLINE: u32 = 1 << 1;
    peek::<u32>(group_of(folder), layout!(cgroup_flags)) & ONLINE == 0
}

/// The address of the `struct cgroup` whose folder has the inode at this address.
#[inline(always)]
fn group_of(folder: u64) -> u64 {
    peek(peek(folder, layout!(inode_private)), layout!(node_priv))
}

/// Whether the agent is in the group with this number, or below it.
#[inline(always)]
fn is_guarded(number: u64) -> bool {
    // SAFETY: only whether it is there is looked at.
    unsafe { CGROUPS.get(number) }.is_some()
}

/// Writes a word if it is still what it was, before anything that follows is read. Returns what it was. In assembler for the
/// reason that [`count`] has.
///
/// # Safety
/// `cell` is a map value of eight bytes.
#[inline(always)]
unsafe fn swap_if(cell: *mut u64, expected: u64, value: u64) -> u64 {
    let mut found = expected;
    unsafe {
        asm!(
            "r0 = cmpxchg_64({cell} + 0, r0, {value})",
            cell = in(reg) cell,
            value = in(reg) value,
            inout("r0") found,
            options(nostack),
        );
    }
    found
}

/// The agent is moved to another control group. No hook could refuse it, and this one is not told who does it by digest
/// (inode storage is for security hooks). From this moment on the new group and those above it are guarded; the agent itself
/// finds out, once it runs again.
#[btf_tracepoint(function = "cgroup_attach_task")]
pub fn moved(ctx: BtfTracePointContext) -> i32 {
    const EOPNOTSUPP: i32 = 95;
    let task: *const c_void = ctx.arg(2);
    let from_init = bpf_get_current_pid_tgid() >> 32 == 1;
    // SAFETY: the tracepoint's argument is a `struct task_struct *`.
    if !is_on() || unsafe { !task::is_agents(task) } {
        return 0;
    }
    // SAFETY: the tracepoint's argument is a `struct cgroup *`.
    unsafe {
        if is_version_2(ctx.arg(0)) {
            guard_groups(ctx.arg(0));
        }
    }
    if from_init || task::is_agent() {
        return 0;
    }
    let facts = Facts::of_buffer(kind::ATTEMPT_FREEZE, 0, Outcome::failed(EOPNOTSUPP));
    if !submit(&facts, |_| 0) && closed() {
        // Nobody refused it for want of room.
        count(counter::LOST);
    }
    0
}

/// Guards a control group and those above it. The agent lets go of those that it has left, when it looks.
///
/// # Safety
/// `group` is a `struct cgroup *` that the verifier tracks.
#[inline(always)]
unsafe fn guard_groups(group: *const c_void) {
    unsafe {
        let node: *const c_void = load(group, layout!(cgroup_node));
        let _full = CGROUPS.insert(&load::<u64>(node, layout!(node_id)), &1, 0);
        if layout!(cgroup_ancestors) == ABSENT {
            return;
        }
        let level = load::<u32>(group, layout!(cgroup_level));
        for above in 0..MAX_LEVELS {
            if above >= level {
                break;
            }
            // An array of no fixed length: the verifier does not follow its pointers.
            let ancestor: u64 = peek(group as u64, layout!(cgroup_ancestors) + above * 8);
            let node: u64 = peek(ancestor, layout!(cgroup_node));
            let id: u64 = peek(node, layout!(node_id));
            let _full = CGROUPS.insert(&id, &1, 0);
        }
    }
}

//! Keeping other processes, root's included, away from the agent: its life, its memory, its TPM, its programs and maps.
//!
//! Everything here is refused only while [`control::PROTECT`] is set, and each refusal is a record.

use core::ffi::c_void;

use assay_ebpf::{MAX_FOLDERS, MAX_GUARDED, MAX_HEIRS, control, counter, flags, guarded, kind};
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use aya_ebpf::macros::{lsm, map};
use aya_ebpf::maps::HashMap;
use aya_ebpf::programs::LsmContext;

use crate::gate::{EPERM, order};
use crate::groups;
use crate::kernel::{begins_with, layout, load};
use crate::queue::{Facts, Outcome, count, submit};
use crate::task;

/// Ids of the agent's maps, programs and links, see [`guarded`].
#[map]
static GUARDED: HashMap<u64, u32> = HashMap::with_max_entries(MAX_GUARDED, 0);

/// Inode numbers of the folders with pins, on the file system [`control::PINS_DEV`].
#[map]
static FOLDERS: HashMap<u64, u32> = HashMap::with_max_entries(MAX_FOLDERS, 0);

/// Digests of programs that may take over: the agent's own, and that of its update.
#[map]
static HEIRS: HashMap<[u64; 4], u32> = HashMap::with_max_entries(MAX_HEIRS, 0);

/// A signal that reaches the agent. Those that a process may ignore anyway pass; systemd, which is process 1, may ask it
/// to end, and nothing harder, unless somebody has frozen it: its watchdog then puts another one in its place.
#[lsm(hook = "task_kill")]
pub fn signal(ctx: LsmContext) -> i32 {
    const SIGINT: u32 = 2;
    const SIGKILL: u32 = 9;
    const SIGTERM: u32 = 15;
    const HARMLESS: u64 = 1 | 1 << 17 | 1 << 18 | 1 << 23 | 1 << 28; // none, CHLD, CONT, URG, WINCH
    let target: *const c_void = ctx.arg(0);
    let signal = ctx.arg::<u64>(2) as u32;
    // SAFETY: the hook's argument is a `struct task_struct *`.
    if !is_on() || unsafe { !task::is_agents(target) } || task::is_agent() {
        return 0;
    }
    let from_init = bpf_get_current_pid_tgid() >> 32 == 1;
    if HARMLESS >> (signal & 63) & 1 != 0 || from_init && (signal == SIGTERM || signal == SIGINT) {
        return 0;
    }
    // SAFETY: as above.
    if from_init && signal == SIGKILL && unsafe { task::is_frozen(target) } {
        return 0;
    }
    refuse(kind::ATTEMPT_SIGNAL, u64::from(signal))
}

/// A debugger, `process_vm_writev`, `/proc/PID/mem`, `pidfd_getfd`: all that may change the agent, not what merely looks.
#[lsm(hook = "ptrace_access_check")]
pub fn trace(ctx: LsmContext) -> i32 {
    /// `PTRACE_MODE_ATTACH` (include/linux/ptrace.h).
    const ATTACH: u64 = 2;
    let target: *const c_void = ctx.arg(0);
    if ctx.arg::<u64>(1) & ATTACH == 0 || !is_on() || task::is_agent() {
        return 0;
    }
    // SAFETY: the hook's argument is a `struct task_struct *`.
    if unsafe { task::is_agents(target) || may_take_over(&task::digest_of(target)) } {
        refuse(kind::ATTEMPT_TRACE, 0)
    } else {
        0
    }
}

/// Whether the calling task is traced where that matters: cheap, and no for nearly all.
#[inline(always)]
pub fn is_led() -> bool {
    is_on() && task::is_traced()
}

/// A program that may take over is started by somebody who traces it from before its first instruction, and could tell it
/// what to do with what only it may open. Only where [`is_led`]. 0, or what to answer.
#[inline(always)]
pub fn led(program: &Outcome) -> i32 {
    if !may_take_over(program) {
        return 0;
    }
    let mut facts = Facts::of_buffer(kind::ATTEMPT_TRACE, 0, *program);
    facts.flags = flags::REFUSED;
    count(counter::REFUSED);
    submit(&facts, |_| 0);
    -EPERM
}

/// Limits that would make the kernel end the agent.
#[lsm(hook = "task_setrlimit")]
pub fn limit(ctx: LsmContext) -> i32 {
    // SAFETY: the hook's argument is a `struct task_struct *`.
    unsafe { slowed(ctx.arg(0)) }
}

/// Scheduling that would never let the agent run.
#[lsm(hook = "task_setscheduler")]
pub fn schedule(ctx: LsmContext) -> i32 {
    // SAFETY: as for `limit`.
    unsafe { slowed(ctx.arg(0)) }
}

/// # Safety
/// `target` is a `struct task_struct *` that the verifier tracks.
#[inline(always)]
unsafe fn slowed(target: *const c_void) -> i32 {
    if !is_on() || unsafe { !task::is_agents(target) } || task::is_agent() {
        return 0;
    }
    refuse(kind::ATTEMPT_LIMIT, 0)
}

/// A descriptor for one of the agent's maps, from a pin, an id or another process.
#[lsm(hook = "bpf_map")]
pub fn map_asked(ctx: LsmContext) -> i32 {
    let map: *const c_void = ctx.arg(0);
    // SAFETY: the hook's argument is a `struct bpf_map *`.
    let id = unsafe { load::<u32>(map, layout!(map_id)) };
    asked(guarded::MAP | u64::from(id))
}

/// A descriptor for one of the agent's programs, which others could replace functions of.
#[lsm(hook = "bpf_prog")]
pub fn program_asked(ctx: LsmContext) -> i32 {
    let program: *const c_void = ctx.arg(0);
    // SAFETY: the hook's argument is a `struct bpf_prog *`, which has its aux.
    let id = unsafe {
        let aux: *const c_void = load(program, layout!(prog_aux));
        load::<u32>(aux, layout!(aux_id))
    };
    asked(guarded::PROGRAM | u64::from(id))
}

/// A descriptor for one of the agent's links.
#[lsm(hook = "bpf")]
pub fn link_asked(ctx: LsmContext) -> i32 {
    /// `BPF_LINK_GET_FD_BY_ID` (include/uapi/linux/bpf.h).
    const LINK_BY_ID: u32 = 30;
    if ctx.arg::<u64>(0) as u32 != LINK_BY_ID || !is_on() {
        return 0;
    }
    let mut id = 0_u32;
    // SAFETY: room for a u32; the attribute begins with the id, and the helper refuses what cannot be read.
    let read = unsafe { bpf_probe_read_kernel((&raw mut id).cast(), 4, ctx.arg::<*const c_void>(1)) };
    if read == 0 {
        asked(guarded::LINK | u64::from(id))
    } else {
        0
    }
}

#[inline(always)]
fn asked(key: u64) -> i32 {
    // SAFETY: only whether it is there is looked at.
    if !is_on() || unsafe { GUARDED.get(&key) }.is_none() || task::is_agent() || is_heir() {
        return 0;
    }
    refuse(kind::ATTEMPT_BPF, key & 0xffff_ffff)
}

/// The program of an agent that starts: it opens the pins before it has said that it is the agent now.
#[inline(always)]
fn is_heir() -> bool {
    may_take_over(&task::own_digest())
}

#[inline(always)]
fn may_take_over(program: &Outcome) -> bool {
    // SAFETY: only whether it is there is looked at.
    program.error == 0 && unsafe { HEIRS.get(&program.digest) }.is_some()
}

/// Removing a pin.
#[lsm(hook = "inode_unlink")]
pub fn unpin(ctx: LsmContext) -> i32 {
    // SAFETY: the hook's argument is the folder's `struct inode *`.
    unsafe { touched(ctx.arg(0)) }
}

/// Removing a folder with pins.
#[lsm(hook = "inode_rmdir")]
pub fn unpin_folder(ctx: LsmContext) -> i32 {
    // SAFETY: the hook's argument is a `struct dentry *` of something that exists.
    unsafe { touched(load(ctx.arg(1), layout!(dentry_inode))) }
}

/// Renaming a pin, or a folder with pins.
#[lsm(hook = "inode_rename")]
pub fn repin(ctx: LsmContext) -> i32 {
    // SAFETY: as for the two above.
    unsafe {
        let answer = touched(ctx.arg(0));
        if answer != 0 {
            return answer;
        }
        touched(load(ctx.arg(1), layout!(dentry_inode)))
    }
}

/// Unmounting the file system with the pins, lazily or not.
#[lsm(hook = "sb_umount")]
pub fn unmount(ctx: LsmContext) -> i32 {
    let mount: *const c_void = ctx.arg(0);
    // SAFETY: the hook's argument is a `struct vfsmount *`, which has its superblock.
    let dev = unsafe {
        let superblock: *const c_void = load(mount, layout!(mount_super));
        load::<u32>(superblock, layout!(super_dev))
    };
    if !is_on() || u64::from(dev) != order(control::PINS_DEV) || dev == 0 || task::is_agent() {
        return 0;
    }
    refuse(kind::ATTEMPT_PIN, 0)
}

/// Covering the pins with another mount: a successor would not find them.
#[lsm(hook = "sb_mount")]
pub fn mount(ctx: LsmContext) -> i32 {
    let path: *const c_void = ctx.arg(1);
    // SAFETY: the hook's argument is a `struct path *` of something that exists.
    unsafe {
        let dentry: *const c_void = load(path, layout!(path_dentry));
        covered(load(dentry, layout!(dentry_inode)))
    }
}

/// The same by `move_mount`.
#[lsm(hook = "move_mount")]
pub fn move_over(ctx: LsmContext) -> i32 {
    let path: *const c_void = ctx.arg(1);
    // SAFETY: as for `mount`.
    unsafe {
        let dentry: *const c_void = load(path, layout!(path_dentry));
        covered(load(dentry, layout!(dentry_inode)))
    }
}

/// # Safety
/// `inode` is a `struct inode *` that the verifier tracks; NULL reads as nothing.
#[inline(always)]
unsafe fn covered(inode: *const c_void) -> i32 {
    unsafe {
        if inode.is_null() || !is_on() {
            return 0;
        }
        let superblock: *const c_void = load(inode, layout!(inode_sb));
        let dev = load::<u32>(superblock, layout!(super_dev));
        if dev == 0 || u64::from(dev) != order(control::PINS_DEV) || task::is_agent() {
            return 0;
        }
        refuse(kind::ATTEMPT_PIN, 0)
    }
}

/// # Safety
/// As for [`covered`].
#[inline(always)]
unsafe fn touched(inode: *const c_void) -> i32 {
    unsafe {
        if inode.is_null() || !is_on() {
            return 0;
        }
        let superblock: *const c_void = load(inode, layout!(inode_sb));
        let dev = load::<u32>(superblock, layout!(super_dev));
        if dev == 0 || u64::from(dev) != order(control::PINS_DEV) {
            return 0;
        }
        let number: u64 = load(inode, layout!(inode_ino));
        if FOLDERS.get(&number).is_none() || task::is_agent() || is_heir() {
            return 0;
        }
        refuse(kind::ATTEMPT_PIN, 0)
    }
}

/// A file of the kernel's own that is opened for writing: one of a control group's, or what offers the agent to the
/// out-of-memory killer.
///
/// # Safety
/// `file`, `inode` and what they lead to are pointers that the verifier tracks.
#[inline(always)]
pub unsafe fn knob(file: *const c_void, inode: *const c_void, magic: u64) -> i32 {
    const CGROUP2_MAGIC: u64 = 0x6367_7270;
    /// Version 1, whatever its controllers.
    const CGROUP_MAGIC: u64 = 0x0027_e0eb;
    const PROC_MAGIC: u64 = 0x9fa0;
    let of_a_group = magic == CGROUP2_MAGIC || magic == CGROUP_MAGIC;
    if !of_a_group && magic != PROC_MAGIC || !is_on() {
        return 0;
    }
    unsafe {
        let dentry: *const c_void = load(file, layout!(file_path) + layout!(path_dentry));
        if of_a_group {
            return groups::opened(file, inode, dentry, magic == CGROUP_MAGIC);
        }
        let name: u64 = load(dentry, layout!(dentry_name));
        let parent: *const c_void = load(dentry, layout!(dentry_parent));
        let offered = begins_with(name, *b"oom_") && (is_agents_folder(parent) || is_agents_thread(parent));
        if offered && !task::is_agent() {
            refuse(kind::ATTEMPT_LIMIT, 0)
        } else {
            0
        }
    }
}

/// Whether this is `/proc/AGENT`.
///
/// # Safety
/// `dentry` is a `struct dentry *` that the verifier tracks.
#[inline(always)]
unsafe fn is_agents_folder(dentry: *const c_void) -> bool {
    let name: u64 = unsafe { load(dentry, layout!(dentry_name)) };
    begins_with(name, order(control::AGENT_NAME).to_ne_bytes())
}

/// Whether this is `/proc/AGENT/task/THREAD`.
///
/// # Safety
/// As for [`is_agents_folder`].
#[inline(always)]
unsafe fn is_agents_thread(dentry: *const c_void) -> bool {
    unsafe {
        let tasks: *const c_void = load(dentry, layout!(dentry_parent));
        is_agents_folder(load(tasks, layout!(dentry_parent)))
    }
}

/// The TPM's device, opened by somebody else.
///
/// # Safety
/// `inode` is the device's `struct inode *`, which the verifier tracks.
#[inline(always)]
pub unsafe fn tpm(inode: *const c_void) -> i32 {
    if !is_on() || task::is_agent() || is_heir() {
        return 0;
    }
    let device = unsafe { load::<u32>(inode, layout!(inode_rdev)) };
    refuse(kind::ATTEMPT_TPM, u64::from(device))
}

/// Whether the agent is kept from others.
#[inline(always)]
pub fn is_on() -> bool {
    order(control::PROTECT) != 0
}

/// Records the attempt, with a number that belongs to it in the place of a size, and refuses it.
#[inline(always)]
pub fn refuse(kind: u32, number: u64) -> i32 {
    let own: Outcome = task::own_digest();
    let mut facts = Facts::of_buffer(kind, number, own);
    facts.flags = flags::REFUSED;
    count(counter::REFUSED);
    submit(&facts, |_| 0);
    -EPERM
}

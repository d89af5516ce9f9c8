//! Whose task is this? The agent is told by its id and its start: a reused id is somebody else.

use core::ffi::c_void;

use assay_ebpf::control;
use aya_ebpf::bindings::inode;
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::helpers::generated::bpf_get_current_task_btf;

use crate::file::known_digest;
use crate::gate::order;
use crate::kernel::{layout, load};
use crate::queue::Outcome;

/// Nanoseconds of a tick of USER_HZ, in which `/proc/PID/stat` tells a start.
const TICK: u64 = 10_000_000;

/// Whether the calling task belongs to the agent.
#[inline(always)]
pub fn is_agent() -> bool {
    let agent = order(control::AGENT);
    if agent == 0 || bpf_get_current_pid_tgid() >> 32 != agent {
        return false;
    }
    // SAFETY: the helper's answer is the calling task, which the verifier tracks.
    unsafe { started_as_agent(bpf_get_current_task_btf().cast()) }
}

/// Whether `task` belongs to the agent.
///
/// # Safety
/// `task` is a `struct task_struct *` that the verifier tracks.
#[inline(always)]
pub unsafe fn is_agents(task: *const c_void) -> bool {
    let agent = order(control::AGENT);
    unsafe { agent != 0 && u64::from(load::<u32>(task, layout!(task_tgid))) == agent && started_as_agent(task) }
}

/// # Safety
/// As for [`is_agents`].
#[inline(always)]
unsafe fn started_as_agent(task: *const c_void) -> bool {
    unsafe {
        let leader: *const c_void = load(task, layout!(task_leader));
        load::<u64>(leader, layout!(task_start)) / TICK == order(control::AGENT_START)
    }
}

/// The digest of the program that the calling task runs, if it was measured. Only from programs that do not sleep:
/// elsewhere the verifier does not follow the way from task to file.
#[inline(always)]
pub fn own_digest() -> Outcome {
    // SAFETY: the helper's answer is the calling task, which the verifier tracks.
    unsafe { digest_of(bpf_get_current_task_btf().cast()) }
}

/// The same for another task.
///
/// # Safety
/// `task` is a `struct task_struct *` that the verifier tracks.
#[inline(always)]
pub unsafe fn digest_of(task: *const c_void) -> Outcome {
    const ENODATA: i32 = 61;
    // SAFETY: each step starts from a pointer that the verifier tracks, and is checked before it is followed.
    unsafe {
        let memory: *const c_void = load(task, layout!(task_mm));
        if memory.is_null() {
            return Outcome::failed(ENODATA);
        }
        let file: *const c_void = load(memory, layout!(mm_exe_file));
        if file.is_null() {
            return Outcome::failed(ENODATA);
        }
        let inode: *const c_void = load(file, layout!(file_inode));
        known_digest(inode.cast_mut().cast::<inode>()).unwrap_or(Outcome::failed(ENODATA))
    }
}

/// Whether this task is frozen with its control group, or about to be.
///
/// # Safety
/// `task` is a `struct task_struct *` that the verifier tracks.
#[inline(always)]
pub unsafe fn is_frozen(task: *const c_void) -> bool {
    /// `JOBCTL_TRAP_FREEZE` (include/linux/sched/jobctl.h).
    const TRAP_FREEZE: u64 = 1 << 23;
    unsafe { load::<u64>(task, layout!(task_jobctl)) & TRAP_FREEZE != 0 }
}

/// Whether somebody traces the calling task.
#[inline(always)]
pub fn is_traced() -> bool {
    // SAFETY: the helper's answer is the calling task, which the verifier tracks.
    unsafe { load::<u32>(bpf_get_current_task_btf().cast(), layout!(task_ptrace)) != 0 }
}

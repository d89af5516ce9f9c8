//! Records on their way to the agent.

use core::ffi::c_void;

use assay_ebpf::probe_record::{HEADER_SIZE, Layout, NAMES, Record, counter};
use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::BPF_F_CURRENT_CPU;
use aya_ebpf::helpers::generated::{bpf_get_current_comm, bpf_get_current_task, bpf_perf_event_output};
use aya_ebpf::helpers::{
    bpf_get_current_cgroup_id, bpf_get_current_pid_tgid, bpf_get_current_uid_gid, bpf_ktime_get_ns,
};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{PerCpuArray, PerfEventByteArray};

use crate::kernel::{bounded, read};

#[map]
static EVENTS: PerfEventByteArray = PerfEventByteArray::new(0);

/// A record is too large for the stack. A probe runs to its end before another one begins on its CPU.
#[map]
static SCRATCH: PerCpuArray<Record> = PerCpuArray::with_max_entries(1, 0);

#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(counter::COUNT, 0);

/// The record to fill in: kind is set, there are no flags, names or size yet.
#[inline(always)]
pub fn begin(kind: u32) -> Option<*mut Record> {
    let record = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: a map value of this CPU.
    unsafe {
        (*record).kind = kind;
        (*record).flags = 0;
        (*record).size = 0;
        (*record).names_len = 0;
    }
    Some(record)
}

/// Sends it, numbered; counts it if there is no room. False = it was not sent.
#[inline(always)]
pub fn send(ctx: &impl EbpfContext, layout: &Layout, record: *mut Record) -> bool {
    let Some(next) = COUNTERS.get_ptr_mut(counter::SEQ) else {
        return false;
    };
    // SAFETY: map values of this CPU.
    unsafe {
        (*record).time_ns = bpf_ktime_get_ns();
        (*record).seq = *next;
        (*record).cgroup = bpf_get_current_cgroup_id();
        (*record).mount_ns = mount_namespace(layout);
        (*record).pid = (bpf_get_current_pid_tgid() >> 32) as u32;
        (*record).uid = bpf_get_current_uid_gid() as u32;
        // All 16 bytes are written, also on failure.
        bpf_get_current_comm((&raw mut (*record).comm).cast(), 16);
        const MASK: i32 = NAMES as i32 - 1;
        let size = bounded::<MASK>((*record).names_len as u64) + HEADER_SIZE as u64;
        let events = (&raw const EVENTS).cast_mut().cast::<c_void>();
        let flags = BPF_F_CURRENT_CPU as u64;
        if bpf_perf_event_output(ctx.as_ptr(), events, flags, record.cast(), size) == 0 {
            *next += 1;
            return true;
        }
        if let Some(lost) = COUNTERS.get_ptr_mut(counter::LOST) {
            *lost += 1;
        }
        false
    }
}

/// Number of the current task's mount namespace; 0 for a task that is on its way out.
#[inline(always)]
fn mount_namespace(layout: &Layout) -> u32 {
    // SAFETY: a helper without arguments.
    let task = unsafe { bpf_get_current_task() };
    let namespaces: u64 = read(task, layout.task_nsproxy);
    let mounts: u64 = read(namespaces, layout.nsproxy_mount);
    read(mounts, layout.mount_namespace_number)
}

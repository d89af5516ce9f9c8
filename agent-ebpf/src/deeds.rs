//! What a running program does that no load tells: memory made executable, devices opened, code written to.
//!
//! The record's digest is that of the program which does it, where that was measured; the agent adds what is missing.

use core::ffi::c_void;

use assay_ebpf::{MAX_DEVICES, control, counter, flags, kind};
use aya_ebpf::bindings::inode;
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::helpers::generated::bpf_get_current_task_btf;
use aya_ebpf::macros::{lsm, map};
use aya_ebpf::maps::{HashMap, LruHashMap};
use aya_ebpf::programs::LsmContext;

use crate::file::{known_digest, marks_of, path_of};
use crate::gate::{self, EPERM, order};
use crate::guard;
use crate::kernel::{Identity, first_is_null, layout, load};
use crate::queue::{Facts, Outcome, count, submit};
use crate::task;

/// Character devices by number: [`kind::DEVICE`] to record who opens them, [`kind::ATTEMPT_TPM`] to keep others out.
#[map]
static DEVICES: HashMap<u64, u32> = HashMap::with_max_entries(MAX_DEVICES, 0);

/// Processes that were recorded for memory without a file, with the memory they had: one record a program run.
#[map]
static TOLD: LruHashMap<u64, u64> = LruHashMap::with_max_entries(4096, 0);

const PROT_EXEC: u64 = 4;
/// `VM_EXEC` (include/linux/mm.h).
const VM_EXEC: u64 = 4;
const ENODATA: i32 = 61;

/// `mprotect` that makes a mapping executable which was not.
#[lsm(hook = "file_mprotect")]
pub fn protect(ctx: LsmContext) -> i32 {
    let vma: *const c_void = ctx.arg(0);
    let prot: u64 = ctx.arg(2);
    // SAFETY: the hook's argument is a `struct vm_area_struct *`.
    unsafe {
        if prot & PROT_EXEC == 0 || load::<u64>(vma, layout!(vma_flags)) & VM_EXEC != 0 {
            return 0;
        }
        let file: *const c_void = load(vma, layout!(vma_file));
        if file.is_null() {
            return anonymous();
        }
        let inode: *const c_void = load(file, layout!(file_inode));
        let identity = Identity::of(inode);
        let hash = known_digest(inode.cast_mut().cast::<inode>()).unwrap_or(Outcome::failed(ENODATA));
        let mut facts = Facts::of_file(inode, kind::PROTECT, marks_of(&identity), hash, 0);
        // Pages of its own: what becomes executable need not be what the file holds.
        let modified = load::<u64>(vma, layout!(vma_anon)) != 0;
        if modified {
            facts.flags |= flags::MODIFIED;
        }
        let answer = if modified && order(control::DENY_ANONYMOUS) != 0 {
            -EPERM
        } else if !gate::closed() || modified {
            0
        } else if hash.error != 0 {
            -EPERM
        } else {
            gate::answer(&hash.digest, true)
        };
        if answer < 0 {
            facts.flags |= flags::REFUSED;
            count(counter::REFUSED);
        }
        gate::unless_lost(answer, submit(&facts, |_| 0))
    }
}

/// Memory that is executable from the start, without a file.
#[lsm(hook = "mmap_file")]
pub fn anonymous_mapping(ctx: LsmContext) -> i32 {
    let prot: u64 = ctx.arg(2);
    if prot & PROT_EXEC != 0 && first_is_null(&ctx) {
        anonymous()
    } else {
        0
    }
}

/// One record for each run of a program; refused each time, where that is wanted.
#[inline(always)]
fn anonymous() -> i32 {
    let refused = order(control::DENY_ANONYMOUS) != 0;
    let process = bpf_get_current_pid_tgid() >> 32;
    // SAFETY: the calling task, of which a pointer is read as a number.
    let memory: u64 = unsafe { load(bpf_get_current_task_btf().cast(), layout!(task_mm)) };
    // SAFETY: one aligned word, which is only compared.
    if unsafe { TOLD.get(&process) }.is_some_and(|told| *told == memory) {
        return if refused { -EPERM } else { 0 };
    }
    let mut facts = Facts::of_buffer(kind::ANONYMOUS, 0, task::own_digest());
    if refused {
        facts.flags |= flags::REFUSED;
        count(counter::REFUSED);
    }
    if submit(&facts, |_| 0) {
        let _ = TOLD.insert(process, &memory, 0);
        return if refused { -EPERM } else { 0 };
    }
    gate::unless_lost(if refused { -EPERM } else { 0 }, false)
}

/// A file is opened. Reading an ordinary file leaves after two comparisons.
#[lsm(hook = "file_open")]
pub fn opened(ctx: LsmContext) -> i32 {
    const FMODE_WRITE: u32 = 2;
    const S_IFMT: u16 = 0o170_000;
    const S_IFCHR: u16 = 0o020_000;
    const S_IFBLK: u16 = 0o060_000;
    const S_IFREG: u16 = 0o100_000;
    let file: *const c_void = ctx.arg(0);
    // SAFETY: the hook's argument is a `struct file *`, which has its inode.
    unsafe {
        let inode: *const c_void = load(file, layout!(file_inode));
        let mode = load::<u16>(inode, layout!(inode_mode)) & S_IFMT;
        if mode == S_IFCHR {
            return character(file, inode);
        }
        if load::<u32>(file, layout!(file_mode)) & FMODE_WRITE == 0 {
            return 0;
        }
        if mode == S_IFREG {
            return written(file, inode);
        }
        if mode == S_IFBLK && !task::is_agent() {
            return record_device(file, inode, kind::BLOCK_WRITE);
        }
        0
    }
}

/// # Safety
/// `file` and `inode` are pointers that the verifier tracks.
#[inline(always)]
unsafe fn character(file: *const c_void, inode: *const c_void) -> i32 {
    unsafe {
        let device = u64::from(load::<u32>(inode, layout!(inode_rdev)));
        match DEVICES.get(&device) {
            Some(&kind::ATTEMPT_TPM) => guard::tpm(inode),
            Some(_) if !task::is_agent() => record_device(file, inode, kind::DEVICE),
            _ => 0,
        }
    }
}

/// # Safety
/// As for [`character`].
#[inline(always)]
unsafe fn record_device(file: *const c_void, inode: *const c_void, kind: u32) -> i32 {
    unsafe {
        let mut facts = Facts::of_buffer(kind, 0, task::own_digest());
        facts.dev = load(inode, layout!(inode_rdev));
        gate::unless_lost(0, submit(&facts, |out| path_of(file, out)))
    }
}

/// An ordinary file is opened for writing: one of the kernel's own, or one that was measured and is mapped.
///
/// # Safety
/// As for [`character`].
#[inline(always)]
unsafe fn written(file: *const c_void, inode: *const c_void) -> i32 {
    unsafe {
        let identity = Identity::of(inode);
        let answer = guard::knob(file, inode, identity.magic);
        if answer != 0 {
            return answer;
        }
        let mapping: *const c_void = load(inode, layout!(inode_mapping));
        if load::<u64>(mapping, layout!(mapping_mapped)) == 0 {
            return 0;
        }
        let Some(hash) = known_digest(inode.cast_mut().cast::<inode>()) else {
            return 0;
        };
        let facts = Facts::of_file(inode, kind::CODE_WRITE, marks_of(&identity), hash, 0);
        gate::unless_lost(0, submit(&facts, |out| path_of(file, out)))
    }
}

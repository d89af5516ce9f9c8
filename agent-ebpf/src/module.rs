//! What the kernel itself takes in: modules, firmware and the next kernel, hashed over the very buffer that it is about
//! to use, and let through or refused by that digest.

use core::ffi::c_void;

use assay_ebpf::{PATH_MAX, counter, flags, kind};
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use aya_ebpf::macros::{lsm, map};
use aya_ebpf::maps::LruHashMap;
use aya_ebpf::programs::LsmContext;

use crate::file::{marks_of, path_of};
use crate::gate::{self, EPERM};
use crate::kernel::{Identity, State, first_is_null, is_id, layout, load};
use crate::queue::{Facts, Outcome, count, submit};
use crate::sha256;

/// The path of a module file between the two hooks that see it: the first may ask for a path but has no content, the
/// second has the content but may not ask. A hint for people; whom it belongs to is checked when it is taken.
#[repr(C)]
pub struct Hint {
    ino: u64,
    dev: u32,
    generation: u32,
    /// Not 0: it is a packed module, which was let through.
    passed: u64,
    /// What `bpf_d_path` returned.
    used: i64,
    path: [u8; PATH_MAX],
}

/// By task. Entries of tasks that died in between are the first to go when it is full.
#[map]
static HINTS: LruHashMap<u64, Hint> = LruHashMap::with_max_entries(128, 0);

static NO_HINT: Hint = Hint {
    ino: 0,
    dev: 0,
    generation: 0,
    passed: 0,
    used: -1,
    path: [0; PATH_MAX],
};

/// Before a file is read: a module, firmware, a kernel for kexec.
#[lsm(hook = "kernel_read_file", sleepable)]
pub fn module_path(ctx: LsmContext) -> i32 {
    let file: *const c_void = ctx.arg(0);
    let id: u64 = ctx.arg(1);
    if kind_of(id) != 0 && !first_is_null(&ctx) && !file.is_null() {
        // SAFETY: the hook's argument is a `struct file *`, and not NULL.
        unsafe { remember(file) };
    }
    0
}

/// With the bytes that were read. A kernel that unpacks modules itself calls it for the packed file; newer ones call it
/// again for the image.
#[lsm(hook = "kernel_post_read_file")]
pub fn module_file(ctx: LsmContext) -> i32 {
    let file: *const c_void = ctx.arg(0);
    let buffer: u64 = ctx.arg(1);
    let size: u64 = ctx.arg(2);
    let kind = kind_of(ctx.arg(3));
    if kind == 0 {
        return 0;
    }
    let mut facts = Facts::of_buffer(kind, size, sha256::hash(buffer, size));
    if first_is_null(&ctx) || file.is_null() {
        return gated(&mut facts, |_, _| -1);
    }
    // SAFETY: the hook's argument is a `struct file *`, and not NULL.
    unsafe {
        let inode: *const c_void = load(file, layout!(file_inode));
        let state = State::of(inode);
        let identity = Identity::of(inode);
        facts.ino = identity.ino;
        facts.change = state.change;
        facts.fs_magic = identity.magic;
        facts.dev = identity.dev;
        facts.generation = state.generation;
        facts.flags = marks_of(&identity);
    }
    if kind == kind::MODULE_FILE && is_unpacked(&facts) {
        // What this was unpacked from has been let through, and it follows from that.
        return ungated(&facts, recall);
    }
    let answer = gated(&mut facts, recall);
    if kind == kind::MODULE_COMPRESSED && answer == 0 {
        let_through(&facts);
    }
    answer
}

/// `init_module`: the kernel's copy of a buffer from user memory. There is no file.
#[lsm(hook = "kernel_post_load_data")]
pub fn module_buffer(ctx: LsmContext) -> i32 {
    let buffer: u64 = ctx.arg(0);
    let size: u64 = ctx.arg(1);
    if !is_id(ctx.arg(2), layout!(loading_module)) {
        return 0;
    }
    let mut facts = Facts::of_buffer(kind::MODULE_BUFFER, size, sha256::hash(buffer, size));
    gated(&mut facts, |_, _| 0)
}

/// `kexec_load`: a kernel in pieces of user memory, which no hook sees.
#[lsm(hook = "kernel_load_data")]
pub fn kexec(ctx: LsmContext) -> i32 {
    const EOPNOTSUPP: i32 = 95;
    if !is_id(ctx.arg(0), layout!(loading_kexec_image)) {
        return 0;
    }
    let mut facts = Facts::of_buffer(kind::KEXEC_LOAD, 0, Outcome::failed(EOPNOTSUPP));
    gated(&mut facts, |_, _| 0)
}

/// Records it, and answers whether it may be loaded.
#[inline(always)]
fn gated(facts: &mut Facts, path: impl FnOnce(&Facts, *mut u8) -> i64) -> i32 {
    let answer = if !gate::closed() {
        0
    } else if facts.hash.error != 0 {
        -EPERM
    } else {
        gate::answer(&facts.hash.digest, true)
    };
    if answer < 0 {
        facts.flags |= flags::REFUSED;
        count(counter::REFUSED);
    }
    let facts: &Facts = facts;
    gate::unless_lost(answer, submit(facts, |out| path(facts, out)))
}

/// Records it, and lets it through if it was recorded.
#[inline(always)]
fn ungated(facts: &Facts, path: impl FnOnce(&Facts, *mut u8) -> i64) -> i32 {
    gate::unless_lost(0, submit(facts, |out| path(facts, out)))
}

/// The record's kind for an id of `enum kernel_read_file_id`; 0 = nothing that runs.
#[inline(always)]
fn kind_of(id: u64) -> u32 {
    if is_id(id, layout!(reading_module)) {
        kind::MODULE_FILE
    } else if is_id(id, layout!(reading_module_compressed)) {
        kind::MODULE_COMPRESSED
    } else if is_id(id, layout!(reading_firmware)) {
        kind::FIRMWARE
    } else if is_id(id, layout!(reading_kexec_image)) {
        kind::KEXEC_IMAGE
    } else if is_id(id, layout!(reading_kexec_initramfs)) {
        kind::KEXEC_INITRAMFS
    } else {
        0
    }
}

/// Whether this task was let through with the packed file that `facts` has in its file's place.
#[inline(always)]
fn is_unpacked(facts: &Facts) -> bool {
    // SAFETY: a map value, as in `remember`.
    HINTS
        .get_ptr(bpf_get_current_pid_tgid())
        .is_some_and(|hint| unsafe { (*hint).passed != 0 && is_about(hint, facts) })
}

/// Remembers that the packed file was let through.
#[inline(always)]
fn let_through(facts: &Facts) {
    if let Some(hint) = HINTS.get_ptr_mut(bpf_get_current_pid_tgid()) {
        // SAFETY: a map value, as in `remember`.
        unsafe {
            if is_about(hint, facts) {
                (*hint).passed = 1;
            }
        }
    }
}

/// # Safety
/// `hint` is a map value.
#[inline(always)]
unsafe fn is_about(hint: *const Hint, facts: &Facts) -> bool {
    unsafe { (*hint).ino == facts.ino && (*hint).dev == facts.dev && (*hint).generation == facts.generation }
}

/// # Safety
/// `file` is a `struct file *` that the verifier tracks; only from a hook that may sleep.
#[inline(always)]
unsafe fn remember(file: *const c_void) {
    let task = bpf_get_current_pid_tgid();
    // A failure leaves no path, which the record then says.
    let _ = HINTS.insert(task, &NO_HINT, 0);
    if let Some(hint) = HINTS.get_ptr_mut(task) {
        // SAFETY: a map value; another task writes it only if 128 others loaded modules in this instant.
        unsafe {
            let inode: *const c_void = load(file, layout!(file_inode));
            let identity = Identity::of(inode);
            (*hint).ino = identity.ino;
            (*hint).dev = identity.dev;
            (*hint).generation = load(inode, layout!(inode_generation));
            (*hint).used = path_of(file, (&raw mut (*hint).path).cast());
        }
    }
}

/// Writes the remembered path to `out` if it is this file's, and returns its length, NUL included, or an errno.
#[inline(always)]
fn recall(facts: &Facts, out: *mut u8) -> i64 {
    let Some(hint) = HINTS.get_ptr(bpf_get_current_pid_tgid()) else {
        return -1;
    };
    // SAFETY: a map value, as in `remember`; `out` has room for PATH_MAX bytes.
    unsafe {
        if !is_about(hint, facts) {
            return -1;
        }
        let source = (&raw const (*hint).path).cast::<c_void>();
        if bpf_probe_read_kernel(out.cast(), PATH_MAX as u32, source) == 0 {
            (*hint).used
        } else {
            -1
        }
    }
}

//! Kernel modules: hashed over the very buffer that the kernel is about to load.

use core::ffi::c_void;

use assay_ebpf::{PATH_MAX, flags, kind};
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use aya_ebpf::macros::{lsm, map};
use aya_ebpf::maps::LruHashMap;
use aya_ebpf::programs::LsmContext;

use crate::file::path_of;
use crate::kernel::{Identity, State, is_id, layout, load};
use crate::queue::{Facts, submit};
use crate::sha256;

/// The path of a module file between the two hooks that see it: the first may ask for a path but has no content, the
/// second has the content but may not ask. A hint for people; whom it belongs to is checked when it is taken.
#[repr(C)]
pub struct Hint {
    ino: u64,
    dev: u32,
    generation: u32,
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
    used: -1,
    path: [0; PATH_MAX],
};

/// `finit_module`, before the file is read.
#[lsm(hook = "kernel_read_file", sleepable)]
pub fn module_path(ctx: LsmContext) -> i32 {
    let file: *const c_void = ctx.arg(0);
    let id: u64 = ctx.arg(1);
    if !file.is_null() && module_kind(id) != 0 {
        // SAFETY: the hook's argument is a `struct file *`, and not NULL.
        unsafe { remember(file) };
    }
    0
}

/// `finit_module`, with the bytes that were read. A kernel that unpacks modules itself calls it for the packed file;
/// newer ones call it again for the image.
#[lsm(hook = "kernel_post_read_file")]
pub fn module_file(ctx: LsmContext) -> i32 {
    let file: *const c_void = ctx.arg(0);
    let buffer: u64 = ctx.arg(1);
    let size: u64 = ctx.arg(2);
    let kind = module_kind(ctx.arg(3));
    if kind == 0 {
        return 0;
    }
    let mut facts = Facts::of_buffer(kind, size, sha256::hash(buffer, size));
    if file.is_null() {
        submit(&facts, |_| -1);
        return 0;
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
        facts.flags = if identity.links == 0 { flags::UNLINKED } else { 0 };
    }
    submit(&facts, |out| recall(&facts, out));
    0
}

/// `init_module`: the kernel's copy of a buffer from user memory. There is no file.
#[lsm(hook = "kernel_post_load_data")]
pub fn module_buffer(ctx: LsmContext) -> i32 {
    let buffer: u64 = ctx.arg(0);
    let size: u64 = ctx.arg(1);
    if is_id(ctx.arg(2), layout!(loading_module)) {
        let facts = Facts::of_buffer(kind::MODULE_BUFFER, size, sha256::hash(buffer, size));
        submit(&facts, |_| 0);
    }
    0
}

/// The record's kind for an id of `enum kernel_read_file_id`; 0 = not a module.
#[inline(always)]
fn module_kind(id: u64) -> u32 {
    if is_id(id, layout!(reading_module)) {
        kind::MODULE_FILE
    } else if is_id(id, layout!(reading_module_compressed)) {
        kind::MODULE_COMPRESSED
    } else {
        0
    }
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
        if (*hint).ino != facts.ino || (*hint).dev != facts.dev || (*hint).generation != facts.generation {
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

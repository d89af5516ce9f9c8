//! Programs and executable mappings: hashed by the kernel's own `bpf_ima_file_hash`, once per state of an inode.

use core::ffi::{c_long, c_void};

use assay_ebpf::{HASH_ALGO_SHA256, HASH_LIMIT, PATH_MAX, counter, flags, kind};
use aya_ebpf::bindings::{inode, path};
use aya_ebpf::btf_maps::InodeStorage;
use aya_ebpf::helpers::generated::{bpf_d_path, bpf_ima_file_hash};
use aya_ebpf::macros::{btf_map, lsm};
use aya_ebpf::programs::LsmContext;

use crate::kernel::{Identity, State, layout, load, writers};
use crate::queue::{Facts, Outcome, count, submit};

/// The state in which an inode's content was last measured and queued. Kept in the inode's own memory: it goes when
/// the inode goes, and no path or number can be mistaken for another. An entry is never changed in place, only
/// deleted and made anew, so that no reader sees half of one.
#[btf_map]
static CACHE: InodeStorage<State> = InodeStorage::new();

/// Once for a program, once more for each `#!` interpreter: `bprm->file` is the one that is looked at. By now the
/// kernel keeps writers away from it.
#[lsm(hook = "bprm_check_security", sleepable)]
pub fn program(ctx: LsmContext) -> i32 {
    let bprm: *const c_void = ctx.arg(0);
    // SAFETY: the hook's argument is a `struct linux_binprm *`, with a file in it.
    unsafe { measure(load(bprm, layout!(bprm_file)), kind::PROGRAM) };
    0
}

/// Libraries, the ELF interpreter, `dlopen`: whatever file gets mapped executable. `prot` is what will be in force, not
/// only what was asked for (READ_IMPLIES_EXEC).
#[lsm(hook = "mmap_file", sleepable)]
pub fn mapping(ctx: LsmContext) -> i32 {
    const PROT_EXEC: u64 = 4;
    let file: *const c_void = ctx.arg(0);
    let prot: u64 = ctx.arg(2);
    if !file.is_null() && prot & PROT_EXEC != 0 {
        // SAFETY: the hook's argument is a `struct file *`, and not NULL.
        unsafe { measure(file, kind::MAPPING) };
    }
    0
}

/// # Safety
/// `file` is a `struct file *` that the verifier tracks.
#[inline(always)]
unsafe fn measure(file: *const c_void, kind: u32) {
    unsafe {
        let inode: *const c_void = load(file, layout!(file_inode));
        let before = State::of(inode);
        let known = CACHE.get_ptr_mut(inode.cast_mut().cast::<inode>());
        if !known.is_null() && *known == before && writers(inode) <= 0 {
            count(counter::CACHE_HIT);
            return;
        }
        let identity = Identity::of(inode);
        let hash = hash(file, &identity, before.size);
        // bpf_ima_file_hash asks for the change cookie before it reads, and from then on every change moves it.
        let after = State::of(inode);
        let unstable = after != before || writers(inode) > 0;
        let unlinked = identity.links == 0;
        let facts = Facts {
            kind,
            flags: if unstable { flags::UNSTABLE } else { 0 } | if unlinked { flags::UNLINKED } else { 0 },
            size: after.size,
            ino: identity.ino,
            change: after.change,
            fs_magic: identity.magic,
            dev: identity.dev,
            generation: after.generation,
            hash,
        };
        let queued = submit(&facts, |out| path_of(file, out));
        if !known.is_null() {
            let _ = CACHE.delete(inode.cast_mut().cast::<inode>());
        }
        // Only what is in the queue counts as measured. A memfd or deleted file never does: it can be written through
        // a mapping that moves neither cookie nor time.
        if queued && facts.hash.error == 0 && !unstable && !unlinked {
            let mut state = after;
            let _ = CACHE.get_or_insert_ptr_mut(inode.cast_mut().cast::<inode>(), Some(&mut state));
        }
    }
}

/// # Safety
/// As for [`measure`].
#[inline(always)]
unsafe fn hash(file: *const c_void, identity: &Identity, size: u64) -> Outcome {
    const ENODEV: i32 = 19;
    const EFBIG: i32 = 27;
    const EBADMSG: i32 = 74;
    if !identity.is_regular() {
        return Outcome::failed(ENODEV);
    }
    if identity.links == 0 && size > HASH_LIMIT {
        return Outcome::failed(EFBIG);
    }
    let mut digest = [0_u64; 4];
    // SAFETY: 32 writable bytes, and a file that the verifier tracks.
    let answer: c_long = unsafe { bpf_ima_file_hash(file.cast_mut().cast(), (&raw mut digest).cast::<c_void>(), 32) };
    if answer == c_long::from(HASH_ALGO_SHA256) {
        Outcome {
            algo: HASH_ALGO_SHA256,
            error: 0,
            digest,
        }
    } else if answer < 0 {
        Outcome {
            algo: HASH_ALGO_SHA256,
            error: answer as i32,
            digest: [0; 4],
        }
    } else {
        Outcome {
            algo: answer as u32,
            error: -EBADMSG,
            digest: [0; 4],
        }
    }
}

/// Writes the file's path and its NUL to `out`, a place of [`PATH_MAX`] bytes, and returns the length or an errno.
///
/// # Safety
/// As for [`measure`]; only from a hook that may sleep, as the kernel allows `bpf_d_path` nowhere else.
#[inline(always)]
pub unsafe fn path_of(file: *const c_void, out: *mut u8) -> i64 {
    unsafe {
        let path = file.byte_add(layout!(file_path) as usize).cast_mut().cast::<path>();
        bpf_d_path(path, out.cast(), PATH_MAX as u32)
    }
}

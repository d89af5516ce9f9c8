//! Scripts that an interpreter is given by name: `python3 plugin.py` runs a file that no `execve` sees.
//!
//! The first file that a configured interpreter opens and that one of its arguments names is taken for its script. Where an
//! argument names a link, the name that the link leads to counts as well.

use core::ffi::c_void;
use core::ptr::{read_volatile, write_volatile};

use assay_ebpf::{MAX_INTERPRETERS, flags, kind};
use aya_ebpf::bindings::inode;
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::helpers::generated::{
    bpf_get_current_task_btf, bpf_probe_read_kernel, bpf_probe_read_kernel_str, bpf_probe_read_user,
};
use aya_ebpf::macros::{lsm, map};
use aya_ebpf::maps::{HashMap, LruHashMap};
use aya_ebpf::programs::LsmContext;

use crate::file::{known_digest, marks_of, measure_argument, path_of};
use crate::gate;
use crate::kernel::{Identity, layout, load};
use crate::queue::{Facts, Outcome, submit};

/// Bytes of arguments that are looked at.
const WORDS: u64 = 1024;
/// Rounds of each of two nested loops over them.
const FAN: u32 = 32;
/// Longest file name, with its NUL.
const NAME: usize = 256;

const _: () = assert!(FAN as u64 * FAN as u64 == WORDS);

/// Interpreters, by inode number and device.
#[map]
static INTERPRETERS: HashMap<[u64; 2], u32> = HashMap::with_max_entries(MAX_INTERPRETERS, 0);

/// Interpreters that have opened their script, with the memory that they had.
#[map]
static STARTED: LruHashMap<u64, u64> = LruHashMap::with_max_entries(4096, 0);

/// Where a link leads that an interpreter was told to run.
#[repr(C)]
struct Trail {
    /// The interpreter's memory: a process that runs something else by now is another one.
    memory: u64,
    /// Bytes of `target`, with its NUL. 0: this file system does not say where its links lead.
    length: u64,
    target: [u8; NAME],
}

/// By process.
#[map]
static TRAILS: LruHashMap<u64, Trail> = LruHashMap::with_max_entries(1024, 0);

static NOWHERE: Trail = Trail {
    memory: 0,
    length: 0,
    target: [0; NAME],
};

/// Where names are compared.
#[repr(C)]
struct Desk {
    /// Bytes of `words` in use.
    length: u64,
    /// Bytes of the name that the current part of a word has matched.
    matched: u32,
    /// Not 0: it has matched so far.
    good: u32,
    /// Words that are over.
    word: u32,
    pad: u32,
    name: [u8; NAME],
    words: [u8; WORDS as usize],
}

/// By task.
#[map]
static DESKS: LruHashMap<u64, Desk> = LruHashMap::with_max_entries(128, 0);

static CLEAN: Desk = Desk {
    length: 0,
    matched: 0,
    good: 1,
    word: 0,
    pad: 0,
    name: [0; NAME],
    words: [0; WORDS as usize],
};

/// A link is followed, by anybody: everybody but an interpreter that has not begun yet leaves at once.
#[lsm(hook = "inode_follow_link")]
pub fn link(ctx: LsmContext) -> i32 {
    let dentry: *const c_void = ctx.arg(0);
    let inode: *const c_void = ctx.arg(1);
    // SAFETY: the hook's arguments are a `struct dentry *` and a `struct inode *`.
    unsafe {
        let memory = beginner();
        if memory.is_null() || !is_told(memory, load(dentry, layout!(dentry_name))) {
            return 0;
        }
        let process = bpf_get_current_pid_tgid() >> 32;
        let _ = TRAILS.insert(process, &NOWHERE, 0);
        if let Some(trail) = TRAILS.get_ptr_mut(process) {
            let text: u64 = load(inode, layout!(inode_link));
            let target = (&raw mut (*trail).target).cast::<c_void>();
            // Short ones lie in memory, the others somewhere on the disk.
            let read = if text == 0 {
                0
            } else {
                bpf_probe_read_kernel_str(target, NAME as u32, text as *const c_void)
            };
            (*trail).length = if read > 0 { read as u64 } else { 0 };
            (*trail).memory = memory as u64;
        }
    }
    0
}

/// A file was opened, and can be read (Linux 6.9 and later).
#[lsm(hook = "file_post_open", sleepable)]
pub fn argument(ctx: LsmContext) -> i32 {
    let file: *const c_void = ctx.arg(0);
    // SAFETY: the hook's argument is a `struct file *`.
    unsafe {
        if !is_script(file) {
            return 0;
        }
        started(measure_argument(file))
    }
}

/// A file is about to be opened: all that older kernels show. Its content is read by the agent, unless it is known.
#[lsm(hook = "file_open")]
pub fn argument_named(ctx: LsmContext) -> i32 {
    const EOPNOTSUPP: i32 = 95;
    let file: *const c_void = ctx.arg(0);
    // SAFETY: the hook's argument is a `struct file *`.
    unsafe {
        if !is_script(file) {
            return 0;
        }
        let inode: *const c_void = load(file, layout!(file_inode));
        let known = known_digest(inode.cast_mut().cast::<inode>());
        let answer = known.map_or(0, |hash| gate::answer(&hash.digest, true));
        let hash = known.unwrap_or(Outcome::failed(EOPNOTSUPP));
        let mut facts = Facts::of_file(inode, kind::ARGUMENT, marks_of(&Identity::of(inode)), hash, 0);
        if answer < 0 {
            facts.flags |= flags::REFUSED;
        }
        started(gate::unless_lost(answer, submit(&facts, |out| path_of(file, out))))
    }
}

/// The interpreter has its script, if it was let: one that was refused may open it again, as Python does.
///
/// # Safety
/// As for [`is_script`], which said yes.
#[inline(always)]
unsafe fn started(answer: i32) -> i32 {
    if answer == 0 {
        let process = bpf_get_current_pid_tgid() >> 32;
        let memory: u64 = unsafe { load(bpf_get_current_task_btf().cast(), layout!(task_mm)) };
        let _ = STARTED.insert(process, &memory, 0);
    }
    answer
}

/// Whether an interpreter opens the file that it was told to run.
///
/// # Safety
/// `file` is a `struct file *` that the verifier tracks.
#[inline(always)]
unsafe fn is_script(file: *const c_void) -> bool {
    const FMODE_READ: u32 = 1;
    /// `__FMODE_EXEC` in the flags: `execve` opens it, which has a record of its own (include/linux/fs.h).
    const FOR_EXEC: u32 = 0x20;
    unsafe {
        if load::<u32>(file, layout!(file_mode)) & FMODE_READ == 0
            || load::<u32>(file, layout!(file_flags)) & FOR_EXEC != 0
        {
            return false;
        }
        let inode: *const c_void = load(file, layout!(file_inode));
        let memory = beginner();
        if memory.is_null() || !Identity::of(inode).is_regular() {
            return false;
        }
        let dentry: *const c_void = load(file, layout!(file_path) + layout!(path_dentry));
        is_told(memory, load(dentry, layout!(dentry_name)))
    }
}

/// The memory of the calling task if it is an interpreter that has not opened its script yet, or NULL.
///
/// # Safety
/// Only from a hook.
#[inline(always)]
unsafe fn beginner() -> *const c_void {
    unsafe {
        let task: *const c_void = bpf_get_current_task_btf().cast();
        let memory: *const c_void = load(task, layout!(task_mm));
        if memory.is_null() || !runs_interpreter(memory) {
            return core::ptr::null();
        }
        let process = bpf_get_current_pid_tgid() >> 32;
        if STARTED.get(&process).is_some_and(|then| *then == memory as u64) {
            return core::ptr::null();
        }
        memory
    }
}

/// Whether the interpreter was told to run what has this name: by an argument, or by a link that one named.
///
/// # Safety
/// As for [`is_named`].
#[inline(always)]
unsafe fn is_told(memory: *const c_void, name: u64) -> bool {
    unsafe { is_named(memory, name) || is_at_the_end(memory, name) }
}

/// Whether a link that was followed leads to this name.
///
/// # Safety
/// As for [`is_named`].
#[inline(always)]
unsafe fn is_at_the_end(memory: *const c_void, name: u64) -> bool {
    unsafe {
        let process = bpf_get_current_pid_tgid() >> 32;
        let Some(trail) = TRAILS.get_ptr_mut(process) else {
            return false;
        };
        if (*trail).memory != memory as u64 {
            return false;
        }
        if (*trail).length == 0 {
            return true;
        }
        let Some(desk) = desk(name) else {
            return false;
        };
        let length = (*trail).length & (WORDS - 1);
        let (target, text) = ((&raw mut (*desk).words).cast(), (&raw const (*trail).target).cast());
        if length > NAME as u64 || bpf_probe_read_kernel(target, length as u32, text) != 0 {
            return false;
        }
        (*desk).length = length;
        // There is no program's own name before it.
        (*desk).word = 1;
        is_found()
    }
}

/// # Safety
/// `memory` is a `struct mm_struct *` that the verifier lets us read.
#[inline(always)]
unsafe fn runs_interpreter(memory: *const c_void) -> bool {
    unsafe {
        let file: *const c_void = load(memory, layout!(mm_exe_file));
        if file.is_null() {
            return false;
        }
        let inode: *const c_void = load(file, layout!(file_inode));
        let superblock: *const c_void = load(inode, layout!(inode_sb));
        let key = [
            load::<u64>(inode, layout!(inode_ino)),
            u64::from(load::<u32>(superblock, layout!(super_dev))),
        ];
        INTERPRETERS.get(&key).is_some()
    }
}

/// Whether one of the process's arguments ends in this file name.
///
/// # Safety
/// `memory` as for [`runs_interpreter`]; `name` is an address in the kernel.
#[inline(always)]
unsafe fn is_named(memory: *const c_void, name: u64) -> bool {
    unsafe {
        let start: u64 = load(memory, layout!(mm_arg_start));
        let end: u64 = load(memory, layout!(mm_arg_end));
        let Some(desk) = desk(name) else {
            return false;
        };
        let length = if end - start < WORDS { end - start } else { WORDS - 1 };
        let length = length & (WORDS - 1);
        let target = (&raw mut (*desk).words).cast::<c_void>();
        if length == 0 || bpf_probe_read_user(target, length as u32, start as *const c_void) != 0 {
            return false;
        }
        (*desk).length = length;
        is_found()
    }
}

/// A clean desk with the name on it.
///
/// # Safety
/// `name` is an address in the kernel.
#[inline(always)]
unsafe fn desk(name: u64) -> Option<*mut Desk> {
    unsafe {
        let task = bpf_get_current_pid_tgid();
        let _ = DESKS.insert(task, &CLEAN, 0);
        let desk = DESKS.get_ptr_mut(task)?;
        let target = (&raw mut (*desk).name).cast::<c_void>();
        (bpf_probe_read_kernel_str(target, NAME as u32, name as *const c_void) > 0).then_some(desk)
    }
}

/// Whether one of the words on the desk ends in the name.
#[inline(always)]
fn is_found() -> bool {
    let mut span = 0_u32;
    while span < FAN {
        let found = assay_argument_span(span);
        if found != 0 {
            return found > 0;
        }
        span += 1;
    }
    false
}

/// [`FAN`] bytes of the arguments: 1 = the name is there, -1 = it is not, 0 = go on.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn assay_argument_span(span: u32) -> i32 {
    let Some(desk) = DESKS.get_ptr_mut(bpf_get_current_pid_tgid()) else {
        return -1;
    };
    let mut index = 0_u32;
    while index < FAN {
        // SAFETY: this task's own map entry; every index is masked to the array's size.
        unsafe {
            let at = (span * FAN + index) as usize & (WORDS as usize - 1);
            if at as u64 >= (*desk).length {
                return -1;
            }
            let byte = read_volatile((&raw const (*desk).words).cast::<u8>().add(at));
            let matched = read_volatile(&raw const (*desk).matched);
            let expected = read_volatile(
                (&raw const (*desk).name)
                    .cast::<u8>()
                    .add(matched as usize & (NAME - 1)),
            );
            let good = read_volatile(&raw const (*desk).good) != 0;
            if byte == 0 {
                let word = read_volatile(&raw const (*desk).word);
                if good && matched > 0 && expected == 0 && word > 0 {
                    return 1;
                }
                write_volatile(&raw mut (*desk).word, word + 1);
            }
            if byte == 0 || byte == b'/' {
                write_volatile(&raw mut (*desk).matched, 0);
                write_volatile(&raw mut (*desk).good, 1);
            } else if good && byte == expected {
                write_volatile(&raw mut (*desk).matched, matched + 1);
            } else {
                write_volatile(&raw mut (*desk).good, 0);
            }
        }
        index += 1;
    }
    0
}

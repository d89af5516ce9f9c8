//! What a running program does that no load tells: memory made executable, devices opened, code written to.
//!
//! The file of these records is the program's own (but for a mapping that `mprotect` makes executable, and for code that is
//! written to); the names are those of what it opened.

use assay_ebpf::probe_record::{Layout, flags};
use assay_ebpf::{MAX_DEVICES, kind};
use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::helpers::generated::bpf_get_current_task;
use aya_ebpf::macros::{kprobe, map};
use aya_ebpf::maps::{HashMap, LruHashMap};
use aya_ebpf::programs::ProbeContext;

use crate::file::{describe, inode_of, is_known};
use crate::kernel::{bounded, layout, read};
use crate::path::names;
use crate::send::{begin, send};

/// Numbers of the character devices whose openers are told.
#[map]
static DEVICES: HashMap<u32, u32> = HashMap::with_max_entries(MAX_DEVICES, 0);

/// Processes that were told for memory without a file, with the memory they had: one record a program run.
#[map]
static TOLD: LruHashMap<u64, u64> = LruHashMap::with_max_entries(4096, 0);

const PROT_EXEC: u64 = 4;
/// `VM_EXEC` (include/linux/mm.h).
const VM_EXEC: u64 = 4;

/// `mprotect` that makes a mapping of a file executable which was not.
#[kprobe(function = "security_file_mprotect")]
pub fn protect(ctx: ProbeContext) -> u32 {
    if let (Some(layout), Some(vma), Some(prot)) = (layout(), ctx.arg::<u64>(0), ctx.arg::<u64>(2))
        && becomes_executable(layout, vma, prot)
        && let file = read::<u64>(vma, layout.vma_file)
        && file != 0
        && let Some(record) = begin(kind::PROTECT)
    {
        // SAFETY: a map value of this CPU.
        unsafe {
            describe(layout, inode_of(layout, file), &raw mut (*record).file);
            // Pages of its own: what becomes executable need not be what the file holds.
            if read::<u64>(vma, layout.vma_anon) != 0 {
                (*record).flags = flags::MODIFIED;
            }
            names(layout, file, record);
        }
        send(&ctx, layout, record);
    }
    0
}

/// The same for memory without a file. A probe of its own, since one with both paths in it would be too long.
#[kprobe(function = "security_file_mprotect")]
pub fn protect_memory(ctx: ProbeContext) -> u32 {
    if let (Some(layout), Some(vma), Some(prot)) = (layout(), ctx.arg::<u64>(0), ctx.arg::<u64>(2))
        && becomes_executable(layout, vma, prot)
        && read::<u64>(vma, layout.vma_file) == 0
        && let Some(what) = Executable::of(layout, 0)
    {
        what.tell(&ctx, layout);
    }
    0
}

#[inline(always)]
fn becomes_executable(layout: &Layout, vma: u64, prot: u64) -> bool {
    prot & PROT_EXEC != 0 && read::<u64>(vma, layout.vma_flags) & VM_EXEC == 0
}

/// Memory that is, or becomes, executable.
pub struct Executable {
    /// [`kind::MAPPING`] or [`kind::ANONYMOUS`].
    kind: u32,
    /// Its `struct file`; without one, that of the program.
    file: u64,
}

impl Executable {
    /// A mapping of `file`, or memory without one. Nothing = that was told before.
    #[inline(always)]
    pub fn of(layout: &Layout, file: u64) -> Option<Self> {
        let (kind, file) = if file == 0 {
            let memory: u64 = read(current(), layout.task_mm);
            // SAFETY: one aligned word, which is only compared.
            if unsafe { TOLD.get(process()) }.is_some_and(|told| *told == memory) {
                return None;
            }
            (kind::ANONYMOUS, read(memory, layout.memory_program))
        } else {
            (kind::MAPPING, file)
        };
        // Hidden from the compiler, which would write all that follows out once for each kind.
        let kind = bounded::<0xff>(kind as u64) as u32;
        Some(Self { kind, file })
    }

    /// Told, unless it is a mapping in a known state; without a file once for each run of a program.
    #[inline(always)]
    pub fn tell(&self, ctx: &impl EbpfContext, layout: &Layout) {
        let Some(record) = begin(self.kind) else { return };
        // SAFETY: a map value of this CPU.
        unsafe {
            describe(layout, inode_of(layout, self.file), &raw mut (*record).file);
            if self.kind == kind::MAPPING && is_known(&(*record).file, 0) {
                return;
            }
            names(layout, self.file, record);
        }
        if send(ctx, layout, record) && self.kind == kind::ANONYMOUS {
            let memory: u64 = read(current(), layout.task_mm);
            let _ = TOLD.insert(process(), memory, 0);
        }
    }
}

/// A file is opened. Reading an ordinary file leaves after two comparisons.
#[kprobe(function = "security_file_open")]
pub fn opened(ctx: ProbeContext) -> u32 {
    if let (Some(layout), Some(file)) = (layout(), ctx.arg::<u64>(0))
        && let Some(deed) = Deed::of(layout, file)
        && let Some(record) = begin(deed.kind)
    {
        // SAFETY: a map value of this CPU.
        unsafe {
            describe(layout, deed.inode, &raw mut (*record).file);
            // Whoever opens it counts as a writer already.
            if deed.kind == kind::CODE_WRITE && !is_known(&(*record).file, 1) {
                return 0;
            }
            (*record).size = deed.device;
            names(layout, file, record);
        }
        send(&ctx, layout, record);
    }
    0
}

/// What the opening of a file is.
struct Deed {
    kind: u32,
    /// Number of the device.
    device: u64,
    /// Whose content the record is about.
    inode: u64,
}

impl Deed {
    /// Nothing, most of the time.
    #[inline(always)]
    fn of(layout: &Layout, file: u64) -> Option<Self> {
        const FMODE_WRITE: u32 = 2;
        const S_IFMT: u16 = 0o170_000;
        const S_IFCHR: u16 = 0o020_000;
        const S_IFBLK: u16 = 0o060_000;
        const S_IFREG: u16 = 0o100_000;
        let inode = inode_of(layout, file);
        let mode = read::<u16>(inode, layout.inode_mode) & S_IFMT;
        if mode != S_IFCHR && read::<u32>(file, layout.file_mode) & FMODE_WRITE == 0 {
            return None;
        }
        if mode == S_IFREG {
            let mapping: u64 = read(inode, layout.inode_mapping);
            let mapped = read::<u64>(mapping, layout.mapping_mapped) != 0;
            return mapped.then_some(Self {
                kind: kind::CODE_WRITE,
                device: 0,
                inode,
            });
        }
        let device: u32 = read(inode, layout.inode_rdev);
        // SAFETY: only asked whether it is there.
        let kind = if mode == S_IFCHR && unsafe { DEVICES.get(device) }.is_some() {
            kind::DEVICE
        } else if mode == S_IFBLK {
            kind::BLOCK_WRITE
        } else {
            return None;
        };
        // The agent opens disks.
        let is_agent = process() == layout.agent as u64;
        (!is_agent).then(|| Self {
            kind,
            device: device as u64,
            inode: own_program(layout),
        })
    }
}

/// The `struct inode` of the program that runs.
#[inline(always)]
fn own_program(layout: &Layout) -> u64 {
    let memory: u64 = read(current(), layout.task_mm);
    inode_of(layout, read(memory, layout.memory_program))
}

#[inline(always)]
fn process() -> u64 {
    bpf_get_current_pid_tgid() >> 32
}

#[inline(always)]
fn current() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_get_current_task() }
}

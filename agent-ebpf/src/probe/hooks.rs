//! The probes: each on the function that the kernel itself calls to ask its security modules.

use assay_ebpf::kind;
use assay_ebpf::probe_record::{Layout, flags};
use aya_ebpf::macros::kprobe;
use aya_ebpf::programs::ProbeContext;

use crate::deeds::Executable;
use crate::file::{asked, describe, inode_of, is_known};
use crate::kernel::{is_id, layout, read};
use crate::path::names;
use crate::send::{begin, send};

/// Once for a program, once more for each `#!` interpreter.
#[kprobe(function = "security_bprm_check")]
pub fn program(ctx: ProbeContext) -> u32 {
    if let (Some(layout), Some(bprm)) = (layout(), ctx.arg::<u64>(0)) {
        let named: u64 = read(bprm, layout.bprm_filename);
        let interpreter: u64 = read(bprm, layout.bprm_interp);
        let how = if named == interpreter { 0 } else { flags::INTERPRETER };
        load(&ctx, layout, read(bprm, layout.bprm_file), how);
    }
    0
}

/// Libraries, the ELF interpreter, `dlopen`: whatever somebody wants to map executable.
#[kprobe(function = "security_mmap_file")]
pub fn mapping(ctx: ProbeContext) -> u32 {
    const PROT_EXEC: u64 = 4;
    if let (Some(layout), Some(file), Some(prot)) = (layout(), ctx.arg::<u64>(0), ctx.arg::<u64>(1))
        && prot & PROT_EXEC != 0
    {
        if let Some(answer) = asked() {
            // SAFETY: a map value.
            unsafe { describe(layout, inode_of(layout, file), answer) };
        } else if let Some(what) = Executable::of(layout, file) {
            what.tell(&ctx, layout);
        }
    }
    0
}

/// Modules, firmware and kexec images that the kernel read from a file. Each load counts, known or not.
#[kprobe(function = "security_kernel_post_read_file")]
pub fn read_file(ctx: ProbeContext) -> u32 {
    if let (Some(layout), Some(file), Some(size), Some(id)) =
        (layout(), ctx.arg::<u64>(0), ctx.arg::<u64>(2), ctx.arg::<u64>(3))
        && let Some(kind) = read_kind(layout, id)
        && let Some(record) = begin(kind)
    {
        // SAFETY: a map value of this CPU.
        unsafe {
            (*record).size = size;
            if file == 0 {
                (*record).flags = flags::NO_FILE;
            } else {
                describe(layout, inode_of(layout, file), &raw mut (*record).file);
                names(layout, file, record);
            }
        }
        send(&ctx, layout, record);
    }
    0
}

/// `init_module`, `kexec_load`, firmware from user memory: no file, and a probe cannot hash the buffer.
#[kprobe(function = "security_kernel_load_data")]
pub fn load_data(ctx: ProbeContext) -> u32 {
    if let (Some(layout), Some(id)) = (layout(), ctx.arg::<u64>(0))
        && let Some(kind) = load_kind(layout, id)
        && let Some(record) = begin(kind)
    {
        // SAFETY: a map value of this CPU.
        unsafe { (*record).flags = flags::NO_FILE };
        send(&ctx, layout, record);
    }
    0
}

/// A file that is about to run: told, unless its state is known.
#[inline(always)]
fn load(ctx: &ProbeContext, layout: &Layout, file: u64, how: u32) {
    let Some(record) = begin(kind::PROGRAM) else { return };
    // SAFETY: a map value of this CPU.
    unsafe {
        describe(layout, inode_of(layout, file), &raw mut (*record).file);
        if is_known(&(*record).file, 0) {
            return;
        }
        (*record).flags = how;
        names(layout, file, record);
    }
    send(ctx, layout, record);
}

/// The record's kind for an id of `enum kernel_read_file_id`.
#[inline(always)]
fn read_kind(layout: &Layout, id: u64) -> Option<u32> {
    if is_id(id, layout.reading_module) {
        Some(kind::MODULE_FILE)
    } else if is_id(id, layout.reading_module_compressed) {
        Some(kind::MODULE_COMPRESSED)
    } else if is_id(id, layout.reading_firmware) || is_id(id, layout.reading_firmware_prealloc) {
        Some(kind::FIRMWARE)
    } else if is_id(id, layout.reading_kexec_image) {
        Some(kind::KEXEC_IMAGE)
    } else if is_id(id, layout.reading_kexec_initramfs) {
        Some(kind::KEXEC_INITRAMFS)
    } else {
        None
    }
}

/// The record's kind for an id of `enum kernel_load_data_id`.
#[inline(always)]
fn load_kind(layout: &Layout, id: u64) -> Option<u32> {
    if is_id(id, layout.loading_module) {
        Some(kind::MODULE_BUFFER)
    } else if is_id(id, layout.loading_firmware) {
        Some(kind::FIRMWARE)
    } else if is_id(id, layout.loading_kexec_image) {
        Some(kind::KEXEC_LOAD)
    } else {
        None
    }
}

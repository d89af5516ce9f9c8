//! Reading the kernel's structures: offsets from a map that the agent fills in before it attaches anything.

use core::arch::asm;
use core::ffi::c_void;
use core::mem::MaybeUninit;

use assay_ebpf::ABSENT;
use assay_ebpf::probe_record::Layout;
use aya_ebpf::helpers::generated::bpf_probe_read;
use aya_ebpf::macros::map;
use aya_ebpf::maps::Array;

/// One entry. Kernels before 5.2 have no read-only data for programs.
#[map]
static LAYOUT: Array<Layout> = Array::with_max_entries(1, 0);

/// The layout; `None` never happens, and has to be asked for.
#[inline(always)]
pub fn layout() -> Option<&'static Layout> {
    LAYOUT.get(0)
}

/// Reads kernel memory at `base + offset`. An address that cannot be read gives zeros (the helper wipes its output).
#[inline(always)]
pub fn read<T: Copy>(base: u64, offset: u32) -> T {
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: the helper writes all bytes of the value, also when it fails; T is a plain number.
    unsafe {
        read_into(value.as_mut_ptr(), base, offset);
        value.assume_init()
    }
}

/// The same, to where it belongs.
///
/// # Safety
/// `out` is writable for a `T`.
#[inline(always)]
pub unsafe fn read_into<T>(out: *mut T, base: u64, offset: u32) {
    let from = base.wrapping_add(offset as u64) as *const c_void;
    unsafe { bpf_probe_read(out.cast(), size_of::<T>() as u32, from) };
}

/// Whether an id that a hook was given is this enumerator. Ids arrive with rubbish in their upper half on old kernels.
#[inline(always)]
pub fn is_id(given: u64, enumerator: u32) -> bool {
    enumerator != ABSENT && given as u32 == enumerator
}

/// `value & MASK`, in the very register that is used afterwards: the verifiers of old kernels do not carry what a
/// comparison proved from one register to its copy, and the compiler leaves out a mask that it can prove useless.
#[inline(always)]
pub fn bounded<const MASK: i32>(mut value: u64) -> u64 {
    // SAFETY: one instruction on a number.
    unsafe { asm!("{0} &= {mask}", inout(reg) value, mask = const MASK, options(pure, nomem, nostack)) };
    value
}

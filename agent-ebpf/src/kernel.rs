//! Reading kernel structures: offsets from the loader, loads that the verifier checks.

use core::arch::asm;
use core::ffi::c_void;
use core::mem::MaybeUninit;
use core::ptr::read_volatile;

use assay_ebpf::{ABSENT, Layout};
use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::{bpf_get_smp_processor_id, bpf_probe_read_kernel};
use aya_ebpf::programs::LsmContext;

/// Filled in by the loader, then frozen: to the verifier its fields are constants.
#[unsafe(no_mangle)]
pub static LAYOUT: Layout = Layout::UNSET;

/// A field of [`LAYOUT`], read in a way that the compiler cannot fold to the value in this file.
macro_rules! layout {
    ($field:ident) => {
        $crate::kernel::constant(&$crate::kernel::LAYOUT.$field)
    };
}
pub(crate) use layout;

/// Reads a word of the frozen data.
#[inline(always)]
pub fn constant(word: &u32) -> u32 {
    // SAFETY: a reference is valid and aligned.
    unsafe { read_volatile(word) }
}

/// Loads a member through a pointer to a kernel structure.
///
/// # Safety
/// `object` is a pointer that the verifier tracks by its BTF type, and `offset` comes from [`LAYOUT`]. The verifier
/// proves the access, or refuses the program; a pointer that has gone stale reads as zero.
#[inline(always)]
pub unsafe fn load<T: Copy>(object: *const c_void, offset: u32) -> T {
    unsafe { read_volatile(object.byte_add(offset as usize).cast::<T>()) }
}

/// What stands at a kernel address that the verifier does not follow; zero where nothing can be read.
#[inline(always)]
pub fn peek<T: Copy>(address: u64, offset: u32) -> T {
    let mut value = MaybeUninit::<T>::zeroed();
    let place = address.wrapping_add(u64::from(offset)) as *const c_void;
    // SAFETY: room for one; numbers and pointers alone are asked for, which may be zero.
    unsafe {
        bpf_probe_read_kernel(value.as_mut_ptr().cast(), size_of::<T>() as u32, place);
        value.assume_init()
    }
}

/// What identifies an inode and the state of its content.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// The change cookie, `i_version >> 1`: the lowest bit only says whether somebody asked (include/linux/iversion.h).
    pub change: u64,
    /// Size in bytes.
    pub size: u64,
    /// Change time, seconds.
    pub ctime_sec: u64,
    /// Change time, nanoseconds.
    pub ctime_nsec: u32,
    /// Inode generation.
    pub generation: u32,
}

impl State {
    /// The state of `inode` now.
    ///
    /// # Safety
    /// `inode` is a `struct inode *` that the verifier tracks.
    #[inline(always)]
    pub unsafe fn of(inode: *const c_void) -> Self {
        unsafe {
            Self {
                change: load::<u64>(inode, layout!(inode_version)) >> 1,
                size: load(inode, layout!(inode_size)),
                ctime_sec: load(inode, layout!(inode_ctime_sec)),
                // From Linux 6.13 the highest bit only says that somebody asked for the time (I_CTIME_QUERIED).
                ctime_nsec: load::<u32>(inode, layout!(inode_ctime_nsec)) & !(1 << 31),
                generation: load(inode, layout!(inode_generation)),
            }
        }
    }
}

/// Where an inode lives, and what it is.
#[derive(Clone, Copy)]
pub struct Identity {
    /// Inode number.
    pub ino: u64,
    /// `s_dev`.
    pub dev: u32,
    /// File system magic.
    pub magic: u64,
    /// `i_mode`.
    pub mode: u16,
    /// Link count.
    pub links: u32,
    /// The file system counts changes: an equal [`State`] is equal content.
    pub counts: bool,
}

impl Identity {
    /// The identity of `inode`.
    ///
    /// # Safety
    /// As for [`State::of`].
    #[inline(always)]
    pub unsafe fn of(inode: *const c_void) -> Self {
        /// `SB_I_VERSION` (include/linux/fs.h).
        const COUNTS: u64 = 1 << 23;
        unsafe {
            let superblock: *const c_void = load(inode, layout!(inode_sb));
            Self {
                ino: load(inode, layout!(inode_ino)),
                dev: load(superblock, layout!(super_dev)),
                magic: load(superblock, layout!(super_magic)),
                mode: load(inode, layout!(inode_mode)),
                links: load(inode, layout!(inode_nlink)),
                counts: load::<u64>(superblock, layout!(super_flags)) & COUNTS != 0,
            }
        }
    }

    /// A regular file: the only kind whose content a hash can stand for.
    #[inline(always)]
    pub fn is_regular(&self) -> bool {
        const S_IFMT: u16 = 0o170_000;
        const S_IFREG: u16 = 0o100_000;
        self.mode & S_IFMT == S_IFREG
    }
}

/// Descriptors open for writing on `inode`, as a count; negative = writers are kept out, as during `execve`.
///
/// # Safety
/// As for [`State::of`].
#[inline(always)]
pub unsafe fn writers(inode: *const c_void) -> i32 {
    unsafe { load(inode, layout!(inode_writecount)) }
}

/// Whether the next change of the inode is sure to move its [`State`]: somebody has asked for the change cookie, or (from
/// Linux 6.13 on) for the change time, since the last one. A change that nobody could tell from the last is not counted.
///
/// # Safety
/// As for [`State::of`].
#[inline(always)]
pub unsafe fn is_watched(inode: *const c_void) -> bool {
    /// `I_VERSION_QUERIED` (include/linux/iversion.h).
    const COOKIE_ASKED: u64 = 1;
    /// `I_CTIME_QUERIED` (include/linux/fs.h).
    const TIME_ASKED: u32 = 1 << 31;
    unsafe {
        load::<u32>(inode, layout!(inode_ctime_nsec)) & TIME_ASKED != 0
            || load::<u64>(inode, layout!(inode_version)) & COOKIE_ASKED != 0 && Identity::of(inode).counts
    }
}

/// Whether an id that a hook was given is this enumerator. Ids arrive with rubbish in their upper half on old kernels.
#[inline(always)]
pub fn is_id(given: u64, enumerator: u32) -> bool {
    enumerator != ABSENT && given as u32 == enumerator
}

/// Whether the hook's first argument is NULL, read as a number: the verifier of some kernels takes a pointer there for one
/// that never is, and drops what is done if it is.
#[inline(always)]
pub fn first_is_null(ctx: &LsmContext) -> bool {
    let mut first = 1_u64;
    // SAFETY: room for a u64, and the arguments begin with that one.
    let read = unsafe { bpf_probe_read_kernel((&raw mut first).cast(), 8, ctx.as_ptr()) };
    read == 0 && first == 0
}

/// The same number, about which the verifier knows nothing any more. Where many conditions each add a mark, it would
/// otherwise follow every combination of them to the end of the program.
#[inline(always)]
pub fn forget(value: u32) -> u32 {
    // SAFETY: no arguments, no effects.
    let unknown = u64::from(unsafe { bpf_get_smp_processor_id() });
    let mut value = u64::from(value);
    // SAFETY: registers only.
    unsafe {
        asm!(
            "{value} += {unknown}",
            "{value} -= {unknown}",
            value = inout(reg) value,
            unknown = in(reg) unknown,
            options(nomem, nostack),
        );
    }
    value as u32
}

/// `marks`, with one more if `on`.
#[inline(always)]
pub fn mark(marks: u32, on: bool, flag: u32) -> u32 {
    forget(if on { marks | flag } else { marks })
}

/// Whether the text at a kernel address begins so.
#[inline(always)]
pub fn begins_with<const N: usize>(text: u64, wanted: [u8; N]) -> bool {
    let mut found = [0_u8; N];
    // SAFETY: room for N bytes; the helper refuses addresses that cannot be read.
    let read = unsafe { bpf_probe_read_kernel(found.as_mut_ptr().cast(), N as u32, text as *const c_void) };
    read == 0 && found == wanted
}

//! SHA-256 over kernel memory, in BPF (FIPS 180-4).
//!
//! The kernel has no hash for BPF programs that may not sleep. What shapes this file is the verifier: each step is a
//! global function, verified once by itself, and loops are nested, since it refuses a single one of 16,384 rounds.
//! The scratch memory is a map entry per task and not per CPU: a program can be preempted between two blocks.

use core::ffi::c_void;
use core::ptr::{read_volatile, write_volatile};

use assay_ebpf::{HASH_ALGO_SHA256, HASH_LIMIT};
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use aya_ebpf::macros::map;
use aya_ebpf::maps::HashMap;

use crate::queue::Outcome;

/// Bytes copied from the buffer at a time.
const CHUNK: u64 = 4096;
/// Rounds of each of the two outer loops.
const FAN: u32 = 128;
/// Modules hashed at the same moment; one more is recorded as not hashed.
const SLOTS: u32 = 64;

const _: () = assert!(CHUNK * (FAN as u64) * (FAN as u64) == HASH_LIMIT);

/// Scratch memory of one hash.
#[repr(C)]
struct Work {
    state: [u32; 8],
    source: u64,
    length: u64,
    unreadable: u64,
    /// Not 0: these are BPF instructions, see [`assay_sha256_blank`].
    blank: u32,
    /// Not 0: the next instruction is the second half of one.
    half: u32,
    schedule: [u32; 16],
    chunk: [u8; CHUNK as usize],
}

/// By task; preallocated, so that taking a slot never allocates.
#[map]
static WORK: HashMap<u64, Work> = HashMap::with_max_entries(SLOTS, 0);

static EMPTY: Work = Work {
    state: [
        0x6a09_e667,
        0xbb67_ae85,
        0x3c6e_f372,
        0xa54f_f53a,
        0x510e_527f,
        0x9b05_688c,
        0x1f83_d9ab,
        0x5be0_cd19,
    ],
    source: 0,
    length: 0,
    unreadable: 0,
    blank: 0,
    half: 0,
    schedule: [0; 16],
    chunk: [0; CHUNK as usize],
};

/// Hashes `length` bytes of kernel memory at `source`.
#[inline(always)]
pub fn hash(source: u64, length: u64) -> Outcome {
    digest_of(source, length, 0)
}

/// Hashes BPF instructions, with what a loader fills in left out: the same program has the same digest whatever numbers
/// its maps' descriptors happen to have.
#[inline(always)]
pub fn hash_instructions(source: u64, length: u64) -> Outcome {
    digest_of(source, length, 1)
}

#[inline(always)]
fn digest_of(source: u64, length: u64, blank: u32) -> Outcome {
    const EFAULT: i32 = 14;
    const EFBIG: i32 = 27;
    const ENOSPC: i32 = 28;
    if length > HASH_LIMIT {
        return Outcome::failed(EFBIG);
    }
    let task = bpf_get_current_pid_tgid();
    if WORK.insert(task, &EMPTY, 0).is_err() {
        return Outcome::failed(ENOSPC);
    }
    let mut outcome = Outcome::failed(EFAULT);
    if let Some(work) = WORK.get_ptr_mut(task) {
        // SAFETY: this task's own map entry, which only the functions below touch until it is removed.
        unsafe {
            (*work).source = source;
            (*work).length = length;
            (*work).blank = blank;
            let mut round = 0_u32;
            while round < FAN && assay_sha256_span(round) == 0 {
                round += 1;
            }
            if assay_sha256_finish() == 0 && (*work).unreadable == 0 {
                outcome = Outcome {
                    algo: HASH_ALGO_SHA256,
                    error: 0,
                    digest: digest(work),
                };
            }
        }
    }
    let _ = WORK.remove(task);
    outcome
}

#[inline(always)]
fn work() -> Option<*mut Work> {
    WORK.get_ptr_mut(bpf_get_current_pid_tgid())
}

/// # Safety
/// `work` is a valid map entry.
#[inline(always)]
unsafe fn digest(work: *mut Work) -> [u64; 4] {
    let mut words = [0_u64; 4];
    let mut index = 0;
    while index < 4 {
        // SAFETY: 0..8 of the state; big-endian words, two of them in a u64 in memory order.
        let pair = unsafe {
            let state = (&raw const (*work).state).cast::<u32>();
            let first = read_volatile(state.add(2 * index)).swap_bytes();
            let second = read_volatile(state.add(2 * index + 1)).swap_bytes();
            u64::from(first) | u64::from(second) << 32
        };
        // SAFETY: index < 4.
        unsafe { *words.as_mut_ptr().add(index) = pair };
        index += 1;
    }
    words
}

/// [`FAN`] chunks. Not 0 = the end of the buffer was reached, or it could not be read.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn assay_sha256_span(span: u32) -> i32 {
    let mut index = 0_u32;
    while index < FAN {
        if assay_sha256_chunk(span * FAN + index) != 0 {
            return 1;
        }
        index += 1;
    }
    0
}

/// One chunk: copies it and takes in all its full blocks.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn assay_sha256_chunk(index: u32) -> i32 {
    let Some(work) = work() else { return 1 };
    // SAFETY: this task's own map entry; the copy is at most CHUNK bytes.
    unsafe {
        let offset = u64::from(index) * CHUNK;
        if offset >= (*work).length {
            return 1;
        }
        let left = (*work).length - offset;
        let size = if left >= CHUNK { CHUNK } else { left & (CHUNK - 1) };
        let target = (&raw mut (*work).chunk).cast::<c_void>();
        let source = ((*work).source + offset) as *const c_void;
        if bpf_probe_read_kernel(target, size as u32, source) != 0 {
            (*work).unreadable = 1;
            return 1;
        }
        if (*work).blank != 0 && assay_sha256_blank(0) != 0 {
            return 1;
        }
        let blocks = (size / 64) as u32;
        let mut block = 0_u32;
        while block < (CHUNK / 64) as u32 {
            if block >= blocks {
                break;
            }
            if assay_sha256_block(block) != 0 {
                return 1;
            }
            block += 1;
        }
    }
    0
}

/// Zeroes the immediates of 16-byte loads that name something else (a map, a value in one, a type, a function).
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn assay_sha256_blank(_unused: u32) -> i32 {
    /// `BPF_LD | BPF_DW | BPF_IMM`
    const LOAD_WIDE: u32 = 0x18;
    let Some(work) = work() else { return 1 };
    let mut index = 0_usize;
    while index < (CHUNK / 8) as usize {
        // SAFETY: this task's own map entry; two words an instruction, 512 instructions a chunk.
        unsafe {
            let at = (&raw mut (*work).chunk).cast::<u32>().add(2 * index);
            let head = read_volatile(at);
            let half = read_volatile(&raw const (*work).half);
            let names = half == 0 && head & 0xff == LOAD_WIDE && head >> 12 & 0xf != 0;
            if half != 0 || names {
                write_volatile(at.add(1), 0);
            }
            write_volatile(&raw mut (*work).half, u32::from(names));
        }
        index += 1;
    }
    0
}

/// The padding (FIPS 180-4, 5.1.1): what is left of the last chunk, a one bit, zeros, the length in bits.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn assay_sha256_finish() -> i32 {
    let Some(work) = work() else { return 1 };
    // SAFETY: this task's own map entry; every index is masked or bounded below CHUNK.
    unsafe {
        let length = (*work).length;
        let chunk = (&raw mut (*work).chunk).cast::<u8>();
        let tail = length & 63;
        let base = (length & (CHUNK - 1)) & !63;
        let mut at = 0_u64;
        while at < 64 {
            let from = ((base + at) & (CHUNK - 8)) as usize;
            let word = read_volatile(chunk.add(from).cast::<u64>());
            write_volatile(chunk.add(at as usize).cast::<u64>(), word);
            at += 8;
        }
        let mut at = 0_u64;
        while at < 128 {
            if at >= tail {
                write_volatile(chunk.add(at as usize), if at == tail { 0x80 } else { 0 });
            }
            at += 1;
        }
        let two = tail >= 56;
        let end = if two { 120 } else { 56 };
        write_volatile(chunk.add(end).cast::<u64>(), (length * 8).swap_bytes());
        if assay_sha256_block(0) != 0 || (two && assay_sha256_block(1) != 0) {
            return 1;
        }
    }
    0
}

/// Takes in the block at `index` of the chunk.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn assay_sha256_block(index: u32) -> i32 {
    let Some(work) = work() else { return 1 };
    // SAFETY: this task's own map entry; the masked index keeps the block inside the chunk.
    unsafe {
        let offset = ((index & 63) * 64) as usize;
        let block = (&raw const (*work).chunk).cast::<u8>().add(offset).cast::<u32>();
        compress(&mut (*work).state, block, (&raw mut (*work).schedule).cast());
    }
    0
}

/// FIPS 180-4, 4.2.2.
const K: [u32; 64] = [
    0x428a_2f98,
    0x7137_4491,
    0xb5c0_fbcf,
    0xe9b5_dba5,
    0x3956_c25b,
    0x59f1_11f1,
    0x923f_82a4,
    0xab1c_5ed5,
    0xd807_aa98,
    0x1283_5b01,
    0x2431_85be,
    0x550c_7dc3,
    0x72be_5d74,
    0x80de_b1fe,
    0x9bdc_06a7,
    0xc19b_f174,
    0xe49b_69c1,
    0xefbe_4786,
    0x0fc1_9dc6,
    0x240c_a1cc,
    0x2de9_2c6f,
    0x4a74_84aa,
    0x5cb0_a9dc,
    0x76f9_88da,
    0x983e_5152,
    0xa831_c66d,
    0xb003_27c8,
    0xbf59_7fc7,
    0xc6e0_0bf3,
    0xd5a7_9147,
    0x06ca_6351,
    0x1429_2967,
    0x27b7_0a85,
    0x2e1b_2138,
    0x4d2c_6dfc,
    0x5338_0d13,
    0x650a_7354,
    0x766a_0abb,
    0x81c2_c92e,
    0x9272_2c85,
    0xa2bf_e8a1,
    0xa81a_664b,
    0xc24b_8b70,
    0xc76c_51a3,
    0xd192_e819,
    0xd699_0624,
    0xf40e_3585,
    0x106a_a070,
    0x19a4_c116,
    0x1e37_6c08,
    0x2748_774c,
    0x34b0_bcb5,
    0x391c_0cb3,
    0x4ed8_aa4a,
    0x5b9c_ca4f,
    0x682e_6ff3,
    0x748f_82ee,
    0x78a5_636f,
    0x84c8_7814,
    0x8cc7_0208,
    0x90be_fffa,
    0xa450_6ceb,
    0xbef9_a3f7,
    0xc671_78f2,
];

/// One round (FIPS 180-4, 6.2.2 step 3), with the variables named as they rotate.
macro_rules! round {
    ($a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident, $k:expr, $w:expr) => {
        let t1 = $h
            .wrapping_add($e.rotate_right(6) ^ $e.rotate_right(11) ^ $e.rotate_right(25))
            .wrapping_add($g ^ ($e & ($f ^ $g)))
            .wrapping_add($k)
            .wrapping_add($w);
        let t2 =
            ($a.rotate_right(2) ^ $a.rotate_right(13) ^ $a.rotate_right(22)).wrapping_add(($a & $b) | ($c & ($a | $b)));
        $d = $d.wrapping_add(t1);
        $h = t1.wrapping_add(t2);
    };
}

/// Eight rounds from number `$n`; `$word` gives the schedule's word of a round.
macro_rules! eight {
    ($word:ident $block:ident $w:ident $n:literal, $a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident) => {
        round!($a $b $c $d $e $f $g $h, K[$n], $word($block, $w, $n));
        round!($h $a $b $c $d $e $f $g, K[$n + 1], $word($block, $w, $n + 1));
        round!($g $h $a $b $c $d $e $f, K[$n + 2], $word($block, $w, $n + 2));
        round!($f $g $h $a $b $c $d $e, K[$n + 3], $word($block, $w, $n + 3));
        round!($e $f $g $h $a $b $c $d, K[$n + 4], $word($block, $w, $n + 4));
        round!($d $e $f $g $h $a $b $c, K[$n + 5], $word($block, $w, $n + 5));
        round!($c $d $e $f $g $h $a $b, K[$n + 6], $word($block, $w, $n + 6));
        round!($b $c $d $e $f $g $h $a, K[$n + 7], $word($block, $w, $n + 7));
    };
}

/// Word `n` < 16: the block's own, kept in the 16-word window `w`.
///
/// # Safety
/// `block` and `w` are 64 readable (`w`: writable) bytes, aligned to 4.
#[inline(always)]
unsafe fn given(block: *const u32, w: *mut u32, n: usize) -> u32 {
    unsafe {
        let word = read_volatile(block.add(n)).swap_bytes();
        write_volatile(w.add(n), word);
        word
    }
}

/// Word `n` >= 16 (FIPS 180-4, 6.2.2 step 1), which takes the place of the oldest in the window.
///
/// # Safety
/// As for [`given`].
#[inline(always)]
unsafe fn derived(_: *const u32, w: *mut u32, n: usize) -> u32 {
    unsafe {
        let word = |back: usize| read_volatile(w.add((n - back) & 15));
        let s0 = word(15);
        let s1 = word(2);
        let new = word(16)
            .wrapping_add(s0.rotate_right(7) ^ s0.rotate_right(18) ^ (s0 >> 3))
            .wrapping_add(word(7))
            .wrapping_add(s1.rotate_right(17) ^ s1.rotate_right(19) ^ (s1 >> 10));
        write_volatile(w.add(n & 15), new);
        new
    }
}

/// FIPS 180-4, 6.2.2. The schedule stays outside the stack, which has 512 bytes.
///
/// # Safety
/// `block`: 64 readable bytes; `w`: 64 bytes of scratch; both aligned to 4.
#[inline(always)]
unsafe fn compress(state: &mut [u32; 8], block: *const u32, w: *mut u32) {
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    unsafe {
        eight!(given block w 0, a b c d e f g h);
        eight!(given block w 8, a b c d e f g h);
        eight!(derived block w 16, a b c d e f g h);
        eight!(derived block w 24, a b c d e f g h);
        eight!(derived block w 32, a b c d e f g h);
        eight!(derived block w 40, a b c d e f g h);
        eight!(derived block w 48, a b c d e f g h);
        eight!(derived block w 56, a b c d e f g h);
    }
    let [s0, s1, s2, s3, s4, s5, s6, s7] = state;
    *s0 = s0.wrapping_add(a);
    *s1 = s1.wrapping_add(b);
    *s2 = s2.wrapping_add(c);
    *s3 = s3.wrapping_add(d);
    *s4 = s4.wrapping_add(e);
    *s5 = s5.wrapping_add(f);
    *s6 = s6.wrapping_add(g);
    *s7 = s7.wrapping_add(h);
}

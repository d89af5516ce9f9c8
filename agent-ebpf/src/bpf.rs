//! Other BPF programs: code for the kernel, that no file need hold.

use core::ffi::c_void;

use assay_ebpf::{counter, flags, kind};
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use aya_ebpf::macros::{lsm, map};
use aya_ebpf::maps::LruHashMap;
use aya_ebpf::programs::LsmContext;

use crate::gate::{self, EPERM};
use crate::kernel::{layout, load};
use crate::queue::{Facts, Outcome, count, submit};
use crate::sha256;
use crate::task;

/// What the digest of a program is made over.
#[repr(C)]
struct Identity {
    /// SHA-256 of the instructions; on kernels where only a loaded program is seen, the kernel's own tag and zeros.
    instructions: [u64; 4],
    kind: u32,
    attach: u32,
}

/// Bytes of an [`Identity`].
const IDENTITY: u64 = 40;
const _: () = assert!(core::mem::size_of::<Identity>() as u64 == IDENTITY);

/// By task, since what is hashed must lie in memory of the kernel's.
#[map]
static IDENTITIES: LruHashMap<u64, Identity> = LruHashMap::with_max_entries(128, 0);

static NONE: Identity = Identity {
    instructions: [0; 4],
    kind: 0,
    attach: 0,
};

/// Programs that were recorded, by id, where descriptors and not loads are seen.
#[map]
static SEEN: LruHashMap<u32, u32> = LruHashMap::with_max_entries(4096, 0);

/// A program is about to be verified (Linux 6.9 and later).
#[lsm(hook = "bpf_prog_load")]
pub fn bpf_load(ctx: LsmContext) -> i32 {
    let program: *const c_void = ctx.arg(0);
    if task::is_agent() {
        // Its own are named by the object's digest in AGENT_START.
        return 0;
    }
    // SAFETY: the hook's argument is a `struct bpf_prog *`.
    unsafe {
        let length = u64::from(load::<u32>(program, layout!(prog_len))) * 8;
        let source = program.byte_add(layout!(prog_instructions) as usize) as u64;
        let instructions = sha256::hash_instructions(source, length);
        record(program, instructions, length)
    }
}

/// A descriptor for a program is made, for the first time when it was loaded: all that older kernels show. The tag is
/// theirs: SHA-1 over the instructions, cut to eight bytes.
#[lsm(hook = "bpf_prog")]
pub fn bpf_seen(ctx: LsmContext) -> i32 {
    let program: *const c_void = ctx.arg(0);
    if task::is_agent() {
        return 0;
    }
    // SAFETY: the hook's argument is a `struct bpf_prog *`, which has its aux.
    unsafe {
        let aux: *const c_void = load(program, layout!(prog_aux));
        let id: u32 = load(aux, layout!(aux_id));
        if SEEN.get(&id).is_some() {
            return 0;
        }
        let tag: u64 = load(program, layout!(prog_tag));
        let length = u64::from(load::<u32>(program, layout!(prog_len))) * 8;
        let answer = record(program, Outcome::of([tag, 0, 0, 0]), length);
        if answer == 0 {
            let _ = SEEN.insert(id, 1, 0);
        }
        answer
    }
}

/// # Safety
/// `program` is a `struct bpf_prog *` that the verifier tracks.
#[inline(always)]
unsafe fn record(program: *const c_void, instructions: Outcome, length: u64) -> i32 {
    unsafe {
        let kind = load::<u32>(program, layout!(prog_type));
        let attach = load::<u32>(program, layout!(prog_attach_type));
        let hash = if instructions.error == 0 {
            identify(&instructions.digest, kind, attach)
        } else {
            instructions
        };
        let mut facts = Facts::of_buffer(kind::BPF_PROGRAM, length, hash);
        let answer = if !gate::closed() || (only_filters(kind) && !gate::enforces()) {
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
        let aux: *const c_void = load(program, layout!(prog_aux));
        let name = aux.byte_add(layout!(aux_name) as usize);
        gate::unless_lost(answer, submit(&facts, |out| name_of(name, out)))
    }
}

/// Programs that systemd makes anew for each unit, and that see nothing but packets, sockets and device numbers. In *hold*
/// they are recorded and not waited for: nobody would load them a second time.
#[inline(always)]
const fn only_filters(kind: u32) -> bool {
    // BPF_PROG_TYPE_SOCKET_FILTER, CGROUP_SKB, CGROUP_SOCK, CGROUP_DEVICE, CGROUP_SOCK_ADDR (include/uapi/linux/bpf.h)
    const FILTERS: u32 = 1 << 1 | 1 << 8 | 1 << 9 | 1 << 15 | 1 << 18;
    kind < 32 && FILTERS >> kind & 1 != 0
}

#[inline(always)]
fn identify(instructions: &[u64; 4], kind: u32, attach: u32) -> Outcome {
    const ENOSPC: i32 = 28;
    let task = bpf_get_current_pid_tgid();
    let _ = IDENTITIES.insert(task, &NONE, 0);
    let Some(identity) = IDENTITIES.get_ptr_mut(task) else {
        return Outcome::failed(ENOSPC);
    };
    // SAFETY: a map value; another task writes it only if 128 others load programs in this instant.
    unsafe {
        (*identity).instructions = *instructions;
        (*identity).kind = kind;
        (*identity).attach = attach;
    }
    sha256::hash(identity as u64, IDENTITY)
}

/// The program's name, sixteen bytes at most, as a path.
#[inline(always)]
fn name_of(name: *const c_void, out: *mut u8) -> i64 {
    const LENGTH: u32 = 16;
    // SAFETY: `out` has room for more than that.
    unsafe {
        if bpf_probe_read_kernel(out.cast(), LENGTH, name) != 0 {
            return -1;
        }
        let mut length = 0_i64;
        while length < 15 && *out.add(length as usize) != 0 {
            length += 1;
        }
        length + 1
    }
}

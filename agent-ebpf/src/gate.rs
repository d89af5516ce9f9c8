//! May this digest be loaded? The answer of the modes *hold* and *enforce*, and who is exempt.

use assay_ebpf::{MAX_APPROVED, MAX_EXTENDED, control};
use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap};

use crate::task;

/// Try again: it has not been extended yet, or the queue was full.
pub const EAGAIN: i32 = 11;
/// Never: not approved, or nothing that could be.
pub const EPERM: i32 = 1;
/// Somebody has it open for writing.
pub const ETXTBSY: i32 = 26;

/// Indexed by [`control`]; written by the agent.
#[map]
static CONTROL: Array<u64> = Array::with_max_entries(control::COUNT, 0);

/// Digests that are in the TPM's register. Only grows: it belongs to the boot, as the register does.
#[map]
static EXTENDED: HashMap<[u64; 4], u32> = HashMap::with_max_entries(MAX_EXTENDED, BPF_F_NO_PREALLOC);

/// Digests of approved lists, with the number of the list.
#[map]
static APPROVED: HashMap<[u64; 4], u64> = HashMap::with_max_entries(MAX_APPROVED, BPF_F_NO_PREALLOC);

/// What the agent ordered, 0 before it did.
#[inline(always)]
pub fn order(index: u32) -> u64 {
    CONTROL.get(index).copied().unwrap_or(0)
}

/// Whether anything is refused at all.
#[inline(always)]
pub fn closed() -> bool {
    order(control::MODE) >= control::HOLD
}

/// Whether only what is approved is let through.
#[inline(always)]
pub fn enforces() -> bool {
    order(control::MODE) == control::ENFORCE
}

/// 0 if code with this digest may be loaded now, or the negative errno for whoever wants to. `own`: it is the calling
/// task that wants to, and not somebody on whose behalf the agent asks.
#[inline(always)]
pub fn answer(digest: &[u64; 4], own: bool) -> i32 {
    let mode = order(control::MODE);
    if mode < control::HOLD {
        return 0;
    }
    if mode == control::ENFORCE && !approved(digest) {
        return -EPERM;
    }
    // SAFETY: an entry is never changed, and its memory stays as long as a program may look at it.
    if unsafe { EXTENDED.get(digest) }.is_some() {
        return 0;
    }
    // What the agent itself needs in order to extend cannot wait for an extend.
    if own && task::is_agent() { 0 } else { -EAGAIN }
}

#[inline(always)]
fn approved(digest: &[u64; 4]) -> bool {
    let list = order(control::LIST);
    // SAFETY: a torn read cannot happen, it is one aligned word.
    // Without any list nothing could run, not even what would bring one: then it is as in hold.
    list == 0 || unsafe { APPROVED.get(digest) }.is_some_and(|of| *of == list)
}

/// `answer`, but in the closed modes a load that could not be recorded is none.
#[inline(always)]
pub fn unless_lost(answer: i32, recorded: bool) -> i32 {
    if !recorded && answer == 0 && closed() {
        -EAGAIN
    } else {
        answer
    }
}

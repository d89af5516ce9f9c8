//! Files that are about to run: hashed by the kernel's own `bpf_ima_file_hash`, once per state of an inode, and let through
//! or refused by their digest.

use core::ffi::{c_long, c_void};

use assay_ebpf::{HASH_ALGO_SHA256, HASH_LIMIT, PATH_MAX, control, counter, flags, kind, request};
use aya_ebpf::bindings::{inode, path};
use aya_ebpf::btf_maps::InodeStorage;
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::helpers::generated::{bpf_d_path, bpf_ima_file_hash};
use aya_ebpf::macros::{btf_map, lsm, map};
use aya_ebpf::maps::LruHashMap;
use aya_ebpf::programs::LsmContext;

use crate::gate::{self, EAGAIN, EPERM, ETXTBSY};
use crate::guard;
use crate::kernel::{Identity, State, begins_with, first_is_null, is_watched, layout, load, mark, writers};
use crate::queue::{Facts, Outcome, count, submit};
use crate::task;

/// What is known of an inode: the state in which its content was last measured, and what has been said of it. Kept in
/// the inode's own memory: it goes when the inode goes, and no path or number can be mistaken for another. State and
/// digest are never changed in place, only deleted and made anew, so that no reader sees half of one.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Entry {
    state: State,
    digest: [u64; 4],
    /// Bits of [`said`].
    said: u32,
    /// In which epoch that counts.
    epoch: u32,
}

/// What the log has of a state.
mod said {
    /// A load: it is let through without a further word.
    pub const LOADED: u32 = 1;
    /// A refusal: the next ones are only counted.
    pub const REFUSED: u32 = 2;
    /// Nothing: the agent hashes it just now (tier 2).
    pub const PENDING: u32 = 4;
    /// Not the log's but the entry's: an equal state is equal content. Without it the digest alone says what is new.
    pub const SURE: u32 = 8;
}

/// How a file was when its hash was begun. The kernel moves cookie and time before it changes the content, and the cookie
/// only if somebody has asked for it: a writer who is at work then could end between the hash and the look afterwards.
#[derive(Clone, Copy)]
struct Begin {
    state: State,
    /// Somebody had it open for writing.
    busy: bool,
    /// Nobody had, and whoever has it from now on moves the state, or nobody can.
    quiet: bool,
}

impl Begin {
    /// # Safety
    /// `inode` is a `struct inode *` that the verifier tracks.
    #[inline(always)]
    unsafe fn now(inode: *const c_void, alone: bool) -> Self {
        unsafe {
            // First the state: whoever changes something before the two looks has moved it by the end.
            let state = State::of(inode);
            let watched = is_watched(inode);
            let writers = writers(inode);
            Self {
                state,
                busy: writers > 0,
                quiet: writers < 0 || writers == 0 && (alone || watched),
            }
        }
    }
}

#[btf_map]
static CACHE: InodeStorage<Entry> = InodeStorage::new();

/// The digest that an answer to the agent is about, by its thread; in tier 2 also the way back.
#[map]
static DIGESTS: LruHashMap<u64, [u64; 4]> = LruHashMap::with_max_entries(64, 0);

/// How a file came to be measured.
#[derive(Clone, Copy)]
struct Cause {
    kind: u32,
    flags: u32,
    /// Whose load it is; 0 = the calling task's.
    pid: u32,
    /// Somebody else waits for the extend, and the load itself comes later.
    held: bool,
    /// See [`request::ALONE`].
    alone: bool,
}

/// Once for a program, once more for each `#!` interpreter: `bprm->file` is the one that is looked at. By now the
/// kernel keeps writers away from it.
#[lsm(hook = "bprm_check_security", sleepable)]
pub fn program(ctx: LsmContext) -> i32 {
    let bprm: *const c_void = ctx.arg(0);
    // SAFETY: the hook's argument is a `struct linux_binprm *`, with a file in it.
    unsafe {
        let script = load::<u16>(bprm, layout!(bprm_buf)) == u16::from_ne_bytes(*b"#!");
        let marks = mark(0, script, flags::SCRIPT);
        // The kernel renames what it interprets only once it has found an interpreter for it.
        let renamed = load::<u64>(bprm, layout!(bprm_interp)) != load::<u64>(bprm, layout!(bprm_filename));
        let marks = mark(marks, renamed, flags::INTERPRETER);
        let file: *const c_void = load(bprm, layout!(bprm_file));
        let answer = measure(file, Cause::load(kind::PROGRAM, marks));
        if answer != 0 || !guard::is_led() {
            return answer;
        }
        let inode: *const c_void = load(file, layout!(file_inode));
        match known_digest(inode.cast_mut().cast::<inode>()) {
            Some(digest) => guard::led(&digest),
            None => 0,
        }
    }
}

/// Libraries, the ELF interpreter, `dlopen`: whatever file gets mapped executable. `prot` is what will be in force, not
/// only what was asked for (READ_IMPLIES_EXEC).
#[lsm(hook = "mmap_file", sleepable)]
pub fn mapping(ctx: LsmContext) -> i32 {
    const PROT_EXEC: u64 = 4;
    let file: *const c_void = ctx.arg(0);
    let prot: u64 = ctx.arg(2);
    // Newer verifiers want to see the pointer checked, and older ones take it for one that never is NULL.
    if prot & PROT_EXEC == 0 || first_is_null(&ctx) || file.is_null() {
        return 0;
    }
    // SAFETY: the hook's argument is a `struct file *`, and not NULL.
    unsafe { measure(file, Cause::load(kind::MAPPING, 0)) }
}

/// A file that an interpreter was told to run.
///
/// # Safety
/// `file` is a `struct file *` that the verifier tracks; only from a hook that may sleep.
#[inline(always)]
pub unsafe fn measure_argument(file: *const c_void) -> i32 {
    unsafe { measure(file, Cause::load(kind::ARGUMENT, 0)) }
}

/// What the agent asks, see [`request`]. For everybody else it lets every `ioctl` pass.
#[lsm(hook = "file_ioctl", sleepable)]
pub fn asked(ctx: LsmContext) -> i32 {
    let file: *const c_void = ctx.arg(0);
    let command = ctx.arg::<u64>(1) as u32;
    let argument: u64 = ctx.arg(2);
    if command < request::MEASURE || command > request::FINISH || !task::is_agent() {
        return 0;
    }
    let cause = Cause {
        kind: (argument >> 48) as u32 & 0xff,
        flags: (argument >> 32) as u32 & flags::ALL,
        pid: argument as u32,
        held: true,
        alone: argument & request::ALONE != 0,
    };
    // SAFETY: the hook's argument is a `struct file *`.
    unsafe {
        match command {
            request::BEGIN => begin(file),
            request::FINISH => finish(file, cause),
            _ => reply(measure(file, cause)),
        }
    }
}

/// What the agent is answered for what a load would be answered.
#[inline(always)]
fn reply(answer: i32) -> i32 {
    if answer == 0 {
        request::KNOWN
    } else if answer == -EAGAIN {
        request::QUEUED
    } else {
        answer
    }
}

impl Cause {
    #[inline(always)]
    const fn load(kind: u32, flags: u32) -> Self {
        Self {
            kind,
            flags,
            pid: 0,
            held: false,
            alone: false,
        }
    }

    /// Whether that answer is a refusal: somebody who waits for an extend is not refused by it.
    #[inline(always)]
    const fn is_refused(&self, answer: i32) -> bool {
        answer < 0 && (!self.held || answer == -EPERM)
    }

    /// What the log has of a state after a record of this.
    #[inline(always)]
    const fn said(&self, answer: i32) -> u32 {
        if self.is_refused(answer) {
            said::REFUSED
        } else if self.flags & flags::AHEAD != 0 {
            0
        } else {
            said::LOADED
        }
    }

    /// In which epoch what is said of a state counts. What somebody waits for has not been let through: when the load
    /// itself comes, the gate must be asked, though the agent may have died in between.
    #[inline(always)]
    const fn epoch(&self, answer: i32, now: u32) -> u32 {
        if answer < 0 && !self.is_refused(answer) {
            !now
        } else {
            now
        }
    }
}

/// Measures the file if its state is a new one, and answers whether it may be loaded: 0, or a negative errno.
///
/// # Safety
/// `file` is a `struct file *` that the verifier tracks.
#[inline(always)]
unsafe fn measure(file: *const c_void, cause: Cause) -> i32 {
    unsafe {
        let inode: *const c_void = load(file, layout!(file_inode));
        let mut begin = Begin::now(inode, cause.alone);
        let known = CACHE.get_ptr_mut(inode.cast_mut().cast::<inode>());
        if !known.is_null()
            && (*known).said & (said::PENDING | said::SURE) == said::SURE
            && (*known).state == begin.state
            && !begin.busy
        {
            return again(file, inode, known, cause);
        }
        let identity = Identity::of(inode);
        let mut hash = hash(file, &identity, begin.state.size);
        if !begin.quiet && !begin.busy && hash.error == 0 {
            // bpf_ima_file_hash asks for the change cookie before it reads, and from then on every change moves it.
            begin = Begin::now(inode, cause.alone);
            hash = self::hash(file, &identity, begin.state.size);
        }
        settle(file, inode, known, begin, hash, cause)
    }
}

/// A state that was measured before.
///
/// # Safety
/// As for [`measure`]; `inode` is the file's and `known` its entry.
#[inline(always)]
unsafe fn again(file: *const c_void, inode: *const c_void, known: *mut Entry, cause: Cause) -> i32 {
    unsafe {
        let epoch = gate::order(control::EPOCH) as u32;
        let said = (*known).said;
        let current = (*known).epoch == epoch;
        if said & said::LOADED != 0 && current && !cause.held {
            count(counter::CACHE_HIT);
            return 0;
        }
        let digest = (*known).digest;
        if cause.held {
            tell(&digest);
        }
        let answer = gate::answer(&digest, !cause.held);
        if said & said::LOADED != 0 && (answer == 0 || cause.held) {
            if answer == 0 {
                (*known).epoch = epoch;
            }
            count(counter::CACHE_HIT);
            return answer;
        }
        if cause.is_refused(answer) && said & said::REFUSED != 0 && current {
            count(counter::REFUSED);
            return answer;
        }
        if cause.flags & flags::AHEAD != 0 && current {
            // Known, though not loaded: nothing new to say.
            return answer;
        }
        let facts = Facts::of_file(inode, cause.kind, cause.flags, Outcome::of(digest), cause.pid);
        let queued = record(file, facts, answer, cause);
        if queued {
            let news = cause.said(answer);
            // Refused is no longer let through, whatever it was before.
            (*known).said = if news == said::REFUSED { news } else { said | news };
            (*known).epoch = cause.epoch(answer, epoch);
        }
        gate::unless_lost(answer, queued)
    }
}

/// A state that was hashed just now: what is said of it, and what is remembered.
///
/// # Safety
/// As for [`again`]; `known` may be NULL.
#[inline(always)]
unsafe fn settle(
    file: *const c_void,
    inode: *const c_void,
    known: *mut Entry,
    begin: Begin,
    hash: Outcome,
    cause: Cause,
) -> i32 {
    unsafe {
        // Last the state: a writer who has ended by now has moved it, and so does one who comes after this look.
        let busy = begin.busy || writers(inode) > 0;
        let watched = is_watched(inode);
        let after = State::of(inode);
        let identity = Identity::of(inode);
        let unstable = busy || after != begin.state;
        let sure = begin.quiet && (watched || cause.flags & flags::USER_HASH != 0 && identity.counts);
        let sure = mark(0, sure, said::SURE);
        let unlinked = identity.links == 0;
        let answer = if !gate::closed() {
            0
        } else if hash.error != 0 {
            -EPERM
        } else if unstable && (cause.held || cause.kind == kind::MAPPING) {
            -ETXTBSY
        } else {
            gate::answer(&hash.digest, !cause.held)
        };
        if cause.held && answer == -ETXTBSY {
            // Nothing to tell: nobody has loaded it, and whoever does is looked at with writers kept out.
            return answer;
        }
        let epoch = gate::order(control::EPOCH) as u32;
        let heard = !known.is_null()
            && (*known).said & (said::LOADED | said::SURE) == said::LOADED
            && (*known).epoch == epoch
            && (*known).digest == hash.digest;
        if heard && answer == 0 && !unstable && hash.error == 0 && cause.flags & flags::AHEAD == 0 {
            // No counter tells whether it changed, but the digest does.
            count(counter::CACHE_HIT);
            if sure != 0 {
                remember(inode, known, after, &hash.digest, said::LOADED | sure, epoch);
            }
            return 0;
        }
        if cause.held {
            tell(&hash.digest);
        }
        let marks = mark(cause.flags | place(file, &identity), unstable, flags::UNSTABLE);
        let facts = Facts::of_file(inode, cause.kind, marks, hash, cause.pid);
        let queued = record(file, facts, answer, cause);
        // Only what is in the queue counts as measured. A memfd or deleted file never does: it can be written through
        // a mapping that moves neither cookie nor time.
        if queued && hash.error == 0 && !unstable && !unlinked {
            let said = cause.said(answer) | sure;
            remember(inode, known, after, &hash.digest, said, cause.epoch(answer, epoch));
        } else if !known.is_null() {
            let _ = CACHE.delete(inode.cast_mut().cast::<inode>());
        }
        if cause.held && queued && hash.error != 0 {
            return request::NOT_HASHED;
        }
        gate::unless_lost(answer, queued)
    }
}

/// Makes the inode's entry, in the place of `known` if that is one.
///
/// # Safety
/// As for [`settle`].
#[inline(always)]
unsafe fn remember(inode: *const c_void, known: *mut Entry, state: State, digest: &[u64; 4], said: u32, epoch: u32) {
    let inode = inode.cast_mut().cast::<inode>();
    let mut entry = Entry {
        state,
        digest: *digest,
        said,
        epoch,
    };
    // SAFETY: the inode is one that the verifier tracks.
    unsafe {
        if !known.is_null() {
            let _ = CACHE.delete(inode);
        }
        let _ = CACHE.get_or_insert_ptr_mut(inode, Some(&mut entry));
    }
}

/// Leaves the digest for the agent's thread, which waits until it is extended.
#[inline(always)]
fn tell(digest: &[u64; 4]) {
    // A thread that finds none refuses: it cannot wait for what it does not know.
    let _ = DIGESTS.insert(bpf_get_current_pid_tgid(), digest, 0);
}

/// Queues the record, with the mark of a refusal where it is one.
///
/// # Safety
/// As for [`measure`].
#[inline(always)]
unsafe fn record(file: *const c_void, mut facts: Facts, answer: i32, cause: Cause) -> bool {
    let refused = cause.is_refused(answer);
    if refused {
        count(counter::REFUSED);
    }
    facts.flags = mark(facts.flags, refused, flags::REFUSED);
    submit(&facts, |out| unsafe { path_of(file, out) })
}

/// Tier 2: the file's state, before the agent reads it.
///
/// # Safety
/// As for [`measure`].
#[inline(always)]
unsafe fn begin(file: *const c_void) -> i32 {
    unsafe {
        let inode: *const c_void = load(file, layout!(file_inode));
        let state = State::of(inode);
        let known = CACHE.get_ptr_mut(inode.cast_mut().cast::<inode>());
        if !known.is_null() {
            if (*known).said & said::PENDING == 0 && (*known).state == state && writers(inode) <= 0 {
                let digest = (*known).digest;
                tell(&digest);
                return reply(gate::answer(&digest, false));
            }
            let _ = CACHE.delete(inode.cast_mut().cast::<inode>());
        }
        let mut entry = Entry {
            state,
            digest: [0; 4],
            said: said::PENDING,
            epoch: 0,
        };
        let _ = CACHE.get_or_insert_ptr_mut(inode.cast_mut().cast::<inode>(), Some(&mut entry));
        request::HASH_IT
    }
}

/// Tier 2: the digest, after the agent has read the file.
///
/// # Safety
/// As for [`measure`].
#[inline(always)]
unsafe fn finish(file: *const c_void, mut cause: Cause) -> i32 {
    unsafe {
        let inode: *const c_void = load(file, layout!(file_inode));
        let known = CACHE.get_ptr_mut(inode.cast_mut().cast::<inode>());
        let Some(digest) = DIGESTS.get(&bpf_get_current_pid_tgid()) else {
            return request::NOT_HASHED;
        };
        let digest = *digest;
        if known.is_null() {
            return request::UNSTABLE;
        }
        if (*known).said & said::PENDING == 0 {
            // Another thread was asked about the same file, and was quicker.
            let same = (*known).state == State::of(inode) && (*known).digest == digest;
            return if same {
                reply(gate::answer(&digest, false))
            } else {
                request::UNSTABLE
            };
        }
        // Nobody asks for the cookie here. That a change moved neither cookie nor time is what tier 2 cannot see, unless
        // nobody could make one.
        let begin = Begin {
            state: (*known).state,
            busy: false,
            quiet: true,
        };
        cause.flags |= flags::USER_HASH;
        reply(settle(file, inode, known, begin, Outcome::of(digest), cause))
    }
}

/// The digest of an inode's content, if it was measured and has not moved.
///
/// # Safety
/// `inode` is a `struct inode *` that the verifier tracks.
#[inline(always)]
pub unsafe fn known_digest(inode: *mut inode) -> Option<Outcome> {
    unsafe {
        let known = CACHE.get_ptr_mut(inode);
        if known.is_null() || (*known).said & said::PENDING != 0 || (*known).state != State::of(inode.cast()) {
            return None;
        }
        Some(Outcome::of((*known).digest))
    }
}

/// Where a file lies, as far as its inode says it.
#[inline(always)]
pub fn marks_of(identity: &Identity) -> u32 {
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    const OVERLAYFS_MAGIC: u64 = 0x794c_7630;
    let marks = mark(0, identity.magic == TMPFS_MAGIC, flags::TMPFS);
    let marks = mark(marks, identity.magic == OVERLAYFS_MAGIC, flags::OVERLAY);
    let marks = mark(marks, !identity.counts, flags::NO_COUNTER);
    mark(marks, identity.links == 0, flags::UNLINKED)
}

/// The same, and whether it is a memfd.
///
/// # Safety
/// As for [`measure`].
#[inline(always)]
unsafe fn place(file: *const c_void, identity: &Identity) -> u32 {
    let mut memfd = false;
    if identity.links == 0 {
        // SAFETY: a file has a dentry, and a dentry a name.
        unsafe {
            let dentry: *const c_void = load(file, layout!(file_path) + layout!(path_dentry));
            memfd = begins_with(load(dentry, layout!(dentry_name)), *b"memfd:");
        }
    }
    mark(marks_of(identity), memfd, flags::MEMFD)
}

/// # Safety
/// As for [`measure`].
#[inline(always)]
unsafe fn hash(file: *const c_void, identity: &Identity, size: u64) -> Outcome {
    const ENODEV: i32 = 19;
    const EFBIG: i32 = 27;
    const EBADMSG: i32 = 74;
    const EOPNOTSUPP: i32 = 95;
    if !identity.is_regular() {
        return Outcome::failed(ENODEV);
    }
    if gate::order(control::USER_HASH) != 0 {
        return Outcome::failed(EOPNOTSUPP);
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
/// `file` is a `struct file *` that the verifier tracks; only from a hook that may sleep, as the kernel allows `bpf_d_path` nowhere else.
#[inline(always)]
pub unsafe fn path_of(file: *const c_void, out: *mut u8) -> i64 {
    unsafe {
        let path = file.byte_add(layout!(file_path) as usize).cast_mut().cast::<path>();
        bpf_d_path(path, out.cast(), PATH_MAX as u32)
    }
}

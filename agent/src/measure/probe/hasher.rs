//! The second thread: is it still that file in that state, what is its digest, and what does the record say.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use assay_ebpf::probe_record::{File as Facts, STATE_SIZE};
use assay_ebpf::{HASH_ALGO_SHA256, PATH_MAX, Record, flags, kind};
use assay_evidence::digest::Sha256Digest;
use aya::maps::{HashMap, MapData};
use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime};

use super::ProbeError;
use super::ask::Asker;
use super::load::{Answers, Loaded, map_error};
use super::shared::Shared;
use super::sighting::Sighting;
use crate::measure::inventory;

/// The map's name.
pub const SEEN: &str = "SEEN";

/// Largest file that is hashed, in bytes: everything loaded since waits behind it.
pub const USER_HASH_LIMIT: u64 = 1 << 30;

/// No kernel's clock tick is longer (CONFIG_HZ=100), in nanoseconds.
const TICK_NS: i128 = 10_000_000;

const TMPFS: u64 = 0x0102_1994;
/// File system magic of overlayfs.
pub const OVERLAYFS: u64 = 0x794c_7630;
/// What a FUSE daemon answers need not be what it answered before, or come at all.
const FUSE: u64 = 0x6573_5546;

/// A sighting, with what was found of it.
pub struct Job {
    /// What a probe said.
    pub sighting: Sighting,
    /// Its file, or why there is none.
    pub file: Result<File, Errno>,
}

/// Completes sightings.
pub struct Hasher {
    work: Receiver<Job>,
    answers: Answers,
    seen: HashMap<MapData, [u8; 16], [u8; STATE_SIZE]>,
    _shared: Arc<Shared>,
}

/// What was found out about a sighting's content.
struct Content {
    digest: Sha256Digest,
    size: u64,
    /// It was not the same from the sighting to the end of the hash, or nobody can tell.
    unstable: bool,
    script: bool,
    state: Facts,
}

impl Hasher {
    /// Ready to run in a thread.
    pub fn new(loaded: &Loaded, work: Receiver<Job>, shared: Arc<Shared>) -> Result<Self, ProbeError> {
        Ok(Self {
            work,
            answers: loaded.answers()?,
            seen: loaded.seen()?,
            _shared: shared,
        })
    }

    /// Until nobody sends work.
    pub fn run(self, shared: &Shared) -> Result<(), ProbeError> {
        let Self {
            work,
            answers,
            mut seen,
            ..
        } = self;
        let mut asker = Asker::for_this_thread(answers);
        for job in work {
            if shared.is_stopping() {
                break;
            }
            if let Some(record) = shared.hashing.on(|| complete(&job, &mut asker, &mut seen))? {
                shared.push(record);
            }
        }
        Ok(())
    }
}

/// The record of a sighting; `None` = this file in this state has been recorded before.
fn complete(
    job: &Job,
    asker: &mut Asker,
    seen: &mut HashMap<MapData, [u8; 16], [u8; STATE_SIZE]>,
) -> Result<Option<Record>, ProbeError> {
    let sighting = &job.sighting;
    let file = match hashable(job) {
        Ok(file) => file,
        Err(errno) => return Ok(Some(record(sighting, Err(errno)))),
    };
    let Some(facts) = sighting.file else {
        return Ok(Some(record(sighting, Err(Errno::EOPNOTSUPP))));
    };
    if may_be_known(sighting, &facts) && knows(seen, &facts)? {
        return Ok(None);
    }
    let content = match content(sighting, &facts, file, asker)? {
        Ok(content) => content,
        Err(errno) => return Ok(Some(record(sighting, Err(errno)))),
    };
    if may_be_known(sighting, &content.state) && !content.unstable {
        seen.insert(facts.key().to_bytes(), facts.state().to_bytes(), 0)
            .map_err(map_error(SEEN))?;
    }
    Ok(Some(record(sighting, Ok(content))))
}

/// The file to hash, or why there will be no digest.
fn hashable(job: &Job) -> Result<&File, Errno> {
    let facts = job.sighting.file.ok_or(Errno::EOPNOTSUPP)?;
    if facts.mode & nix::libc::S_IFMT != nix::libc::S_IFREG {
        return Err(Errno::ENODEV);
    }
    if facts.magic == FUSE {
        return Err(Errno::EOPNOTSUPP);
    }
    if facts.size > USER_HASH_LIMIT {
        return Err(Errno::EFBIG);
    }
    job.file.as_ref().map_err(|errno| *errno)
}

/// Whether one record of this state is enough: every module counts, and what has writers or no name can change unseen.
fn may_be_known(sighting: &Sighting, facts: &Facts) -> bool {
    matches!(sighting.kind, kind::PROGRAM | kind::MAPPING) && facts.writers <= 0 && facts.links > 0
}

fn knows(seen: &HashMap<MapData, [u8; 16], [u8; STATE_SIZE]>, facts: &Facts) -> Result<bool, ProbeError> {
    match seen.get(&facts.key().to_bytes(), 0) {
        Ok(state) => Ok(state == facts.state().to_bytes()),
        Err(aya::maps::MapError::KeyNotFound) => Ok(false),
        Err(error) => Err(map_error(SEEN)(error).into()),
    }
}

fn content(
    sighting: &Sighting,
    facts: &Facts,
    file: &File,
    asker: &mut Asker,
) -> Result<Result<Content, Errno>, ProbeError> {
    let hashed = inventory::hash(io::Read::take(file, USER_HASH_LIMIT + 1));
    // Equal to what the probe saw: then nothing changed in between, since every change moves the time.
    let state = asker.ask(file)?;
    let (digest, size) = match hashed {
        Ok((_, size)) if size > USER_HASH_LIMIT => return Ok(Err(Errno::EFBIG)),
        Ok(hashed) => hashed,
        Err(error) => {
            let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
            return Ok(Err(errno));
        }
    };
    let mut start = [0; 2];
    let script = sighting.kind == kind::PROGRAM && file.read_at(&mut start, 0).is_ok() && start == *b"#!";
    let unstable = state.state() != facts.state()
        || facts.writers > 0
        || state.writers > 0
        || size != state.size
        // A buffer that the kernel read is the whole file.
        || (sighting.size != 0 && sighting.size != size)
        || is_racy(facts, sighting.time_ns, Clocks::now());
    Ok(Ok(Content {
        digest,
        size,
        unstable,
        script,
        state,
    }))
}

/// Nanoseconds of three clocks at one moment.
#[derive(Clone, Copy)]
struct Clocks {
    monotonic: i128,
    real: i128,
    boot: i128,
}

impl Clocks {
    fn now() -> Self {
        let read = |id| {
            clock_gettime(id).map_or(0, |time| {
                i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec())
            })
        };
        Self {
            monotonic: read(ClockId::CLOCK_MONOTONIC),
            real: read(ClockId::CLOCK_REALTIME),
            boot: read(ClockId::CLOCK_BOOTTIME),
        }
    }
}

/// Whether the file could have changed after it was sighted without its time being another: when it had been changed
/// within the very step of the clock in which it was sighted. (A time of the future is as good as one of the past: a
/// change would bring it back to now.)
fn is_racy(facts: &Facts, sighted_ns: u64, now: Clocks) -> bool {
    let changed = i128::from(facts.ctime_sec.cast_signed()) * 1_000_000_000 + i128::from(facts.ctime_nsec);
    let sighted = now.real - now.monotonic + i128::from(sighted_ns);
    let step = i128::from(facts.granularity.max(1));
    let earliest = (sighted - TICK_NS).div_euclid(step) * step;
    (earliest..=now.real).contains(&changed)
}

fn record(sighting: &Sighting, content: Result<Content, Errno>) -> Record {
    let now = Clocks::now();
    let facts = sighting.file.unwrap_or_default();
    let (path, path_len, cut) = path(sighting);
    let mut record = Record {
        seq: 0,
        time_ns: u64::try_from(i128::from(sighting.time_ns) + now.boot - now.monotonic).unwrap_or(sighting.time_ns),
        size: sighting.size,
        ino: facts.ino,
        change: facts.version >> 1,
        cgroup: sighting.cgroup,
        fs_magic: facts.magic,
        dev: facts.dev,
        generation: facts.generation,
        kind: sighting.kind,
        flags: marks(sighting, &facts) | if cut { flags::PATH_CUT } else { 0 },
        hash_algo: HASH_ALGO_SHA256,
        hash_error: 0,
        pid: sighting.pid,
        uid: sighting.uid,
        digest: [0; 32],
        comm: sighting.comm,
        path_len,
        pad: 0,
        path,
    };
    match content {
        Ok(content) => {
            record.digest.copy_from_slice(content.digest.as_ref());
            record.size = content.size;
            record.flags |= flags::USER_HASH;
            if content.unstable {
                record.flags |= flags::UNSTABLE;
            }
            if content.script {
                record.flags |= flags::SCRIPT;
            }
        }
        Err(errno) => {
            record.flags |= flags::NOT_HASHED;
            record.hash_error = -(errno as i32);
        }
    }
    record
}

/// The circumstances that need no content.
fn marks(sighting: &Sighting, facts: &Facts) -> u32 {
    let mut marks = match facts.magic {
        TMPFS => flags::TMPFS,
        OVERLAYFS => flags::OVERLAY,
        _ => 0,
    };
    if sighting.is_unlinked() {
        marks |= flags::UNLINKED;
        if sighting.path.as_os_str().as_bytes().starts_with(b"/memfd:") {
            marks |= flags::MEMFD;
        }
    }
    if sighting.interpreter {
        marks |= flags::INTERPRETER;
    }
    marks
}

/// The path as the kernel would show it, its length, and whether it is not all of it.
fn path(sighting: &Sighting) -> ([u8; PATH_MAX], u32, bool) {
    let mut bytes = sighting.path.as_os_str().as_bytes().to_vec();
    if sighting.is_unlinked() {
        bytes.extend_from_slice(b" (deleted)");
    }
    let fits = bytes.len() < PATH_MAX;
    bytes.truncate(PATH_MAX - 1);
    let mut path = [0; PATH_MAX];
    for (out, byte) in path.iter_mut().zip(&bytes) {
        *out = *byte;
    }
    let cut = sighting.file.is_some() && !(sighting.whole && fits);
    (path, u32::try_from(bytes.len()).unwrap_or(0), cut)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i128 = 1_000_000_000;

    fn facts() -> Facts {
        Facts {
            ino: 4,
            size: 3,
            version: 6,
            ctime_sec: 1000,
            magic: 0xef53,
            ctime_nsec: 0,
            generation: 9,
            dev: 8,
            links: 1,
            writers: 0,
            mode: 0o100_755,
            granularity: 1,
            pad: 0,
        }
    }

    fn sighting(file: Option<Facts>) -> Sighting {
        Sighting {
            file,
            time_ns: 50,
            cgroup: 6,
            size: 0,
            kind: kind::PROGRAM,
            pid: 13,
            mount_ns: 0,
            uid: 14,
            comm: *b"bash\0\0\0\0\0\0\0\0\0\0\0\0",
            interpreter: false,
            path: "/usr/bin/true".into(),
            whole: true,
        }
    }

    fn content() -> Content {
        Content {
            digest: Sha256Digest::new([7; 32]),
            size: 3,
            unstable: false,
            script: false,
            state: facts(),
        }
    }

    #[test]
    fn what_is_made_is_what_the_log_takes() {
        let made = record(&sighting(Some(facts())), Ok(content()));
        assert_eq!(Record::read(&made.to_bytes()), Some(made));
        assert_eq!(
            (made.path(), made.flags),
            (b"/usr/bin/true".as_slice(), flags::USER_HASH)
        );
        assert_eq!((made.change, made.dev, made.generation), (3, 8, 9));
        let gone = record(&sighting(Some(facts())), Err(Errno::ESTALE));
        assert_eq!(Record::read(&gone.to_bytes()), Some(gone));
        assert_eq!((gone.flags, gone.hash_error), (flags::NOT_HASHED, -116));
    }

    #[test]
    fn circumstances_are_told() {
        let mut memfd = sighting(Some(Facts {
            links: 0,
            magic: TMPFS,
            ..facts()
        }));
        memfd.path = "/memfd:x".into();
        memfd.interpreter = true;
        let made = record(
            &memfd,
            Ok(Content {
                unstable: true,
                script: true,
                ..content()
            }),
        );
        assert_eq!(made.path(), b"/memfd:x (deleted)");
        let expected = flags::USER_HASH
            | flags::UNSTABLE
            | flags::SCRIPT
            | flags::UNLINKED
            | flags::MEMFD
            | flags::TMPFS
            | flags::INTERPRETER;
        assert_eq!(made.flags, expected);
        let buffer = record(&sighting(None), Err(Errno::EOPNOTSUPP));
        assert_eq!(buffer.flags, flags::NOT_HASHED, "no file, so no path is missing");
    }

    #[test]
    fn a_path_that_does_not_fit_is_cut_and_says_so() {
        for (length, whole, cut) in [
            (511, true, false),
            (512, true, true),
            (600, true, true),
            (10, false, true),
        ] {
            let mut long = sighting(Some(facts()));
            long.path = format!("/{}", "x".repeat(length - 1)).into();
            long.whole = whole;
            let made = record(&long, Ok(content()));
            assert_eq!(made.flags & flags::PATH_CUT != 0, cut, "{length} {whole}");
            assert_eq!(Record::read(&made.to_bytes()), Some(made));
        }
    }

    #[test]
    fn no_digest_where_none_can_stand_for_it() {
        let refused = |change: fn(&mut Facts)| {
            let mut facts = facts();
            change(&mut facts);
            let job = Job {
                sighting: sighting(Some(facts)),
                file: Err(Errno::ESTALE),
            };
            hashable(&job).map(drop).unwrap_err()
        };
        assert_eq!(refused(|facts| facts.mode = 0o020_666), Errno::ENODEV);
        assert_eq!(refused(|facts| facts.magic = FUSE), Errno::EOPNOTSUPP);
        assert_eq!(refused(|facts| facts.size = USER_HASH_LIMIT + 1), Errno::EFBIG);
        assert_eq!(refused(|facts| facts.size = USER_HASH_LIMIT), Errno::ESTALE);
    }

    #[test]
    fn a_change_that_the_clock_could_hide_is_racy() {
        // Sighted at 1000.5 s of real time, looked at a second later.
        let now = Clocks {
            monotonic: 100 * SECOND,
            real: 1001 * SECOND + SECOND / 2,
            boot: 0,
        };
        let sighted = u64::try_from(99 * SECOND).unwrap();
        let racy = |sec: u64, nsec: u32, granularity: u32| {
            let facts = Facts {
                ctime_sec: sec,
                ctime_nsec: nsec,
                granularity,
                ..facts()
            };
            is_racy(&facts, sighted, now)
        };
        assert!(!racy(900, 0, 1));
        assert!(!racy(1000, 489_999_999, 1));
        assert!(racy(1000, 490_000_000, 1), "within a tick");
        assert!(racy(1001, 0, 1), "changed between sighting and hash");
        assert!(!racy(2000, 0, 1), "of the future");
        assert!(racy(1000, 0, 1_000_000_000), "a file system that counts seconds");
        assert!(!racy(999, 0, 1_000_000_000));
    }

    #[test]
    fn one_record_is_enough_only_for_what_cannot_change_unseen() {
        let known = |kind, change: fn(&mut Facts)| {
            let mut facts = facts();
            change(&mut facts);
            let mut sighting = sighting(Some(facts));
            sighting.kind = kind;
            may_be_known(&sighting, &facts)
        };
        assert!(known(kind::PROGRAM, |_| ()));
        assert!(known(kind::MAPPING, |facts| facts.writers = -1));
        assert!(!known(kind::MODULE_FILE, |_| ()));
        assert!(!known(kind::MAPPING, |facts| facts.writers = 1));
        assert!(!known(kind::PROGRAM, |facts| facts.links = 0));
    }
}

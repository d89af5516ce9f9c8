//! The second thread: is it still that file in that state, and what is its digest.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::mpsc::Receiver;

use assay_ebpf::probe_record::{File as Facts, STATE_SIZE};
use assay_ebpf::{Record, kind};
use assay_evidence::digest::Sha256Digest;
use nix::errno::Errno;

use super::ProbeError;
use super::ask::Asker;
use super::load::{Answers, Loaded, Seen, map_error};
use super::record::{Clocks, Content, record};
use super::shared::Shared;
use super::sighting::Sighting;
use crate::measure::inventory;

/// The map's name.
pub const SEEN: &str = "SEEN";

/// Largest file that is hashed, in bytes: everything loaded since waits behind it.
pub const USER_HASH_LIMIT: u64 = 1 << 30;

/// No kernel's clock tick is longer (CONFIG_HZ=100), in nanoseconds.
const TICK_NS: i128 = 10_000_000;

/// What a FUSE daemon answers need not be what it answered before, or come at all.
const FUSE: u64 = 0x6573_5546;

/// Digests that are kept for programs that do something after their file is gone.
const DIGESTS: usize = 8192;

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
    known: Known,
}

/// What has been recorded, and in which state it was then.
struct Known {
    /// The probes' own table: what is in it they do not tell again.
    seen: Seen,
    /// Key and state to digest.
    digests: HashMap<([u8; 16], [u8; STATE_SIZE]), Sha256Digest>,
}

impl Hasher {
    /// Ready to run in a thread.
    pub fn new(loaded: &Loaded, work: Receiver<Job>) -> Result<Self, ProbeError> {
        Ok(Self {
            work,
            answers: loaded.answers()?,
            known: Known {
                seen: loaded.seen()?,
                digests: HashMap::new(),
            },
        })
    }

    /// Until nobody sends work.
    pub fn run(self, shared: &Shared) -> Result<(), ProbeError> {
        let Self {
            work,
            answers,
            mut known,
        } = self;
        let mut asker = Asker::for_this_thread(answers);
        for job in work {
            if shared.is_stopping() {
                break;
            }
            if let Some(record) = shared.hashing.on(|| complete(&job, &mut asker, &mut known))? {
                shared.push(record);
            }
        }
        Ok(())
    }
}

impl Known {
    /// Whether the log has this file in this state.
    fn has(&self, facts: &Facts) -> Result<bool, ProbeError> {
        match self.seen.get(&facts.key().to_bytes(), 0) {
            Ok(state) => Ok(state == facts.state().to_bytes()),
            Err(aya::maps::MapError::KeyNotFound) => Ok(false),
            Err(error) => Err(map_error(SEEN)(error).into()),
        }
    }

    fn digest(&self, facts: &Facts) -> Option<Sha256Digest> {
        self.digests
            .get(&(facts.key().to_bytes(), facts.state().to_bytes()))
            .copied()
    }

    fn add(&mut self, facts: &Facts, digest: Sha256Digest) -> Result<(), ProbeError> {
        let (key, state) = (facts.key().to_bytes(), facts.state().to_bytes());
        if self.digests.len() >= DIGESTS {
            self.digests.clear();
        }
        self.digests.insert((key, state), digest);
        self.seen.insert(key, state, 0).map_err(map_error(SEEN))?;
        Ok(())
    }
}

/// The record of a sighting; `None` = this file in this state has been recorded before.
fn complete(job: &Job, asker: &mut Asker, known: &mut Known) -> Result<Option<Record>, ProbeError> {
    let sighting = &job.sighting;
    let digest = |facts| known.digest(facts).filter(|_| sighting.is_deed());
    if let Some(digest) = sighting.file.as_ref().and_then(digest) {
        return Ok(Some(record(sighting, Ok(remembered(digest)))));
    }
    let (facts, file) = match hashable(job) {
        Ok(found) => found,
        Err(errno) => return Ok(Some(record(sighting, Err(errno)))),
    };
    let one_is_enough = may_be_known(sighting, facts);
    if one_is_enough && known.has(facts)? {
        return Ok(None);
    }
    let (content, state) = match content(sighting, facts, file, asker)? {
        Ok(found) => found,
        Err(errno) => return Ok(Some(record(sighting, Err(errno)))),
    };
    if one_is_enough && may_be_known(sighting, &state) && !content.unstable {
        known.add(facts, content.digest)?;
    }
    Ok(Some(record(sighting, Ok(content))))
}

/// Of a program that was hashed when it began.
fn remembered(digest: Sha256Digest) -> Content {
    Content {
        digest,
        size: 0,
        unstable: false,
        script: false,
    }
}

/// The file to hash, or why there will be no digest.
fn hashable(job: &Job) -> Result<(&Facts, &File), Errno> {
    let facts = job.sighting.file.as_ref().ok_or(Errno::EOPNOTSUPP)?;
    if facts.mode & nix::libc::S_IFMT != nix::libc::S_IFREG {
        return Err(Errno::ENODEV);
    }
    if facts.magic == FUSE {
        return Err(Errno::EPERM);
    }
    if facts.size > USER_HASH_LIMIT {
        return Err(Errno::EFBIG);
    }
    job.file.as_ref().map(|file| (facts, file)).map_err(|errno| *errno)
}

/// Whether one record of this state is enough: every module counts, and what has writers or no name can change unseen.
fn may_be_known(sighting: &Sighting, facts: &Facts) -> bool {
    matches!(sighting.kind, kind::PROGRAM | kind::MAPPING) && facts.writers <= 0 && facts.links > 0
}

/// Hashes the file, and says what it is afterwards.
fn content(
    sighting: &Sighting,
    facts: &Facts,
    file: &File,
    asker: &mut Asker,
) -> Result<Result<(Content, Facts), Errno>, ProbeError> {
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
        || is_another_size(sighting, size)
        || is_racy(facts, sighting.time_ns, Clocks::now());
    let content = Content {
        digest,
        size,
        unstable,
        script,
    };
    Ok(Ok((content, state)))
}

/// A buffer that the kernel read is the whole file.
fn is_another_size(sighting: &Sighting, size: u64) -> bool {
    !sighting.is_deed() && sighting.size != 0 && sighting.size != size
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::probe::record::tests::{facts, sighting};

    const SECOND: i128 = 1_000_000_000;

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
        assert_eq!(refused(|facts| facts.magic = FUSE), Errno::EPERM);
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
        assert!(!known(kind::PROTECT, |_| ()));
        assert!(!known(kind::MAPPING, |facts| facts.writers = 1));
        assert!(!known(kind::PROGRAM, |facts| facts.links = 0));
    }

    #[test]
    fn a_modules_buffer_is_its_whole_file() {
        let mut module = sighting(Some(facts()));
        (module.kind, module.size) = (kind::MODULE_FILE, 3);
        assert!(!is_another_size(&module, 3) && is_another_size(&module, 4));
        // Of a device it is the number.
        module.kind = kind::DEVICE;
        assert!(!is_another_size(&module, 4));
    }
}

//! What a sighting, and what was found of it, look like as a record.

use std::os::unix::ffi::OsStrExt as _;

use assay_ebpf::probe_record::File as Facts;
use assay_ebpf::{HASH_ALGO_SHA256, PATH_MAX, Record, flags, kind};
use assay_evidence::digest::Sha256Digest;
use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime};

use super::sighting::Sighting;

const TMPFS: u64 = 0x0102_1994;
/// File system magic of overlayfs.
pub const OVERLAYFS: u64 = 0x794c_7630;

/// What was found out about a file's content.
#[derive(Clone, Copy, Debug)]
pub struct Content {
    /// Its digest.
    pub digest: Sha256Digest,
    /// Bytes hashed.
    pub size: u64,
    /// It was not the same from the sighting to the end of the hash, or nobody can tell.
    pub unstable: bool,
    /// It begins with `#!`, and is run.
    pub script: bool,
}

/// Nanoseconds of three clocks at one moment.
#[derive(Clone, Copy)]
pub struct Clocks {
    /// CLOCK_MONOTONIC, the probes' own.
    pub monotonic: i128,
    /// CLOCK_REALTIME, the files'.
    pub real: i128,
    /// CLOCK_BOOTTIME, the log's.
    pub boot: i128,
}

impl Clocks {
    /// As they stand.
    pub fn now() -> Self {
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

/// The record; its number comes later. An error stands where no digest could be made.
pub fn record(sighting: &Sighting, content: Result<Content, Errno>) -> Record {
    let now = Clocks::now();
    let facts = about(sighting);
    let (path, path_len, cut) = path(sighting);
    let is_device = matches!(sighting.kind, kind::DEVICE | kind::BLOCK_WRITE);
    let (size, device) = if is_device {
        (0, u32::try_from(sighting.size).unwrap_or(0))
    } else {
        (sighting.size, facts.dev)
    };
    let mut record = Record {
        seq: 0,
        time_ns: u64::try_from(i128::from(sighting.time_ns) + now.boot - now.monotonic).unwrap_or(sighting.time_ns),
        size,
        ino: facts.ino,
        change: facts.version >> 1,
        cgroup: sighting.cgroup,
        fs_magic: facts.magic,
        dev: device,
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
            if !sighting.is_deed() {
                record.size = content.size;
            }
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

/// The file that the record is about: not the program that opened something, of which only the digest is told.
fn about(sighting: &Sighting) -> Facts {
    match sighting.kind {
        kind::ANONYMOUS | kind::DEVICE | kind::BLOCK_WRITE => Facts {
            links: 1,
            ..Facts::default()
        },
        _ => sighting.file.unwrap_or(Facts {
            links: 1,
            ..Facts::default()
        }),
    }
}

/// The circumstances that need no content.
fn marks(sighting: &Sighting, facts: &Facts) -> u32 {
    let mut marks = match facts.magic {
        TMPFS => flags::TMPFS,
        OVERLAYFS => flags::OVERLAY,
        _ => 0,
    };
    if facts.links == 0 {
        marks |= flags::UNLINKED;
        if sighting.path.as_os_str().as_bytes().starts_with(b"/memfd:") {
            marks |= flags::MEMFD;
        }
    }
    for (is_so, mark) in [
        (sighting.interpreter, flags::INTERPRETER),
        (sighting.modified, flags::MODIFIED),
    ] {
        if is_so {
            marks |= mark;
        }
    }
    marks
}

/// The path as the kernel would show it, its length, and whether it is not all of it.
fn path(sighting: &Sighting) -> ([u8; PATH_MAX], u32, bool) {
    let mut bytes = sighting.path.as_os_str().as_bytes().to_vec();
    if about(sighting).links == 0 {
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
pub mod tests {
    use super::*;

    /// A file that nothing is odd about.
    pub fn facts() -> Facts {
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

    /// A program that was sighted.
    pub fn sighting(file: Option<Facts>) -> Sighting {
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
            modified: false,
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
        assert_eq!((made.change, made.dev, made.generation, made.size), (3, 8, 9, 3));
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
        let odd = Content {
            unstable: true,
            script: true,
            ..content()
        };
        let made = record(&memfd, Ok(odd));
        assert_eq!(made.path(), b"/memfd:x (deleted)");
        let expected = flags::USER_HASH
            | flags::UNSTABLE
            | flags::SCRIPT
            | flags::UNLINKED
            | flags::MEMFD
            | flags::TMPFS
            | flags::INTERPRETER;
        assert_eq!(made.flags, expected);
        let mut buffer = sighting(None);
        buffer.path = "".into();
        let made = record(&buffer, Err(Errno::EOPNOTSUPP));
        assert_eq!(made.flags, flags::NOT_HASHED, "no file, so no path is missing");
    }

    #[test]
    fn of_a_deed_only_the_digest_is_the_programs() {
        let mut deed = sighting(Some(Facts {
            links: 0,
            magic: TMPFS,
            ..facts()
        }));
        (deed.kind, deed.size, deed.path) = (kind::DEVICE, 0x00a0_0001, "/dev/xen/privcmd".into());
        let made = record(&deed, Ok(content()));
        assert_eq!(Record::read(&made.to_bytes()), Some(made));
        assert_eq!((made.dev, made.ino, made.size, made.fs_magic), (0x00a0_0001, 0, 0, 0));
        assert_eq!(
            (made.path(), made.flags),
            (b"/dev/xen/privcmd".as_slice(), flags::USER_HASH)
        );
        assert_eq!(made.digest, [7; 32]);
        (deed.kind, deed.size, deed.path) = (kind::ANONYMOUS, 0, "/usr/bin/perl".into());
        let made = record(&deed, Ok(content()));
        assert_eq!(
            (made.path(), made.flags),
            (b"/usr/bin/perl".as_slice(), flags::USER_HASH)
        );
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
}

//! Kernel records into log events.

use std::fs::File;
use std::io::Read as _;

use assay_ebpf::{HASH_ALGO_SHA256, Record, flags};
use assay_evidence::digest::Sha256Digest;
use assay_evidence::event::{Event, LoadKind, MAX_COMM, MAX_PATH, Measurement, Violation, cut};

/// The event that stands for a kernel record in the log. A record that makes no sense becomes a violation, never nothing.
#[must_use]
pub fn event(record: &Record) -> Event {
    let path = path(record);
    let Some(kind) = LoadKind::from_kernel(record.kind) else {
        let detail = format!(
            "the kernel side reports an unknown kind {} (record {})",
            record.kind, record.seq
        );
        return Event::Violation(Violation::NotHashed { path, detail });
    };
    let hashed = record.flags & flags::NOT_HASHED == 0 && record.hash_algo == HASH_ALGO_SHA256;
    Event::Load(Measurement {
        kind,
        flags: if hashed {
            record.flags
        } else {
            record.flags | flags::NOT_HASHED
        },
        digest: hashed.then(|| Sha256Digest::from(record.digest)),
        size: record.size,
        path: path.into(),
        comm: if record.comm == [0; 16] {
            name_of(record.pid).into()
        } else {
            text(&record.comm, MAX_COMM).into()
        },
        seq: Some(record.seq),
        time_ns: record.time_ns,
        pid: record.pid,
        uid: record.uid,
        dev: record.dev,
        ino: record.ino,
        generation: record.generation,
        change: record.change,
        fs_magic: record.fs_magic,
        cgroup: record.cgroup,
    })
}

/// The name of a task on whose behalf the agent asked; it waits, or has gone. It waits for this look, too: one read takes
/// what there is.
fn name_of(pid: u32) -> String {
    let mut name = [0; MAX_COMM + 1];
    let read = File::open(format!("/proc/{pid}/comm")).and_then(|mut file| file.read(&mut name));
    let name = name.get(..read.unwrap_or(0)).unwrap_or_default();
    text(name.strip_suffix(b"\n").unwrap_or(name), MAX_COMM)
}

fn path(record: &Record) -> String {
    let length = usize::try_from(record.path_len).unwrap_or(usize::MAX);
    text(record.path.get(..length).unwrap_or(&record.path), MAX_PATH)
}

/// Up to the first NUL; what is not UTF-8 is replaced, which may make it longer, so the cut comes last.
fn text(bytes: &[u8], limit: usize) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let text = String::from_utf8_lossy(bytes.get(..end).unwrap_or_default());
    cut(&text, limit).to_owned()
}

#[cfg(test)]
mod tests {
    use assay_ebpf::{PATH_MAX, kind};

    use super::*;

    fn record() -> Record {
        let mut path = [0; PATH_MAX];
        path[..7].copy_from_slice(b"/bin/sh");
        Record {
            seq: 5,
            time_ns: 1,
            size: 2,
            ino: 3,
            change: 4,
            cgroup: 6,
            fs_magic: 7,
            dev: 8,
            generation: 9,
            kind: kind::PROGRAM,
            flags: 0,
            hash_algo: HASH_ALGO_SHA256,
            hash_error: 0,
            pid: 10,
            uid: 11,
            digest: [12; 32],
            comm: *b"bash\0\0\0\0\0\0\0\0\0\0\0\0",
            path_len: 7,
            pad: 0,
            path,
        }
    }

    fn load(record: &Record) -> Measurement {
        match event(record) {
            Event::Load(measurement) => measurement,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_record_becomes_a_load() {
        let load = load(&record());
        assert_eq!(
            (load.kind, load.path.as_str(), load.comm.as_str(), load.seq),
            (LoadKind::Program, "/bin/sh", "bash", Some(5))
        );
        assert_eq!(load.digest, Some(Sha256Digest::from([12; 32])));
    }

    #[test]
    fn a_task_that_was_asked_for_is_told_by_its_number() {
        let mut record = record();
        (record.comm, record.pid) = ([0; 16], std::process::id());
        let own = std::fs::read_to_string("/proc/self/comm").unwrap();
        assert_eq!(load(&record).comm, own.trim_end());
        // No process has this number (PID_MAX_LIMIT).
        record.pid = u32::MAX;
        assert_eq!(load(&record).comm, "");
    }

    #[test]
    fn no_hash_or_another_hash_is_no_digest() {
        let mut unhashed = record();
        unhashed.flags = flags::NOT_HASHED;
        assert_eq!(load(&unhashed).digest, None);
        let mut sha1 = record();
        sha1.hash_algo = 2;
        assert_eq!(load(&sha1).digest, None);
        assert_eq!(load(&sha1).flags, flags::NOT_HASHED);
    }

    #[test]
    fn nonsense_is_a_violation_and_long_paths_are_cut() {
        let mut unknown = record();
        unknown.kind = 99;
        assert!(matches!(event(&unknown), Event::Violation(Violation::NotHashed { .. })));
        let mut wild = record();
        wild.path = [0xff; PATH_MAX];
        wild.path_len = u32::MAX;
        let path = load(&wild).path;
        assert!(path.len() <= MAX_PATH && path.len() > MAX_PATH - 3);
    }
}

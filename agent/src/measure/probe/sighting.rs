//! What a probe said, in a form that is easy to keep: the path in one piece, and no more bytes than it has.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use assay_ebpf::kind;
use assay_ebpf::probe_record::{File, Record, flags};

/// A file, or a buffer, that was about to be loaded.
#[derive(Clone, Debug)]
pub struct Sighting {
    /// The file; nothing for a buffer.
    pub file: Option<File>,
    /// CLOCK_MONOTONIC in nanoseconds.
    pub time_ns: u64,
    /// cgroup v2 id of the task.
    pub cgroup: u64,
    /// Bytes in the kernel's buffer, or number of the device; 0 without either.
    pub size: u64,
    /// One of `assay_ebpf::kind`.
    pub kind: u32,
    /// Process id.
    pub pid: u32,
    /// Number of the mount namespace that the path is of.
    pub mount_ns: u32,
    /// Real user id.
    pub uid: u32,
    /// Name of the task, NUL-padded.
    pub comm: [u8; 16],
    /// Run as an interpreter.
    pub interpreter: bool,
    /// The mapping has pages of its own.
    pub modified: bool,
    /// The path in the task's mount namespace, or its lower end.
    pub path: PathBuf,
    /// Whether it is all of it.
    pub whole: bool,
}

impl From<&Record> for Sighting {
    fn from(record: &Record) -> Self {
        let whole = record.flags & flags::WHOLE != 0;
        let mut path = Vec::new();
        for name in record.names().rev() {
            if whole || !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name);
        }
        Self {
            file: (record.flags & flags::NO_FILE == 0).then_some(record.file),
            time_ns: record.time_ns,
            cgroup: record.cgroup,
            size: record.size,
            kind: record.kind,
            pid: record.pid,
            mount_ns: record.mount_ns,
            uid: record.uid,
            comm: record.comm,
            interpreter: record.flags & flags::INTERPRETER != 0,
            modified: record.flags & flags::MODIFIED != 0,
            path: OsString::from_vec(path).into(),
            whole,
        }
    }
}

impl Sighting {
    /// The path, if it leads to the file from the root.
    pub fn absolute(&self) -> Option<&Path> {
        (self.whole && self.path.is_absolute()).then_some(&self.path)
    }

    /// Something that a program did; the file is the program, or, of code that is written to, was in the log before.
    pub fn is_deed(&self) -> bool {
        matches!(
            self.kind,
            kind::ANONYMOUS | kind::DEVICE | kind::BLOCK_WRITE | kind::CODE_WRITE
        )
    }

    /// Has no name any more, or never had one.
    pub fn is_unlinked(&self) -> bool {
        self.file.is_some_and(|file| file.links == 0)
    }
}

#[cfg(test)]
mod tests {
    use assay_ebpf::probe_record::NAMES;

    use super::*;

    fn record(names: &[u8], flags: u32) -> Record {
        let mut all = [0; NAMES];
        all[..names.len()].copy_from_slice(names);
        Record {
            file: File::default(),
            time_ns: 0,
            seq: 0,
            cgroup: 0,
            size: 0,
            kind: kind::PROGRAM,
            flags,
            pid: 1,
            uid: 0,
            comm: [0; 16],
            names_len: u32::try_from(names.len()).unwrap(),
            mount_ns: 0,
            names: all,
        }
    }

    #[test]
    fn the_path_is_put_together_from_its_end() {
        let whole = Sighting::from(&record(b"true\0bin\0usr\0", flags::WHOLE));
        assert_eq!(whole.absolute(), Some(Path::new("/usr/bin/true")));
        let cut = Sighting::from(&record(b"true\0bin\0usr\0", 0));
        assert_eq!((cut.path.to_str(), cut.absolute()), (Some("usr/bin/true"), None));
        let buffer = Sighting::from(&record(b"", flags::NO_FILE));
        assert_eq!((buffer.file, buffer.path.to_str()), (None, Some("")));
    }
}

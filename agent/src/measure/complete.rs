//! What a kernel program could not tell of its record, told by the agent: the program behind a deed that ran before the
//! kernel programs did, a file whose content no hook could read, and whether a block device is in use at all.

use std::fs::File;
use std::os::linux::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use assay_ebpf::{Record, flags, kind};
use assay_evidence::event::{Event, LoadKind, MAX_PATH, Measurement, cut};
use nix::libc;
use procfs::process::Process;

use super::{convert, inventory, mounts};

/// Largest file that is hashed here, in bytes: measuring waits for it.
const LIMIT: u64 = 1 << 30;

/// The event for a record, with what the agent can add. Nothing is left out, however little it says: its number would be
/// missed.
#[must_use]
pub fn event(record: &Record) -> Event {
    let mut event = convert::event(record);
    if let Event::Load(load) = &mut event {
        fill(load, record.hash_error);
        if record.kind == kind::BLOCK_WRITE && !mounts::is_in_use(record.dev) {
            load.flags |= flags::IDLE;
        }
    }
    event
}

fn fill(load: &mut Measurement, error: i32) {
    let by_program = load.kind.is_deed() && load.kind != LoadKind::CodeWrite;
    let link = PathBuf::from(format!("/proc/{}/exe", load.pid));
    if by_program && load.digest.is_none() {
        take(load, &link);
    }
    if by_program && load.path.is_empty() {
        // The hook cannot tell a path; who did it is what people want to know.
        let program = std::fs::read_link(&link).unwrap_or_default();
        load.path = cut(&program.to_string_lossy(), MAX_PATH).into();
    }
    let unread = error == -libc::EOPNOTSUPP || error == -libc::ENODATA;
    if !by_program && load.digest.is_none() && load.ino != 0 && unread {
        for (place, name) in mapped(load.pid, load.ino).into_iter().chain(named(load)) {
            take(load, &place);
            if load.path.is_empty() {
                load.path = name.into();
            }
            if load.digest.is_some() {
                break;
            }
        }
    } else if load.path.is_empty() && load.kind == LoadKind::Protect {
        load.path = mapped(load.pid, load.ino)
            .map(|(_, name)| name)
            .unwrap_or_default()
            .into();
    }
}

/// The digest of the file at `place`, if it is one that can be hashed, and for a load the very one.
fn take(load: &mut Measurement, place: &Path) {
    let Ok(file) = File::open(place) else { return };
    let Ok(metadata) = file.metadata() else { return };
    if !metadata.is_file() || metadata.len() > LIMIT || load.ino != 0 && metadata.st_ino() != load.ino {
        return;
    }
    if let Ok((digest, size)) = inventory::hash(&file) {
        load.digest = Some(digest);
        load.flags = load.flags & !flags::NOT_HASHED | flags::USER_HASH;
        if load.ino != 0 {
            load.size = size;
        }
    }
}

/// A mapping of this inode in the process, and what it is called there.
fn mapped(pid: u32, ino: u64) -> Option<(PathBuf, String)> {
    let maps = Process::new(i32::try_from(pid).ok()?)
        .and_then(|process| process.maps())
        .ok()?;
    let map = maps.iter().find(|map| map.inode == ino)?;
    let (start, end) = map.address;
    let name = match &map.pathname {
        procfs::process::MMapPath::Path(path) => cut(&path.to_string_lossy(), MAX_PATH).to_owned(),
        _ => String::new(),
    };
    Some((PathBuf::from(format!("/proc/{pid}/map_files/{start:x}-{end:x}")), name))
}

/// The path as the process sees it, and where that has ended as the agent does.
fn named(load: &Measurement) -> Vec<(PathBuf, String)> {
    let Some(below) = load.path.strip_prefix('/') else {
        return Vec::new();
    };
    let theirs = PathBuf::from(format!("/proc/{}/root", load.pid)).join(below);
    [theirs, PathBuf::from(load.path.as_str())]
        .map(|place| (place, load.path.to_string()))
        .into()
}

#[cfg(test)]
mod tests {
    use assay_ebpf::PATH_MAX;
    use assay_evidence::digest::Sha256Digest;

    use super::*;

    fn record(kind: u32) -> Record {
        Record {
            seq: 1,
            time_ns: 0,
            size: 0,
            ino: 0,
            change: 0,
            cgroup: 0,
            fs_magic: 0,
            dev: 0,
            generation: 0,
            kind,
            flags: flags::NOT_HASHED,
            hash_algo: assay_ebpf::HASH_ALGO_SHA256,
            hash_error: -libc::ENODATA,
            pid: std::process::id(),
            uid: 0,
            digest: [0; 32],
            comm: [1; 16],
            path_len: 0,
            pad: 0,
            path: [0; PATH_MAX],
        }
    }

    fn load(record: &Record) -> Measurement {
        match event(record) {
            Event::Load(load) => load,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_deed_gets_the_program_that_did_it() {
        let me = std::env::current_exe().unwrap();
        let deed = load(&record(kind::ANONYMOUS));
        assert_eq!(deed.digest, Some(Sha256Digest::of(&std::fs::read(&me).unwrap())));
        assert_eq!(deed.flags, flags::USER_HASH);
        assert_eq!(deed.path.as_str(), me.to_string_lossy());
    }

    #[test]
    fn a_file_that_no_hook_could_read_is_found_by_its_inode() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "print()").unwrap();
        let path = file.path().to_string_lossy().into_owned();
        let mut record = record(kind::ARGUMENT);
        record.ino = file.as_file().metadata().unwrap().st_ino();
        record.path_len = u32::try_from(path.len()).unwrap();
        record.path[..path.len()].copy_from_slice(path.as_bytes());
        assert_eq!(load(&record).digest, Some(Sha256Digest::of(b"print()")));
        // Another file has the name by now.
        record.ino += 1;
        let unfound = load(&record);
        assert_eq!((unfound.digest, unfound.flags), (None, flags::NOT_HASHED));
    }

    #[test]
    fn a_block_device_that_nobody_uses_is_marked() {
        let mut record = record(kind::BLOCK_WRITE);
        record.dev = 0xfff << 20;
        assert_eq!(load(&record).flags & flags::IDLE, flags::IDLE);
    }
}

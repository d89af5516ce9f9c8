//! From a sighting to a descriptor of the very file: by its path, or through the process that runs it.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use assay_ebpf::kind;
use nix::libc;
use procfs::process::{MMapPath, MemoryMap, Process};

use super::ProbeError;
use super::ask::Asker;
use super::sighting::Sighting;

/// Mappings of one process that are looked at: enough for the largest browser, and an end for what makes millions.
const MAPPINGS: usize = 16 * 1024;

/// Other processes that are tried.
const NEIGHBOURS: usize = 8;

/// What became of the search.
#[derive(Debug)]
pub enum Found {
    /// The very file.
    File(File),
    /// Not there yet: the process is still on its way to run it.
    NotYet,
    /// No way leads there any more.
    Gone,
}

/// Looks for the file of a sighting.
///
/// # Errors
/// Those of [`Asker::ask`]. What cannot be opened is [`Found::Gone`].
pub fn find(sighting: &Sighting, asker: &mut Asker) -> Result<Found, ProbeError> {
    let Some(wanted) = sighting.file else {
        return Ok(Found::Gone);
    };
    let mut is_it = |file: &File| -> Result<bool, ProbeError> {
        let found = asker.ask(file)?;
        Ok(found.key() == wanted.key() && found.generation == wanted.generation)
    };
    // A program that does something runs; code that is written to is known.
    let all: [fn(&Sighting) -> Vec<PathBuf>; 3] = if sighting.is_deed() {
        [program, nowhere, nowhere]
    } else {
        [names, mapped, elsewhere]
    };
    for ways in all {
        for path in ways(sighting) {
            if let Ok(file) = open(&path)
                && is_it(&file)?
            {
                return Ok(Found::File(file));
            }
        }
    }
    let coming = sighting.kind == kind::PROGRAM || sighting.kind == kind::MAPPING;
    if coming && process(sighting.pid).exists() {
        return Ok(Found::NotYet);
    }
    Ok(Found::Gone)
}

/// The program that a process runs.
fn program(sighting: &Sighting) -> Vec<PathBuf> {
    vec![process(sighting.pid).join("exe")]
}

fn nowhere(_: &Sighting) -> Vec<PathBuf> {
    Vec::new()
}

/// Names that may lead there, the most likely first.
fn names(sighting: &Sighting) -> Vec<PathBuf> {
    let process = process(sighting.pid);
    let by_path = sighting.absolute().filter(|_| !sighting.is_unlinked());
    let mut names = Vec::new();
    names.extend(by_path.map(Path::to_owned));
    if sighting.kind == kind::PROGRAM {
        names.push(process.join("exe"));
    }
    // In a container the path begins at the container's root.
    if let Some(below) = by_path.and_then(|path| path.strip_prefix("/").ok()) {
        names.push(process.join("root").join(below));
    }
    names
}

/// The process's mappings of an inode of this number. Device numbers are not compared: those of /proc/PID/maps are
/// others than the kernel's on some file systems.
fn mapped(sighting: &Sighting) -> Vec<PathBuf> {
    let wanted = sighting.file.map_or(0, |file| file.ino);
    let Ok(maps) = i32::try_from(sighting.pid)
        .map_err(drop)
        .and_then(|pid| Process::new(pid).map_err(drop))
        .and_then(|process| process.maps().map_err(drop))
    else {
        return Vec::new();
    };
    let is_file = |map: &&MemoryMap| map.inode == wanted && matches!(map.pathname, MMapPath::Path(_));
    let mut ways: Vec<PathBuf> = maps
        .iter()
        .take(MAPPINGS)
        .filter(is_file)
        .map(|map| {
            let (start, end) = map.address;
            process(sighting.pid).join(format!("map_files/{start:x}-{end:x}"))
        })
        .collect();
    // Of many mappings of one file the first tells enough; a few more, should the number be another file's.
    ways.truncate(8);
    ways
}

/// Through other processes that see the same mounts: of a container in which a program has run and is gone.
fn elsewhere(sighting: &Sighting) -> Vec<PathBuf> {
    let below = sighting.absolute().filter(|_| !sighting.is_unlinked());
    let Some(below) = below.and_then(|path| path.strip_prefix("/").ok()) else {
        return Vec::new();
    };
    let number = |process: &Path| std::fs::metadata(process.join("ns/mnt")).map_or(0, |at| at.ino());
    let wanted = u64::from(sighting.mount_ns);
    // The path itself has been tried.
    if wanted == 0 || number(Path::new("/proc/self")) == wanted {
        return Vec::new();
    }
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let is_process = |name: &OsStr| name.as_bytes().iter().all(u8::is_ascii_digit);
    processes
        .flatten()
        .filter(|entry| is_process(&entry.file_name()))
        .map(|entry| entry.path())
        .filter(|process| number(process) == wanted)
        .map(|process| process.join("root").join(below))
        // Most see the same root; some may be in a folder of it (chroot).
        .take(NEIGHBOURS)
        .collect()
}

fn process(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
}

/// Opens what is behind `path` for reading if it is a regular file: to open a device can wait, or do things. Reading
/// moves no access time where the file system allows that.
pub fn open(path: &Path) -> io::Result<File> {
    let place = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
        .open(path)?;
    if !place.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let again = format!("/proc/self/fd/{}", place.as_raw_fd());
    let open = |flags| File::options().read(true).custom_flags(flags).open(&again);
    open(libc::O_NOATIME | libc::O_NONBLOCK).or_else(|_| open(libc::O_NONBLOCK))
}

#[cfg(test)]
mod tests {
    use assay_ebpf::probe_record::File as Facts;

    use super::*;

    fn sighting(kind: u32, links: u32, path: &str) -> Sighting {
        Sighting {
            file: Some(Facts {
                links,
                ..Facts::default()
            }),
            time_ns: 0,
            cgroup: 0,
            size: 0,
            kind,
            pid: 7,
            mount_ns: 0,
            uid: 0,
            comm: [0; 16],
            interpreter: false,
            modified: false,
            path: path.into(),
            whole: true,
        }
    }

    #[test]
    fn a_program_has_three_names_and_a_deleted_one_only_its_process() {
        let texts = |sighting: &Sighting| {
            names(sighting)
                .iter()
                .map(|path| path.display().to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            texts(&sighting(kind::PROGRAM, 1, "/usr/bin/true")),
            ["/usr/bin/true", "/proc/7/exe", "/proc/7/root/usr/bin/true"]
        );
        assert_eq!(texts(&sighting(kind::PROGRAM, 0, "/memfd:x")), ["/proc/7/exe"]);
        assert_eq!(
            texts(&sighting(kind::MODULE_FILE, 1, "/a.ko")),
            ["/a.ko", "/proc/7/root/a.ko"]
        );
    }

    #[test]
    fn a_program_that_is_gone_is_looked_for_through_its_neighbours() {
        let mut gone = sighting(kind::PROGRAM, 1, "/bin/x");
        gone.mount_ns = u32::try_from(std::fs::metadata("/proc/self/ns/mnt").unwrap().ino()).unwrap();
        assert_eq!(elsewhere(&gone), Vec::<PathBuf>::new(), "its path is ours");
        gone.mount_ns = 1;
        assert_eq!(elsewhere(&gone), Vec::<PathBuf>::new(), "nobody is there");
    }

    #[test]
    fn only_regular_files_are_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "content").unwrap();
        assert_eq!(open(&path).unwrap().metadata().unwrap().len(), 7);
        assert!(open(folder.path()).is_err());
        assert!(open(Path::new("/dev/null")).is_err());
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(open(&pipe).is_err(), "and it does not wait for a writer");
    }
}

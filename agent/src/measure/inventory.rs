//! What ran before the hooks were there: executables, executable mappings and loaded modules, hashed from procfs.
//!
//! Files are reached through /proc/PID/exe and /proc/PID/map_files, which lead to the very inode that runs, whatever has
//! happened to its name since. What cannot be hashed is listed without a digest, and no policy allows that.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::linux::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use assay_ebpf::flags;
use assay_evidence::digest::Sha256Digest;
use assay_evidence::event::{Event, LoadKind, MAX_COMM, MAX_PATH, Measurement, cut};
use procfs::ProcError;
use procfs::process::{MMPermissions, MMapPath, MemoryMap, Process};
use ring::digest::{Context, SHA256};

use super::{MeasureError, kernel};

/// Bytes hashed at a time.
const CHUNK: usize = 64 * 1024;

/// An inode at one state of its content: device, number, ctime with nanoseconds.
type Seen = (u64, u64, i64, i64);

/// Takes the inventory. It takes as long as hashing takes: run it in a thread of its own.
///
/// Processes that end meanwhile are left out: what they start is measured by the hooks.
///
/// # Errors
/// [`MeasureError::Inventory`] when the processes cannot be listed, [`MeasureError::HostFact`] when the modules cannot.
pub fn take(kernel_release: &str) -> Result<Vec<Event>, MeasureError> {
    let start = Instant::now();
    let mut inventory = Inventory {
        seen: HashSet::new(),
        mapped: HashSet::new(),
        events: Vec::new(),
    };
    // An error in the list is a process that has gone.
    for process in procfs::process::all_processes()
        .map_err(MeasureError::Inventory)?
        .flatten()
    {
        inventory.process(&process);
    }
    inventory.modules(kernel_release)?;
    let seconds = format!("{:.3}", start.elapsed().as_secs_f64());
    tracing::info!(files = inventory.events.len(), %seconds, "inventory complete");
    Ok(inventory.events)
}

struct Inventory {
    seen: HashSet<Seen>,
    /// Mappings by what /proc/PID/maps says (device, inode, name), so that a library is opened once and not once a process.
    /// The name is among them since two subvolumes of one Btrfs have the same device and inode numbers.
    mapped: HashSet<((i32, i32), u64, String)>,
    events: Vec<Event>,
}

impl Inventory {
    fn process(&mut self, process: &Process) {
        let who = Who {
            pid: u32::try_from(process.pid).unwrap_or(0),
            uid: process.uid().unwrap_or(0),
            comm: process.stat().map(|stat| stat.comm).unwrap_or_default(),
        };
        // Kernel threads have no executable.
        let Ok(executable) = process.exe() else { return };
        let link = PathBuf::from(format!("/proc/{}/exe", process.pid));
        self.file(LoadKind::Program, &link, &executable.to_string_lossy(), &who, None);
        let maps = match process.maps() {
            Ok(maps) => maps,
            Err(ProcError::NotFound(_)) => return,
            Err(error) => {
                let name = executable.to_string_lossy();
                tracing::warn!(pid = who.pid, path = %name, %error, "what a process has mapped cannot be listed");
                self.push(who.measurement(LoadKind::Mapping, &name));
                return;
            }
        };
        for map in maps
            .iter()
            .filter(|map| map.perms.contains(MMPermissions::EXECUTE) && map.inode != 0)
        {
            let name = match &map.pathname {
                MMapPath::Path(path) => path.to_string_lossy().into_owned(),
                other => format!("{other:?}"),
            };
            if self.mapped.insert((map.dev, map.inode, name.clone())) {
                self.mapping(map, &name, &who);
            }
        }
    }

    fn mapping(&mut self, map: &MemoryMap, name: &str, who: &Who) {
        let (start, end) = map.address;
        let link = PathBuf::from(format!("/proc/{}/map_files/{start:x}-{end:x}", who.pid));
        self.file(LoadKind::Mapping, &link, name, who, Some(map));
    }

    fn file(&mut self, kind: LoadKind, link: &Path, name: &str, who: &Who, map: Option<&MemoryMap>) {
        let mut measurement = who.measurement(kind, name);
        if let Some(map) = map {
            measurement.dev = kernel_dev(map.dev.0.unsigned_abs(), map.dev.1.unsigned_abs());
            measurement.ino = map.inode;
        }
        match open_regular(link) {
            Ok((file, metadata)) => {
                let inode = (
                    metadata.st_dev(),
                    metadata.st_ino(),
                    metadata.st_ctime(),
                    metadata.st_ctime_nsec(),
                );
                if !self.seen.insert(inode) {
                    return;
                }
                fill(&mut measurement, &file, &metadata);
            }
            // It ended, or unmapped the file, between the listing and now.
            Err(error) if is_gone(&error) => return,
            Err(error) => tracing::warn!(path = name, %error, "running code cannot be hashed"),
        }
        self.push(measurement);
    }

    fn modules(&mut self, kernel_release: &str) -> Result<(), MeasureError> {
        let list = Path::new("/proc/modules");
        let loaded = match std::fs::read_to_string(list) {
            Ok(loaded) => loaded,
            // A kernel without loadable modules.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(source) => {
                return Err(MeasureError::HostFact {
                    path: list.to_owned(),
                    source,
                });
            }
        };
        let folder = Path::new("/lib/modules").join(kernel_release);
        let files = module_files(&folder);
        for name in loaded.lines().filter_map(|line| line.split_whitespace().next()) {
            self.module(name, files.get(name).map(|file| folder.join(file)).as_deref());
        }
        Ok(())
    }

    fn module(&mut self, name: &str, path: Option<&Path>) {
        let shown = path.map_or_else(|| name.to_owned(), |path| path.to_string_lossy().into_owned());
        let mut measurement = Who::default().measurement(LoadKind::LoadedModule, &shown);
        match path.map(open_regular) {
            Some(Ok((file, metadata))) => fill(&mut measurement, &file, &metadata),
            Some(Err(error)) => {
                tracing::warn!(module = name, path = shown, %error, "a loaded module's file cannot be hashed")
            }
            None => tracing::warn!(module = name, "a loaded module has no file under /lib/modules"),
        }
        self.push(measurement);
    }

    fn push(&mut self, mut measurement: Measurement) {
        if measurement.digest.is_none() {
            measurement.flags |= flags::NOT_HASHED;
        }
        self.events.push(Event::Inventory(measurement));
    }
}

/// The task that something was found in.
#[derive(Default)]
struct Who {
    pid: u32,
    uid: u32,
    comm: String,
}

impl Who {
    fn measurement(&self, kind: LoadKind, path: &str) -> Measurement {
        Measurement {
            kind,
            flags: if path.ends_with(" (deleted)") {
                flags::UNLINKED
            } else {
                0
            },
            digest: None,
            size: 0,
            path: cut(path, MAX_PATH).into(),
            comm: cut(&self.comm, MAX_COMM).into(),
            seq: None,
            time_ns: boot_time_ns(),
            pid: self.pid,
            uid: self.uid,
            dev: 0,
            ino: 0,
            generation: 0,
            change: 0,
            fs_magic: 0,
            cgroup: 0,
        }
    }
}

/// Opens what is behind `link` if it is a regular file: reading a device could wait, or do things.
fn open_regular(link: &Path) -> std::io::Result<(File, std::fs::Metadata)> {
    let metadata = std::fs::metadata(link)?;
    if !metadata.is_file() {
        return Err(std::io::Error::other("it is no regular file"));
    }
    let file = File::open(link)?;
    let metadata = file.metadata()?;
    Ok((file, metadata))
}

fn is_gone(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::errno::Errno::ESRCH as i32)
}

fn fill(measurement: &mut Measurement, file: &File, metadata: &std::fs::Metadata) {
    measurement.ino = metadata.st_ino();
    if measurement.dev == 0 {
        measurement.dev = kernel::kernel_dev(metadata.st_dev());
    }
    measurement.fs_magic = nix::sys::statfs::fstatfs(file).map_or(0, |fs| fs.filesystem_type().0.cast_unsigned());
    match hash(file) {
        Ok((digest, size)) => (measurement.digest, measurement.size) = (Some(digest), size),
        Err(error) => tracing::warn!(path = %measurement.path, %error, "running code cannot be hashed"),
    }
}

/// The kernel's dev_t: major << 20 | minor.
fn kernel_dev(major: u32, minor: u32) -> u32 {
    (major << 20) | (minor & 0xf_ffff)
}

/// SHA-256 and size of a file, without a copy of it in memory.
pub(super) fn hash(mut file: impl std::io::Read) -> std::io::Result<(Sha256Digest, u64)> {
    let mut context = Context::new(&SHA256);
    let (mut chunk, mut size) = (vec![0; CHUNK], 0);
    loop {
        let read = file.read(&mut chunk)?;
        if read == 0 {
            break;
        }
        context.update(chunk.get(..read).unwrap_or_default());
        size += read as u64;
    }
    let digest = Sha256Digest::try_from(context.finish().as_ref()).map_err(std::io::Error::other)?;
    Ok((digest, size))
}

/// Module name (as /proc/modules spells it) to file, from modules.dep.
fn module_files(folder: &Path) -> HashMap<String, PathBuf> {
    let Ok(file) = File::open(folder.join("modules.dep")) else {
        return HashMap::new();
    };
    let lines = BufReader::new(file).lines().map_while(Result::ok);
    lines.filter_map(|line| module_file(&line)).collect()
}

/// `kernel/fs/ext4/ext4.ko.xz: kernel/lib/crc16.ko.xz` → (`ext4`, its file). Names have `_` where files may have `-`.
fn module_file(line: &str) -> Option<(String, PathBuf)> {
    let (file, _) = line.split_once(':')?;
    let base = file.rsplit('/').next()?;
    let (name, _) = base.split_once(".ko")?;
    Some((name.replace('-', "_"), PathBuf::from(file)))
}

/// CLOCK_BOOTTIME, as the kernel's records have it.
fn boot_time_ns() -> u64 {
    let Ok(now) = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME) else {
        return 0;
    };
    u64::try_from(std::time::Duration::from(now).as_nanos()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_found_by_the_name_that_the_kernel_uses() {
        let found = module_file("kernel/drivers/net/virtio-net.ko.zst: kernel/lib/a.ko.zst").unwrap();
        assert_eq!(
            found,
            (
                "virtio_net".to_owned(),
                PathBuf::from("kernel/drivers/net/virtio-net.ko.zst")
            )
        );
        assert_eq!(module_file("nonsense"), None);
    }

    #[test]
    fn the_inventory_has_this_very_program_and_its_libraries() {
        let events = take("no-such-release").unwrap();
        let me = std::env::current_exe().unwrap();
        let (digest, size) = hash(&File::open(&me).unwrap()).unwrap();
        let found: Vec<&Measurement> = events
            .iter()
            .filter_map(|event| match event {
                Event::Inventory(found) => Some(found),
                _ => None,
            })
            .collect();
        let own: Vec<_> = found
            .iter()
            .filter(|m| m.path.as_str() == me.to_string_lossy())
            .collect();
        assert_eq!(own.len(), 1, "once, though many mappings show it");
        assert_eq!(
            (own[0].digest, own[0].size, own[0].kind),
            (Some(digest), size, LoadKind::Program)
        );
        assert!(
            found
                .iter()
                .any(|m| m.kind == LoadKind::Mapping && m.path.contains("libc") && m.digest.is_some())
        );
    }
}

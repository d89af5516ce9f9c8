//! Is something on this block device mounted: itself, one of its partitions, or what lies on top of it?

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use procfs::process::Process;

/// Layers of device-mapper, RAID and loops that are looked through.
const DEPTH: u32 = 8;

/// Whether the device (kernel's `dev_t`: major << 20 | minor) is mounted in any way. When that cannot be told it counts
/// as mounted.
#[must_use]
pub fn is_in_use(dev: u32) -> bool {
    let Ok(mounts) = Process::myself().and_then(|process| process.mountinfo()) else {
        return true;
    };
    let mounted: HashSet<String> = mounts.into_iter().map(|mount| mount.majmin).collect();
    holds(
        Path::new("/sys/dev/block"),
        &format!("{}:{}", dev >> 20, dev & 0xf_ffff),
        &mounted,
        DEPTH,
    )
}

fn holds(devices: &Path, number: &str, mounted: &HashSet<String>, depth: u32) -> bool {
    if mounted.contains(number) || depth == 0 {
        return true;
    }
    let device = devices.join(number);
    let above = numbers_in(&device.join("holders")).into_iter();
    // A partition is a folder in its disk's folder, with a file that says so.
    let partitions = numbers_in(&device)
        .into_iter()
        .filter(|(path, _)| path.join("partition").exists());
    above
        .chain(partitions)
        .any(|(_, inner)| holds(devices, &inner, mounted, depth - 1))
}

/// Entries that are devices, with their numbers.
fn numbers_in(folder: &Path) -> Vec<(PathBuf, String)> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let number = |entry: std::fs::DirEntry| {
        let path = entry.path();
        let number = std::fs::read_to_string(path.join("dev")).ok()?;
        Some((path, number.trim().to_owned()))
    };
    entries.flatten().filter_map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_in_use_when_a_partition_or_what_lies_on_it_is() {
        let sys = tempfile::tempdir().unwrap();
        let device = |path: &str, number: &str| {
            let path = sys.path().join(path);
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join("dev"), format!("{number}\n")).unwrap();
            path
        };
        device("8:0", "8:0");
        let partition = device("8:0/sda1", "8:1");
        std::fs::write(partition.join("partition"), "1").unwrap();
        device("8:1/holders/dm-0", "254:0");
        device("254:0", "254:0");
        device("8:0/queue", "8:9");
        let holds =
            |number: &str, mounted: &str| holds(sys.path(), number, &HashSet::from([mounted.to_owned()]), DEPTH);
        assert!(holds("8:0", "8:0"));
        assert!(holds("8:0", "8:1"));
        assert!(holds("8:0", "254:0"));
        assert!(!holds("8:0", "8:9"), "what is no partition does not count");
        assert!(!holds("254:0", "8:0"), "what lies below is somebody else's");
    }

    #[test]
    fn the_root_file_system_is_in_use() {
        let root = nix::sys::stat::stat("/").unwrap().st_dev;
        let dev = nix::sys::stat::major(root) << 20 | nix::sys::stat::minor(root);
        assert!(is_in_use(u32::try_from(dev).unwrap()));
    }
}

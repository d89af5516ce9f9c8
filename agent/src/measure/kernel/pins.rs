//! The folder in the BPF file system where programs and maps outlive the agent.
//!
//! ```text
//! bpf_dir/                 0700, locked while an agent uses it
//!   maps-3/                all that is in [`MAPS`]; the number is assay_ebpf::MAPS_VERSION
//!   programs-<sha256>/     one link for each program of the object with that digest
//!   new-<pid>/             links of a start that has not finished, or that never did
//! ```
//! A `programs-` folder gets its name by a rename after the last link was pinned into it: it is whole, or has no such
//! name.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use assay_ebpf::MAPS_VERSION;

use super::KernelError;
use crate::measure::lock::Lock;

/// Names of the maps that outlive the programs.
pub const EVENTS: &str = "EVENTS";
/// See [`EVENTS`].
pub const COUNTERS: &str = "COUNTERS";
/// See [`EVENTS`].
pub const SEQUENCE: &str = "SEQUENCE";
/// See [`EVENTS`].
pub const CACHE: &str = "CACHE";
/// See [`EVENTS`].
pub const CONTROL: &str = "CONTROL";
/// See [`EVENTS`].
pub const EXTENDED: &str = "EXTENDED";
/// See [`EVENTS`].
pub const APPROVED: &str = "APPROVED";
/// See [`EVENTS`].
pub const DIGESTS: &str = "DIGESTS";
/// See [`EVENTS`].
pub const GUARDED: &str = "GUARDED";
/// See [`EVENTS`].
pub const CGROUPS: &str = "CGROUPS";
/// See [`EVENTS`].
pub const FOLDERS: &str = "FOLDERS";
/// See [`EVENTS`].
pub const HEIRS: &str = "HEIRS";
/// See [`EVENTS`].
pub const DEVICES: &str = "DEVICES";
/// See [`EVENTS`].
pub const INTERPRETERS: &str = "INTERPRETERS";
/// All of them.
pub const MAPS: [&str; 14] = [
    EVENTS,
    COUNTERS,
    SEQUENCE,
    CACHE,
    CONTROL,
    EXTENDED,
    APPROVED,
    DIGESTS,
    GUARDED,
    CGROUPS,
    FOLDERS,
    HEIRS,
    DEVICES,
    INTERPRETERS,
];

/// The pins' folder, locked.
#[derive(Debug)]
pub struct Pins {
    dir: PathBuf,
    /// Whoever holds it reads the queue: two readers would share the records among them.
    _lock: Lock,
}

impl Pins {
    /// Makes the folder if it does not exist, and locks it until the value is dropped.
    ///
    /// # Errors
    /// [`KernelError::InUse`] when another process holds the lock, [`KernelError::ForeignPins`] when the maps are of
    /// another version, [`KernelError::File`].
    pub fn open(dir: &Path) -> Result<Self, KernelError> {
        make_folder(dir)?;
        let lock = File::open(dir).map_err(KernelError::file("open", dir))?;
        let lock = Lock::take(lock).map_err(|error| match error {
            TryLockError::WouldBlock => KernelError::InUse { path: dir.to_owned() },
            TryLockError::Error(error) => KernelError::file("lock", dir)(error),
        })?;
        let pins = Self {
            dir: dir.to_owned(),
            _lock: lock,
        };
        let ours = pins.maps();
        if let Some(path) = pins.folders("maps-")?.into_iter().find(|path| *path != ours) {
            return Err(KernelError::ForeignPins { path });
        }
        make_folder(&ours)?;
        Ok(pins)
    }

    /// Where a map is pinned.
    pub fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    /// Where the links of an object are pinned.
    pub fn programs(&self, digest: &[u8; 32]) -> PathBuf {
        self.dir.join(format!("programs-{}", hex::encode(digest)))
    }

    /// An empty folder for the links of a start in progress.
    pub fn begin(&self) -> Result<PathBuf, KernelError> {
        let path = self.dir.join(format!("new-{}", std::process::id()));
        if path.exists() {
            remove_folder(&path)?;
        }
        make_folder(&path)?;
        Ok(path)
    }

    /// Gives the folder of a start its final name.
    pub fn finish(&self, begun: &Path, digest: &[u8; 32]) -> Result<(), KernelError> {
        let path = self.programs(digest);
        if path.exists() {
            // Incomplete, or it would have been taken over.
            remove_folder(&path)?;
        }
        fs::rename(begun, &path).map_err(KernelError::file("rename", begun))
    }

    /// Removes every link but those of the object with this digest: older objects', and those of starts that never
    /// finished. Their programs end here, after the new ones took over.
    pub fn retain(&self, digest: &[u8; 32]) -> Result<(), KernelError> {
        let keep = self.programs(digest);
        for prefix in ["programs-", "new-"] {
            for path in self.folders(prefix)? {
                if path != keep {
                    remove_folder(&path)?;
                }
            }
        }
        Ok(())
    }

    /// The folders of links, of whatever object. That there is one says nothing of what is left in it.
    pub fn program_folders(&self) -> Result<Vec<PathBuf>, KernelError> {
        self.folders("programs-")
    }

    /// Every folder of ours, this one included.
    pub fn all_folders(&self) -> Result<Vec<PathBuf>, KernelError> {
        let mut found = vec![self.dir.clone(), self.maps()];
        found.extend(self.program_folders()?);
        Ok(found)
    }

    /// Whether there are maps of an earlier agent of this boot.
    pub fn has_maps(&self) -> bool {
        self.map(CONTROL).exists()
    }

    fn maps(&self) -> PathBuf {
        self.dir.join(format!("maps-{MAPS_VERSION}"))
    }

    fn folders(&self, prefix: &str) -> Result<Vec<PathBuf>, KernelError> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(KernelError::file("list", &self.dir))? {
            let entry = entry.map_err(KernelError::file("list", &self.dir))?;
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                found.push(entry.path());
            }
        }
        Ok(found)
    }
}

fn make_folder(path: &Path) -> Result<(), KernelError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(KernelError::file("make the folder", path))
}

/// One level deep, and nothing but pins: not a recursive removal, which has no business in a configured path.
fn remove_folder(path: &Path) -> Result<(), KernelError> {
    for entry in fs::read_dir(path).map_err(KernelError::file("list", path))? {
        let pin = entry.map_err(KernelError::file("list", path))?.path();
        fs::remove_file(&pin).map_err(KernelError::file("remove", &pin))?;
    }
    fs::remove_dir(path).map_err(KernelError::file("remove", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: [u8; 32] = [1; 32];
    const NEW: [u8; 32] = [2; 32];

    #[test]
    fn a_start_becomes_visible_whole_and_replaces_what_was_there() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("assay");
        let pins = Pins::open(&dir).unwrap();
        assert!(pins.program_folders().unwrap().is_empty());
        for digest in [OLD, NEW] {
            let begun = pins.begin().unwrap();
            fs::write(begun.join("program"), "").unwrap();
            assert!(!pins.programs(&digest).exists());
            pins.finish(&begun, &digest).unwrap();
        }
        fs::create_dir(dir.join("new-1")).unwrap();
        fs::write(dir.join("new-1/program"), "").unwrap();
        pins.retain(&NEW).unwrap();
        assert!(pins.programs(&NEW).join("program").exists());
        assert!(!pins.programs(&OLD).exists());
        assert!(!dir.join("new-1").exists());
        assert!(dir.join("maps-3").exists());
    }

    #[test]
    fn one_agent_at_a_time() {
        let root = tempfile::tempdir().unwrap();
        let first = Pins::open(root.path()).unwrap();
        assert!(matches!(Pins::open(root.path()), Err(KernelError::InUse { .. })));
        drop(first);
        assert!(Pins::open(root.path()).is_ok());
    }

    #[test]
    fn maps_of_another_version_are_left_alone() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("maps-0")).unwrap();
        assert!(matches!(Pins::open(root.path()), Err(KernelError::ForeignPins { .. })));
    }
}

//! What the kernel programs keep other processes away from: maps, programs, links, pins, the TPM's device, control groups.

use std::collections::HashSet;
use std::os::linux::fs::MetadataExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use assay_ebpf::{MAX_INTERPRETERS, control, guarded, kind};
use aya::maps::{HashMap, MapData};
use aya::programs::links::FdLink;
use aya::programs::{ProgramError, loaded_programs};

use super::orders::{Key, Orders, open};
use super::pins::{CGROUPS, DEVICES, FOLDERS, GUARDED, HEIRS, INTERPRETERS, MAPS, Pins};
use super::{KernelError, map_error};

/// Where control groups of version 2 are, beside version 1's or alone.
pub const CGROUP_MOUNTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// The maps that name what is guarded.
pub struct Guard {
    guarded: HashMap<MapData, u64, u32>,
    cgroups: HashMap<MapData, u64, u32>,
    folders: HashMap<MapData, u64, u32>,
    heirs: HashMap<MapData, Key, u32>,
    devices: HashMap<MapData, u64, u32>,
    interpreters: HashMap<MapData, [u64; 2], u32>,
    /// The agent's control group as it was told last.
    cgroup: String,
}

impl Guard {
    /// Opens the pinned maps.
    pub fn open(pins: &Pins) -> Result<Self, KernelError> {
        Ok(Self {
            guarded: open(pins, GUARDED)?,
            cgroups: open(pins, CGROUPS)?,
            folders: open(pins, FOLDERS)?,
            heirs: open(pins, HEIRS)?,
            devices: open(pins, DEVICES)?,
            interpreters: open(pins, INTERPRETERS)?,
            cgroup: String::new(),
        })
    }

    /// Names the maps, programs, links and folders of this object, and the file system that they are pinned on.
    pub fn pins(&mut self, pins: &Pins, links: &[FdLink], orders: &mut Orders) -> Result<(), KernelError> {
        let mut keys = Vec::new();
        let mut programs = HashSet::new();
        for name in MAPS {
            let map = MapData::from_pin(pins.map(name)).map_err(map_error(name))?;
            keys.push(guarded::MAP | u64::from(map.info().map_err(map_error(name))?.id()));
        }
        for link in links {
            let info = link.info().map_err(|error| KernelError::Link {
                path: "(a running program)".into(),
                step: "looked at",
                source: Box::new(error),
            })?;
            keys.push(guarded::LINK | u64::from(info.id()));
            keys.push(guarded::PROGRAM | u64::from(info.program_id()));
            programs.insert(info.program_id());
        }
        keys.extend(maps_of(&programs)?.into_iter().map(|id| guarded::MAP | u64::from(id)));
        for key in keys {
            self.guarded.insert(key, 1, 0).map_err(map_error(GUARDED))?;
        }
        for folder in pins.all_folders()? {
            let metadata = std::fs::metadata(&folder).map_err(KernelError::file("look at", &folder))?;
            self.folders
                .insert(metadata.st_ino(), 1, 0)
                .map_err(map_error(FOLDERS))?;
            orders.set(control::PINS_DEV, u64::from(kernel_dev(metadata.st_dev())))?;
        }
        Ok(())
    }

    /// Names the devices: the TPM's, which others must not open, and those whose opening is recorded. What does not exist
    /// is left out.
    pub fn devices(&mut self, tpms: &[PathBuf], watched: &[PathBuf]) -> Result<(), KernelError> {
        let kinds = [(tpms, kind::ATTEMPT_TPM), (watched, kind::DEVICE)];
        for (paths, kind) in kinds {
            for path in paths {
                let Ok(metadata) = std::fs::metadata(path) else {
                    continue;
                };
                if metadata.file_type().is_char_device() {
                    let device = u64::from(kernel_dev(metadata.st_rdev()));
                    self.devices.insert(device, kind, 0).map_err(map_error(DEVICES))?;
                }
            }
        }
        Ok(())
    }

    /// Names the interpreters whose script arguments are measured: as they are now, since an update brings another file.
    pub fn interpreters(&mut self, paths: &[PathBuf]) -> Result<(), KernelError> {
        for path in paths {
            let Ok(metadata) = std::fs::metadata(path) else {
                continue;
            };
            let key = [metadata.st_ino(), u64::from(kernel_dev(metadata.st_dev()))];
            if self.interpreters.get(&key, 0).is_ok() {
                continue;
            }
            let full = self.interpreters.keys().count() >= MAX_INTERPRETERS as usize;
            if full {
                // Of files that are gone; those that are there follow in this very loop, or in the next.
                let stale: Vec<_> = self.interpreters.keys().filter_map(Result::ok).collect();
                for key in stale {
                    self.interpreters.remove(&key).map_err(map_error(INTERPRETERS))?;
                }
            }
            self.interpreters.insert(key, 1, 0).map_err(map_error(INTERPRETERS))?;
        }
        Ok(())
    }

    /// A program with this digest may take over from this agent.
    pub fn heir(&mut self, digest: Key) -> Result<(), KernelError> {
        self.heirs.insert(digest, 1, 0).map_err(map_error(HEIRS))
    }

    /// Names the agent's control group and those above it, if it has moved.
    pub fn cgroups(&mut self) -> Result<(), KernelError> {
        let path = Path::new("/proc/self/cgroup");
        let table = std::fs::read_to_string(path).map_err(KernelError::file("read", path))?;
        // "0::/system.slice/assay-agent.service": the one line of version 2 (cgroups(7)).
        let own = table
            .lines()
            .find_map(|line| line.strip_prefix("0::"))
            .unwrap_or_default();
        if own == self.cgroup {
            return Ok(());
        }
        if !self.cgroup.is_empty() {
            tracing::warn!(
                from = self.cgroup,
                to = own,
                "the agent was moved to another control group"
            );
        }
        let groups = folders_of(own);
        // First those that are new: between the two, more is guarded than must be.
        for group in &groups {
            self.cgroups.insert(group, 1, 0).map_err(map_error(CGROUPS))?;
        }
        let guarded: Vec<u64> = self.cgroups.keys().filter_map(Result::ok).collect();
        for left in guarded.iter().filter(|group| !groups.contains(group)) {
            self.cgroups.remove(left).map_err(map_error(CGROUPS))?;
        }
        own.clone_into(&mut self.cgroup);
        Ok(())
    }
}

/// The numbers of the folders of this control group and of those above it.
fn folders_of(group: &str) -> HashSet<u64> {
    let mut numbers = HashSet::new();
    for mount in CGROUP_MOUNTS.map(Path::new) {
        for group in Path::new(group.trim_start_matches('/')).ancestors() {
            let folder = mount.join(group);
            // Not every folder of this name is one of a control group.
            if let Ok(metadata) = std::fs::metadata(folder.join("cgroup.procs")).and(std::fs::metadata(&folder)) {
                numbers.insert(metadata.st_ino());
            }
        }
    }
    numbers
}

/// Every map that these programs use, pinned or not: what they note in the others decides as well.
fn maps_of(programs: &HashSet<u32>) -> Result<Vec<u32>, KernelError> {
    let failed = |error: ProgramError| KernelError::Program {
        program: "(a running program)",
        step: "looked at",
        source: Box::new(error),
    };
    let mut found = Vec::new();
    for info in loaded_programs() {
        let info = info.map_err(failed)?;
        if programs.contains(&info.id()) {
            found.extend(info.map_ids().map_err(failed)?.unwrap_or_default());
        }
    }
    Ok(found)
}

/// A device number of user space (`dev_t`, gnu_dev_makedev(3)) as the kernel has it: major << 20 | minor.
pub fn kernel_dev(device: u64) -> u32 {
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    u32::try_from((major & 0xfff) << 20 | (minor & 0xf_ffff)).unwrap_or(0)
}

/// The id as /proc has it, as a word for [`control::AGENT_NAME`].
pub fn name_word(id: u32) -> u64 {
    let mut word = [0; 8];
    for (place, byte) in word.iter_mut().take(7).zip(id.to_string().bytes()) {
        *place = byte;
    }
    u64::from_ne_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_the_kernels() {
        // /dev/null is 1:3 on every Linux.
        let null = std::fs::metadata("/dev/null").unwrap();
        assert_eq!(kernel_dev(null.st_rdev()), 1 << 20 | 3);
    }

    #[test]
    fn an_id_is_text_with_zeros_behind_it() {
        assert_eq!(name_word(235).to_ne_bytes(), *b"235\0\0\0\0\0");
        assert_eq!(name_word(4_194_304).to_ne_bytes(), *b"4194304\0");
    }
}

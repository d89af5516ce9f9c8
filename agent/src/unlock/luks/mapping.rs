//! Which LUKS UUID is open under which name, as the kernel tells.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

/// Mappings of LUKS devices, and ours of qcow2 images, carry one of these in front of the LUKS UUID in their device-mapper UUID.
const DM_PREFIXES: [&str; 3] = ["CRYPT-LUKS2-", "CRYPT-LUKS1-", super::qcow2::linear::DM_PREFIX];
const BLOCK: &str = "/sys/class/block";

/// Whether a LUKS UUID is open under this name.
#[must_use]
pub fn is_open(uuid: &[u8; 16], name: &str) -> bool {
    match folder_of(name).and_then(|folder| uuid_of(&folder)) {
        // One look, however many disks are open: this is asked for each of them.
        Some(id) => is_of(&id, uuid),
        None => open_mapping(Path::new(BLOCK), uuid).as_deref() == Some(name),
    }
}

/// The mapping under which a LUKS UUID is open, from `/sys/class/block/dm-*/dm/{uuid,name}`.
pub(super) fn open_mapping(block: &Path, uuid: &[u8; 16]) -> Option<String> {
    fs::read_dir(block).ok()?.flatten().find_map(|entry| {
        let dm = entry.path().join("dm");
        let id = fs::read_to_string(dm.join("uuid")).ok()?;
        let name = fs::read_to_string(dm.join("name")).ok()?;
        is_of(&id, uuid).then(|| name.trim_end().to_owned())
    })
}

/// The folder in `/sys` of the mapping whose node has this name.
pub(super) fn folder_of(name: &str) -> Option<PathBuf> {
    let device = fs::metadata(Path::new("/dev/mapper").join(name)).ok()?.rdev();
    Some(PathBuf::from(format!(
        "/sys/dev/block/{}:{}",
        major(device),
        minor(device)
    )))
}

/// The device-mapper UUID of the mapping with this folder.
pub(super) fn uuid_of(folder: &Path) -> Option<String> {
    fs::read_to_string(folder.join("dm/uuid")).ok()
}

/// Whether a device-mapper UUID is that of a LUKS UUID's mapping.
fn is_of(id: &str, uuid: &[u8; 16]) -> bool {
    let rest = DM_PREFIXES.iter().find_map(|prefix| id.strip_prefix(prefix));
    rest.is_some_and(|rest| rest.starts_with(&format!("{}-", hex::encode(uuid))))
}

//! The mapping that lies on a network block device, and gives it a name.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::super::{DiskError, mapping};
use super::nbd::Device;
use super::program::{Ended, command, run};

/// In front of the LUKS UUID in the mapping's own UUID, as cryptsetup has it for its mappings.
pub(in super::super) const DM_PREFIX: &str = "ASSAY-QCOW2-";
const PROGRAM: &str = "dmsetup";
/// A mapping that is in use is tried again for some seconds by the program itself.
const WITHIN: Duration = Duration::from_secs(60);

/// A mapping of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Linear {
    name: String,
    /// In `/sys`.
    folder: PathBuf,
}

impl Linear {
    /// Makes one over all of a device.
    ///
    /// # Errors
    /// [`DiskError::Program`], [`DiskError::Said`], [`DiskError::Device`].
    pub(super) fn make(name: &str, disk: &[u8; 16], device: &Device) -> Result<(), DiskError> {
        let uuid = format!("{DM_PREFIX}{}-{name}", hex::encode(disk));
        dmsetup(name, &["create", name, "--uuid", &uuid, "--table", &device.table()?])?;
        see_to_node(name, true).inspect_err(|_| {
            // Nothing is left half open. The error that led here is the one to tell.
            if let Err(error) = dmsetup(name, &["remove", "--retry", name]) {
                tracing::warn!("{error}");
            }
        })
    }

    /// The one of this name; `None` if there is none, or it is somebody else's.
    pub(in super::super) fn find(name: &str) -> Option<Self> {
        let folder = mapping::folder_of(name)?;
        let id = mapping::uuid_of(&folder)?;
        id.starts_with(DM_PREFIX).then(|| Self {
            name: name.to_owned(),
            folder,
        })
    }

    /// Its name under `/dev/mapper`.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The device below it.
    pub(super) fn device(&self) -> Option<Device> {
        Device::below(&self.folder)
    }

    /// Gives it another device, of the same size, for when it goes on.
    ///
    /// # Errors
    /// [`DiskError::Program`], [`DiskError::Said`], [`DiskError::Device`].
    pub(super) fn put_on(&self, device: &Device) -> Result<(), DiskError> {
        dmsetup(&self.name, &["load", &self.name, "--table", &device.table()?])
    }

    /// Takes it away.
    ///
    /// # Errors
    /// [`DiskError::Busy`], [`DiskError::Program`], [`DiskError::Said`].
    pub(super) fn remove(&self) -> Result<(), DiskError> {
        dmsetup(&self.name, &["remove", "--retry", &self.name])?;
        see_to_node(&self.name, false)
    }
}

/// Where no udev is running, nobody makes or removes the node.
fn see_to_node(name: &str, wanted: bool) -> Result<(), DiskError> {
    if node(name).exists() == wanted {
        return Ok(());
    }
    dmsetup(name, &["mknodes", name])
}

fn node(name: &str) -> PathBuf {
    Path::new("/dev/mapper").join(name)
}

fn dmsetup(name: &str, arguments: &[&str]) -> Result<(), DiskError> {
    let said = match run(command(PROGRAM).args(arguments), PROGRAM, b"", WITHIN)? {
        Ended::Well => return Ok(()),
        Ended::Late => format!("nothing within {} s", WITHIN.as_secs()),
        Ended::Said(words) => words,
    };
    if said.contains("Device or resource busy") {
        return Err(DiskError::Busy { name: name.to_owned() });
    }
    Err(DiskError::Said {
        program: PROGRAM,
        about: node(name),
        said,
    })
}

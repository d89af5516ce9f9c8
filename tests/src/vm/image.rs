//! What the image builder leaves for the harness.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::HarnessError;

/// Environment variable that names another image description than the default one.
pub const IMAGE_VARIABLE: &str = "ASSAY_VM_IMAGE";

/// A bootable machine: written by `cargo xtask`, read by every test.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// The kernel's release, as `uname -r` says it.
    pub kernel_release: String,
    /// The bzImage. An uncompressed vmlinux does not do: QEMU lays its initramfs over the ACPI tables of a machine
    /// with a TPM.
    pub kernel: PathBuf,
    /// The initramfs: virtio drivers, and the programs under test, which it copies onto the root filesystem.
    pub initrd: PathBuf,
    /// The root filesystem, raw ext4; never written to.
    pub root: PathBuf,
    /// The kernel's modules: a folder of this machine with the files that the guest has at /lib/modules/RELEASE.
    pub modules: PathBuf,
    /// The kernel's command line.
    pub cmdline: String,
    /// A machine that has booted and waits, if one was saved.
    pub snapshot: Option<PathBuf>,
}

impl Image {
    /// The image that `cargo xtask` built last.
    ///
    /// # Errors
    /// [`HarnessError::Image`] when there is none.
    pub fn load() -> Result<Self, HarnessError> {
        let path = std::env::var_os(IMAGE_VARIABLE).map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/assay/vm.json"),
            PathBuf::from,
        );
        Self::read(&path)
    }

    /// Reads a description.
    ///
    /// # Errors
    /// [`HarnessError::Image`] when it is missing, does not parse, or names files that are gone.
    pub fn read(path: &Path) -> Result<Self, HarnessError> {
        let unusable = |message: String| HarnessError::Image {
            path: path.to_owned(),
            message,
        };
        let text = std::fs::read(path).map_err(|error| unusable(error.to_string()))?;
        let image: Self = serde_json::from_slice(&text).map_err(|error| unusable(error.to_string()))?;
        for file in [&image.kernel, &image.initrd, &image.root]
            .into_iter()
            .chain(&image.snapshot)
        {
            if !file.exists() {
                return Err(unusable(format!("{} is gone", file.display())));
            }
        }
        Ok(image)
    }

    /// The disk of the saved machine, a qcow2 with one internal snapshot.
    pub(super) fn snapshot_disk(snapshot: &Path) -> PathBuf {
        snapshot.join("disk.qcow2")
    }

    /// The TPM's state as it was when the machine was saved.
    pub(super) fn snapshot_tpm(snapshot: &Path) -> PathBuf {
        snapshot.join("tpm")
    }
}

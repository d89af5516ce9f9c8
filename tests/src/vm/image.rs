//! What the image builder leaves for the harness.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::HarnessError;

use super::{Efi, Variant, Xen, saved};

/// Environment variable that names another image description than the default one.
pub const IMAGE_VARIABLE: &str = "ASSAY_VM_IMAGE";
/// The series of kernels for which there are machines, by name; `7` stands for the newest 7.x of Debian.
pub const KERNELS: [&str; 4] = ["5.10", "6.1", "6.12", "7"];
/// The series of machines whose test does not say which.
pub const DEFAULT_KERNEL: &str = "6.12";

/// The image of a host with Xen and xl, by name; described only for the tests that need it.
pub const XEN: &str = "xen";
/// The image of a host with libvirt and QEMU, by name; as with [`XEN`].
pub const LIBVIRT: &str = "libvirt";

/// A bootable machine: written by `cargo xtask`, read by every test.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// The kernel's release, as `uname -r` says it.
    pub kernel_release: String,
    /// The bzImage. An uncompressed vmlinux does not do: QEMU lays its initramfs over the ACPI tables of a machine
    /// with a TPM.
    pub kernel: PathBuf,
    /// The initramfs, parts to be laid one after the other: drivers, and the programs under test, which the first part
    /// copies onto the root filesystem.
    pub initrd: Vec<PathBuf>,
    /// The root filesystem, raw ext4; never written to.
    pub root: PathBuf,
    /// The kernel's modules: a folder of this machine with the files that the guest has at /lib/modules/RELEASE.
    pub modules: PathBuf,
    /// The hypervisor under which the kernel runs as dom0; `None`: on the machine itself.
    pub xen: Option<Xen>,
    /// What boots it where a test wants real firmware.
    pub efi: Efi,
    /// The kernel's command line, to which the variant and the test may add.
    pub cmdline: String,
    /// The folder for machines that have booted and wait, one a [`Variant`].
    pub saved: PathBuf,
    /// How it is booted; the test chooses.
    #[serde(skip)]
    pub variant: Variant,
}

impl Image {
    /// The image that `cargo xtask` built last, with the kernel of [`DEFAULT_KERNEL`].
    ///
    /// # Errors
    /// [`HarnessError::Image`] when there is none.
    pub fn load() -> Result<Self, HarnessError> {
        let path = std::env::var_os(IMAGE_VARIABLE).map_or_else(|| description("vm.json"), PathBuf::from);
        Self::read(&path)
    }

    /// The image with a kernel of that series, one of [`KERNELS`].
    ///
    /// # Errors
    /// [`HarnessError::Image`] when there is none.
    pub fn load_kernel(series: &str) -> Result<Self, HarnessError> {
        Self::read(&description(&Self::file_name(series)))
    }

    /// The image of a host with a toolstack: [`XEN`] or [`LIBVIRT`].
    ///
    /// # Errors
    /// [`HarnessError::Image`] when there is none.
    pub fn load_host(name: &str) -> Result<Self, HarnessError> {
        Self::read(&description(&Self::file_name(name)))
    }

    /// What the description of the image with a kernel of that series, or of that host, is called, beside the default one's `vm.json`.
    pub fn file_name(series: &str) -> String {
        format!("vm-{series}.json")
    }

    /// The same image, booted in another way.
    pub fn booted(self, variant: Variant) -> Self {
        Self { variant, ..self }
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
        let parts = [&image.kernel, &image.root].into_iter().chain(&image.initrd);
        let xen = image.xen.iter().flat_map(Xen::files);
        for file in parts.map(PathBuf::as_path).chain(image.efi.files()).chain(xen) {
            if !file.exists() {
                return Err(unusable(format!("{} is gone", file.display())));
            }
        }
        Ok(image)
    }

    /// Where the saved machine is, or will be once somebody has restored it for the first time.
    pub fn snapshot(&self) -> PathBuf {
        self.saved.join(self.variant.name())
    }

    /// Boots and saves the machine, unless that was done before: [`super::Vm::restore`] does the same at need.
    ///
    /// # Errors
    /// When it does not come up, or cannot be saved.
    pub fn save(&self) -> Result<(), HarnessError> {
        saved::ensure(self).map(drop)
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

/// A file that `cargo xtask` left in the target folder.
fn description(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/assay").join(name)
}

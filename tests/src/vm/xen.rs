//! Machines with Xen between QEMU and the kernel, which is then dom0: a host's whole stack, down to paravirtualised guests.
//!
//! Always emulated. The processor is QEMU's plainest: with more of them in it (`max`), programs in dom0 have died of damaged
//! memory, and Xen does not start at all on some that are named after real ones.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

/// Memory of the whole machine, in MiB, unless the test says otherwise.
pub(super) const MEMORY: u32 = 1536;
/// The hypervisor's command line: its console, which is dom0's as well, and dom0's memory; what is left is for guests.
const CMDLINE: &str = "console=com1 com1=115200,8n1 dom0_mem=960M,max:960M loglvl=warning";

/// A hypervisor, and what guests can run on it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Xen {
    /// Xen, not compressed.
    pub hypervisor: PathBuf,
    /// A kernel that boots as a guest.
    pub guest_kernel: PathBuf,
    /// Its initramfs: shows the first line of its disk `xvda` on the console, and switches off.
    pub guest_initrd: PathBuf,
}

impl Xen {
    /// All of them.
    pub fn files(&self) -> [&Path; 3] {
        [&self.hypervisor, &self.guest_kernel, &self.guest_initrd].map(PathBuf::as_path)
    }

    /// QEMU's arguments for processor, hypervisor, dom0's kernel, and its initramfs.
    pub(super) fn configure(&self, kernel: &Path, cmdline: &str, initrd: &Path, command: &mut Command) {
        // A list of modules with their command lines, in which commas are doubled.
        let double = |text: &str| text.replace(',', ",,");
        let modules = format!(
            "{} {},{}",
            double(&kernel.display().to_string()),
            double(cmdline),
            double(&initrd.display().to_string())
        );
        command
            .args(["-accel", "tcg,thread=multi", "-cpu", "qemu64", "-append", CMDLINE])
            .arg("-kernel")
            .arg(&self.hypervisor)
            .args(["-initrd", &modules]);
    }
}

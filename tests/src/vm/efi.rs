//! Machines that boot as real ones do: UEFI firmware, a boot loader from an EFI system partition, and each of them
//! measuring the next into the TPM. (QEMU's `-kernel` leaves nothing to a boot loader.)

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::{HarnessError, child};

use super::Image;

/// The system partition's folder, in the machine's.
const PARTITION: &str = "esp";
/// The firmware's variables, in the machine's folder.
const VARIABLES: &str = "variables.fd";
/// Where Debian's `grub-efi-amd64-bin` has GRUB's modules, and where XenServer's GRUB looks for one that is not built in.
pub const GRUB_MODULES: &str = "/usr/lib/grub/x86_64-efi";
/// What XenServer's GRUB has built in and is needed here; not `tpm`.
const BUILT_IN: [&str; 7] = ["part_msdos", "fat", "search", "normal", "linux", "boot", "configfile"];
/// Where XenServer's GRUB has its configuration.
const XENSERVER: &str = "EFI/xenserver";
/// What firmware starts from a disk that no boot entry names.
const DEFAULT_LOADER: &str = "EFI/BOOT/BOOTX64.EFI";

/// Firmware and boot loaders as Debian ships them, signed.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Efi {
    /// OVMF, and variables without keys for it: Secure Boot is off.
    pub firmware: (PathBuf, PathBuf),
    /// OVMF with System Management Mode, and variables with Microsoft's keys: Secure Boot is on.
    pub secure_firmware: (PathBuf, PathBuf),
    /// The loader that Microsoft's key lets start; it has Debian's with it.
    pub shim: PathBuf,
    /// GRUB, with its `tpm` module inside.
    pub grub: PathBuf,
    /// What begins a unified kernel image: systemd-stub.
    pub stub: PathBuf,
}

impl Efi {
    /// All of them.
    pub fn files(&self) -> [&Path; 7] {
        let (code, variables) = &self.firmware;
        let (secure_code, secure_variables) = &self.secure_firmware;
        [
            code,
            variables,
            secure_code,
            secure_variables,
            &self.shim,
            &self.grub,
            &self.stub,
        ]
        .map(PathBuf::as_path)
    }
}

/// By which way the kernel is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loader {
    /// Firmware with Secure Boot on, shim, GRUB, kernel and initrd from the system partition.
    Grub,
    /// Firmware with Secure Boot off, and one program with kernel, initrd and command line in it.
    UnifiedImage,
    /// Firmware with Secure Boot off, and a GRUB without its `tpm` module built in, as XenServer 8 has it. The module lies on the disk, where
    /// a configuration can have it loaded.
    BareGrub,
}

/// What is on the system partition.
#[derive(Debug, Clone)]
pub struct EfiBoot {
    /// What starts the kernel.
    pub loader: Loader,
    /// Another kernel: one bit is, where it is under no signature and means nothing to anyone (the checksum of its PE header, which
    /// Authenticode leaves out).
    pub other_kernel: bool,
    /// Another initrd: by four zero bytes at its end, which the kernel skips.
    pub other_initrd: bool,
    /// GRUB's configuration, in the place of the one that starts the kernel and does no more.
    pub script: Option<String>,
}

impl EfiBoot {
    /// The image's kernel and initrd, by this loader.
    pub fn by(loader: Loader) -> Self {
        Self {
            loader,
            other_kernel: false,
            other_initrd: false,
            script: None,
        }
    }

    /// The configuration with which GRUB starts the kernel. It finds the disk as XenServer's does, but by a file, since this disk's label is
    /// QEMU's.
    #[must_use]
    pub fn plain_script(cmdline: &str) -> String {
        format!("search --file --set root /vmlinuz\nlinux /vmlinuz {cmdline}\ninitrd /initrd\nboot\n")
    }

    /// The kernel that is on the partition, or in the unified image.
    ///
    /// # Errors
    /// When the image's kernel cannot be read.
    pub fn kernel(&self, image: &Image) -> Result<Vec<u8>, HarnessError> {
        let mut kernel = read(&image.kernel)?;
        if self.other_kernel {
            change_checksum(&mut kernel);
        }
        Ok(kernel)
    }

    /// The initrd that is with it.
    ///
    /// # Errors
    /// When a part of the image's initrd cannot be read.
    pub fn initrd(&self, image: &Image) -> Result<Vec<u8>, HarnessError> {
        let mut initrd = Vec::new();
        for part in &image.initrd {
            initrd.extend(read(part)?);
        }
        if self.other_initrd {
            initrd.extend([0; 4]);
        }
        Ok(initrd)
    }

    /// Lays out the system partition, and fresh variables: the firmware measures its boot entries, and keeps those that it
    /// found at the boot before.
    pub(super) fn lay_out(&self, image: &Image, cmdline: &str, dir: &Path) -> Result<(), HarnessError> {
        let (efi, partition) = (&image.efi, dir.join(PARTITION));
        let _ = std::fs::remove_dir_all(&partition);
        for folder in [
            "EFI/BOOT",
            "EFI/debian",
            XENSERVER,
            GRUB_MODULES.trim_start_matches('/'),
        ] {
            let folder = partition.join(folder);
            std::fs::create_dir_all(&folder).map_err(HarnessError::io(format!("make {}", folder.display())))?;
        }
        copy(&self.firmware(efi).1, &dir.join(VARIABLES))?;
        let (kernel, initrd) = (self.kernel(image)?, self.initrd(image)?);
        match self.loader {
            Loader::Grub => {
                copy(&efi.shim, &partition.join(DEFAULT_LOADER))?;
                copy(&efi.grub, &partition.join("EFI/BOOT/grubx64.efi"))?;
                write(&partition.join("vmlinuz"), &kernel)?;
                write(&partition.join("initrd"), &initrd)?;
                let script = format!("linux /vmlinuz {cmdline}\ninitrd /initrd\nboot\n");
                write(&partition.join("EFI/debian/grub.cfg"), script.as_bytes())
            }
            Loader::BareGrub => {
                bare_grub(&partition.join(DEFAULT_LOADER))?;
                let module = format!("{GRUB_MODULES}/tpm.mod");
                copy(Path::new(&module), &partition.join(module.trim_start_matches('/')))?;
                write(&partition.join("vmlinuz"), &kernel)?;
                write(&partition.join("initrd"), &initrd)?;
                let script = self.script.clone().unwrap_or_else(|| Self::plain_script(cmdline));
                write(&partition.join(XENSERVER).join("grub.cfg"), script.as_bytes())
            }
            Loader::UnifiedImage => {
                let sections = [
                    (".osrel", b"ID=debian\n".as_slice()),
                    (".cmdline", cmdline.as_bytes()),
                    (".initrd", &initrd),
                    (".linux", &kernel),
                ];
                unify(&efi.stub, &sections, dir, &partition.join(DEFAULT_LOADER))
            }
        }
    }

    /// QEMU's arguments for firmware and system partition.
    pub(super) fn configure(&self, efi: &Efi, dir: &Path, command: &mut Command) {
        let file = |name: &str| dir.join(name).display().to_string();
        if self.loader == Loader::Grub {
            // Only System Management Mode may write the variables then: without that, Secure Boot would be for show.
            command.args([
                "-machine",
                "smm=on",
                "-global",
                "driver=cfi.pflash01,property=secure,value=on",
            ]);
        }
        let code = self.firmware(efi).0.display().to_string();
        command.args([
            "-drive",
            &format!("if=pflash,unit=0,format=raw,readonly=on,file={code}"),
            "-drive",
            &format!("if=pflash,unit=1,format=raw,file={}", file(VARIABLES)),
            // QEMU makes a FAT filesystem of the folder. Behind the root disk on the bus, so that Linux names it second.
            "-drive",
            &format!("if=none,id=esp,format=raw,readonly=on,file=fat:{}", file(PARTITION)),
            "-device",
            "virtio-blk-pci,drive=esp,addr=0x10,bootindex=0",
        ]);
    }

    fn firmware<'a>(&self, efi: &'a Efi) -> &'a (PathBuf, PathBuf) {
        match self.loader {
            Loader::Grub => &efi.secure_firmware,
            Loader::UnifiedImage | Loader::BareGrub => &efi.firmware,
        }
    }
}

/// Makes a GRUB of Debian's modules, with what XenServer's has built in.
fn bare_grub(to: &Path) -> Result<(), HarnessError> {
    let mut make = Command::new("grub-mkimage");
    make.args(["-O", "x86_64-efi", "-p", &format!("/{XENSERVER}"), "-o"]);
    child::run(make.arg(to).args(BUILT_IN))
}

/// Changes the checksum in a PE file's header. It is for drivers of Windows; nothing here looks at it.
fn change_checksum(pe: &mut [u8]) {
    // Signature and file header come before the optional header, whose checksum is 64 bytes into it.
    let at = header(pe).and_then(|header| header.checked_add(4 + 20 + 64));
    if let Some(byte) = at.and_then(|at| pe.get_mut(at)) {
        *byte ^= 1;
    }
}

/// Where a PE file's header begins.
fn header(pe: &[u8]) -> Option<usize> {
    number(pe, 0x3C, 4)
}

/// A little-endian number in a file.
fn number(file: &[u8], at: usize, size: usize) -> Option<usize> {
    let bytes = file.get(at..at.checked_add(size)?)?;
    let value = bytes
        .iter()
        .rev()
        .fold(0_u64, |value, &byte| (value << 8) | u64::from(byte));
    usize::try_from(value).ok()
}

/// Where a PE file's image ends in memory, as objcopy counts addresses; aligned for sections that follow.
fn image_end(pe: &[u8]) -> Option<usize> {
    let header = header(pe)?;
    let optional = header.checked_add(4 + 20)?;
    let base = number(pe, optional.checked_add(24)?, 8)?;
    let size = number(pe, optional.checked_add(56)?, 4)?;
    base.checked_add(size)?.checked_next_multiple_of(ALIGNMENT)
}

/// Sections begin at multiples of this, in memory.
const ALIGNMENT: usize = 0x1000;

/// Makes a unified kernel image: systemd-stub with these sections behind its own.
fn unify(stub: &Path, sections: &[(&str, &[u8])], dir: &Path, to: &Path) -> Result<(), HarnessError> {
    let unreadable = || HarnessError::Image {
        path: stub.to_owned(),
        message: "it is no PE file".to_owned(),
    };
    let mut address = image_end(&read(stub)?).ok_or_else(unreadable)?;
    let mut objcopy = Command::new("objcopy");
    for (name, content) in sections {
        let file = dir.join(format!("section{name}"));
        write(&file, content)?;
        objcopy
            .args(["--add-section", &format!("{name}={}", file.display())])
            .args(["--change-section-vma", &format!("{name}={address:#x}")]);
        let end = address
            .checked_add(content.len())
            .and_then(|end| end.checked_next_multiple_of(ALIGNMENT));
        address = end.ok_or_else(unreadable)?;
    }
    child::run(objcopy.args([stub, to]))
}

fn read(path: &Path) -> Result<Vec<u8>, HarnessError> {
    std::fs::read(path).map_err(HarnessError::io(format!("read {}", path.display())))
}

fn write(path: &Path, content: &[u8]) -> Result<(), HarnessError> {
    std::fs::write(path, content).map_err(HarnessError::io(format!("write {}", path.display())))
}

fn copy(from: &Path, to: &Path) -> Result<(), HarnessError> {
    // Not the permissions: the packages' files are for reading only.
    write(to, &read(from)?)
}

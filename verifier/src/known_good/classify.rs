//! What counts: told by what a file is, and only where content can't tell by its name.

use assay_evidence::event::LoadKind;

use super::error::Fault;
use super::unpack::Packing;

/// Bytes of a file that [`classify`] wants to see.
pub(super) const HEAD: usize = 1024;

/// What a host can do with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// Load it as it is.
    Plain(LoadKind),
    /// Unpack and load it: a compressed kernel module, which has two digests.
    PackedModule(Packing),
    /// Boot with it, and run what is in it.
    Initramfs,
}

/// What a host can do with a file of this path (without a slash at the start), these permissions and this beginning; none:
/// nothing that is measured.
///
/// # Errors
/// [`Fault::Packing`]: a module or an initramfs that can't be looked into.
pub(super) fn classify(path: &str, executable: bool, head: &[u8]) -> Result<Option<Class>, Fault> {
    let name = path.rsplit('/').next().unwrap_or(path);
    if is_module_name(name) {
        if let Some(packing) = Packing::of(head)? {
            return Ok(Some(Class::PackedModule(packing)));
        }
        if head.starts_with(ELF) {
            return Ok(Some(Class::Plain(LoadKind::ModuleFile)));
        }
    }
    if is_firmware(path) {
        // A compressed one is measured as it lies there: the kernel unpacks it after the hook (drivers/base/firmware_loader).
        return Ok(Some(Class::Plain(LoadKind::Firmware)));
    }
    if is_kernel(path, name, head) {
        return Ok(Some(Class::Plain(LoadKind::KexecImage)));
    }
    if !head.is_empty() && is_initramfs(path, name, head) {
        return Ok(Some(Class::Initramfs));
    }
    Ok(program(name, executable, head).map(Class::Plain))
}

const ELF: &[u8] = b"\x7fELF";
/// An uncompressed initramfs: cpio "newc", with or without checksums.
const CPIO: [&[u8]; 2] = [b"070701", b"070702"];

/// Whether bytes that begin so are an uncompressed initramfs.
pub(super) fn is_cpio(head: &[u8]) -> bool {
    CPIO.iter().any(|magic| head.starts_with(magic))
}

fn is_module_name(name: &str) -> bool {
    let plain = ["", ".gz", ".xz", ".zst"].into_iter();
    plain
        .filter_map(|suffix| name.strip_suffix(suffix))
        .any(|stem| stem.ends_with(".ko"))
}

fn is_firmware(path: &str) -> bool {
    // The last one is where the boot processor finds its microcode in an initramfs.
    ["lib/firmware/", "usr/lib/firmware/", "kernel/x86/microcode/"]
        .iter()
        .any(|folder| path.starts_with(folder))
}

fn is_in_boot(path: &str) -> bool {
    ["boot/", "lib/modules/", "usr/lib/modules/"]
        .iter()
        .any(|folder| path.starts_with(folder))
}

fn is_kernel(path: &str, name: &str, head: &[u8]) -> bool {
    let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(magic));
    // x86 (Documentation/arch/x86/boot.rst), arm64 (arch/arm64/booting.rst), and EFI's compressed form.
    let by_content =
        at(0x1fe, b"\x55\xaa") && at(0x202, b"HdrS") || at(56, b"ARM\x64") || at(0, b"MZ") && at(4, b"zimg");
    let by_name = ["vmlinuz", "vmlinux", "bzImage", "Image"]
        .iter()
        .any(|begin| name.starts_with(begin));
    by_content || by_name && is_in_boot(path)
}

fn is_initramfs(path: &str, name: &str, head: &[u8]) -> bool {
    let by_name = name.starts_with("initrd") || name.starts_with("initramfs");
    is_in_boot(path) && (by_name || is_cpio(head))
}

fn program(name: &str, executable: bool, head: &[u8]) -> Option<LoadKind> {
    let ends = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    // The kernel does not run these, and who reads them is not named them on a command line.
    if ends(&[".pyc", ".pyo"]) {
        return None;
    }
    match elf_type(head) {
        Some(ElfType::Fixed) => return Some(LoadKind::Program),
        // Programs that may lie anywhere in memory and libraries are of one type; which it is, people read off the name.
        Some(ElfType::Shared) if executable && !ends(&[".so"]) && !name.contains(".so.") => {
            return Some(LoadKind::Program);
        }
        Some(ElfType::Shared) => return Some(LoadKind::Mapping),
        None => {}
    }
    if executable {
        Some(LoadKind::Program)
    } else if head.starts_with(b"#!") || ends(&[".py", ".pl", ".sh"]) {
        Some(LoadKind::Argument)
    } else {
        None
    }
}

enum ElfType {
    /// ET_EXEC.
    Fixed,
    /// ET_DYN.
    Shared,
}

/// Of what runs or is mapped; an object file or a core dump has none.
fn elf_type(head: &[u8]) -> Option<ElfType> {
    let rest = head.strip_prefix(ELF)?;
    let kind = [*rest.get(12)?, *rest.get(13)?];
    let kind = if rest.get(1) == Some(&2) {
        u16::from_be_bytes(kind)
    } else {
        u16::from_le_bytes(kind)
    };
    match kind {
        2 => Some(ElfType::Fixed),
        3 => Some(ElfType::Shared),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(path: &str, executable: bool, head: &[u8]) -> Option<LoadKind> {
        match classify(path, executable, head).unwrap() {
            Some(Class::Plain(kind)) => Some(kind),
            None => None,
            other => panic!("{other:?}"),
        }
    }

    fn elf(kind: u8) -> Vec<u8> {
        let mut head = b"\x7fELF\x02\x01\x01".to_vec();
        head.resize(16, 0);
        head.extend([kind, 0]);
        head
    }

    #[test]
    fn what_runs_counts_as_what_it_is() {
        for (path, executable, head, kind) in [
            ("usr/bin/a", true, elf(2), Some(LoadKind::Program)),
            ("usr/bin/a", true, elf(3), Some(LoadKind::Program)),
            ("usr/lib/a.so.6", true, elf(3), Some(LoadKind::Mapping)),
            ("usr/lib/a.so", false, elf(3), Some(LoadKind::Mapping)),
            ("usr/lib/a.ko", false, elf(1), Some(LoadKind::ModuleFile)),
            ("usr/lib/crt1.o", false, elf(1), None),
            ("usr/bin/s", true, b"#!/bin/sh\n".to_vec(), Some(LoadKind::Program)),
            ("usr/share/s", false, b"#!/bin/sh\n".to_vec(), Some(LoadKind::Argument)),
            (
                "usr/share/s.py",
                false,
                b"import os\n".to_vec(),
                Some(LoadKind::Argument),
            ),
            ("usr/share/s.pyc", true, b"\xa7\x0d\x0d\x0a".to_vec(), None),
            ("usr/share/data", true, b"data".to_vec(), Some(LoadKind::Program)),
            ("usr/share/data", false, b"data".to_vec(), None),
            ("usr/share/doc/a.ko", false, b"no module".to_vec(), None),
            ("lib/firmware/a/b.bin", false, b"x".to_vec(), Some(LoadKind::Firmware)),
            (
                "lib/firmware/a/b.xz",
                false,
                b"\xfd7zXZ\0".to_vec(),
                Some(LoadKind::Firmware),
            ),
            (
                "boot/vmlinuz-6",
                false,
                b"\x1f\x8b".to_vec(),
                Some(LoadKind::KexecImage),
            ),
            ("usr/share/vmlinuz.txt", false, b"text".to_vec(), None),
            ("boot/grub/grub.cfg", false, b"set".to_vec(), None),
        ] {
            assert_eq!(plain(path, executable, &head), kind, "{path}");
        }
    }

    #[test]
    fn a_big_endian_program_is_one() {
        let mut head = b"\x7fELF\x02\x02\x01".to_vec();
        head.resize(16, 0);
        head.extend([0, 2]);
        assert_eq!(plain("usr/bin/a", false, &head), Some(LoadKind::Program));
    }

    #[test]
    fn a_kernel_is_known_by_its_header() {
        let mut head = vec![0; 0x1fe];
        head.extend(b"\x55\xaa\0\0HdrS");
        assert_eq!(plain("srv/tftp/linux", false, &head), Some(LoadKind::KexecImage));
    }

    #[test]
    fn what_has_to_be_unpacked_is_known_and_what_cannot_be_is_refused() {
        let xz = b"\xfd7zXZ\0";
        assert_eq!(
            classify("lib/modules/6/a.ko.xz", false, xz).unwrap(),
            Some(Class::PackedModule(Packing::Xz))
        );
        assert_eq!(
            classify("boot/initrd.img-6", false, xz).unwrap(),
            Some(Class::Initramfs)
        );
        assert_eq!(
            classify("boot/anything", false, b"070701").unwrap(),
            Some(Class::Initramfs)
        );
        assert!(matches!(
            classify("lib/modules/6/a.ko.gz", false, b"BZh9"),
            Err(Fault::Packing("bzip2"))
        ));
    }
}

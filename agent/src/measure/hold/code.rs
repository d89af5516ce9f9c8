//! What kind of code a file is, by its first bytes and its place. Decides only what waits, never what is allowed.

use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::path::Path;

use nix::sys::uio::pread;

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// A program or a library.
    Elf,
    /// A kernel module, packed or not.
    Module,
    /// In a folder for firmware.
    Firmware,
    /// Begins with `#!`.
    Script,
    /// None of these.
    None,
}

/// Looks at an open file. One that cannot be read is none.
pub fn look(file: BorrowedFd<'_>) -> Code {
    let mut start = [0; 18];
    let Ok(read) = pread(file, &mut start, 0) else {
        return Code::None;
    };
    let start = start.get(..read).unwrap_or_default();
    let kind = of(start);
    // Only what the bytes leave open is worth a look at the name.
    if kind == Code::None || kind == Code::Module {
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        return std::fs::read_link(link).map_or(kind, |path| with_path(kind, &path));
    }
    kind
}

fn of(start: &[u8]) -> Code {
    /// `e_type` of an object file, which a kernel module is (ELF, figure 1-3).
    const ET_REL: u8 = 1;
    if start.starts_with(b"\x7fELF") {
        return if start.get(16) == Some(&ET_REL) {
            Code::Module
        } else {
            Code::Elf
        };
    }
    if start.starts_with(b"#!") {
        return Code::Script;
    }
    Code::None
}

fn with_path(kind: Code, path: &Path) -> Code {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    let name = name.unwrap_or_default();
    let module = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"]
        .iter()
        .any(|ending| name.ends_with(ending));
    if module {
        return Code::Module;
    }
    if path.components().any(|part| part.as_os_str() == "firmware") {
        return Code::Firmware;
    }
    // An object file that is no module is data for a linker.
    if kind == Code::Module { Code::None } else { kind }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn the_first_bytes_tell() {
        let mut elf = *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0";
        assert_eq!(of(&elf), Code::Elf);
        elf[16] = 1;
        assert_eq!(of(&elf), Code::Module);
        assert_eq!(of(b"#!/bin/sh\n"), Code::Script);
        assert_eq!(of(b"\x7fEL"), Code::None);
        assert_eq!(of(b""), Code::None);
    }

    #[test]
    fn the_name_tells_modules_from_objects_and_firmware_from_data() {
        let at = |kind, path: &str| with_path(kind, Path::new(path));
        assert_eq!(at(Code::None, "/lib/modules/6/dummy.ko.xz"), Code::Module);
        assert_eq!(at(Code::Module, "/root/dummy.ko"), Code::Module);
        assert_eq!(at(Code::Module, "/usr/lib/crt1.o"), Code::None);
        assert_eq!(at(Code::None, "/usr/lib/firmware/a.bin"), Code::Firmware);
        assert_eq!(at(Code::None, "/usr/lib/locale/C.utf8"), Code::None);
    }

    #[test]
    fn an_open_file_is_looked_at_through_its_descriptor() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"#!/bin/true\n").unwrap();
        assert_eq!(look(file.as_file().as_fd()), Code::Script);
    }
}

//! The kernel's initramfs format: cpio "newc" (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::fmt::Write as _;

/// An archive being written. Everything belongs to root and has time 0: equal content, equal bytes.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

/// Type bits of a mode, as in stat(2).
const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;

impl Archive {
    /// Adds a folder; those above it must have been added before.
    pub fn dir(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, &[]);
    }

    /// Adds a file with permission bits.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entry(path, FILE | mode, content);
    }

    /// Ends the archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entries = self.entries.saturating_add(1);
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let name_size = path.len().saturating_add(1);
        let mut header = String::from("070701");
        // inode, mode, uid, gid, links, time, size, device (2), real device (2), name's size with its NUL, checksum
        let fields = [0, 0, links, 0];
        let _ = write!(header, "{:08x}{mode:08x}", self.entries);
        for field in fields {
            let _ = write!(header, "{field:08x}");
        }
        let _ = write!(header, "{:08x}", content.len());
        for _ in 0..4 {
            let _ = write!(header, "{:08x}", 0);
        }
        let _ = write!(header, "{name_size:08x}{:08x}", 0);
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_110_bytes_and_parts_are_aligned() {
        let mut archive = Archive::default();
        archive.dir("a");
        archive.file("a/b", 0o755, b"hello");
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        // 110 + "a\0" is 112: already a multiple of four.
        assert_eq!(&bytes[112..118], b"070701");
        assert_eq!(&bytes[112 + 110..112 + 114], b"a/b\0");
        assert_eq!(&bytes[112 + 116..112 + 121], b"hello");
        assert_eq!(bytes.len() % 4, 0);
    }
}

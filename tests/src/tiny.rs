//! The smallest programs there are: no library, one page of code, an exit status of 0. What it costs to start one is
//! the kernel's work and the measuring, and nothing else.

/// The ELF header.
const HEADER: usize = 64;
/// One entry of the table of segments.
const SEGMENT: usize = 56;
/// Where the code starts, behind the header and two segments.
const CODE: usize = HEADER + 2 * SEGMENT;
/// `xor edi, edi; mov eax, 60; syscall`: exit(0).
const EXIT: [u8; 9] = [0x31, 0xff, 0xb8, 60, 0, 0, 0, 0x0f, 0x05];
/// Where what makes a program unlike any other starts: not mapped, only hashed.
const UNIQUE: usize = 192;
/// Where the program is mapped.
const ADDRESS: u64 = 0x40_0000;

/// The smallest program, in bytes.
pub const SMALLEST: usize = UNIQUE + 8;

/// A program for x86-64 of `size` bytes, at least [`SMALLEST`], that no other value of `unique` makes.
pub fn program(size: usize, unique: u64) -> Vec<u8> {
    let size = size.max(SMALLEST);
    let mut bytes = Vec::with_capacity(size);
    // Magic, 64 bits, little endian, version; then an executable for x86-64.
    bytes.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0");
    for word in [ADDRESS + CODE as u64, HEADER as u64, 0] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    // Flags; then the sizes of the header and of a segment, two segments, no sections.
    bytes.extend_from_slice(&[0; 4]);
    for half in [64_u16, 56, 2, 64, 0, 0] {
        bytes.extend_from_slice(&half.to_le_bytes());
    }
    // Readable and executable, from the file's start to the code's end.
    let end = (CODE + EXIT.len()) as u64;
    segment(&mut bytes, 1, 5, [0, ADDRESS, ADDRESS, end, end, 0x1000]);
    // No executable stack.
    segment(&mut bytes, 0x6474_e551, 6, [0, 0, 0, 0, 0, 16]);
    bytes.extend_from_slice(&EXIT);
    bytes.resize(UNIQUE, 0);
    bytes.extend_from_slice(&unique.to_le_bytes());
    // Xorshift: never zero, so that no file system can leave a hole.
    let mut state = unique | 1 << 63;
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

fn segment(bytes: &mut Vec<u8>, kind: u32, flags: u32, words: [u64; 6]) {
    bytes.extend_from_slice(&kind.to_le_bytes());
    bytes.extend_from_slice(&flags.to_le_bytes());
    for word in words {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_run_and_are_unlike_one_another() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        for (name, size) in [("small", SMALLEST), ("large", 10_001)] {
            let (bytes, path) = (program(size, 7), folder.path().join(name));
            assert_eq!(bytes.len(), size);
            assert_ne!(bytes, program(size, 8));
            std::fs::write(&path, &bytes).expect("a file");
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("permissions");
            let status = std::process::Command::new(&path)
                .status()
                .expect("a program that starts");
            assert!(status.success(), "{name}: {status}");
        }
    }
}

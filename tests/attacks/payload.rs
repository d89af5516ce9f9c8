//! Code that no machine has seen before.

use std::sync::atomic::{AtomicU32, Ordering};

use assay_evidence::digest::Sha256Digest;
use assay_tests::HarnessError;
use assay_tests::guest::Guest;

/// What [`tiny`] programs exit with.
pub const EXIT: u8 = 42;

static SALT: AtomicU32 = AtomicU32::new(0);

/// What is loaded.
#[derive(Debug, Clone, Copy)]
pub enum Payload {
    /// A program without a library.
    Tiny,
    /// A program with libraries.
    Dynamic,
    /// A library.
    Library,
    /// A kernel module.
    Module,
    /// The same, compressed with xz.
    PackedModule,
    /// Instructions for a BPF program: they load a number, and end.
    Bpf,
    /// A text to which a comment is added.
    Text(&'static str),
}

impl Payload {
    /// Makes one, different from every other.
    pub fn make(self, guest: &Guest) -> Result<Vec<u8>, HarnessError> {
        let number = SALT.fetch_add(1, Ordering::SeqCst);
        let salt = format!("{number:06}");
        let with_salt = |mut bytes: Vec<u8>| {
            bytes.extend(salt.bytes());
            bytes
        };
        Ok(match self {
            Self::Tiny => tiny(EXIT, &salt),
            Self::Dynamic => with_salt(guest.get("/usr/bin/true")?),
            Self::Library => with_salt(guest.get("/usr/lib/x86_64-linux-gnu/libc.so.6")?),
            Self::Module => {
                guest.script("busybox xzcat $(modinfo -n dummy) > /root/dummy.ko")?;
                with_salt(guest.get("/root/dummy.ko")?)
            }
            Self::PackedModule => {
                // Another file of the same content, by a padding that xz allows: four bytes of zero.
                let name = guest.run_ok(&["modinfo", "-n", "dummy"])?;
                let mut bytes = guest.get(name.trim())?;
                bytes.extend([0; 4].repeat(1 + number as usize));
                bytes
            }
            Self::Bpf => [
                &[0xb7, 0, 0, 0][..],
                &number.to_le_bytes(),
                &[0x95, 0, 0, 0, 0, 0, 0, 0],
            ]
            .concat(),
            Self::Text(text) => format!("{text}\n# {salt}\n").into_bytes(),
        })
    }
}

/// The digest that everybody must find.
pub fn digest(bytes: &[u8]) -> String {
    Sha256Digest::of(bytes).to_string()
}

/// The smallest program there is: it ends with this status. `salt` makes it another file.
pub fn tiny(status: u8, salt: &str) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const CODE: u64 = 64 + 56;
    // mov eax, 60 (exit); mov edi, status; syscall
    let code = [0xb8, 60, 0, 0, 0, 0xbf, status, 0, 0, 0, 0x0f, 0x05];
    let size = CODE + code.len() as u64;
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend([2_u16, 62].map(u16::to_le_bytes).as_flattened()); // ET_EXEC, x86-64
    elf.extend(1_u32.to_le_bytes());
    elf.extend([BASE + CODE, 64, 0].map(u64::to_le_bytes).as_flattened());
    elf.extend(0_u32.to_le_bytes());
    elf.extend([64_u16, 56, 1, 0, 0, 0].map(u16::to_le_bytes).as_flattened());
    elf.extend([1_u32, 5].map(u32::to_le_bytes).as_flattened()); // PT_LOAD, readable and executable
    elf.extend([0, BASE, BASE, size, size, 0x1000].map(u64::to_le_bytes).as_flattened());
    elf.extend(code);
    elf.extend(salt.bytes());
    elf
}

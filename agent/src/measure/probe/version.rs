//! The version that the kernel was compiled as. Kernels before 5.0 load a probe only when it names that number, and
//! `uname -r` need not tell it: XCP-ng's kernel calls itself 4.19.0, whatever its sources were.
//!
//! It is in a note of the vDSO, which the kernel maps into every process (arch/x86/entry/vdso/vdso-note.S).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use procfs::process::{MMapPath, Process};

/// In the object, in place of the version: the agent puts the number there before it loads it.
pub const PLACEHOLDER: u32 = assay_ebpf::probe_record::VERSION;

/// A vDSO has one or two pages.
const VDSO_LIMIT: u64 = 64 * 1024;

const PT_NOTE: u32 = 4;

/// LINUX_VERSION_CODE of the running kernel, if its vDSO has it.
pub fn compiled_as() -> Option<u32> {
    vdso().ok().flatten().and_then(|image| note(&image))
}

/// Puts the version into the object. `None` = there is no place for it: not an object of this version.
pub fn put(object: &mut [u8], version: u32) -> Option<()> {
    let wanted = PLACEHOLDER.to_le_bytes();
    let mut places = object
        .windows(wanted.len())
        .enumerate()
        .filter(|(_, bytes)| *bytes == wanted);
    let (at, _) = places.next()?;
    if places.next().is_some() {
        return None;
    }
    object
        .get_mut(at..at.checked_add(wanted.len())?)?
        .copy_from_slice(&version.to_le_bytes());
    Some(())
}

/// The image as it lies in this process.
fn vdso() -> io::Result<Option<Vec<u8>>> {
    let maps = Process::myself().and_then(|me| me.maps()).map_err(io::Error::other)?;
    let Some(map) = maps.iter().find(|map| map.pathname == MMapPath::Vdso) else {
        return Ok(None);
    };
    let (start, end) = map.address;
    let length = usize::try_from(end.saturating_sub(start).min(VDSO_LIMIT)).map_err(io::Error::other)?;
    let mut image = vec![0; length];
    File::open("/proc/self/mem")?.read_exact_at(&mut image, start)?;
    Ok(Some(image))
}

/// The kernel's note in a 64-bit ELF image: name `Linux`, type 0, a number of 4 bytes.
fn note(image: &[u8]) -> Option<u32> {
    let (table, entry, count) = (word(image, 32, 8)?, word(image, 54, 2)?, word(image, 56, 2)?);
    (0..count).find_map(|index| {
        let header = table.checked_add(entry.checked_mul(index)?)?;
        if word(image, header, 4)? != u64::from(PT_NOTE) {
            return None;
        }
        let (start, length) = (word(image, header + 8, 8)?, word(image, header + 32, 8)?);
        note_in(image, start, start.checked_add(length)?)
    })
}

fn note_in(image: &[u8], mut at: u64, end: u64) -> Option<u32> {
    let padded = |length: u64| length.checked_add(3).map(|length| length & !3);
    while at < end {
        let (name_length, length, kind) = (word(image, at, 4)?, word(image, at + 4, 4)?, word(image, at + 8, 4)?);
        let name = at.checked_add(12)?;
        let content = name.checked_add(padded(name_length)?)?;
        let is_it = name_length == 6 && length == 4 && kind == 0 && bytes(image, name, 6)? == b"Linux\0";
        if is_it {
            return u32::try_from(word(image, content, 4)?).ok();
        }
        at = content.checked_add(padded(length)?)?;
    }
    None
}

/// A little-endian number of at most 8 bytes.
fn word(image: &[u8], at: u64, length: usize) -> Option<u64> {
    let mut number = [0; 8];
    for (out, byte) in number.iter_mut().zip(bytes(image, at, length)?) {
        *out = *byte;
    }
    Some(u64::from_le_bytes(number))
}

fn bytes(image: &[u8], at: u64, length: usize) -> Option<&[u8]> {
    let at = usize::try_from(at).ok()?;
    image.get(at..at.checked_add(length)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_kernel_has_one_like_its_name() {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release
            .split(|c: char| !c.is_ascii_digit())
            .map_while(|part| part.parse::<u32>().ok());
        let (major, minor) = (numbers.next().unwrap(), numbers.next().unwrap());
        let version = compiled_as().expect("a vDSO with a note");
        assert_eq!((version >> 16, version >> 8 & 0xff), (major, minor), "{version:#x}");
    }

    #[test]
    fn a_damaged_image_has_no_version_and_does_no_harm() {
        let whole = vdso().unwrap().unwrap();
        for length in [0, 10, 40, 60, 100, 200] {
            assert_eq!(note(&whole[..length]), None, "{length}");
        }
        for at in 0..512 {
            for value in [0, 1, 0x7f, 0xff] {
                let mut changed = whole.clone();
                changed[at] = value;
                let _ = note(&changed);
            }
        }
    }

    #[test]
    fn the_version_has_one_place() {
        let mut object = [b"abc".as_slice(), &PLACEHOLDER.to_le_bytes(), b"def"].concat();
        put(&mut object, 0x0004_1313).unwrap();
        assert_eq!(object, b"abc\x13\x13\x04\0def");
        assert_eq!(put(&mut object, 1), None, "it is gone");
        let mut twice = [PLACEHOLDER.to_le_bytes(), PLACEHOLDER.to_le_bytes()].concat();
        assert_eq!(put(&mut twice, 1), None);
    }
}

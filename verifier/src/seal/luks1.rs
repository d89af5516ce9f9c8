//! Where a LUKS1 header is: at the beginning of a file, or where a qcow2 image says.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use assay_evidence::luks1::{LEN, Luks1};

use super::SealError;

/// `QCOW_CRYPTO_HEADER` of docs/interop/qcow2.rst: where the LUKS header is.
const QCOW2_CRYPTO: u32 = 0x0537_BE77;
/// Most of a qcow2 file that its header and extensions take; they end with the first cluster, which has at most 2 MiB, but all that
/// qemu writes there is a few names.
const QCOW2_HEADER: usize = 64 * 1024;

/// The LUKS header inside a qcow2 image, and the disk's size in bytes.
pub(super) struct InQcow2 {
    pub(super) luks: Luks1,
    /// Where it is in the file, in bytes.
    pub(super) offset: u64,
    pub(super) disk_size: u64,
}

/// Reads the header at an offset.
pub(super) fn read(file: &File, path: &Path, offset: u64) -> Result<Luks1, SealError> {
    let mut bytes = [0; LEN];
    file.read_exact_at(&mut bytes, offset)
        .map_err(|source| failed(path, source))?;
    Luks1::parse(&bytes).map_err(|_| SealError::NotSealed(path.to_owned()))
}

/// Reads the LUKS header of a qcow2 image; `None` when it has none.
pub(super) fn read_in_qcow2(file: &File, path: &Path) -> Result<Option<InQcow2>, SealError> {
    let damaged = || SealError::NotSealed(path.to_owned());
    let mut start = vec![0; QCOW2_HEADER];
    let len = read_some(file, &mut start).map_err(|source| failed(path, source))?;
    start.truncate(len);
    let disk_size = be64(&start, 24).ok_or_else(damaged)?;
    let mut at = match be32(&start, 4) {
        Some(2) => 72,
        Some(3) => usize::try_from(be32(&start, 100).ok_or_else(damaged)?).map_err(|_| damaged())?,
        _ => return Err(damaged()),
    };
    loop {
        let kind = be32(&start, at).ok_or_else(damaged)?;
        let len = be32(&start, at.saturating_add(4)).ok_or_else(damaged)?;
        let data = at.saturating_add(8);
        match kind {
            // The end of the extensions.
            0 => return Ok(None),
            QCOW2_CRYPTO => {
                let offset = be64(&start, data).ok_or_else(damaged)?;
                let luks = read(file, path, offset)?;
                return Ok(Some(InQcow2 {
                    luks,
                    offset,
                    disk_size,
                }));
            }
            // Each is padded to eight bytes.
            _ => {
                let len = usize::try_from(len).map_err(|_| damaged())?;
                at = data.saturating_add(len.next_multiple_of(8));
            }
        }
    }
}

fn read_some(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, done as u64)? {
            0 => break,
            read => done += read,
        }
    }
    Ok(done)
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    field.try_into().ok().map(u32::from_be_bytes)
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(8)?)?;
    field.try_into().ok().map(u64::from_be_bytes)
}

fn failed(path: &Path, source: io::Error) -> SealError {
    match source.kind() {
        io::ErrorKind::UnexpectedEof => SealError::NotSealed(path.to_owned()),
        _ => SealError::Input {
            operation: "read",
            path: path.to_owned(),
            source,
        },
    }
}

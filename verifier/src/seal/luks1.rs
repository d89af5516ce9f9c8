//! Where a LUKS1 header is: at the beginning of a file, or where a qcow2 image says.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use assay_evidence::{
    luks1::{LEN, Luks1},
    qcow2::{self, Qcow2},
};

use super::SealError;

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
    let mut start = vec![0; qcow2::MAX_LEN];
    let len = read_some(file, &mut start).map_err(|source| failed(path, source))?;
    start.truncate(len);
    let said = Qcow2::parse(&start).map_err(|_| SealError::NotSealed(path.to_owned()))?;
    let inside = |offset| {
        Ok(InQcow2 {
            luks: read(file, path, offset)?,
            offset,
            disk_size: said.disk_size,
        })
    };
    said.luks_at.map(inside).transpose()
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

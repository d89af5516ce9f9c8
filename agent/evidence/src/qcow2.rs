//! Reading the header of a qcow2 image (QEMU, docs/interop/qcow2.rst): where the LUKS header in it is, and whether it stands alone.
//!
//! The verifier reads it of images that it sealed, a host of images that somebody hands to it: **untrusted input**. qemu reads it too before
//! anything is opened, but follows what it names.

use crate::reader::{ReadError, Reader};

/// What a qcow2 image begins with.
pub const START: [u8; 4] = *b"QFI\xfb";
/// Bytes from the start that header and extensions are looked for in. They end with the first cluster, which has at most 2 MiB, but all
/// that qemu writes there is a few names.
pub const MAX_LEN: usize = 64 * 1024;

/// `crypt_method` of data that is encrypted by LUKS.
const LUKS: u32 = 2;
/// Length of the header's second version in bytes, and least length of the third.
const VERSION_2_LEN: usize = 72;
const VERSION_3_LEN: usize = 104;
/// Bit of the incompatible features: the disk is in another file.
const DATA_FILE: u64 = 1 << 2;
/// Extensions: the end of them, and where the LUKS header is.
const END: u32 = 0;
const CRYPTO_HEADER: u32 = 0x0537_BE77;

/// Why bytes are no qcow2 header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Qcow2Error {
    /// It is cut off.
    #[error("the header is cut off")]
    Short(#[from] ReadError),
    /// It begins as something else.
    #[error("it does not begin as qcow2 does")]
    Start,
    /// A version that nobody knows.
    #[error("its version is {0}, only 2 and 3 are known")]
    Version(u32),
    /// A length that cannot be.
    #[error("it says that it is {0} bytes long")]
    Length(u32),
}

/// What a qcow2 header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qcow2 {
    /// Size of the disk inside, in bytes.
    pub disk_size: u64,
    /// Where the LUKS header is, in bytes from the image's start; `None` where the data are not encrypted by LUKS.
    pub luks_at: Option<u64>,
    /// Whether parts of the disk are in another file: one below it, or one that has all the data.
    pub needs_another: bool,
}

impl Qcow2 {
    /// Reads a header from the first bytes of an image, at least all of its header and extensions: [`MAX_LEN`], if it has as many.
    ///
    /// # Errors
    /// One variant of [`Qcow2Error`] for each reason.
    pub fn parse(start: &[u8]) -> Result<Self, Qcow2Error> {
        let mut reader = Reader::new("qcow2 header", start);
        if reader.array()? != START {
            return Err(Qcow2Error::Start);
        }
        let version = reader.u32()?;
        let backing_at = reader.u64()?;
        // The length of the other file's name, and the size of clusters.
        reader.take(4 + 4)?;
        let disk_size = reader.u64()?;
        let crypt_method = reader.u32()?;
        // Where the tables and snapshots are.
        reader.take(VERSION_2_LEN - 36)?;
        let features = match version {
            2 => 0,
            3 => version_3(&mut reader)?,
            other => return Err(Qcow2Error::Version(other)),
        };
        let luks_at = crypto_header(&mut reader)?;
        Ok(Self {
            disk_size,
            luks_at: luks_at.filter(|_| crypt_method == LUKS),
            needs_another: backing_at != 0 || features & DATA_FILE != 0,
        })
    }
}

/// Reads what the third version has more, and gives the incompatible features.
fn version_3(reader: &mut Reader<'_>) -> Result<u64, Qcow2Error> {
    let incompatible = reader.u64()?;
    // The other features, and the width of reference counts.
    reader.take(8 + 8 + 4)?;
    let said = reader.u32()?;
    let more = usize::try_from(said)
        .ok()
        .and_then(|len| len.checked_sub(VERSION_3_LEN));
    reader.take(more.ok_or(Qcow2Error::Length(said))?)?;
    Ok(incompatible)
}

/// Goes through the extensions, and gives where the LUKS header is.
fn crypto_header(reader: &mut Reader<'_>) -> Result<Option<u64>, Qcow2Error> {
    let mut found = None;
    loop {
        let (kind, len) = (reader.u32()?, reader.u32()?);
        if kind == END {
            return Ok(found);
        }
        // Each is padded to eight bytes.
        let padded = usize::try_from(len)
            .ok()
            .and_then(|len| len.checked_next_multiple_of(8));
        let data = reader.take(padded.ok_or(Qcow2Error::Length(len))?)?;
        if kind == CRYPTO_HEADER {
            found = Some(Reader::new("qcow2 crypto header", data).u64()?);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header of the third version: with this file below it, crypt method and features, and with these extensions.
    fn header(backing_at: u64, crypt_method: u32, features: u64, extensions: &[u8]) -> Vec<u8> {
        let mut bytes = START.to_vec();
        bytes.extend(3_u32.to_be_bytes());
        bytes.extend(backing_at.to_be_bytes());
        bytes.extend([0; 8]);
        bytes.extend((1_u64 << 30).to_be_bytes());
        bytes.extend(crypt_method.to_be_bytes());
        bytes.resize(VERSION_2_LEN, 0);
        bytes.extend(features.to_be_bytes());
        bytes.resize(100, 0);
        // A field that a later qemu has added.
        bytes.extend(112_u32.to_be_bytes());
        bytes.resize(112, 0);
        bytes.extend(extensions);
        bytes
    }

    fn extensions() -> Vec<u8> {
        // One that is not known, of five bytes; the LUKS header; the end.
        let mut bytes = [7_u32, 5, 0, 0].map(u32::to_be_bytes).concat();
        bytes.extend(
            [CRYPTO_HEADER, 16, 0, 0x5_0000, 0, 0x1000, END, 0]
                .map(u32::to_be_bytes)
                .concat(),
        );
        bytes
    }

    #[test]
    fn the_luks_header_is_found_behind_other_extensions() {
        let said = Qcow2::parse(&header(0, LUKS, 0, &extensions()));
        let expected = Qcow2 {
            disk_size: 1 << 30,
            luks_at: Some(0x5_0000),
            needs_another: false,
        };
        assert_eq!(said, Ok(expected));
    }

    #[test]
    fn data_that_are_not_encrypted_have_no_luks_header_whatever_the_extensions_say() {
        for method in [0, 1, 3] {
            let said = Qcow2::parse(&header(0, method, 0, &extensions())).unwrap();
            assert_eq!(said.luks_at, None, "{method}");
        }
    }

    #[test]
    fn another_file_below_it_or_in_its_place_is_seen() {
        for (backing_at, features) in [(0x200, 0), (0, DATA_FILE)] {
            let said = Qcow2::parse(&header(backing_at, LUKS, features, &extensions())).unwrap();
            assert!(said.needs_another, "{backing_at} {features}");
        }
    }

    #[test]
    fn what_is_cut_off_or_no_qcow2_is_refused() {
        let whole = header(0, LUKS, 0, &extensions());
        for len in 0..whole.len() {
            let said = Qcow2::parse(&whole[..len]);
            assert!(matches!(said, Err(Qcow2Error::Short(_))), "{len}: {said:?}");
        }
        let changed = |at: usize, to: u8| {
            let mut bytes = whole.clone();
            bytes[at] = to;
            Qcow2::parse(&bytes)
        };
        assert_eq!(changed(0, b'q'), Err(Qcow2Error::Start));
        assert_eq!(changed(7, 4), Err(Qcow2Error::Version(4)));
        assert_eq!(changed(103, 80), Err(Qcow2Error::Length(80)));
        let endless = header(0, LUKS, 0, &[7, u32::MAX].map(u32::to_be_bytes).concat());
        assert!(Qcow2::parse(&endless).is_err());
    }
}

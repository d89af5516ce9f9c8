//! Reading a LUKS1 header ("LUKS1 On-Disk Format Specification", section 2.1).
//!
//! The verifier reads it of images that it sealed, a host of images that somebody hands to it: **untrusted input**. libcryptsetup reads
//! it too before anything is opened, but tells only part of it.

use crate::digest::Sha256Digest;
use crate::luks::{self, FingerprintError, LUKS1_FIXED_LEN};
use crate::reader::{ReadError, Reader};
use crate::uuid::Uuid;

/// What a LUKS1 image begins with: LUKS's magic, and the version.
pub const START: [u8; 8] = *b"LUKS\xba\xbe\0\x01";
/// Length in bytes of what is read: the fixed part, and the table of key slots.
pub const LEN: usize = LUKS1_FIXED_LEN + SLOTS as usize * SLOT_LEN;
/// Key slots that an image has room for.
pub const SLOTS: u32 = 8;

const SLOT_LEN: usize = 48;
/// What a filled slot begins with.
const ENABLED: u32 = 0x00AC_71F3;
const SECTOR_LEN: u64 = 512;

/// Why bytes are no LUKS1 header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Luks1Error {
    /// It is cut off.
    #[error("the header is cut off")]
    Short(#[from] ReadError),
    /// It begins as something else.
    #[error("it does not begin as LUKS1 does")]
    Start,
    /// A text that is none.
    #[error("its {0} is not readable: it is damaged")]
    Text(&'static str),
    /// It has no fingerprint.
    #[error(transparent)]
    Fingerprint(#[from] FingerprintError),
}

/// What a LUKS1 header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Luks1 {
    /// Its UUID.
    pub uuid: Uuid,
    /// Cipher and mode, such as `aes-xts-plain64`; of data and key slots alike.
    pub cipher: String,
    /// Length of the volume key in bytes.
    pub key_len: u32,
    /// Where the data begins, in bytes from the header's start.
    pub data_offset: u64,
    /// Iterations of the volume key's digest.
    pub digest_iterations: u32,
    /// The key slots that are filled.
    pub slots: Vec<Slot>,
    /// Its fingerprint: see [`luks::luks1`].
    pub fingerprint: Sha256Digest,
}

/// A key slot that is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Its number, 0 to 7.
    pub number: u32,
    /// Iterations of its key derivation.
    pub iterations: u32,
    /// Into how many parts the volume key was split.
    pub stripes: u32,
}

impl Luks1 {
    /// Reads a header from its first [`LEN`] bytes; more may follow.
    ///
    /// # Errors
    /// One variant of [`Luks1Error`] for each reason.
    pub fn parse(header: &[u8]) -> Result<Self, Luks1Error> {
        let mut reader = Reader::new("LUKS1 header", header);
        if reader.array()? != START {
            return Err(Luks1Error::Start);
        }
        let name = text(&mut reader, "cipher", 32)?;
        let mode = text(&mut reader, "cipher mode", 32)?;
        // The hash of key derivation and digest.
        reader.take(32)?;
        let (data_at, key_len) = (reader.u32()?, reader.u32()?);
        // The digest and its salt.
        reader.take(20 + 32)?;
        let digest_iterations = reader.u32()?;
        let uuid = text(&mut reader, "UUID", 40)?;
        let mut slots = Vec::new();
        for number in 0..SLOTS {
            let (state, iterations) = (reader.u32()?, reader.u32()?);
            // The salt, and where the key material is.
            reader.take(32 + 4)?;
            let stripes = reader.u32()?;
            if state == ENABLED {
                slots.push(Slot {
                    number,
                    iterations,
                    stripes,
                });
            }
        }
        Ok(Self {
            uuid: uuid.parse().map_err(|_| Luks1Error::Text("UUID"))?,
            cipher: format!("{name}-{mode}"),
            key_len,
            data_offset: u64::from(data_at).saturating_mul(SECTOR_LEN),
            digest_iterations,
            slots,
            fingerprint: luks::luks1(header)?,
        })
    }
}

/// A text that ends with its first zero, or with its field.
fn text<'a>(reader: &mut Reader<'a>, what: &'static str, len: usize) -> Result<&'a str, Luks1Error> {
    let field = reader.take(len)?;
    let text = field.split(|byte| *byte == 0).next().unwrap_or_default();
    std::str::from_utf8(text).map_err(|_| Luks1Error::Text(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "6f9619ff-8b86-4011-b42d-00cf4fc964ff";

    /// Slot 2 is filled.
    fn header() -> Vec<u8> {
        let mut bytes = START.to_vec();
        let field = |bytes: &mut Vec<u8>, text: &str, len: usize| {
            bytes.extend_from_slice(text.as_bytes());
            bytes.resize(bytes.len() + len - text.len(), 0);
        };
        for name in ["aes", "xts-plain64", "sha256"] {
            field(&mut bytes, name, 32);
        }
        bytes.extend([8192_u32, 64].iter().flat_map(|number| number.to_be_bytes()));
        bytes.extend([7; 52]);
        bytes.extend(1000_u32.to_be_bytes());
        field(&mut bytes, UUID, 40);
        for slot in 0..8 {
            let state = if slot == 2 { ENABLED } else { 0x0000_DEAD };
            bytes.extend([state, 1001].iter().flat_map(|number| number.to_be_bytes()));
            bytes.extend([9; 32]);
            bytes.extend([8_u32, 4000].iter().flat_map(|number| number.to_be_bytes()));
        }
        bytes
    }

    #[test]
    fn a_header_says_what_it_is() {
        let bytes = header();
        assert_eq!(bytes.len(), LEN);
        let read = Luks1::parse(&bytes).unwrap();
        assert_eq!(read.uuid.to_string(), UUID);
        assert_eq!((read.cipher.as_str(), read.key_len), ("aes-xts-plain64", 64));
        assert_eq!((read.data_offset, read.digest_iterations), (4 * 1024 * 1024, 1000));
        let filled = Slot {
            number: 2,
            iterations: 1001,
            stripes: 4000,
        };
        assert_eq!(read.slots, [filled]);
        assert_eq!(read.fingerprint, luks::luks1(&bytes).unwrap());
        // What follows is not looked at.
        assert_eq!(Luks1::parse(&[bytes, vec![1; 9]].concat()), Ok(read));
    }

    #[test]
    fn what_is_no_header_is_refused() {
        let good = header();
        for len in 0..good.len() {
            let error = Luks1::parse(&good[..len]).unwrap_err();
            assert!(matches!(error, Luks1Error::Short(_)), "{len}: {error}");
        }
        let with = |at: usize, byte: u8| {
            let mut changed = good.clone();
            changed[at] = byte;
            Luks1::parse(&changed).unwrap_err()
        };
        assert_eq!(with(0, b'l'), Luks1Error::Start);
        assert_eq!(with(7, 2), Luks1Error::Start, "LUKS2");
        assert_eq!(with(8, 0xff), Luks1Error::Text("cipher"));
        assert_eq!(with(40, 0xff), Luks1Error::Text("cipher mode"));
        assert_eq!(with(168, b'x'), Luks1Error::Text("UUID"));
    }
}
